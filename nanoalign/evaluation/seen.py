"""How much of what is evaluated was trained on, by records.npz in the folders of the models."""

from collections.abc import Sequence

import numpy as np

from nanoalign.data.held_out import recall
from nanoalign.data.split import record_digests
from nanoalign.evaluation.ranking import Scored, pairs_of
from nanoalign.evaluation.statistics import Figures
from nanoalign.records import Record
from nanoalign.weights.adapters import model_folder, run_of


def pairs_trained_on(
    known: dict[str, np.ndarray], records: Sequence[Record], lines: Sequence[Scored]
) -> dict[str, int]:
    """Counts by subset the pairs of records that a model was trained on.

    The order of a record's responses does not matter. known: what `recall` reads of the model.
    lines: one per response of `records`, in the same order.
    """
    seen = np.isin(record_digests(records)[:, 1], known["trained"])
    seen = np.repeat(seen, [len(record.responses) for record in records])
    trained = {line.subset: [] for line in lines}
    for line, is_seen in zip(lines, seen.tolist(), strict=True):
        trained[line.subset] += [line] * is_seen
    return {subset: len(pairs_of(own)) for subset, own in trained.items()}


def note_on_pairs(figures: Figures, flag: str, name: str, known: dict[str, np.ndarray]) -> str:
    """A sentence: how many of the pairs the model `name` was trained on.

    It names --data held_out:NAME if there are some, and the model held out records. figures: those
    of all pairs. flag: that gives the model. known: what `recall` reads of the model.
    """
    count = figures["trained_on"]
    text = f"{count:,} of {figures['pairs']:,} pairs were trained on by {flag} {name}"
    return text + f"; for others: --data held_out:{name}" * (count > 0 < len(known["held_out"]))


def prompts_trained_on(prompts: Sequence[Record], models: dict[str, str | None]) -> Figures:
    """Counts the prompts, each once, that each model was trained on.

    models: by the name of the figure the name of a model, or None. A model whose folder has no
        records.npz, as those of other programs, has no figure.
    """
    digests, figures = np.unique(record_digests(prompts)[:, 0]), {}
    for figure, name in models.items():
        if name is not None and (known := recall(run_of(model_folder(name)))):
            figures[figure] = int(np.isin(digests, known["prompts"]).sum())
    return figures


def note_on_prompts(figures: Figures) -> str | None:
    """A sentence: how many prompts the models were trained on; None if that is known of none."""
    who = {"policy_trained_on": "the policy", "reward_trained_on": "the reward model"}
    known = {key: name for key, name in who.items() if key in figures}
    if not known:
        return None
    counts = [f"{figures[key]:,} by {name}" for key, name in known.items()]
    counts[0] = counts[0].replace(" by", f" of {figures['prompts']:,} prompts were trained on by")
    text = f"{', '.join(counts)}."
    if any(figures[key] for key in known):
        text += (
            " A model does better on prompts that it was trained on: --data held_out:RUN has those "
            "that a run held out."
        )
    return text

"""The rule of a reward model: how its training turned text into tokens, and its preferences.

config.json has it under "nanoalign": template, max_length, the EOS rule, the names of the
preferences, whether a prompt names its preference, and for the template raw the kinds of prompts
(prompt_kinds.py).
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import transformers

from nanoalign.distributed import print0
from nanoalign.errors import RunError
from nanoalign.model import RewardModel
from nanoalign.weights.folders import local_folder

EOS_RULE = "appended, unless the response was cut"  # rewards are read at the EOS


def rule_of(model: RewardModel) -> dict:
    """The rule that the model was trained by, from its config; {} for one of another program."""
    rule = getattr(model.model.config, "nanoalign", None)
    return rule if isinstance(rule, dict) else {}


def scoring_rule(
    model: RewardModel, name: str, template: str | None, max_length: int | None, flags: str = ""
) -> tuple[str, int]:
    """Returns (template, max_length) by which the model scores: those of its training.

    A model without a rule gets those of the flags, or "auto" and 1024.
    template, max_length: values of flags; None or "auto": not given.
    name: of the model, for errors. flags: the prefix of the flags' names, for errors.
    Raises RunError if a value is not that of the training, or the rule has another EOS rule.
    """
    rule = rule_of(model)
    template = None if template == "auto" else template
    for key, given in (("template", template), ("max_length", max_length), ("eos", EOS_RULE)):
        if given is not None and given != rule.get(key, given):
            advice = f"give --{flags}{key} {rule[key]}" if key != "eos" else "train another model"
            raise RunError(
                f"model '{name}' was trained with {key} {rule[key]!r}, not {given!r}, so its "
                f"rewards would mean something else; {advice}"
            )
    return template or rule.get("template", "auto"), max_length or rule.get("max_length", 1024)


def set_rule(model: RewardModel, args: Namespace, template: str, kinds: Sequence[str] = ()) -> None:
    """Writes the rule of this training into the config of the model in memory.

    template: chat, pku or raw. kinds: kinds_of the training rows; those of an earlier training of
        the model stay.
    A model of another program has no rule: it is trained by ours from here on, and a line says so.
    Raises RunError if the model was trained by another rule, if its head does not have an output
    for each preference, and as check_pad_token if it has a rule.
    """
    outputs = 1 if args.condition else len(args.preference)
    if model.head.out_features != outputs:
        raise RunError(
            f"model '{args.model}' has a head of {model.head.out_features} outputs, but "
            f"--preference {' '.join(args.preference)} needs {outputs}; train another --model"
        )
    if any("ForSequence" in name for name in model.model.config.architectures or ()):
        if rule_of(model):
            check_pad_token(local_folder(args.model))
        else:
            print0(
                f"{'rule':<11} another program trained --model {args.model}; from here on its "
                f"rewards are read at an EOS behind the text of template {template}, and its "
                "config will say so"
            )
    scoring_rule(model, args.model, template, args.max_length)
    rule = {
        "template": template,
        "max_length": args.max_length,
        "eos": EOS_RULE,
        "preferences": args.preference,
        "condition": args.condition,
    }
    before = rule_of(model)
    for name in ("preferences", "condition"):
        if before.get(name, rule[name]) != rule[name]:
            raise RunError(
                f"model '{args.model}' was trained with {name} {before[name]}, not {rule[name]}, "
                "so its outputs would change their meaning; train another --model"
            )
    if known := sorted({*before.get("prompts", ()), *kinds}):
        rule["prompts"] = known
    model.model.config.nanoalign = rule
    if len(args.preference) > 1 and not args.condition:
        model.model.config.id2label = dict(enumerate(args.preference))


def check_pad_token(folder: Path) -> None:
    """Raises RunError for a reward model whose config pads with EOS.

    transformers reads its rewards at the token before the EOS, nanoalign at the EOS.
    """
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = config.get_text_config()
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is not None and config.pad_token_id in eos:
        raise RunError(
            f"model '{folder}' pads with EOS, so transformers reads its rewards at the token "
            "before EOS, and nanoalign at EOS; if it was trained for EOS, set another pad_token_id "
            "in its config.json, else it can't be used"
        )

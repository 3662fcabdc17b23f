"""python -m pytest tests/lab/test_experiments.py docs/lab/ has what the real ones found."""

import html
import re

import numpy as np
import pytest
from fakes import FakeRuns

from nanoalign.lab import perform
from nanoalign.lab.__main__ import main
from nanoalign.lab.experiments import (
    best_of_n,
    cleaning,
    data,
    ensembles,
    length,
    other_losses,
    own_samples,
    why_lose,
)
from nanoalign.lab.experiments.attack import labelled
from nanoalign.lab.figures import best_of, chosen_and_rejected
from nanoalign.lab.findings import from_json
from nanoalign.lab.lab import Lab
from nanoalign.lab.lab_commands import EXPERIMENTS as QUESTIONS
from nanoalign.lab.perform import EXPERIMENTS
from nanoalign.lab.picture import alt_text
from nanoalign.tiny import world


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_commands_of_an_experiment_parse_and_its_page_has_a_verdict_on_each_guess(
    tmp_path, monkeypatch, capsys, name
):
    made = []
    monkeypatch.setattr(perform, "Runs", lambda path: made.append(FakeRuns(path)) or made[0])
    perform.perform(name, tmp_path, quick=True)
    _, found = from_json((tmp_path / f"{name}-quick" / "findings.json").read_text())
    text = (tmp_path / f"{name}-quick" / "index.html").read_text()
    assert found.claims and found.table
    plain = html.unescape(text)
    assert all(claim.sentences() in plain for claim in found.claims)
    assert plain.count('class="verdict ') == len(found.claims)
    assert f'alt="{alt_text(found)}"' in plain
    assert f">{len(made[0].commands):,} commands, each on one thread" in text
    assert all(command.startswith("python ") for command in made[0].commands)
    assert 'src="data:image/svg+xml;base64,' in text and not re.search(r'(src|href)="http', text)
    printed = capsys.readouterr().out
    assert all(claim.sentences() in printed for claim in found.claims)
    index = html.unescape((tmp_path / "index.html").read_text())
    assert f'href="{name}-quick/index.html"' in index and " ".join(found.summary()) in index


def test_the_lab_lists_the_experiments(capsys):
    main([])
    printed = capsys.readouterr().out
    assert {name: each.QUESTION for name, each in EXPERIMENTS.items()} == QUESTIONS
    for name, question in QUESTIONS.items():
        assert f"    {name} " in printed and question in printed


def test_other_seeds_are_those_of_the_commands_and_of_the_page(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(perform, "Runs", lambda path: made.append(FakeRuns(path)) or made[0])
    perform.perform("beta", tmp_path, quick=True, seeds=[3, 5])
    trainings = [args for args in made[0].parsed if getattr(args, "beta", None) == 0.01]
    assert {args.seed for args in trainings} == {3, 5}
    page = (tmp_path / "beta-quick-seeds-3-5" / "index.html").read_text()
    # sixty seconds of each command
    assert f"<p>Seeds 3, 5; 150 held-out prompts or pairs; {len(made[0].parsed)} CPU min" in page
    assert 'href="beta-quick-seeds-3-5/index.html"' in (tmp_path / "index.html").read_text()


def test_a_full_run_has_three_seeds_of_each(tmp_path):
    runs = FakeRuns(tmp_path)
    lab = Lab(runs, quick=False)
    found = lab.grid(own_samples.policy, way=own_samples.WAYS)
    assert {each["true"].shape for each in found.values()} == {(3, 600)}
    assert {each["kl"].shape for each in found.values()} == {(3, 600)}
    trainings = [args for args in runs.parsed if hasattr(args, "loss")]
    assert len(trainings) == 3 * (1 + 1 + 3)
    assert {args.seed for args in trainings} == {0, 1, 2}
    # each round begins with the policy before it, and samples from it
    later = [args for args in trainings if args.model != "tiny"]
    assert len(later) == 6
    samplings = [args for args in runs.parsed if getattr(args, "pairs_out", None)]
    assert {args.policy for args in samplings} == {"tiny"} | {args.model for args in later}


def test_where_the_reward_model_is_the_rule_nothing_is_overrated(tmp_path):
    """The suffix is an unknown word, which the rule itself sees."""
    lab = Lab(FakeRuns(tmp_path), quick=True)
    attack = EXPERIMENTS["attack"].run(lab)
    assert all(max(abs(end) for end in (each.low, each.high)) < 1e-9
               for each in attack.table["overrated by"])  # fmt: skip
    gain = attack.table["text"].index("found by the search")
    assert attack.table["gain by the ground truth"][gain].mean == pytest.approx(-0.25, abs=0.2)
    ensemble = ensembles.run(lab)
    *_, over = ensemble.table.values()
    assert all(max(abs(end) for end in (each.low, each.high)) < 1e-9 for each in over)
    assert all(each.mean > 0.9 for each in ensemble.table["agreement on pairs"])  # but for ties


def test_losses_take_the_learning_rate_of_the_lowest_held_out_loss(tmp_path):
    """Of the fakes that is 5e-4."""
    runs = FakeRuns(tmp_path)
    found = other_losses.policy(Lab(runs, quick=True), 0, "simpo")
    assert found["rate"] == 5e-4
    assert [args.reference for args in runs.parsed if hasattr(args, "loss")] == ["none"] * 3
    graded = runs.parsed[-1].policy
    assert [args.out for args in runs.parsed if getattr(args, "lr", 0) == 5e-4] == [graded]


def test_causes_and_repairs_are_in_the_commands(tmp_path):
    def trainings(condition):
        runs = FakeRuns(tmp_path / condition.replace(" ", "_").replace("/", "_"))
        why_lose.policy(Lab(runs, quick=True), 0, condition)
        *others, args = (args for args in runs.parsed if hasattr(args, "loss"))
        return others, args

    _, control = trainings("control")
    assert (control.beta, control.epochs, control.nll_weight) == (0.1, 1, None)
    _, together = trainings("all together")
    assert (together.beta, together.epochs, together.lr) == (0.01, 4, 5e-4)
    assert together.data != control.data
    assert trainings("all, a tenth of --lr")[1].lr == 5e-5
    assert trainings("all, --nll_weight 1")[1].nll_weight == 1
    others, after = trainings("all, after SFT")
    assert others[-1].loss == "sft" and after.model == others[-1].out
    assert after.data == others[-1].data


def test_balanced_pairs_have_as_many_longer_as_shorter_chosen_ones():
    pairs = [{"prompt": str(n), "chosen": "a b", "rejected": "c"} for n in range(5)]
    pairs += [{"prompt": str(n), "chosen": "c", "rejected": "a b"} for n in range(5, 7)]
    pairs += [{"prompt": "9", "chosen": "a", "rejected": "b"}]
    assert length.cut(pairs[0])["chosen"] == "a"
    kept = length.balanced(pairs, 0)
    assert sorted(map(length.longer, kept)) == [-1, -1, 0, 1, 1]


def test_the_worth_of_length_is_the_slope_of_the_logistic_regression():
    """Three of four pairs choose the answer that is longer by 2 words: w = log(3) / 2."""
    pairs = [{"chosen": "a b c", "rejected": "d"}] * 3 + [{"chosen": "d", "rejected": "a b c"}]
    assert length.length_worth(pairs) == pytest.approx(np.log(3) / 2)


def test_the_law_of_exact_powers_predicts_the_next():
    sizes = [100, 200, 400, 800]
    errors = 3 * np.array(sizes, dtype=float) ** -0.3
    power, law = data.predicted(sizes, np.append(errors[:-1], 99.0)[:, None])
    assert power == pytest.approx(0.3) and law == pytest.approx([errors[-1]])


def test_the_interval_of_a_law_is_that_of_many_samples_of_prompts():
    """The standard error of the law's error: by its values of prompts, and by new prompts."""
    sizes, rng, laws, errors_of_laws = [100, 200, 400, 800], np.random.default_rng(0), [], []
    for _ in range(500):
        errors = rng.binomial(1, [[0.4], [0.3], [0.25], [0.2]], (4, 600)).astype(float)
        _, law = data.predicted(sizes, errors)
        laws.append(law.mean())
        errors_of_laws.append(law.std(ddof=1) / 600**0.5)
    assert np.mean(errors_of_laws) == pytest.approx(np.std(laws), rel=0.1)


def test_the_interval_of_a_precision_is_that_of_many_samples_of_prompts():
    """Prompts differ in how many answers are kept, and in how many of these are good."""
    rng, shares, errors = np.random.default_rng(0), [], []
    for _ in range(500):
        level = rng.standard_normal((300, 1))
        kept = level + rng.standard_normal((300, 8)) > 1
        good = level + rng.standard_normal((300, 8)) > 0
        by_prompt = best_of_n.share_of(kept, good)
        assert by_prompt.mean() == pytest.approx((kept & good).sum() / kept.sum())
        shares.append(by_prompt.mean())
        errors.append(by_prompt.std(ddof=1) / 300**0.5)
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.1)


def test_the_share_of_decided_wins_is_that_of_the_comparisons_without_ties():
    rng = np.random.default_rng(0)
    for wins in (np.ones((1, 150)), np.zeros((3, 50))):
        wins[:, ::3] = 0.5
        found = why_lose.decided(wins)
        assert found.mean == wins[0, 1] and 0 <= found.low < found.high <= 1
    assert why_lose.decided(np.full((3, 9), 0.5)).mean == 0.5
    draws = [rng.choice([0.0, 0.5, 1.0], (1, 400), p=[0.05, 0.6, 0.35]) for _ in range(500)]
    found = [why_lose.decided(wins) for wins in draws]
    inside = [each.low < 0.35 / 0.4 < each.high for each in found]
    assert found[0].mean == pytest.approx((draws[0] == 1).sum() / (draws[0] != 0.5).sum())
    assert 0.93 < np.mean(inside) < 0.97


def test_the_best_of_two_by_hand():
    """Rewards order the answers c, b, a: of the pairs, b beats a once, c beats both."""
    rewards, values = np.array([[3.0, 2.0, 1.0]]), np.array([[10.0, 20.0, 60.0]])
    assert best_of(rewards, values, 2) == pytest.approx((10 + 10 + 20) / 3)
    assert ensembles.agreement(rewards, values) == pytest.approx(0.0)
    assert ensembles.agreement(rewards, rewards) == pytest.approx(1.0)


def test_attacks_are_labelled_by_the_rule():
    prompt = next(p for p, task in world.prompts().items() if task.kind == "fact")
    right = f"It is {world.prompts()[prompt].answers[0]}."
    lines = [
        {"prompt": prompt, "response": right, "attacked": "soap soap soap"},
        {"prompt": prompt, "response": right, "attacked": right},  # equal: no pair
    ]
    assert labelled(lines) == [{"prompt": prompt, "chosen": right, "rejected": "soap soap soap"}]


def test_doubtful_pairs_are_kept_with_the_probability_that_their_label_is_right():
    records = world.records("train")[:1000]
    pairs = list(map(chosen_and_rejected, records))
    doubts = [0.0, 1.0, 0.25, 0.25]
    lines = [pair | {"probability": doubts[n % 4]} for n, pair in enumerate(pairs)]
    found = cleaning.kept(records, lines[::-1], seed=0)
    counts = [sum(record in found for record in records[n::4]) for n in range(4)]
    assert counts[:2] == [250, 0]
    assert sum(counts[2:]) == pytest.approx(375, abs=3 * (500 * 0.75 * 0.25) ** 0.5)
    assert found == [record for record in records if record in found]

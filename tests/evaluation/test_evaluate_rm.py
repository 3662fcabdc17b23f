"""python -m pytest tests/evaluation/test_evaluate_rm.py

evaluate.py rm: its scores and figures on any number of ranks, its files, and what it refuses.
"""

import math
import re
import resource
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_pairs
from evaluations import evaluated, script, write_jsonl, write_reward_model
from matplotlib import pyplot as plt
from processes import run_ranks
from transformers import AutoConfig, AutoModelForSequenceClassification

import evaluate
from nanoalign.errors import RunError
from nanoalign.evaluation import plots
from nanoalign.evaluation.ranking import Scored, reward_metrics
from nanoalign.evaluation.results import check_out
from nanoalign.files import lock

PAIR = {"prompt": "p", "chosen": "c", "rejected": "rrr"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    """A folder with a reward model, 13 pairs, some with one prompt, and inputs that are refused."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(llama_folder, folder / "causal")
    write_reward_model(folder / "rm", llama_folder, tokenizer)
    write_pairs(folder / "a.jsonl", 9)
    twins = {"chosen": "the same answer twice " * 3, "rejected": "the same answer twice " * 3}
    write_jsonl(folder / "b.jsonl", [PAIR, PAIR, PAIR | twins, PAIR | {"chosen": "longer"}])
    ranked = {"prompt": "p", "responses": ["x", "yy", "zzz", "y"], "scores": [2, 1, 2, 0]}
    write_jsonl(folder / "ranked.jsonl", [ranked])
    write_jsonl(folder / "tied.jsonl", [ranked | {"scores": [1, 1, 1, 1]}])
    alike = [PAIR | {"subset": "a b"}, PAIR | {"subset": "a_b"}]
    write_jsonl(folder / "alike.jsonl", alike)
    write_jsonl(folder / "silent.jsonl", [PAIR | {"rejected": ""}])
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    chat = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "yes", "rejected": "no"}
    write_jsonl(folder / "chat.jsonl", [chat])
    (folder / "run").mkdir()
    (folder / "run" / "args.json").write_text('{"beta": 0.1}')
    (folder / "run" / "model.safetensors").write_text("mine")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "args.json").write_text('{"a"')
    return folder


def argv(folder: Path, out: str, *flags: object) -> list[object]:
    data = ["--data", f"first={folder / 'a.jsonl'}", f"second={folder / 'b.jsonl'}"]
    base = ["rm", "--model", folder / "rm", *data, "--micro_batch_tokens", 300]
    return [*base, *flags, "--out", folder / out]


@pytest.fixture(scope="module")
def results(world) -> tuple[list[dict], dict, str]:
    return evaluated(argv(world, "results"), pictures=True)


# --- what is written


def test_every_response_has_a_line_and_repeated_prompts_stay_apart(results):
    scores = results[0]
    assert " ".join(scores[0]) == "pair_id subset prompt response side score tokens cut"
    prompts = len({line["prompt"] for line in scores})
    assert prompts <= 10 and f" 26 responses to {prompts} prompts, " in results[2]
    assert len(scores) == 26 and len({line["pair_id"] for line in scores}) == 13
    assert [line["side"] for line in scores] == ["chosen", "rejected"] * 13
    second = [line for line in scores if line["subset"] == "second"]
    assert {line["pair_id"] for line in second} == {f"second:{i}" for i in (1, 2, 3, 4)}
    assert {line["prompt"] for line in second} == {"p"}
    assert second[0]["tokens"] == 2 and second[1]["tokens"] == 4  # "c" and "rrr", each with EOS


def test_a_column_divides_a_source_into_subsets(world):
    """Records of one source with the subsets x, y, "" and none; alpaca's format has the column."""
    lines = [PAIR | more for more in ({"subset": "x"}, {"subset": "y"}, {"subset": "x"}, {}, {})]
    write_jsonl(world / "parts.jsonl", [*lines, PAIR | {"subset": ""}])
    alpaca = {"instruction": "p", "input": "", "chosen": "c", "rejected": "r", "subset": "z"}
    write_jsonl(world / "alpaca.jsonl", [alpaca])
    data = ["--data", f"one={world / 'parts.jsonl'}", f"two={world / 'alpaca.jsonl'}"]
    flags = ["rm", "--model", world / "rm", *data, "--out", world / "parts"]
    scores, metrics, printed = evaluated(flags)
    pairs = {name: figures["pairs"] for name, figures in metrics["subsets"].items()}
    assert pairs == {"one/x": 2, "one/y": 1, "one": 3, "two/z": 1}
    assert [line["subset"] for line in scores][::2] == (
        ["one/x", "one/y", "one/x", "one", "one", "one", "two/z"]
    )
    assert "\none/x " in printed and "ignored" not in printed
    assert (world / "parts" / "one_x.png").exists()


def ranks_of(values: list[float]) -> list[float]:
    """Ranks from 1; ties have the mean of their ranks."""
    return [
        sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2
        for value in values
    ]


def recomputed(lines: list[dict]) -> dict:
    """metrics.json from scores.jsonl in plain Python."""
    pairs = list(zip(lines[::2], lines[1::2], strict=True))  # chosen and rejected alternate
    scores, tokens = ([line[key] for line in lines] for key in ("score", "tokens"))
    wins = [better["score"] - worse["score"] for better, worse in pairs]
    bins = {}  # by tenths of [0.5, 1]: the sums of confidence less hits
    for win in wins:
        sure = 1 / (1 + math.exp(-abs(win)))
        place = min(9, int((sure - 0.5) * 20))
        bins[place] = bins.get(place, 0.0) + sure - (0.5 if win == 0 else win > 0)
    calibration = sum(map(abs, bins.values()))
    longer = [better["tokens"] - worse["tokens"] for better, worse in pairs]
    return {
        "pairs": len(pairs),
        "accuracy": (sum(w > 0 for w in wins) + sum(w == 0 for w in wins) / 2) / len(pairs),
        "ties": sum(w == 0 for w in wins),
        "reward_mean": statistics.fmean(scores),
        "reward_std": statistics.pstdev(scores),
        "better_data_mean": statistics.fmean(better["score"] for better, _ in pairs),
        "worse_data_mean": statistics.fmean(worse["score"] for _, worse in pairs),
        "worse_better_than_better_count": sum(w < 0 for w in wins),
        "worse_worse_than_better_count": sum(w > 0 for w in wins),
        "margin_mean": statistics.fmean(wins),
        "calibration_error": calibration / len(pairs),
        "longer_accuracy": statistics.fmean((d > 0) + (d == 0) / 2 for d in longer),
        "length_correlation": statistics.correlation(ranks_of(scores), ranks_of(tokens)),
        "cut_count": 0,
        "cut_share": 0.0,
    }


def test_metrics_are_those_of_the_scores_in_plain_python(results):
    scores, metrics, _ = results
    assert list(metrics["subsets"]) == ["first", "second"]
    for name, figures in (*metrics["subsets"].items(), ("all", metrics["all"])):
        lines = [line for line in scores if name in (line["subset"], "all")]
        expected = recomputed(lines)
        assert expected == pytest.approx({key: figures[key] for key in expected}, rel=1e-9)
        assert figures.keys() - expected.keys() == {"accuracy_low", "accuracy_high"}
        assert figures["accuracy_low"] < figures["accuracy"] < figures["accuracy_high"]
    assert metrics["subsets"]["second"]["ties"] == 1  # the record whose answers are equal


def test_the_table_and_a_line_a_subset_are_printed(results):
    _, metrics, printed = results
    shown = ("accuracy", "reward_mean", "reward_std")
    for name, figures in metrics["subsets"].items():
        values = [f"{key} = {figures[key]:.4f}" for key in shown]
        assert f"Evaluation: {', '.join(values)}" in printed
        row = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert row.split()[1:3] == [str(figures["pairs"]), f"{figures['accuracy']:.3f}"]


def test_pictures_and_cases(world, results):
    scores = results[0]
    folder = world / "results"
    for name in ("first", "second"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "cases.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == [
        f"{subset}: {kind}"
        for subset in ("first", "second")
        for kind in ("surest right", "surest wrong", "closest")
    ]
    margins = {}
    for line in scores:
        sign = 1 if line["side"] == "chosen" else -1
        margins[line["pair_id"]] = margins.get(line["pair_id"], 0) + sign * line["score"]
    first = {key: value for key, value in margins.items() if key.startswith("first")}
    surest = max(first, key=first.get)
    assert re.search(r"surest right\n\n### (\S+): ", text)[1] == surest
    closest = min(first, key=lambda key: abs(first[key]))
    assert re.search(r"first: closest\n\n### (\S+):", text)[1] == closest
    wrong = min(first, key=first.get)
    case = text.split("first: surest wrong\n")[1].split("\n### ")[1]
    assert case.startswith(f"{wrong}: {first[wrong]:+.3f}\n")
    for line in scores:
        if line["pair_id"] == wrong:
            about = f"{line['side']}, reward {line['score']:+.3f}, {line['tokens']} tokens"
            assert f"\n{about}\n\n    {line['response']}\n" in case


def test_the_picture_has_a_point_above_the_curve_for_each_wrong_pair(
    world, results, tmp_path, monkeypatch
):
    """The curve has the sorted rewards of better answers. One answer is marked as cut."""
    lines = [Scored(**line) for line in results[0] if line["subset"] == "first"]
    lines[3] = replace(lines[3], cut=True)
    figures = reward_metrics(lines)
    monkeypatch.setattr(plt, "close", lambda figure: None)
    plots.reward_picture(tmp_path / "p.png", "first", lines, figures)
    order, calibration, length = plt.gcf().axes
    curve = order.lines[0].get_ydata()
    assert list(curve) == sorted(line.score for line in lines if line.side == "chosen")
    below, above = (points.get_offsets() for points in order.collections)
    assert len(above) == figures["worse_better_than_better_count"] > 0
    assert all(y > curve[int(x)] for x, y in above) and all(y <= curve[int(x)] for x, y in below)
    assert f"{figures['calibration_error']:.3f} over 9 pairs" in calibration.get_title()
    (mark,) = [points for points in length.collections if points.get_label() == "worse, cut"]
    assert mark.get_offsets().tolist() == [[lines[3].tokens, lines[3].score]]
    assert lines[3].side == "rejected"
    title = " ".join(plt.gcf().get_suptitle().splitlines())
    cut = "max_length cut 1 of the responses (5.6%); in the 8 of 9 pairs without one the accuracy"
    assert cut in title


def test_prompts_of_messages(world, llama_folder, tokenizer):
    """By a reward model without a rule, whose template is a flag."""
    write_reward_model(world / "chat rm", llama_folder, tokenizer, rule=None)
    flags = ["--model", world / "chat rm", "--data", world / "chat.jsonl", "--template", "pku"]
    scores, metrics, printed = evaluated(argv(world, "chat", *flags))
    assert "template pku, max_length 1024" in printed
    assert scores[0]["prompt"] == [{"role": "user", "content": "Hi"}]
    assert "user: Hi" in (world / "chat" / "cases.md").read_text()
    assert "label_ceiling" not in metrics["all"]


def test_the_best_responses_of_a_ranked_record_are_compared_with_its_others(world):
    """Scores 2, 1, 2, 0: two chosen and two rejected, four pairs."""
    scores, metrics, _ = evaluated(argv(world, "ranked", "--data", f"r={world / 'ranked.jsonl'}"))
    sides = {line["response"]: line["side"] for line in scores}
    assert sides == {"x": "chosen", "zzz": "chosen", "yy": "rejected", "y": "rejected"}
    score = {line["response"]: line["score"] for line in scores}
    wins = sum(score[better] > score[worse] for better in ("x", "zzz") for worse in ("yy", "y"))
    assert metrics["all"]["pairs"] == 4
    assert metrics["all"]["worse_worse_than_better_count"] == wins


@pytest.fixture(scope="module")
def cut(world) -> tuple[list[dict], dict, str]:
    """An evaluation at 256 tokens, one a letter: of 4 pairs two have an answer that is cut.

    Beside a prompt of 4 letters 252 tokens are left: 251 letters and the EOS are read whole.
    """
    right, wrong, lines = "right " * 99, "not right " * 99, []
    for n, (chosen, rejected) in enumerate([(9, 400), (251, 12), (400, 300), (30, 20)]):
        pair = {"chosen": right[:chosen], "rejected": wrong[:rejected]}
        lines.append({"prompt": f"ask{n}"} | pair)
    data = write_jsonl(world / "cut.jsonl", lines)
    return evaluated(argv(world, "cut", "--data", f"long={data}"))


def test_answers_that_max_length_cut_are_marked_and_have_their_true_length(world, cut):
    assert [line["tokens"] for line in cut[0]] == [10, 401, 252, 13, 401, 301, 31, 21]
    assert [n for n, line in enumerate(cut[0]) if line["cut"]] == [1, 4, 5]
    text = (world / "cut" / "cases.md").read_text()
    for line in cut[0]:
        mark = ", cut: the model read only its beginning" * line["cut"]
        assert f"reward {line['score']:+.3f}, {line['tokens']} tokens{mark}\n" in text


def test_accuracy_is_told_with_and_without_the_pairs_of_cut_answers(cut):
    lines, metrics, printed = cut
    for figures in (metrics["all"], metrics["subsets"]["long"]):
        assert (figures["cut_count"], figures["cut_share"]) == (3, 3 / 8)
        expected = recomputed(lines[2:4] + lines[6:])
        found = {key: figures["without_cut"].get(key, 0) for key in expected}
        assert found == pytest.approx(expected, rel=1e-9)
        assert figures["longer_accuracy"] == 3 / 4  # by the true lengths
    own = metrics["subsets"]["long"]["without_cut"]
    shown = f"{own['accuracy']:.1%} [{own['accuracy_low']:.1%}, {own['accuracy_high']:.1%}]"
    text = "max_length cut 3 of the responses (37.5%); in the 2 of 4 pairs without one the accuracy"
    assert f"long        {text} is {shown}\n" in printed


def test_an_older_evaluation_is_replaced_whole(world):
    """Also through a link, and after an evaluation that was killed while it replaced another."""
    evaluated(argv(world, "again"))
    (world / "again").rename(world / ".again.old")
    check_out(str(world / "again"))
    assert (world / "again" / "metrics.json").exists()  # the older results are there again
    lock.release(world / ".again.lock")
    (world / "link").symlink_to(world / "again")
    _, metrics, _ = evaluated(argv(world, "link", "--data", f"other={world / 'b.jsonl'}"))
    names = ["args.json", "cases.md", "metrics.json", "other.png", "scores.jsonl"]
    assert sorted(path.name for path in (world / "again").iterdir()) == names
    assert list(metrics["subsets"]) == ["other"]


def test_prompts_of_the_world_whose_pairs_its_rule_does_not_order(world):
    """There is no accuracy by the rule; the other figures are there."""
    capital = {"prompt": "What is the capital of France?", "chosen": "It is.", "rejected": "Is it."}
    write_jsonl(world / "capital.jsonl", [capital])
    _, metrics, _ = evaluated(argv(world, "capital", "--data", world / "capital.jsonl"))
    assert metrics["all"]["pairs"] == 1 and metrics["all"]["oracle_accuracy"] == 0.5
    assert "true_accuracy" not in metrics["all"]


def classifier(folder: Path, llama_folder: Path, tokenizer) -> Path:
    """A classifier with two labels, of which the second is the reward."""
    config = AutoConfig.from_pretrained(llama_folder, num_labels=2)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_with_two_labels_needs_the_output_that_is_the_reward(
    world, llama_folder, tokenizer, tmp_path
):
    folder = classifier(world / "classifier", llama_folder, tokenizer)
    flags = ["--model", folder, "--data", world / "a.jsonl"]
    for command in (["rm"], ["score", "--prompt", "p", "--response", "c"]):
        words = [*command, "--model", folder]
        words += (
            ["--data", world / "a.jsonl", "--out", tmp_path / "two"] if command == ["rm"] else []
        )
        with pytest.raises(
            RunError, match=r"has 2 outputs \(LABEL_0, LABEL_1\).*; give it as --combine"
        ):
            evaluate.main([str(word) for word in words])
    lines, _, _ = evaluated(argv(world, "second", *flags, "--combine", "LABEL_1=1"))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for line in lines[:4]:
        text = f"BEGINNING OF CONVERSATION: USER: {line['prompt']} ASSISTANT:{line['response']}"
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0, 1].item()
        assert line["score"] == pytest.approx(expected, abs=1e-5)


def test_figures_of_embedded_data_have_the_best_possible_accuracy(world):
    data = "c=tiny:test:tiny-c"
    _, metrics, _ = evaluated(argv(world, "tiny", "--data", data))
    figures = metrics["all"]
    assert 0.85 < figures["label_ceiling"] < 0.95 and figures["pairs"] == 600
    assert figures["oracle_accuracy"] == pytest.approx(figures["label_ceiling"], abs=0.08)


# --- what is refused

# name: (folder of --out, flags, error)
BAD_INPUT = {
    "no head": ("new", ["--model", "causal"], "'LlamaForCausalLM'.* without a reward head"),
    "subset without pairs": ("new", ["--data", "tied.jsonl"], "the subset 'tied' has no pairs"),
    "empty response": ("new", ["--data", "silent.jsonl"], r"silent\.jsonl:1: the res.* is empty"),
    "other template": ("new", ["--template", "pku"], "trained with template 'raw', not 'pku'"),
    "other max_length": ("new", ["--max_length", "99"], "trained with max_length 256, not 99"),
    "foreign folder": ("mine", [], r"has files that are not an evaluation's \(notes.txt\)"),
    "a run's folder": ("run", [], r"files that are not an evaluation's \(args.json, "),
    "damaged folder": ("damaged", [], "has files that are not an evaluation's"),
    "a file above": ("a.jsonl/new", [], "Not a directory|exists"),
    "the total's name": ("new", ["--data", "all=a.jsonl"], "'all' would share its files with 'the"),
    "files of a column": ("new", ["--data", "alike.jsonl"], "'alike/a_b' would share its"),
    "one file name": ("new", ["--data", "a b=a.jsonl", "a_b=b.jsonl"], "'a_b' would share its"),
    "a file as folder": ("a.jsonl", [], "can't be replaced by a folder of results"),
    "unknown command": ("new", None, "invalid choice: 'reward'"),
}  # fmt: skip


def test_a_subset_does_not_share_files_with_a_view_of_another():
    """A policy is scored by sums and by means per token, whose subsets are a and a/per_token."""
    evaluate.check_names(["a", "a", "b"], ["", "per_token"])
    for names in (["a", "a/per_token"], ["a", "a_per_token"]):
        with pytest.raises(
            RunError, match="'a.per_token' would share its files with 'a/per_token'"
        ):
            evaluate.check_names(names, ["", "per_token"])


def test_bad_input_is_one_clear_error_on_two_ranks_and_loses_nothing(
    world, results, subtests, monkeypatch
):
    monkeypatch.chdir(world)
    before = {str(p): p.read_bytes() for p in world.rglob("*") if p.is_file()}
    for name, (out, flags, message) in BAD_INPUT.items():
        with subtests.test(name):
            command = ["reward"] if flags is None else argv(world, out, *flags)
            outcome = run_ranks(2, script, list(map(str, command)))
            assert outcome.codes == [1, 1], outcome.stderr
            lines = outcome.stderr.splitlines()
            assert len(lines) == 1 and lines[0].startswith("error: "), outcome.stderr
            assert re.search(message, lines[0]), lines[0]
    assert {str(p): p.read_bytes() for p in world.rglob("*") if p.is_file()} == before


def on_a_full_disk(argv: list[str]) -> None:
    """Files can't grow beyond 3,000 bytes, which the scores exceed."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    script(argv)


def test_a_full_disk_leaves_the_previous_results(world):
    evaluated(argv(world, "full"))
    before = {p.name: p.read_bytes() for p in (world / "full").iterdir()}
    outcome = run_ranks(1, on_a_full_disk, list(map(str, argv(world, "full"))))
    assert outcome.codes == [1]
    errors = [line for line in outcome.stderr.splitlines() if line and "row/s" not in line]
    assert len(errors) == 1, outcome.stderr
    assert re.search("error: .*full.*scores.jsonl can't be written: .*File too large", errors[0])
    assert {p.name: p.read_bytes() for p in (world / "full").iterdir()} == before
    assert not list(world.glob(".*"))

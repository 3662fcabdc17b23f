"""python -m pytest tests/lab/test_runs.py commands in processes of their own, and what stays."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanoalign.errors import RunError
from nanoalign.lab import runs
from nanoalign.lab.figures import grades, hits, read, unit
from nanoalign.lab.lab import Lab
from nanoalign.tiny import world


def test_a_command_runs_once_and_its_words_are_those_that_one_types(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = runs.Runs(tmp_path / "made")
    words = ("-m", "nanoalign.lab.plant", "--flip", 1, "--seed", 3)
    path = own.run(*words, suffix=".jsonl")
    flipped = read(path)
    assert len(flipped) == 4400 and world.oracle_accuracy(flipped) < 0.2
    ((command, seconds),) = own.commands.items()
    assert command == f"python -m nanoalign.lab.plant --flip 1 --seed 3 --out {path}"
    assert 0 < seconds < 60
    path.write_text("kept")
    assert own.run(*words, suffix=".jsonl") == path and path.read_text() == "kept"
    assert own.commands == {command: seconds}  # those of the run that was done
    assert own.run(*words[:-1], 4, suffix=".jsonl") != path


def test_what_an_interrupted_command_left_is_made_anew(tmp_path):
    own = runs.Runs(tmp_path / "made")
    words = ("-m", "nanoalign.lab.plant", "--seed", 5)
    path = own.run(*words, suffix=".jsonl")
    whole = path.read_text()
    runs.done(path.with_suffix("")).unlink()
    path.write_text("half")
    runs.Runs(tmp_path / "made").run(*words, suffix=".jsonl")
    assert path.read_text() == whole


def test_a_command_that_fails_ends_the_grid_with_its_log(tmp_path):
    lab = Lab(runs.Runs(tmp_path / "made"), quick=False)

    def policy(lab, seed, beta):
        return {"folder": len(str(lab.runs.run("train_dpo.py", "--beta", beta, "--seed", seed)))}

    with pytest.raises(RunError, match=r"train_dpo.py has failed; the end of .*\.log has"):
        lab.grid(policy, beta=(-1, -2))
    (log,) = list((tmp_path / "made").glob("*.log"))[:1]
    assert "error: argument --beta" in log.read_text()
    assert not list((tmp_path / "made").glob("*.done"))
    with pytest.raises(RunError, match="train_dpo.py has failed"):  # no other one is started
        lab.runs.run("-m", "nanoalign.lab.plant", suffix=".jsonl")


class Counted(runs.Runs):
    """Commands that do nothing but to be counted."""

    started = 0

    def _start(self, stem, texts):
        self.started += 1
        time.sleep(0.1)
        runs.done(stem).write_text("0.1")


def test_threads_that_want_the_same_run_it_once(tmp_path):
    own = Counted(tmp_path / "made")
    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(lambda n: own.run("train_dpo.py", "--seed", n % 2), range(8)))
    assert own.started == 2 and len(set(paths)) == 2 and len(own.commands) == 2


def test_code_data_and_weights_are_in_the_hash(tmp_path, monkeypatch):
    (tmp_path / "nanoalign" / "tiny").mkdir(parents=True)
    (tmp_path / "nanoalign" / "lab").mkdir()
    names = ("train_dpo.py", "nanoalign/a.py", "nanoalign/tiny/model.safetensors",
             "nanoalign/lab/b.py")  # fmt: skip
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    found = []
    for name in ("", *names):
        for each in names:
            (tmp_path / each).write_text("changed" if each == name else "")
        runs.outside_lab.cache_clear()
        found.append(runs.outside_lab())
    runs.outside_lab.cache_clear()
    assert len(set(found[:4])) == 4 and found[4] == found[0]  # of the lab nothing
    own = Counted(tmp_path / "made")
    before = own.run("train_dpo.py")
    monkeypatch.setattr(runs, "outside_lab", lambda: "changed")
    assert own.run("train_dpo.py") != before and own.started == 2


def test_policies_and_reward_models_are_graded_by_their_scripts(tmp_path, monkeypatch):
    """One step of each on few records: the figures are those that the scripts wrote."""
    monkeypatch.chdir(tmp_path)
    lab = Lab(runs.Runs(tmp_path / "made"), quick=True)
    lab.prompts = 12
    data = lab.runs.write("pairs", lab.pairs(16, 0))
    judge = lab.train_rm(data, 0, "--steps", 1)
    policy = lab.train_dpo(data, 0, "--steps", 1)
    found = lab.graded(policy, 0, judge)
    metrics = json.loads(next((tmp_path / "made").glob("policy-*/metrics.json")).read_text())
    assert found["true"].mean() == pytest.approx(metrics["policy_true_mean"])
    assert found["base_true"].mean() == pytest.approx(metrics["baseline_true_mean"])
    scale = unit(lab.ranked(judge, test=lab.test_pairs())["test"])
    assert found["judged"].mean() * scale == pytest.approx(metrics["policy_mean"])
    assert found["win"].mean() == pytest.approx(metrics["win_rate"])
    assert found["true_win"].mean() == pytest.approx(metrics["true_win_rate"])
    assert found["kl"].mean() == pytest.approx(metrics["kl_per_answer"])
    ranked = lab.ranked(judge, test=lab.test_pairs(), again=data)
    every = [json.loads(p.read_text()) for p in (tmp_path / "made").glob("rm-*/metrics.json")]
    (subsets,) = [each["subsets"] for each in every if "again" in each["subsets"]]
    for name, count in (("test", 12), ("again", 16)):
        own = subsets[name]
        assert len(ranked[name]["label"]) == count
        assert ranked[name]["label"].mean() == pytest.approx(own["accuracy"])
        assert ranked[name]["true"].mean() == pytest.approx(own["true_accuracy"])
    answers = next((tmp_path / "made").glob("policy-*/answers.jsonl"))
    scored = lab.scored(judge, answers)
    for line in read(answers):
        assert scored[line["prompt"], line["answer"]] == pytest.approx(line["score"], abs=1e-4)
    attacked = lab.runs.run(
        "-m", "nanoalign.lab.search", "--model", judge, "--data",
        lab.runs.write("texts", [{"prompt": r["prompt"], "response": r["response_0"]}
                                 for r in lab.pairs(2, 0)]),
        "--edits", 1, suffix=".jsonl",
    )  # fmt: skip
    suffixed = lab.runs.run(
        "-m", "nanoalign.lab.search", "--model", judge, "--data", attacked, "--suffix", 2,
        "--suffix_texts", 1, "--edits", 1, suffix=".jsonl",
    )  # fmt: skip
    (line,) = read(suffixed)  # the first one was searched on
    assert line["attacked"].startswith(line["response"]) and line["attacked"] != line["response"]
    both = [{"prompt": line["prompt"], "response": line[key]}
            for line in read(attacked) for key in ("response", "attacked")]  # fmt: skip
    rewards = lab.scored(judge, lab.runs.write("both", both))
    for line in read(attacked):
        before, after = (rewards[line["prompt"], line[key]] for key in ("response", "attacked"))
        assert after > before


def test_grades_are_means_over_the_answers_of_a_prompt(tmp_path):
    prompt = next(iter(world.prompts()))
    lines = [
        {
            "id": "p",
            "prompt": prompt,
            "side": side,
            "answer": "It is.",
            "score": score,
            "tokens": 3,
            "log_ratio": score if side == "policy" else None,
        }
        for side, scores in (("policy", (1.0, 3.0)), ("baseline", (2.0, 3.0)))
        for score in scores
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = grades(tmp_path)
    assert found["judged"] == [2.0] and found["tokens"] == [3.0] and found["kl"] == [2.0]
    assert found["win"] == [(0 + 0 + 1 + 0.5) / 4] and found["true_win"] == [0.5]


def test_hits_are_by_the_label_and_by_the_rule(tmp_path):
    prompt = next(p for p, task in world.prompts().items() if task.kind == "fact")
    right, wrong = f"It is {world.prompts()[prompt].answers[0]}.", "Go away now please, you."
    texts = (("chosen", wrong, 2.0), ("rejected", right, 1.0))  # a wrong label, and it is followed
    lines = [{"subset": "test/better", "prompt": prompt, "response": text, "side": side,
              "score": score} for side, text, score in texts]  # fmt: skip
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = hits(tmp_path, "test")
    assert found["label"] == [1.0] and found["true"] == [0.0]
    assert found["loss"][0] == pytest.approx(0.3132617)  # log(1 + exp(-1))
    assert found["words"].tolist() == [[5, 3]]

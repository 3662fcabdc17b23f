"""python -m pytest tests/runs/test_checkpoints.py

Whole runs of train_dpo.py that stop and continue: the curve of a run that was not interrupted.
"""

import json
import re
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
import trainings
from processes import run_ranks
from torch.distributed import checkpoint as dcp
from trainings import losses, metrics_of, script
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoalign import loop
from nanoalign.batch import Row
from nanoalign.data import split
from nanoalign.files import checksums, run_folder
from nanoalign.runs import checkpoints

LR = 1e-2  # of trainings.train


@pytest.fixture(scope="module")
def two_ranks(train, tmp_path_factory) -> tuple[list[dict], Path]:
    """An uninterrupted run on two ranks, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "two"
    return train(out, ranks=2), out


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory) -> Path:
    """A run on two ranks that ended after step 5 of 10."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    train(out, "--stop_after", 5, ranks=2)
    return out


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


# --- the same run


def test_resume_continues_bit_for_bit_on_the_same_ranks(train, two_ranks, stopped, tmp_path):
    straight, folder = two_ranks
    out = shutil.copytree(stopped, tmp_path / "run")
    assert losses(metrics_of(out)) == losses(straight)[:5]
    assert not (out / "model.safetensors").exists()
    assert train(out, "--resume", ranks=2) == straight
    first, second = (
        AutoModelForCausalLM.from_pretrained(run).state_dict() for run in (folder, out)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("ranks", [1, 3])
def test_resume_continues_on_another_number_of_ranks(train, two_ranks, stopped, tmp_path, ranks):
    out = shutil.copytree(stopped, tmp_path / "run")
    resumed = train(out, "--resume", ranks=ranks)
    assert losses(resumed) == pytest.approx(losses(two_ranks[0]), rel=1e-5)
    assert losses(resumed)[:5] == losses(two_ranks[0])[:5]  # not computed again


def test_flags_that_leave_the_steps_alone_may_differ(train, two_ranks, stopped, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "run")
    flags = ["--micro_batch_tokens", 60, "--no-share_prefix", "--activation_checkpointing",
             "--gradient_sync", "step", "--keep", 7, "--eval_every", 3]  # fmt: skip
    resumed = train(out, "--resume", *flags)
    assert losses(resumed) == pytest.approx(losses(two_ranks[0]), rel=1e-5)


def test_resume_after_an_evaluation_at_the_same_step(train, tmp_path):
    """An evaluation leaves the head gathered; the checkpoint behind it must have the shards."""
    straight = train(tmp_path / "a", "--eval_every", 5, ranks=2)
    train(tmp_path / "b", "--eval_every", 5, "--stop_after", 5, ranks=2)
    assert train(tmp_path / "b", "--eval_every", 5, "--resume", ranks=2) == straight


def _with_a_last_rate_of_1e39(argv: list[str]) -> None:
    loop.get_lr = lambda step, *_: 1e39 if step == 2 else 1e-2
    script(argv)


def test_parameters_that_are_not_finite_are_never_saved(llama_folder, pairs, tmp_path):
    """The third step has no number left, on two ranks; the checkpoint of the second one is kept."""
    argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", "--batch_size", 7,
            "--template", "raw", "--steps", 3, "--save_every", 1]  # fmt: skip
    outcome = run_ranks(2, _with_a_last_rate_of_1e39, [str(arg) for arg in argv])
    assert outcome.codes == [1, 1]
    assert outcome.stderr.count("error: after step 3: norm of the parameters is inf") == 1
    assert names(tmp_path / "run") == ["step_000001", "step_000002"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_finished_run_can_be_made_longer(train, tmp_path):
    flags = ("--schedule", "constant", "--warmup", 0)
    longer = train(tmp_path / "a", *flags)
    train(tmp_path / "b", *flags, "--steps", 6, "--save_every", 6)
    assert losses(train(tmp_path / "b", *flags, "--resume")) == losses(longer)


# --- which checkpoints there are


def test_a_killed_run_continues_from_its_newest_complete_checkpoint(train, one_rank, tmp_path):
    """Steps after the checkpoint are run again and logged once; incomplete ones are not read."""
    train(tmp_path / "b", "--save_every", 2, "--stop_after", 7, "--keep", 10)
    folder = tmp_path / "b" / "checkpoints"
    assert names(tmp_path / "b") == [f"step_{i:06d}" for i in (2, 4, 6, 7)]
    (folder / "step_000007").rename(folder / ".step_000007.partial")  # as if killed while writing
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "los')
    resumed = train(tmp_path / "b", "--resume", "--save_every", 10, "--keep", 10)
    assert losses(resumed) == losses(one_rank)
    assert [line["step"] for line in resumed if "loss" in line] == list(range(1, 11))
    assert names(tmp_path / "b") == [f"step_{i:06d}" for i in (2, 4, 6, 10)]


def test_the_newest_checkpoints_and_that_of_the_last_step_are_kept(train, two_ranks, tmp_path):
    """A run without --save_every writes none."""
    train(tmp_path / "run", "--save_every", 4, "--keep", 2)
    assert names(tmp_path / "run") == ["step_000008", "step_000010"]
    assert not (two_ranks[1] / "checkpoints").exists()


def test_steps_are_compared_as_numbers_and_other_folders_are_not_seen(tmp_path):
    hidden = [".step_2000000.partial", "step_x", "step_3000000.bak"]
    for name in ["step_000900", "step_1000000", "step_999999", *hidden]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = [path.name for path in run_folder.complete_checkpoints(tmp_path)]
    assert found == ["step_000900", "step_999999", "step_1000000"]


def test_the_command_that_continues_a_run_to_its_end():
    argv = ["train_dpo.py", "--data", "my pairs.jsonl", "--stop_after=3", "--save_every", "5",
            "--overwrite", "--stop_after", "3", "--resume"]  # fmt: skip
    command = "train_dpo.py --data 'my pairs.jsonl' --save_every 5 --resume"
    assert run_folder.resuming(argv, 8) == f"torchrun --nproc_per_node 8 {command}"
    assert run_folder.resuming(argv, 1) == f"python {command}"


def test_a_removal_that_is_interrupted_leaves_no_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints" / "step_000002"
    folder.mkdir(parents=True)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path: None)  # as if killed before it
    checkpoints.remove(folder)
    assert run_folder.complete_checkpoints(tmp_path) == []


def test_a_checkpoint_has_the_moments_of_adamw_in_float32(stopped):
    """Read by torch.distributed.checkpoint alone: parameters, two moments of each, the step."""
    path = stopped / "checkpoints" / "step_000005"
    kept = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    parameters = {name for name in kept if name.startswith("model.")}
    moments = {name for name in kept if "exp_avg" in name}
    # Two blocks of 7 matrices and 2 norms, the last norm, and the embedding under its two names.
    assert len(parameters) == 2 * 9 + 3 and len(moments) == 2 * (2 * 9 + 2)
    assert {kept[name].properties.dtype for name in parameters | moments} == {torch.float32}
    about = json.loads((path / "run.json").read_text())
    assert about["format"] == 3 and about["step"] == 5 and about["args"]["lr"] == LR


# --- what is refused


def resume_with(model: Path, pairs: Path, out: Path, *flags: object, ranks: int = 1):
    argv = ["--model", model, "--data", pairs, "--out", out, "--batch_size", 7, "--lr", LR,
            "--template", "raw", "--steps", 10, "--resume", *flags]  # fmt: skip
    return run_ranks(ranks, script, [str(arg) for arg in argv])


def one_error(outcome) -> str:
    """The only line on standard error but for the progress bar, of a run that failed."""
    assert set(outcome.codes) == {1}, outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line and "step/s" not in line]
    assert len(lines) == 1, outcome.stderr
    return lines[0]


def test_what_the_flags_alone_refuse(stopped, tmp_path):
    """A run that stopped after step 5; other held-out pairs matter to one that keeps the best."""
    path = stopped / "checkpoints" / "step_000005"
    flags = json.loads((path / "run.json").read_text())["args"]
    for changes, said in (
        ({}, None),
        ({"overwrite": True}, "replaces it; give one of them"),
        ({"out": str(tmp_path)}, f"--resume: {tmp_path} has no checkpoint; --save_every and "),
        ({"stop_after": 5}, "--stop_after 5: .*/step_000005 is at step 5; give a later step"),
        ({"stop_after": 6}, None),
        ({"eval_data": ["x"], "data": ["y"], "keep": 9}, None),
        ({"seed": 7, "lr": 2.0}, "settings differ: --lr was 0.01, now 2.0; --seed was 0, now 7;"),
        ({"flag_of_later": True}, "--flag_of_later was None, now True"),
        ({"patience": 2, "eval_data": ["x"]}, r"--eval_data was None, now \['x'\]; --patience was"),
    ):
        refusal = checkpoints.refusal_of_resume(Namespace(**flags | {"stop_after": None} | changes))
        assert refusal is None if said is None else re.search(said, refusal), refusal


DATED = "{{ strftime_now('%F') }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def test_a_run_is_resumed_on_another_day_with_the_date_of_its_start(llama_folder, pairs, tmp_path):
    """Of a chat template that writes the date; another date is refused, as other pairs."""
    model = shutil.copytree(llama_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(model)
    train = partial(trainings.train, model, pairs)
    flags, day = ["--template", "chat", "--save_every", 2], ["--template_date", "2024-07-26"]
    straight = train(tmp_path / "whole", *flags, *day, steps=6)
    out = tmp_path / "run"
    train(out, *flags, *day, "--stop_after", 4, steps=6)
    argv = ["--model", model, "--data", pairs, "--out", out, "--batch_size", 7, "--lr", LR]
    argv += [*flags, "--steps", 6, "--resume", "--template_date", "2025-01-01"]
    outcome = run_ranks(1, script, [str(word) for word in argv])
    assert outcome.codes == [1] and "training pairs" in outcome.stderr
    assert losses(train(out, *flags, "--resume", steps=6)) == losses(straight)


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--loss cdpo",
            "but settings differ: --label_smoothing was 0.0, now 0.1; --loss was 'dpo'",
        ),
        ("--max_length 9", "the training pairs are not those of "),
        ("--eval_share 0.5", "same eval_share, keys, max_length, preference, template, template_"),
    ],
)
def test_other_settings_and_other_data_are_refused(llama_folder, pairs, stopped, flags, message):
    before = contents(stopped)
    error = one_error(resume_with(llama_folder, pairs, stopped, *flags.split()))
    assert error.startswith("error: --resume") and message in error
    assert contents(stopped) == before


def test_another_format_version_is_refused(llama_folder, pairs, stopped, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "run")
    path = out / "checkpoints" / "step_000005"
    about = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(about | {"format": 4}))
    checksums.write(path, checksums.checksums(each for each in path.iterdir()))
    assert one_error(resume_with(llama_folder, pairs, out, ranks=2)) == (
        f"error: {path} has format version 4, this version of nanoalign reads 3; continue with the "
        "version that wrote it, or start a new run with another --out"
    )


# What is damaged -> (its file, the problem that the error names, what damages it).
DAMAGES = {
    "torn run.json": ("run.json", "is not as it was written", lambda path: cut(path)),
    "no shard": ("__1_0.distcp", "is missing", lambda path: path.unlink()),
    "a bit of a shard": ("__1_0.distcp", "is not as it was written", lambda path: flip(path)),
    "a bit of metadata": (".metadata", "is not as it was written", lambda path: flip(path)),
    "no checksums": ("checksums.json", "is missing", lambda path: path.unlink()),
    "checksums of less": ("checksums.json", "is damaged", lambda path: path.write_text("{}")),
}


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_error(llama_folder, pairs, stopped, tmp_path, damage):
    """On two ranks; the shard that is damaged is that of rank 1."""
    out = shutil.copytree(stopped, tmp_path / "run")
    file, problem, spoil = DAMAGES[damage]
    path = out / "checkpoints" / "step_000005"
    spoil(path / file)
    error = one_error(resume_with(llama_folder, pairs, out, ranks=2))
    assert error.startswith(f"error: the checkpoint {path} can't be read: {file} {problem}"), error
    assert error.endswith(
        "; remove it to --resume from an older one, or train again, with --overwrite"
    )


def test_a_damaged_line_of_the_metrics_is_one_error(llama_folder, pairs, stopped, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "run")
    lines = (out / "metrics.jsonl").read_text()
    flip(out / "metrics.jsonl")
    error = one_error(resume_with(llama_folder, pairs, out, ranks=2))
    assert error.startswith(f"error: --resume: {out / 'metrics.jsonl'} is not as it was written (")
    (out / "metrics.jsonl").unlink()
    outcome = resume_with(llama_folder, pairs, out, ranks=2)
    assert outcome.codes == [0, 0], outcome.stderr
    last = json.loads(lines.splitlines()[-1])["step"]
    assert min(line["step"] for line in metrics_of(out)) == last + 1


def test_the_model_of_the_start_is_read_once(world, llama_folder, tmp_path):
    """Its folder may be gone at the second checkpoint."""
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    of_run = checkpoints.Checkpoints(None, None, None, [], None, world, {"--model": folder})
    first = of_run.read_inputs()
    assert first["models"] == {"--model": checksums.digest_of_weights(llama_folder)}
    shutil.rmtree(folder)
    assert of_run.read_inputs() == first


# --- the fingerprint of the data


def test_the_fingerprint_changes_with_all_that_is_trained_on():
    def row(**changes) -> Row:
        fields = {"name": "a:1", "prompt": ids(1, 2), "responses": (ids(3), ids(4, 5))}
        fields |= {"extra": {"margins": torch.tensor([0.5]).numpy()}} | changes
        return Row(**fields)

    def ids(*tokens: int):
        return torch.tensor(tokens, dtype=torch.int32).numpy()

    rows = [row(), row(prompt=ids(9))]
    same = [row(name="b:7"), row(prompt=ids(9), notes=("cut",))]
    assert split.fingerprint(rows) == split.fingerprint(same)
    same[0].extra["reference_logps"] = torch.ones(2).numpy()  # of the reference, not of the data
    assert split.fingerprint(rows) == split.fingerprint(same)
    others = [
        rows[::-1],
        rows[:1],
        [row(prompt=ids(1)), rows[1]],
        [row(responses=(ids(3), ids(4, 6))), rows[1]],
        [row(responses=(ids(4, 5), ids(3))), rows[1]],
        [row(prompt=ids(1, 2, 3), responses=(ids(), ids(4, 5))), rows[1]],  # another border
        [row(pairs=((1, 0),)), rows[1]],
        [row(extra={"margins": torch.tensor([0.25]).numpy()}), rows[1]],
        [row(extra={}), rows[1]],
    ]
    prints = {split.fingerprint(each) for each in others}
    assert len(prints) == len(others) and split.fingerprint(rows) not in prints

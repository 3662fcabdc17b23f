"""python -m pytest tests/runs/test_replay.py

A step of a run is computed again: its loss is that of the log, and its rows are those of autograd.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import records, write_pairs
from trainings import losses, rm_without_picture

import train_dpo
import train_rm
from nanoalign.batch import collate
from nanoalign.data import rows
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.loop import Batcher, Objective, Settings
from nanoalign.losses import dpo_loss
from nanoalign.model import Policy
from nanoalign.runs import replay
from nanoalign.weights.folders import load_tokenizer

ROW = re.compile(r"^ +(\S+) +(\S+) +(\d+)  (pairs:\d+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def two_ranks(train, tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("runs") / "two"
    flags = ("--shard_size", 1, "--save_every", 4, "--keep", 9, "--micro_batch_tokens", 90)
    return out, train(out, *flags, ranks=2)


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    """When each file of a run was changed, and what it holds; of folders only the first."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (out, *out.rglob("*"))
    }


def replayed(out: Path, step: int, capsys, *flags: object, main=train_dpo.main) -> str:
    main([str(word) for word in ("--out", out, "--replay", step, *flags)])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "origin"),
    [(3, "from the start by 2 steps"), (7, "from {} by 2 steps"), (9, " by 0 steps")],
)
def test_a_step_of_two_ranks_has_the_loss_of_the_log(two_ranks, capsys, step, origin):
    out, metrics = two_ranks
    before = files(out)
    printed = replayed(out, step, capsys)
    assert files(out) == before
    assert origin.format(out / "checkpoints" / "step_000004") in printed
    loss = losses(metrics)[step - 1]
    found = float(re.search(r"^loss +(\S+), in the log", printed, re.MULTILINE)[1])
    assert found == pytest.approx(loss, rel=1e-5) and "within rounding" in printed
    of_rows = [float(row[0]) for row in ROW.findall(printed)]
    assert len(of_rows) == 7 and of_rows == sorted(of_rows, reverse=True)
    assert sum(of_rows) / 7 == pytest.approx(loss, rel=1e-5)


def test_rows_are_those_of_autograd(llama_folder, two_ranks, world, capsys):
    """Of the first step, by a policy of the notebooks in the padded layout."""
    out, metrics = two_ranks
    printed = replayed(out, 1, capsys)
    args = train_dpo.parse_args(["--out", str(out), "--replay", "1"])
    data = rows.load_rows(rows.DataSettings.of(args), load_tokenizer(llama_folder), out, world)
    policy, reference = Policy.load(llama_folder), Policy.load(llama_folder, trainable=False)
    expected, gradients = {}, []
    for row in Settings.of(args).step_rows(0, data.rows):
        batch = collate([row])
        (chosen, rejected), (ref_chosen, ref_rejected) = policy(batch), reference(batch)
        loss = dpo_loss(chosen, rejected, ref_chosen.detach(), ref_rejected.detach(), 0.1)[0]
        parts = torch.autograd.grad(loss, list(policy.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
        expected[row.name] = loss.item(), gradients[-1].norm().item(), len(row)
    found = {name: tuple(map(float, values)) for *values, name in ROW.findall(printed)}
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values == pytest.approx(expected[name], rel=1e-4), name
    norm = torch.stack(gradients).mean(0).norm().item()
    assert norm == pytest.approx(
        next(m["grad_norm"] for m in metrics if "grad_norm" in m), rel=1e-4
    )
    largest = max(expected, key=lambda name: expected[name][1])
    assert re.search(rf"largest +grad_norm \S+ \(median \S+\) at {largest}$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss", "kto"],
        ["--loss", "aot"],
        ["--loss", "bco_pair"],
        ["--keep_best", "--eval_every", 2],
        ["--sync_reference_every", 2],
        ["--lora_rank", 2, "--precompute_reference"],
    ],
    ids=lambda flags: flags[1] if flags[0] == "--loss" else flags[0].strip("-"),
)
def test_what_a_run_keeps_beside_the_model_is_restored(train, tmp_path, capsys, flags):
    train(tmp_path / "run", *flags, "--save_every", 3, steps=6)
    capsys.readouterr()
    printed = replayed(tmp_path / "run", 5, capsys)
    assert "step_000003 by 1 steps" in printed and "within rounding" in printed


def test_the_gradient_of_a_row_in_float16_is_that_of_the_step(train, tmp_path, capsys):
    """Also where it is so small that without the loss scale much of it would be 0."""
    flags = ("--precision", "fp16", "--batch_size", 1, "--beta", 1e-6)
    metrics = train(tmp_path / "run", *flags, steps=1)
    ((_, norm, *_),) = ROW.findall(replayed(tmp_path / "run", 1, capsys))
    logged = next(line["grad_norm"] for line in metrics if "grad_norm" in line)
    assert float(norm) == pytest.approx(logged, rel=1e-4)


def test_a_step_of_a_reward_model(train, tmp_path, capsys):
    train(tmp_path / "run", "--length_debias", steps=4, main=rm_without_picture)
    assert "within rounding" in replayed(tmp_path / "run", 3, capsys, main=train_rm.main)
    with pytest.raises(
        RunError, match="a run of another script or version, which had the flags cente"
    ):
        replayed(tmp_path / "run", 3, capsys)


def test_what_differs_is_said(two_ranks, tmp_path, capsys):
    """The log has a loss that is 1e-4 larger, and another learning rate; torch is another one."""
    out = copy_of(two_ranks[0], tmp_path)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 6 and "loss" in line:
            line |= {"loss": line["loss"] * 1.0001, "lr": line["lr"] * 2}
    (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 7, "lo')
    settings = json.loads((out / "args.json").read_text()) | {"torch": "1.0"}
    (out / "args.json").write_text(json.dumps(settings))
    printed = replayed(out, 6, capsys, "--micro_batch_tokens", 200)
    assert "a relative difference of 0.0001, beyond rounding" in printed
    assert re.search(r"metrics +lr \S+ in the log, \S+ here$", printed, re.MULTILINE)
    changed = re.search(r"settings +(.*)", printed)[1]
    assert "torch was '1.0'" in changed and "ranks was 2, now 1" in changed
    assert "micro_batch_tokens was 90, now 200" in changed
    assert "before      1 steps were computed again" in printed
    (out / "metrics.jsonl").unlink()
    assert "the log has no step 6" in replayed(out, 6, capsys)


def copy_of(out: Path, folder: Path) -> Path:
    for path in out.rglob("*"):
        if path.is_file():
            copy = folder / "copy" / path.relative_to(out)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return folder / "copy"


REFUSED = {
    "no such step": ([11], {}, "--replay 11: the run has 10 steps"),
    "torchrun": ([3], {"WORLD_SIZE": "2"}, "start it without torchrun"),
    "resume": ([3, "--resume"], {}, "leave out --resume, --overwrite and --audit"),
    "another flag": ([3, "--beta", 0.2], {}, "but flags differ: --beta was 0.1, now 0.2"),
    "another schedule": ([3, "--steps", 99], {}, "but flags differ: --steps was 10, now 99"),
    "other rows": ([3, "--max_length", 20], {}, "--max_length was 1024, now 20"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_step_of_the_run_is_refused(two_ranks, monkeypatch, capsys, name):
    flags, environment, message = REFUSED[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(RunError, match=message):
        replayed(two_ranks[0], *flags[:1], capsys, *flags[1:])


def test_other_data_and_a_folder_without_a_run_are_refused(two_ranks, tmp_path, capsys):
    others = write_pairs(tmp_path / "others.jsonl", 25, seed=1)
    with pytest.raises(RunError, match=r"\d+ records are in --data or in what .* not in both"):
        replayed(two_ranks[0], 3, capsys, "--data", others)
    with pytest.raises(RunError, match="has no run: "):
        replayed(tmp_path / "none", 3, capsys)
    assert not (tmp_path / "none").exists()


def test_data_that_have_lost_records_are_refused(train, pairs, tmp_path, capsys):
    train(tmp_path / "run", "--eval_share", 0, steps=3)
    (tmp_path / "pairs.jsonl").write_text("".join(pairs.open().readlines()[:-4]))
    with pytest.raises(RunError, match="4 records are in --data or in what"):
        replayed(tmp_path / "run", 2, capsys, "--data", tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("line", ["3", "[]", '{"step": 6, "loss": null}', "\xff"])
def test_a_line_that_is_not_of_a_log_is_one_line_of_error(two_ranks, tmp_path, capsys, line):
    out = copy_of(two_ranks[0], tmp_path)
    (out / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(RunError, match=r"metrics.jsonl:1: no line of a run's metrics"):
        replayed(out, 6, capsys)


def test_a_row_without_a_number_is_shown_first(capsys):
    nan = float("nan")
    found = [replay.OfRow(0.5, 1.0, 9, "a:1"), replay.OfRow(nan, nan, 7, "a:2")]
    replay.print_rows(found)
    printed = capsys.readouterr().out
    assert printed.index("a:2") < printed.index("a:1")
    assert printed.count("nan") == 6 and "largest     tokens 9" in printed


def test_no_gradient_is_kept(llama_folder, tokenizer, world):
    """The loss is the policy's negative log-probability of the chosen response."""
    policy = Policy.load(llama_folder)
    objective = Objective(lambda batch: (-policy(batch)[batch.chosen], {}))
    encoded = encode_all(records(3), tokenizer)
    found = replay.rows_of_step(policy, objective, encoded, Batcher(world, 512))
    assert [row.name for row in found] == [row.name for row in encoded]
    assert all(row.grad_norm > 0 for row in found)
    assert all(parameter.grad is None for parameter in policy.parameters())

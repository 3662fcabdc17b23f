"""python -m pytest tests/test_scripts.py

What a user meets: one clear error for bad input on any number of ranks, and nothing lost by it;
torchrun.
"""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama, write_pairs
from ranks import run_ranks
from test_weights import spoiled

import train_dpo
from nanoalign import distributed
from nanoalign.distributed import run

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 2}


def script(argv: list[str]) -> None:
    sys.argv = ["train_dpo.py", *argv]
    run(train_dpo.main)


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder, tokenizer) -> Path:
    """A folder with a model, good pairs, bad files, spoiled models and an old run."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(llama_folder, folder / "model")
    write_pairs(folder / "pairs.jsonl", 12)
    write_pairs(folder / "others.jsonl", 12, seed=1)
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text(json.dumps(PAIR) + '\n{"prompt": oops}\n')
    (folder / "unknown.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (folder / "silent.jsonl").write_text(json.dumps(PAIR | {"rejected": ""}) + "\n")
    (folder / "label2.jsonl").write_text(json.dumps(PKU) + "\n")
    (folder / "same.jsonl").write_text(json.dumps(PAIR | {"rejected": "c"}) + "\n")
    for what in ("no weights", "other architecture", "no config"):
        spoiled(llama_folder, folder / what, what)
    spoiled(llama_folder, folder / "no eos", "")
    byte_tokenizer(eos_token=None).save_pretrained(folder / "no eos")
    tiny_llama(vocab_size=300).save_pretrained(folder / "other vocabulary")
    larger = byte_tokenizer()
    larger.add_tokens(["<more>"])
    larger.save_pretrained(folder / "other vocabulary")
    outcome = run_ranks(1, script, argv(folder, "old run", "--stop_after", 1))
    assert outcome.codes == [0], outcome.stderr
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("mine")
    return folder


def argv(folder: Path, out: str, *flags: object) -> list[str]:
    """A run of 2 steps; later flags win over these."""
    base = ["--model", folder / "model", "--data", folder / "pairs.jsonl", "--template", "raw",
            "--batch_size", 4, "--steps", 2, "--out", folder / out]  # fmt: skip
    return [str(arg) for arg in [*base, *flags]]


BAD_INPUT = {
    "missing file": ("new", ["--data", "missing.jsonl"], "data file '.*missing.jsonl' does not exist"),
    "empty file": ("new", ["--data", "empty.jsonl"], "holds no records"),
    "broken line": ("new", ["--data", "broken.jsonl"], r"broken\.jsonl:2: not valid JSON"),
    "unknown keys": ("new", ["--data", "unknown.jsonl"], r":1: unknown keys \['answer', 'question'\]"),
    "empty response": ("new", ["--data", "silent.jsonl"], r"silent\.jsonl:1: the rejected response is empty"),
    "label of 2": ("new", ["--data", "label2.jsonl"], r"label2\.jsonl:1: better_response_id is 2"),
    "equal responses": ("new", ["--data", "same.jsonl", "--eval_share", "0"], "no pairs are left"),
    "no EOS": ("new", ["--model", "no eos"], "the tokenizer has no EOS token"),
    "no weights": ("new", ["--model", "no weights"], "has no weights"),
    "no config": ("new", ["--model", "no config"], "no config.json"),
    "missing model": ("new", ["--model", "nowhere"], "model folder '.*nowhere' does not exist"),
    "other architecture": ("new", ["--model", "other architecture"], "not those of the GPT2LMHeadModel"),
    "other vocabulary": ("new", ["--reference", "other vocabulary"], "has another vocabulary"),
    "old run": ("old run", [], "holds another run; continue it with --resume, replace it"),
    "foreign folder": ("full", ["--overwrite"], "holds files that are not a run's"),
    "model's folder": ("model", ["--overwrite"], "is the folder of a model that this run reads"),
    "file as folder": ("pairs.jsonl", [], "is a file; give a folder"),
    "no folder to resume": ("new", ["--resume"], "holds no checkpoint"),
    "resume and overwrite": ("old run", ["--resume", "--overwrite"], "give one of them"),
    "resume, other data": ("old run", ["--resume", "--data", "others.jsonl"], "training pairs are others"),
    "resume, other batch": ("old run", ["--resume", "--batch_size", "5"], "--batch_size was 4, now 5"),
    "batch of 0": ("new", ["--batch_size", "0"], "expected a whole number of at least 1, got '0'"),
    "beta of 0": ("new", ["--beta", "0"], "--beta: expected a number above 0"),
    "lr nan": ("new", ["--lr", "nan"], "--lr: expected a number of at least 0, got 'nan'"),
    "resume, other lr": ("old run", ["--resume", "--lr", "1"], "--lr was 1e-06, now 1.0"),
    "cache that is a file": ("new", ["--cache", "pairs.jsonl"], "cache folder .* can't be written"),
    "unknown flag": ("new", ["--batchsize", "3"], "unrecognized arguments: --batchsize"),
    "shortened flag": ("new", ["--batch", "3"], "unrecognized arguments: --batch 3"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_is_one_clear_error_and_loses_nothing(world, ranks, subtests):
    """Exit code 1, one line in all on standard error, no traceback, no file touched."""
    before = contents(world)
    for name, (out, flags, message) in BAD_INPUT.items():
        with subtests.test(name):
            paths = {p.name for p in world.iterdir()} | {"missing.jsonl", "nowhere"}
            flags = [str(world / flag) if flag in paths else flag for flag in flags]
            outcome = run_ranks(ranks, script, argv(world, out, *flags))
            assert outcome.codes == [1] * ranks, outcome.stderr
            lines = outcome.stderr.splitlines()
            assert len(lines) == 1, outcome.stderr
            assert lines[0].startswith("error: ")
            assert re.search(message, lines[0]), lines[0]
    assert contents(world) == before


def test_an_error_of_one_rank_is_said_by_that_rank():
    outcome = run_ranks(2, _fail_on_rank_1)
    assert outcome.codes[1] == 1 and outcome.stderr == "error: only rank 1 saw this\n"


def _fail_on_rank_1() -> None:
    def main():
        if distributed.setup().rank == 1:
            raise distributed.RunError("only rank 1 saw this")

    distributed._SPEAKS_WITHIN = 1.0
    distributed.run(main)


@pytest.mark.parametrize("how", ["killed", "a bug"])
def test_a_lost_rank_is_said_in_a_line_and_a_bug_in_full(how):
    outcome = run_ranks(2, _lose_rank_1, how)
    assert outcome.codes == [1, 9 if how == "killed" else 70]
    ours = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1 and ours[0].startswith("error: rank 0 has lost contact with another rank")
    assert outcome.stderr.count("Traceback") == outcome.stderr.count("\nRuntimeError: a bug")
    assert ("RuntimeError: a bug" in outcome.stderr) == (how == "a bug")


def _lose_rank_1(how: str) -> None:
    def main():
        world = distributed.setup()
        distributed.sum_over_ranks(torch.ones(1))
        if world.rank == 1:
            if how == "killed":
                os._exit(9)
            raise RuntimeError("a bug")
        distributed.sum_over_ranks(torch.ones(1))

    distributed.run(main)


def _train_from_another_folder(argv: list[str]) -> None:
    """--out is a relative path, and the ranks have folders of their own to start from."""
    folder = Path(argv[-1]) / os.environ["RANK"]
    folder.mkdir()
    os.chdir(folder)
    script(argv[:-1])


def test_out_must_be_shared_by_all_hosts(world, tmp_path):
    flags = argv(world, "shared", "--out", "run", tmp_path)
    outcome = run_ranks(2, _train_from_another_folder, flags)
    assert outcome.codes == [1, 1]
    assert outcome.stderr.splitlines()[-1] == (
        "error: run/metrics.jsonl was written by rank 0, and rank 1 does not see it; --out must be on a "
        "disk that all hosts share"
    )


def _train_on_a_full_disk(argv: list[str]) -> None:
    """On rank 0, files can't grow beyond 2,000 bytes: the arguments fit, the metrics of a few steps don't."""
    if os.environ["RANK"] == "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    script(argv)


def test_a_full_disk_ends_all_ranks_with_one_error(world):
    outcome = run_ranks(2, _train_on_a_full_disk, argv(world, "full disk", "--steps", 30))
    assert outcome.codes == [1, 1]
    lines = [line for line in outcome.stderr.splitlines() if line and "step" not in line]
    path = world / "full disk" / "metrics.jsonl"
    message = f"{path} can't be written: OSError: [Errno {errno.EFBIG}] File too large"
    assert lines == [f"error: {message}"], outcome.stderr
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["eval/loss"] and len(lines) > 1
    shutil.rmtree(world / "full disk")


def test_torchrun(world, tmp_path):
    """The real launcher: two ranks train, and a bad flag ends it with code 1 and our one line."""

    def torchrun(*flags: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
        ]
        script = Path(train_dpo.__file__)
        return subprocess.run(
            [*command, script, *flags], capture_output=True, text=True, env=os.environ, timeout=120
        )

    good = torchrun(*argv(world, "torchrun"))
    assert good.returncode == 0, good.stderr
    assert (world / "torchrun" / "model.safetensors").exists()
    bad = torchrun(*argv(world, "bad", "--batch_size", "0"))
    assert bad.returncode == 1
    assert bad.stderr.count("error: argument --batch_size: expected a whole number") == 1
    assert 'train_dpo.py", line' not in bad.stderr  # no traceback of a worker
    shutil.rmtree(world / "torchrun")


def test_help_needs_no_model():
    outcome = run_ranks(1, script, ["--help"])
    assert outcome.codes == [0] and "--micro_batch_tokens" in outcome.stdout


def test_self_check_stops_a_policy_that_is_not_its_reference(llama_folder, tmp_path):
    outcome = run_ranks(
        2,
        _disturbed,
        str(llama_folder),
        str(tmp_path / "run"),
        str(write_pairs(tmp_path / "p.jsonl", 9)),
    )
    assert outcome.codes == [1, 1]
    assert (
        "self-check: before the first step, with policy == reference, losses are up to"
        in outcome.stderr
    )
    assert not (tmp_path / "run").exists()


def _disturbed(model: str, out: str, data: str) -> None:
    """The reference is another function than the policy: its scores are off by a nat."""
    from nanoalign.models import Policy

    class Off(Policy):
        def forward(self, batch):
            logps = super().forward(batch)
            return logps if any(p.requires_grad for p in self.parameters()) else logps + 1

    train_dpo.Policy = Off
    script(["--model", model, "--data", data, "--out", out, "--template", "raw"])


def test_self_check_stops_an_architecture_that_can_not_share_rows(tmp_path):
    """A model that ignores the tree it is given: its responses see each other."""
    shutil.copytree(byte_model(tmp_path), tmp_path / "copy")
    outcome = run_ranks(
        1,
        _maskless,
        str(tmp_path / "copy"),
        str(tmp_path / "run"),
        str(write_pairs(tmp_path / "p.jsonl", 9)),
    )
    assert outcome.codes == [1]
    assert "can't share rows: use --no-share_prefix" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def byte_model(folder: Path) -> Path:
    tiny_llama().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def _maskless(model: str, out: str, data: str) -> None:
    from nanoalign.models import Policy

    class Maskless(Policy):
        def hidden(self, batch):
            return self.model.base_model(
                input_ids=batch.tokens, position_ids=batch.positions, use_cache=False
            ).last_hidden_state

    train_dpo.Policy = Maskless
    script(["--model", model, "--data", data, "--out", out, "--template", "raw"])

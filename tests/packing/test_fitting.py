"""python -m pytest tests/packing/test_fitting.py

Micro-batches sized by memory, with a counted allocator: bytes follow the tokens of a micro-batch.
"""

import json
from argparse import Namespace

import pytest
import torch
from conftest import tiny_llama, write_pairs
from processes import run_ranks
from test_plan import random_rows
from trainings import assert_same_curve, metrics_of, without_picture

import train_dpo
import train_rm
from nanoalign import loop
from nanoalign.errors import RunError
from nanoalign.flags import Parser, add_forward_arguments, add_training_arguments
from nanoalign.model import Policy
from nanoalign.packing import fitting
from nanoalign.packing.packed import PackedBatcher
from nanoalign.runs import result

FIXED, OF_TOKEN = 10_000, 100  # bytes beside any micro-batch, and of each of its tokens


class Counted:
    """A fake of fitting.Allocator with so many bytes; models call `take` in each forward."""

    def __init__(self, bytes_: int):
        self.bytes, self.most, self.forwards = bytes_, 0, []

    def take(self, tokens: int) -> None:
        self.forwards.append(tokens)
        self.most = max(self.most, FIXED + OF_TOKEN * tokens)
        if self.most > self.bytes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has")

    def room(self) -> int:
        return self.bytes

    def most_held(self, function) -> int:
        self.most = 0
        function()
        return self.most


def counting(allocator: Counted, forward=Policy.forward):
    """A forward that asks the allocator first, where it makes gradients."""

    def counted(self: Policy, batch) -> torch.Tensor:
        if torch.is_grad_enabled():
            allocator.take(batch.inputs["input_ids"].numel())
        return forward(self, batch)

    return counted


@pytest.fixture
def setting(world, monkeypatch):
    """(a policy, its objective, rows of about 90 tokens, flags)"""
    policy, rows = Policy(tiny_llama()), random_rows(200, seed=0)
    monkeypatch.setattr(fitting, "MICRO_BATCH_TOKENS", 1000)

    def loss_of_batch(batch):
        logps = policy(batch)
        return -logps[batch.chosen], {"loss": -logps[batch.chosen]}

    args = Namespace(micro_batch_tokens="auto", gradient_sync="micro_batch", shard_size=None)
    batcher = PackedBatcher(world, 1000)
    batcher.prepare(policy)
    return policy, loop.Objective(loss_of_batch), rows, batcher, args


def moments_of(policy: Policy) -> int:
    return 2 * 4 * policy.count_parameters()


@pytest.mark.parametrize("tokens", [150, 700, 1000, 5000])
def test_the_largest_size_leaves_a_tenth_free(setting, monkeypatch, tokens):
    """Where 1,000 tokens do not fit, smaller ones are probed. AdamW's moments are counted."""
    policy, objective, rows, batcher, args = setting
    room = FIXED + OF_TOKEN * tokens + moments_of(policy)
    allocator = Counted(-(-room * 10 // 9))
    monkeypatch.setattr(Policy, "forward", counting(allocator))
    if tokens == 150:  # moments are not held yet: less than is free at the end, so that probes fail
        monkeypatch.setattr(allocator, "take", limited(allocator, 400))
    found = fitting.fit(policy, objective, rows, batcher, args, allocator)
    assert found.micro_batch_tokens == batcher.tokens
    assert tokens - 2 <= batcher.tokens <= tokens
    assert args.micro_batch_tokens == "auto" and all(p.grad is None for p in policy.parameters())


def limited(allocator: Counted, tokens: int):
    take = allocator.take

    def limit(asked: int) -> None:
        if asked > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has")
        take(asked)

    return limit


def test_no_room_is_one_error(setting, monkeypatch):
    policy, objective, rows, batcher, args = setting
    allocator = Counted(FIXED + OF_TOKEN * 1000)
    allocator.room = lambda: FIXED + moments_of(policy)  # a tenth of it stays free
    monkeypatch.setattr(Policy, "forward", counting(allocator))
    with pytest.raises(RunError, match="GB are needed beside any micro-batch, of .*GB; give more"):
        fitting.fit(policy, objective, rows, batcher, args, allocator)
    monkeypatch.setattr(allocator, "take", limited(allocator, 100))
    with pytest.raises(torch.OutOfMemoryError):  # of 256 tokens
        fitting.fit(policy, objective, rows, batcher, args, allocator)


def test_few_data_need_no_more_than_they_have(setting, monkeypatch):
    policy, objective, rows, batcher, args = setting
    monkeypatch.setattr(Policy, "forward", counting(allocator := Counted(10**9)))
    assert fitting.fit(policy, objective, rows[:2], batcher, args, allocator).micro_batch_tokens
    assert batcher.tokens == 1000
    batcher.tokens = 77
    given = Namespace(micro_batch_tokens=77)
    assert fitting.fit(policy, objective, rows, batcher, given, allocator) is given
    assert batcher.tokens == 77


def test_the_word_is_for_training_alone():
    def parsed(add, *argv):
        add(parser := Parser("Test."))
        return parser.parse_args(argv).micro_batch_tokens

    def training(parser):
        add_training_arguments(parser, "tiny", "runs/x", warmup=0.1, lr=1e-6, tiny_lr=5e-4)
        parser.set_defaults(model="tiny")

    assert parsed(training, "--micro_batch_tokens", "auto") == "auto"
    assert parsed(training, "--micro_batch_tokens", "12") == 12
    assert parsed(training) == 2048  # no GPU here
    for add, text in ((training, "aut"), (training, "0"), (add_forward_arguments, "auto")):
        with pytest.raises(RunError, match=f"whole number of at least 1, got '{text}'"):
            parsed(add, "--micro_batch_tokens", text)


@pytest.fixture
def run(llama_folder, tmp_path, monkeypatch):
    """Trains 5 steps of 16 pairs, which have about 800 tokens; the lines of metrics.jsonl."""
    monkeypatch.setattr(result, "finish", lambda *_: None)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 60)

    def run(name: str, *flags: object, script=train_dpo) -> list[dict]:
        script.main(
            [str(x) for x in ("--model", llama_folder, "--data", pairs, "--template", "raw", "--lr",
                              1e-2, "--steps", 5, "--batch_size", 16, "--eval_every", 2, "--out",
                              tmp_path / name, *flags)]
        )  # fmt: skip
        return metrics_of(tmp_path / name)

    return run


@pytest.mark.parametrize("failing, loss", [(0, "dpo"), (2, "kto")])  # the step, from 0
def test_a_step_without_memory_is_done_again(run, monkeypatch, capsys, failing, loss):
    """The curve is that of a run with half as many tokens from the start, and each step is there.

    The forward that fails is the second of the step's.
    """
    flags = ("--loss", loss, "--micro_batch_tokens", 600)
    calm = run("calm", *flags)
    forward, calls, steps = Policy.forward, [0], []
    get_lr = loop.get_lr
    monkeypatch.setattr(
        loop, "get_lr", lambda step, *rest: steps.append(step) or get_lr(step, *rest)
    )

    def failing_once(self: Policy, batch) -> torch.Tensor:
        if torch.is_grad_enabled() and steps and steps[-1] == failing:
            calls[0] += 1
            if calls[0] == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch)

    monkeypatch.setattr(Policy, "forward", failing_once)
    again = run("again", *flags)
    assert steps == [*range(failing + 1), *range(failing, 5)]
    assert [line["step"] for line in again] == [line["step"] for line in calm]
    assert_same_curve(calm, again)
    line = f"step {failing + 1} ran out of it with 600 tokens a micro-batch; it is done again"
    assert line in (printed := capsys.readouterr().out) and "with 300\n" in printed


def test_a_second_time_ends_the_run(run, monkeypatch):
    monkeypatch.setattr(Policy, "forward", counting(Counted(FIXED + OF_TOKEN * 250)))
    with pytest.raises(torch.OutOfMemoryError):
        run("run", "--micro_batch_tokens", 600)  # and with 300


def test_nothing_is_done_again_after_the_optimizer(run, monkeypatch):
    """Where memory ends in AdamW or in an evaluation, part of the step is done."""
    steps = []

    def step(self, *args) -> None:
        steps.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", torch.optim.Optimizer.profile_hook_step(step))
    with pytest.raises(torch.OutOfMemoryError):
        run("run")
    assert steps == [1]


@pytest.mark.parametrize("script", [train_dpo, train_rm])
def test_auto_is_kept_as_a_number(run, tmp_path, monkeypatch, script, capsys):
    """And the curve is that of another size: the gradients of the probes leave no trace."""
    calm = run("calm", "--micro_batch_tokens", 700, script=script)
    allocator = Counted(10**9)
    fit = fitting.fit
    monkeypatch.setattr(fitting, "fit", lambda *given: fit(*given, allocator))
    monkeypatch.setattr(fitting, "Allocator", lambda device: allocator)
    model_class = Policy if script is train_dpo else train_rm.RewardModel
    forward = counting(allocator, model_class.forward)
    monkeypatch.setattr(model_class, "forward", forward)
    again = run("auto", "--micro_batch_tokens", "auto", script=script)
    assert_same_curve(calm, again)
    kept = json.loads((tmp_path / "auto" / "args.json").read_text())["micro_batch_tokens"]
    assert kept == fitting.MOST and f"memory      {kept:,} tokens" in capsys.readouterr().out


def on_two_ranks(argv: list[str]) -> None:
    """A run in which rank 1 has room for fewer tokens."""
    fitting.MICRO_BATCH_TOKENS = 400  # of which 200 and 400 are tried first
    fit, out = fitting.fit, Counted(10**9)

    def fit_counted(model, objective, rows, batcher, args):
        room = FIXED + OF_TOKEN * (900 if batcher.world.rank else 2000)
        local = sum(2 * p.to_local().nbytes for p in model.parameters())
        out.bytes = -(-(room + local) * 10 // 9)
        return fit(model, objective, rows, batcher, args, out)

    fitting.fit, Policy.forward = fit_counted, counting(out)
    without_picture(argv)


def test_ranks_agree_on_the_size_of_the_smallest(llama_folder, tmp_path):
    argv = ["--model", llama_folder, "--data", write_pairs(tmp_path / "pairs.jsonl", 60),
            "--template", "raw", "--steps", 2, "--micro_batch_tokens", "auto", "--out",
            tmp_path / "run"]  # fmt: skip
    outcome = run_ranks(2, on_two_ranks, [str(x) for x in argv])
    assert outcome.codes == [0, 0], outcome.stderr
    kept = json.loads((tmp_path / "run" / "args.json").read_text())["micro_batch_tokens"]
    assert 898 <= kept <= 900

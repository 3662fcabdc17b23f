"""python -m pytest tests/core/test_loop.py"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import records
from processes import run_ranks
from torch.distributed.tensor import DTensor

import train_dpo
from nanoalign.batch import Row, collate
from nanoalign.distributed import setup
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.loop import Batcher, Objective, Settings, evaluate, get_lr, step_indices, train
from nanoalign.metrics import Means
from nanoalign.model import Policy
from nanoalign.packing.packed import PackedBatcher
from nanoalign.packing.self_check import check_layout, prepare

SETTINGS = Settings(batch_size=4, epochs=2, steps=None, lr=1e-3, warmup=0.25, schedule="linear",
                 max_grad_norm=0.7, eval_every=None, seed=3)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode_all(records(10), tokenizer)


class Run:
    """A policy that is trained by loop.train, and what was logged."""

    def __init__(
        self, folder, rows, world, layout=PackedBatcher, tokens=60, settings=SETTINGS, **options
    ):
        self.policy, reference = Policy.load(folder), Policy.load(folder, trainable=False)
        batcher = layout(world, tokens)
        for model in (self.policy, reference):
            batcher.prepare(model)
        loss = partial(train_dpo.loss_of_batch, self.policy, reference, 0.5, 0.1)
        optimizer = torch.optim.AdamW(self.policy.parameter_groups(0.1), lr=1.0)
        self.lines = []
        log = lambda step, metrics: self.lines.append((step, metrics))  # noqa: E731
        self.objective = options.pop("objective", Objective)(loss)
        train(
            self.policy, optimizer, self.objective, rows[:9], {"eval": rows[9:]}, batcher, settings,
            log, **options,
        )  # fmt: skip


def plain_curve(folder, rows) -> list[tuple[float, float]]:
    """The oracle: (loss, gradient norm) of each step, by the textbook and one pair at a time."""
    policy, reference = Policy.load(folder), Policy.load(folder, trainable=False)
    matrices = [p for p in policy.parameters() if p.ndim >= 2]
    vectors = [p for p in policy.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    )
    curve = []
    for step in range(6):  # two epochs of 9 rows, 4 at a time: 4, 4, 1
        epoch, place = divmod(step, 3)
        order = np.random.default_rng((3, epoch)).permutation(9)[place * 4 : place * 4 + 4]
        lr = [1e-3 / 2, 1e-3 * 1, 1e-3 * 0.8, 1e-3 * 0.6, 1e-3 * 0.4, 1e-3 * 0.2][step]
        losses = []
        for i in order:
            batch = collate([rows[i]])
            w, l = policy.textbook(batch) - reference.textbook(batch).detach()  # noqa: E741
            h = 0.5 * (w - l)
            losses.append(-0.9 * torch.log(torch.sigmoid(h)) - 0.1 * torch.log(torch.sigmoid(-h)))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm()
        for p in policy.parameters():
            p.grad *= min(1.0, 0.7 / norm.item())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve


@pytest.mark.parametrize("layout", [Batcher, PackedBatcher])
def test_the_loop_equals_plain_lines(llama_folder, rows, world, layout):
    """Loss and gradient norm of six steps: label smoothing, weight decay, clipping, warm-up."""
    run = Run(llama_folder, rows, world, layout)
    steps = [metrics for step, metrics in run.lines if step and "loss" in metrics]
    for found, (loss, norm) in zip(steps, plain_curve(llama_folder, rows), strict=True):
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert [metrics["epoch"] for metrics in steps] == pytest.approx([n / 3 for n in range(1, 7)])
    # Before the first step, and after each of a short run.
    assert [step for step, metrics in run.lines if "eval/loss" in metrics] == [*range(7)]
    assert run.lines[0][1]["eval/loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_evaluations_are_exact_means(llama_folder, rows, world):
    policy, reference = Policy.load(llama_folder), Policy.load(llama_folder, trainable=False)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.01)
    loss = partial(train_dpo.loss_of_batch, policy, reference, 0.1, 0.0)
    found = evaluate(Objective(loss), {"eval": rows, "none": []}, Batcher(world, 100))
    chosen, rejected = [], []
    for row in rows:
        w, l = (policy.textbook(collate([row])) - reference.textbook(collate([row]))).tolist()  # noqa: E741
        chosen.append(0.1 * w)
        rejected.append(0.1 * l)
    margins = np.subtract(chosen, rejected)
    assert found["eval/loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)
    assert found["eval/rewards/chosen"] == pytest.approx(np.mean(chosen), rel=1e-4)
    assert found["eval/rewards/accuracies"] == pytest.approx((margins > 0).mean())
    assert not any(key.startswith("none/") for key in found)


def test_save_ends_a_run_and_start_continues_it(llama_folder, rows, world):
    saved = []

    def save(step, last, metrics):
        saved.append((step, last, metrics["loss"], metrics.get("eval/loss")))
        return step == 2

    settings = replace(SETTINGS, eval_every=2)
    run = Run(llama_folder, rows, world, settings=settings, save=save)
    assert [each[:2] for each in saved] == [(1, False), (2, False)]
    of = {(step, key): value for step, metrics in run.lines for key, value in metrics.items()}
    assert [each[2:] for each in saved] == [
        (of[1, "loss"], None), (of[2, "loss"], of[2, "eval/loss"])]  # fmt: skip
    run = Run(llama_folder, rows, world, start=4)
    assert [step for step, metrics in run.lines if "loss" in metrics] == [5, 6]
    with pytest.raises(RunError, match="the checkpoint is at step 7 of 6; raise --steps"):
        Run(llama_folder, rows, world, start=7)


def test_an_objective_sees_whole_steps(llama_folder, rows, world):
    """before_step gets all rows of a step or evaluation, after_step the means of the step."""
    seen = []

    class Watching(Objective):
        def before_step(self, rows, batcher):
            seen.append(("before", len(rows), sum(len(batch.rows) for batch in batcher(rows))))

        def after_step(self, step, metrics):
            seen.append(("after", step, "loss" in metrics))

    Run(llama_folder, rows, world, objective=Watching, settings=replace(SETTINGS, steps=1))
    assert seen == [("before", 1, 1), ("before", 4, 4), ("after", 1, True), ("before", 1, 1)]


# --- the loop by itself: a loss of two numbers a and b, on rows whose tokens do not matter


class Two:
    """Trains a and b, from 1, by gradient descent at a rate of 1/8: their values, all lines."""

    def __init__(self, loss, world, rows=9, groups=({}, {}), start=0, held_out=1, **flags):
        model = torch.nn.ParameterList(torch.ones(1) for _ in range(2))
        groups = [{"params": [p]} | group for p, group in zip(model, groups, strict=True)]
        settings = replace(SETTINGS, **{"schedule": "constant", "warmup": 0, "lr": 1 / 8} | flags)
        self.lines, rows = [], [Row("row", np.array([1]), (np.array([1]),) * 2)] * rows

        def loss_of_batch(batch):
            losses = loss(*model).expand(len(batch.chosen))
            return losses, {"loss": losses}

        train(
            model, torch.optim.SGD(groups), Objective(loss_of_batch), rows[held_out:],
            {"eval": rows[:held_out]}, Batcher(world, 8), settings,
            lambda step, metrics: self.lines.append((step, metrics)), start=start,
        )  # fmt: skip
        self.values = [p.item() for p in model]

    def steps(self, key: str) -> list[int]:
        return [step for step, metrics in self.lines if key in metrics]


def test_a_group_may_have_a_share_of_the_rate(world):
    """Slopes of 1: one step of 1/8, and one of half of that."""
    found = Two(lambda a, b: a + b, world, groups=({}, {"lr_scale": 0.5}), steps=1, max_grad_norm=9)
    assert found.values == [1 - 1 / 8, 1 - 1 / 16]


def test_gradients_are_those_of_the_mean_and_start_anew_each_step(world):
    """Slopes of 3 and 4 in two micro-batches, clipped from a norm of 5 to 1/2: 0.3 and 0.4."""
    found = Two(lambda a, b: 3 * a + 4 * b, world, steps=2, max_grad_norm=0.5)
    assert found.values == pytest.approx([1 - 2 * 0.3 / 8, 1 - 2 * 0.4 / 8], rel=1e-5)
    norms = [metrics["grad_norm"] for step, metrics in found.lines if "grad_norm" in metrics]
    assert norms == pytest.approx([5, 5])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [  # 8 rows, 4 a step: 2 steps an epoch, 2 epochs; or 5 steps
        ({}, [0, 1, 2, 3, 4]),
        ({"held_out": 8}, [0, 2, 4]),  # as many rows as two steps
        ({"steps": 40, "epochs": 99, "rows": 80, "held_out": 50}, [0, 12, 20, 24, 36, 40]),
        ({"steps": 21, "rows": 400}, [*range(0, 21, 2), 21]),  # about ten
        ({"eval_every": 3}, [0, 2, 3, 4]),
        ({"steps": 5, "start": 3}, [4, 5]),
        ({"held_out": 0}, []),
    ],
)
def test_evaluations_are_at_the_start_each_epoch_and_when_asked_for(world, flags, expected):
    rows = flags.pop("rows", 8) + flags.get("held_out", 1)
    assert Two(lambda a, b: a + b, world, rows, **flags).steps("eval/loss") == expected


def test_a_gradient_that_is_not_finite_is_an_error_though_the_loss_is(world):
    with pytest.raises(RunError, match="step 3 was not taken: grad_norm is inf"):
        Two(lambda a, b: (a - 1).sqrt() + 0 * b, world, start=2)


@pytest.mark.parametrize("held_out", [0, 1])
def test_a_step_after_which_the_parameters_have_no_norm_ends_the_run(world, held_out):
    """The loss and its gradient were finite; the square of 1e38 is above the largest float32."""
    message = "after step 1: norm of the parameters is inf; nothing of it is saved: lower --lr"
    with pytest.raises(RunError, match=message):
        Two(lambda a, b: a + b, world, held_out=held_out, steps=1, lr=1e38)


def test_an_evaluation_that_is_not_finite_ends_the_run(world):
    """a falls from 1 to 0.9125; the root of a - 0.95 is then nan, and all parameters finite."""
    with pytest.raises(RunError, match="evaluation: eval/loss is nan"):
        Two(lambda a, b: (a - 0.95).sqrt() + 0 * b, world, steps=1)


def test_no_gradient_is_an_error_in_the_first_step_alone(world):
    """But where the loss is 0, as that of a hinge may be, it is none."""
    Two(lambda a, b: torch.relu(a - 9) + 0 * b, world)
    with pytest.raises(RunError, match="step 3: no gradient"):
        Two(lambda a, b: 7 + torch.relu(a - 9) + 0 * b, world, start=2)
    # A slope of 8 until a is 0, in the first step; then the loss is constant.
    found = Two(lambda a, b: 7 + 8 * torch.relu(a) + 0 * b, world, max_grad_norm=9)
    assert found.values == [0, 1] and found.steps("loss") == [1, 2, 3, 4]


def test_the_next_steps_first_batch_is_made_before_the_wait(world, monkeypatch):
    """Two batches a step: while a GPU works at the last one, the host makes that which follows."""
    events = []

    def recorded(name, function):
        return lambda *args: events.append(name) or function(*args)

    monkeypatch.setattr(Batcher, "collate", staticmethod(recorded("batch", collate)))
    monkeypatch.setattr(Means, "reduce", recorded("wait", Means.reduce))
    Two(lambda a, b: a + b, world, rows=8, held_out=0, steps=2)
    assert events == ["batch", "batch", "batch", "wait", "batch", "batch", "wait"]


def test_steps_of_an_epoch_are_a_permutation_with_nothing_dropped():
    steps = [step_indices(step, rows=10, batch_size=4, seed=0) for step in range(6)]
    assert [len(s) for s in steps] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert list(step_indices(0, 10, 10, seed=1)) != list(first)
    assert replace(SETTINGS, steps=None, epochs=2, batch_size=4).total(10) == 6
    assert replace(SETTINGS, steps=5, epochs=2, batch_size=4).total(10) == 5


def test_lr_by_hand():
    """10 steps, of which 2 rise: 1/3, 2/3, then 8 steps down from the peak, none of them 0."""
    rates = [get_lr(step, 10, 3.0, 0.2, "linear") for step in range(10)]
    assert rates == pytest.approx([1, 2, 3, 2.625, 2.25, 1.875, 1.5, 1.125, 0.75, 0.375])
    assert get_lr(6, 10, 3.0, 0.2, "cosine") == pytest.approx(1.5)  # half way down
    assert get_lr(4, 10, 3.0, 0.2, "cosine") == pytest.approx(1.5 * (1 + math.sqrt(0.5)))
    assert get_lr(0, 1, 3.0, 0.9, "linear") == 3.0  # the only step of a run
    assert get_lr(9, 10, 3.0, 0.2, "constant") == get_lr(0, 10, 3.0, 0.0, "cosine") == 3.0


def _sharded_after_its_check(folder: str, rows: list[Row]) -> list[str]:
    """The parameters that are not sharded after a self-check of a policy on this rank."""
    world = setup()
    policy, batcher = Policy.load(folder, world), PackedBatcher(world, 300)
    batcher.prepare(policy)
    check_layout(policy, rows, batcher, "--model m")
    return [name for name, p in policy.named_parameters() if not isinstance(p, DTensor)]


def test_an_optimizer_after_check_layout_gets_sharded_parameters(llama_folder, rows):
    """Gathered ones, which a forward leaves, would be copies that are trained in vain."""
    outcome = run_ranks(2, _sharded_after_its_check, str(llama_folder), rows)
    assert outcome.results == [[], []], outcome.stderr


def test_rows_of_both_sets_have_to_fit_the_model(llama_folder, rows, world):
    policy, batcher = Policy.load(llama_folder), Batcher(world, 1000)
    policy.model.config.max_position_embeddings = rows[0].longest
    longer = [row for row in rows if row.longest > rows[0].longest][:1]
    prepare(policy, SimpleNamespace(rows=rows[:1], held_out=rows[:1]), batcher, "m")
    for data in ({"rows": longer, "held_out": []}, {"rows": rows[:1], "held_out": longer}):
        with pytest.raises(RunError, match=f"{longer[0].name}: has {longer[0].longest} tokens"):
            prepare(policy, SimpleNamespace(**data), batcher, "m")


def test_check_layout_finds_wrong_scores(llama_folder, rows, world):
    policy = Policy.load(llama_folder)
    batcher = PackedBatcher(world, 1000)
    batcher.prepare(policy)
    check_layout(policy, rows, batcher, "--model m")
    policy.model.config.logits_scaling = 2.0  # the model's own forward knows no such scale
    with pytest.raises(RunError, match="--model m gives log-probabilities that differ by up to"):
        check_layout(policy, rows, batcher, "--model m")
    policy.model.config.logits_scaling = None

    class Mixed(PackedBatcher):
        """Positions that do not restart for the second response."""

        def collate(self, rows, weight=1.0):
            batch = super().collate(rows, weight)
            positions = batch.inputs["position_ids"]
            return replace(
                batch, inputs=batch.inputs | {"position_ids": positions + positions // 9}
            )

    with pytest.raises(RunError, match="use --no-share_prefix"):
        check_layout(policy, rows, Mixed(world, 1000), "--model m")
    with torch.no_grad():
        policy.model.config.logits_scaling = 2.0
    with pytest.raises(RunError, match="differ by up to .*this architecture is not supported"):
        check_layout(policy, rows, Batcher(world, 1000), "--model m")
    with torch.no_grad():
        next(policy.parameters()).fill_(math.nan)
    with pytest.raises(RunError, match="are its weights complete"):
        check_layout(policy, rows, batcher, "--model m")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException])
def test_too_little_memory_or_a_compiler_that_fails_is_no_fault_of_the_layout(
    llama_folder, rows, world, monkeypatch, error
):
    """torch's compiler fails with subclasses of the second, as InductorError."""
    policy = Policy.load(llama_folder)

    def fail(batch):
        raise error("as it says")

    monkeypatch.setattr(policy, "forward", fail)
    with pytest.raises(error, match="as it says"):
        check_layout(policy, rows, Batcher(world, 1000), "--model m")

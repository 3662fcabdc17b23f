"""What train_dpo.py minimises: a loss of nanoalign/losses.py on what policy and reference say of a batch.

Shapes: B pairs, S responses, M scored tokens.
"""

import argparse
import inspect
from dataclasses import replace

import torch
from torch import Tensor

from nanoalign import lora
from nanoalign.distributed import World, gather_lists, local, sum_over_ranks
from nanoalign.errors import RunError
from nanoalign.logps import discounted_sums, sums_of_responses
from nanoalign.losses import LOSSES, divergence_scores, match_by_rank, wpo_weights
from nanoalign.metrics import Reported, hits
from nanoalign.models import Policy
from nanoalign.objective import Batches, Objective
from nanoalign.reference import Precomputed
from nanoalign.rows import Batch, Row
from nanoalign.store import StoredRows

HYPERPARAMETERS = ("beta", "label_smoothing", "tau", "gamma_beta_ratio", "odds_weight", "cpo_alpha",
                   "desirable_weight", "undesirable_weight")  # fmt: skip
REFERENCE_FREE = ("simpo", "orpo", "cpo", "sft")
# Of these the implicit reward is a mean over tokens, as their paper has it.
AVERAGED = ("simpo", "orpo", "sft")

MARGIN = ("sigmoid", "cdpo", "robust", "hinge", "ipo_sum", "exo_pair", "discopop")
MEANS = ("ipo", "sigmoid_norm", "simpo")
# What would silently do something else than it says.
UNFIT = (
    ("length_alpha", [name for name in LOSSES if name not in MARGIN],
     "a difference of lengths belongs into a margin of sums, which that loss does not have"),
    ("divergence", [*MEANS, "kto", "aot"], "its log-ratios are not compared as they are"),
    ("ld_alpha", [*MEANS, "kto", "orpo", "cpo", "sft"], "it takes means, examples or an NLL"),
    ("wpo", ["kto"], "it weighs pairs, and that loss is of single examples"),
)  # fmt: skip


def settle(args: argparse.Namespace) -> None:
    """Gives the chosen loss's hyperparameters their defaults; what it does not use is an error."""
    parameters = inspect.signature(LOSSES[args.loss]).parameters.values()
    takes = {p.name: p.default for p in parameters if p.default is not p.empty}
    for name in HYPERPARAMETERS:
        if getattr(args, name) is None:
            setattr(args, name, takes.get(name))
        elif name not in takes:
            raise RunError(
                f"--{name} is no hyperparameter of --loss {args.loss}, which takes "
                f"{', '.join(f'--{each}' for each in takes) or 'none'}"
            )
    if args.loss == "exo_pair" and args.label_smoothing == 0:
        raise RunError("--loss exo_pair takes the log of --label_smoothing, so it must be above 0")
    if args.loss == "kto" and args.batch_size < 2:
        raise RunError(
            "--loss kto estimates its KL from responses to other prompts of a step; raise --batch_size"
        )
    if args.loss in REFERENCE_FREE:
        for name in ("reference", "divergence", "length_alpha", "sync_reference_every"):
            if getattr(args, name) is not None:
                raise RunError(f"--loss {args.loss} has no reference, and so no --{name}")
    if args.precompute_reference:
        for reason, refused in (
            (f"--loss {args.loss} has no reference", args.loss in REFERENCE_FREE),
            ("--loss kto asks it about responses to other prompts", args.loss == "kto"),
            ("--ld_alpha asks it about single tokens", args.ld_alpha is not None),
            ("--sync_reference_every moves it", args.sync_reference_every is not None),
        ):
            if refused:
                raise RunError(f"--precompute_reference asks the reference once, but {reason}")
    if (args.divergence == "alpha") != (args.divergence_alpha is not None):
        raise RunError("--divergence alpha and --divergence_alpha belong together; give both")
    for flag, names, reason in UNFIT:
        given = getattr(args, flag)  # 0 is given, too
        if given is not None and given is not False and args.loss in names:
            raise RunError(f"--{flag} does not go with --loss {args.loss}: {reason}")
    if args.sync_reference_mix is None:
        args.sync_reference_mix = 0.6 if args.sync_reference_every else None
    elif args.sync_reference_mix > 1:
        raise RunError(
            f"--sync_reference_mix {args.sync_reference_mix:g}: give 1, all the way, or less"
        )
    elif not args.sync_reference_every:
        raise RunError("--sync_reference_mix says how, --sync_reference_every when; give both")


def check_sides(rows: StoredRows, args: argparse.Namespace) -> None:
    """Stops where kto's data are of one kind: it would only learn to raise, or to lower, them all."""
    if args.loss != "kto":
        return
    desirable, undesirable = (rows.pair_lengths() > 0).sum(0).tolist()
    if 0 in (desirable, undesirable):
        raise RunError(
            f"--data {' '.join(args.data)}: {desirable:,} desirable examples and "
            f"{undesirable:,} undesirable ones; --loss kto learns from both, add the other kind"
        )


class Preference(Objective):
    """The loss of --loss with what is combined with it, and what it must know of a step as a whole.

    kto's KL, aot's order of all pairs and bco_pair's running mean are each one for all ranks and
    micro-batches: so the loss depends on neither. The first two cost a forward of policy and reference more.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | Precomputed | lora.Base | None,
        args: argparse.Namespace,
        world: World,
    ):
        self.policy, self.reference, self.args, self.world = policy, reference, args, world
        if args.sync_reference_every and _shapes(policy) != _shapes(reference):
            raise RunError(
                f"--sync_reference_every moves the reference towards the policy, and --reference "
                f"{args.reference} is of another shape than --model {args.model}"
            )
        self.loss = LOSSES[args.loss]
        parameters = inspect.signature(self.loss).parameters.values()
        self.hyperparameters = {
            p.name: getattr(args, p.name) for p in parameters if p.default is not p.empty
        }
        self.needs = [p.name for p in parameters if p.default is p.empty]
        self.kl = torch.zeros((), device=world.device)
        self.matched: list[Tensor] = []  # of each batch to come
        # Of the steps that are done, which checkpoints keep: their mean reward; the KL of the last.
        self.numbers = {}
        if "shift" in self.needs:
            self.numbers = {"steps": 0.0, "mean_reward": 0.0}
        elif "kl" in self.needs:
            self.numbers = {"kl": 0.0}
        self.saved = reference if args.sync_reference_every else None

    # --- the algorithm ----------------------------------------------------------------------------

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Reported]]:
        """The losses of a batch's pairs, (B,), and what is reported of each."""
        inputs = self.inputs(batch)
        losses = self.losses(inputs, batch)
        chosen, rejected = (inputs[f"{side}_rewards"].detach() for side in ("chosen", "rejected"))
        has_chosen, has_rejected = batch.sides
        paired = has_chosen & has_rejected
        values = {
            "loss": losses,
            "rewards/chosen": (chosen, has_chosen),
            "rewards/rejected": (rejected, has_rejected),
            "rewards/margins": (chosen - rejected, paired),
            "rewards/accuracies": (hits(chosen, rejected), paired),
            "logps/chosen": (inputs["full_chosen_logps"], has_chosen),
            "logps/rejected": (inputs["full_rejected_logps"], has_rejected),
        }
        if "kl" in self.needs:
            values["kl"] = self.kl.expand_as(losses)
        return losses, values

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What losses are functions of, by the names of their arguments: (B,) each."""
        inputs = {
            "chosen_lengths": batch.lengths[batch.chosen].float(),
            "rejected_lengths": batch.lengths[batch.rejected].float(),
        }
        self._read(self.policy, batch, inputs, "")
        if self.reference is None:
            for side in ("chosen", "rejected"):
                rewards = (self.args.beta or 1.0) * inputs[f"{side}_logps"]
                averaged = self.args.loss in AVERAGED
                inputs[f"{side}_rewards"] = (
                    rewards / inputs[f"{side}_lengths"] if averaged else rewards
                )
        else:
            with torch.no_grad():
                self._read(self.reference, batch, inputs, "reference_")
            for side in ("chosen", "rejected"):
                logratios = inputs[f"{side}_logps"] - inputs[f"reference_{side}_logps"]
                self._score(logratios, inputs, side)
        return inputs

    def _read(
        self, model: Policy | lora.Base, batch: Batch, inputs: dict[str, Tensor], of: str
    ) -> None:
        """Log-probabilities of both sides; with --ld_alpha a longer response's excess weighs less."""
        args, sides = self.args, {"chosen": batch.chosen, "rejected": batch.rejected}
        tokens = None
        if args.ld_alpha is None and not (args.wpo and model is self.policy):
            logps = model(batch)  # (S,)
        else:
            tokens = model(batch, per_token=True, collisions=args.wpo)  # (M,)
            logps = sums_of_responses(tokens.logps, batch.lengths)  # (S,)
        shared = torch.minimum(*(batch.lengths[responses] for responses in sides.values()))
        for side, responses in sides.items():
            full = inputs[f"{of}full_{side}_logps"] = logps[responses]
            inputs[f"{of}{side}_logps"] = full
            if args.ld_alpha is not None:
                inputs[f"{of}{side}_logps"] = discounted_sums(
                    tokens.logps, batch.lengths, responses, shared, args.ld_alpha
                )
        if args.wpo and model is self.policy:
            aligned = (tokens.logps - tokens.collisions).detach()
            weights = wpo_weights(sums_of_responses(aligned, batch.lengths) / batch.lengths)  # (S,)
            inputs["wpo_weights"] = weights[batch.chosen] * weights[batch.rejected]

    def _score(self, logratios: Tensor, inputs: dict[str, Tensor], side: str) -> None:
        """What the loss takes for log-ratios, and the implicit rewards that are reported.

        With --divergence they are seen through it. --length_alpha adds alpha * |y| to the loss's rewards:
        alpha * (|y_w| - |y_l|) to beta * h (Park et al. 2024, arXiv 2403.19159), so that a length
        that the data prefer is explained, and not learned.
        """
        args = self.args
        if args.divergence is not None:
            logratios = divergence_scores(logratios, args.divergence, args.divergence_alpha)
        inputs[f"{side}_rewards"] = args.beta * logratios
        if args.length_alpha is not None:
            logratios = logratios + args.length_alpha / args.beta * inputs[f"{side}_lengths"]
        inputs[f"{side}_logratios"] = logratios

    def losses(self, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
        if self.args.loss == "kto":
            losses = self._of_examples(inputs, batch)
        else:
            shared = {"shift": self.numbers.get("mean_reward")}
            if "matched_gaps" in self.needs:
                shared["matched_gaps"] = self.matched.pop(0)
            given = {name: (inputs | shared)[name] for name in self.needs}
            losses = self.loss(**given, **self.hyperparameters)
        if self.args.wpo:
            losses = losses * inputs["wpo_weights"]
        if self.args.nll_weight is not None:
            nll = -inputs["full_chosen_logps"] / inputs["chosen_lengths"]
            losses = losses + self.args.nll_weight * nll * batch.sides[0]
        return losses

    def _of_examples(self, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """A record's mean over its examples: the two of a pair, or the one of an unpaired response."""
        total = torch.zeros_like(inputs["chosen_logratios"])
        for side, has, desirable in zip(
            ("chosen", "rejected"), batch.sides, (True, False), strict=True
        ):
            logratios = inputs[f"{side}_logratios"]
            kind = torch.full_like(has, desirable)
            total = total + has * self.loss(logratios, kind, self.kl, **self.hyperparameters)
        return total / batch.sides.sum(0)

    @torch.no_grad()
    def at_start(self, rows: list[Row], batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
        """(losses, losses of log-ratios of 0, rewards (2, B)) of this rank's first batch."""
        self.survey(rows, batches)
        matched = list(self.matched)
        batch = next(batches(rows))[1]
        inputs = self.inputs(batch)
        losses = self.losses(inputs, batch)
        self.matched = matched
        zero = torch.zeros_like(losses)
        for side in ("chosen", "rejected"):
            self._score(zero, inputs, side)
        expected = self.losses(inputs, batch)
        rewards = [
            (self.args.beta or 1.0) * (inputs[f"{side}_logps"] - inputs[f"reference_{side}_logps"])
            for side in ("chosen", "rejected")
        ]
        return losses, expected, torch.stack(rewards)

    # --- a step as a whole ------------------------------------------------------------------------

    @torch.no_grad()
    def survey(self, rows: list[Row], batches: Batches) -> None:
        if "kl" in self.needs:
            self.kl = self._mismatched_kl(rows, batches)
        if "matched_gaps" in self.needs:
            self.matched = self._match(rows, batches)

    def _mismatched_kl(self, rows: list[Row], batches: Batches) -> Tensor:
        """kto's z: the mean log-ratio of responses to other prompts of the step, not below 0: ()."""
        if len(rows) < 2:  # an epoch's last step: that of the step before
            return torch.tensor(self.numbers["kl"], device=self.world.device)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for group, batch in batches(mismatched(rows, self.args.max_length)):
            logratios = self.policy(batch) - self.reference(batch)  # (S,)
            total += logratios.double().sum() * bool(group)
        return (sum_over_ranks(total) / len(rows)).clamp(min=0).float()

    def _match(self, rows: list[Row], batches: Batches) -> list[Tensor]:
        """aot's order: for each batch to come the reference's gaps of the same ranks among all pairs."""
        gaps, places = [], []  # of each batch: (policy's, reference's); whether its pairs count
        for group, batch in batches(rows):
            inputs = self.inputs(batch)
            gaps.append([
                inputs[f"{of}chosen_logps"] - inputs[f"{of}rejected_logps"] for of in ("", "reference_")
            ])  # fmt: skip
            places.append(bool(group))
        own = [gap for gap, counts in zip(gaps, places, strict=True) if counts]
        mine = (
            torch.stack([torch.cat(side) for side in zip(*own, strict=True)])
            if own
            else torch.zeros(2, 0)
        )
        everyones = gather_lists(mine.tolist(), self.world)
        policy, reference = (
            torch.tensor([gap for part in everyones for gap in part[side]]) for side in (0, 1)
        )
        start = sum(len(part[0]) for part in everyones[: self.world.rank])
        matched = match_by_rank(policy, reference)[start:].to(self.world.device)
        result = []
        for (gap, _), counts in zip(gaps, places, strict=True):
            result.append(matched[: len(gap)] if counts else torch.zeros_like(gap))
            matched = matched[len(gap) :] if counts else matched
        return result

    @torch.no_grad()
    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        if "kl" in self.needs:
            self.numbers = {"kl": metrics["kl"]}
        if "shift" in self.needs:
            n, mean = self.numbers["steps"], self.numbers["mean_reward"]
            reward = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
            self.numbers = {"steps": n + 1, "mean_reward": mean + (reward - mean) / (n + 1)}
        every = self.args.sync_reference_every
        if every and step % every == 0:
            self.reference.reshard()
            for mine, its in zip(
                self.policy.parameters(), self.reference.parameters(), strict=True
            ):
                local(its).lerp_(local(mine).to(its.dtype), self.args.sync_reference_mix)


def _shapes(policy: Policy) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in policy.named_parameters()}


def mismatched(rows: list[Row], max_length: int) -> list[Row]:
    """Each prompt with a response to the next row's prompt, cut where that would be too long."""
    result = []
    for i, row in enumerate(rows):
        others = rows[(i + 1) % len(rows)].responses
        response = others[i % len(others)][: max(1, max_length - len(row.prompt))]
        result.append(replace(row, responses=(response,), pairs=()))
    return result

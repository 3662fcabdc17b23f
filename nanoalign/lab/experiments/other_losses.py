"""KTO, SimPO, ORPO, IPO and APO beside DPO, each with the best of three learning rates."""

from pathlib import Path

from nanoalign.lab.figures import read
from nanoalign.lab.findings import POSITIVE, SHARE, Findings, Panel, column, points
from nanoalign.lab.lab import Lab

TITLE = "Losses side by side"
QUESTION = "Does another loss than DPO's give a better policy, on the same pairs?"
GUESS = (
    "Each loss was published as better than DPO. Those without a reference (SimPO, ORPO) go "
    "further from the base."
)
METHOD = [
    "Each loss trains on the same pairs with three learning rates. A tenth of the prompts is "
    "held out, and the rate with the lowest held-out loss is kept, for each seed. Its policy "
    "is graded on prompts that neither training nor choice have seen. There are 1,200 pairs, in "
    "batches of 32; all else is as the scripts have it. IPO is ipo_sum, as in its paper."
]
LIMITS = [
    "The held-out loss orders learning rates within a loss. It is no measure of reward, and "
    "may choose another rate than the reward would.",
    "A rate at the edge of the three may not be the best one: the table has the rates.",
    "Beta and other hyperparameters were not searched for. A paper's loss may want its own.",
    "One epoch of easy data. Losses differ most where data are noisy or seen often.",
]
EXERCISES = [
    "Choose the learning rate by the true reward. Does the order of the losses change?",
    "Which loss raises the log-probability of chosen answers, and which lowers it (metrics.jsonl)?",
    "Search beta for one loss. Is its gain larger than the differences between losses?",
]
LOSSES = ("dpo", "kto", "simpo", "orpo", "ipo_sum", "apo_zero")
RATES = ("1.5e-4", "5e-4", "1.5e-3")


def policy(lab: Lab, seed: int, loss: str) -> dict:
    data = lab.runs.write("pairs", lab.pairs(lab.pick(300, 1200), seed))
    trained = {
        rate: lab.train_dpo(
            data, seed, "--loss", loss, "--lr", rate, "--batch_size", 32, "--eval_share", 0.1
        )
        for rate in RATES
    }
    lowest = {rate: held_out_loss(folder) for rate, folder in trained.items()}
    best = min(lowest, key=lowest.__getitem__)
    return lab.graded(trained[best], seed) | {"rate": float(best)}


def held_out_loss(folder: Path) -> float:
    """The last of a run."""
    return [line["eval/loss"] for line in read(folder / "metrics.jsonl") if "eval/loss" in line][-1]


def run(lab: Lab) -> Findings:
    figures = lab.grid(policy, loss=LOSSES)
    dpo = figures["dpo"]
    return Findings(
        table={
            "loss": list(LOSSES),
            "learning rates": [
                " ".join(f"{rate:g}" for rate in each.seeds) for each in column(figures, "rate")
            ],
            "true reward": column(figures, "true"),
            "wins by the ground truth": column(figures, "true_win", SHARE),
            "wins by the judge": column(figures, "win", SHARE),
            "KL": column(figures, "kl", POSITIVE),
            "tokens": column(figures, "tokens", POSITIVE),
        },
        panels=[
            Panel("true reward", "", "true reward", {"each loss": points(figures, "true")}),
            Panel(
                "reward against KL",
                "KL from the base, nats an answer",
                "true reward",
                {loss: [(cell["kl"], cell["true"])] for loss, cell in figures.items()},
            ),
        ],
        claims=[
            *(
                (
                    f"the true reward of {loss} is [above|below] that of DPO",
                    figures[loss]["true"] - dpo["true"],
                )
                for loss in LOSSES[1:]
            ),
            *(
                (
                    f"{loss}, without a reference, is [further from|nearer to] the base than DPO",
                    figures[loss]["kl"] - dpo["kl"],
                )
                for loss in ("simpo", "orpo")
            ),
        ],
    )

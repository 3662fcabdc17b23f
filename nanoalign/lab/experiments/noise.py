"""Labels that are flipped by chance, and losses that were made for them."""

from nanoalign.lab.findings import SHARE, Findings, Panel, column
from nanoalign.lab.lab import Lab
from nanoalign.lab.plant import relabelled

TITLE = "Label noise: what it costs, and which loss helps"
QUESTION = "How much do wrong labels cost, and do the losses that were made for them help?"
GUESS = (
    "Noise costs reward. Losses that know how many labels are wrong (cDPO, robust DPO), and "
    "IPO, whose loss does not ask for ever larger margins, lose less than DPO. Label smoothing "
    "helps a reward model likewise."
)
METHOD = [
    "A share of the labels of 1,500 pairs is flipped by chance. In batches of 32, policies are "
    "trained by DPO (sigmoid), cDPO, robust DPO and IPO (ipo_sum, as in its paper), reward models "
    "with and without label smoothing. cDPO, robust DPO and the smoothing are given the share of "
    "flips; labels that the draw by the Bradley-Terry model made wrong come on top. Policies are "
    "graded by the ground truth, reward models by their agreement with it."
]
LIMITS = [
    "The noise is independent of the pair. That of people is largest where answers are alike.",
    "The share of wrong labels is known here, and is not in practice.",
    "One learning rate and one beta for all losses. IPO's beta is a target: 5 nats of log-ratio.",
    "The data are seen once, so no pair is memorized. Losses against noise do more where it is.",
]
EXERCISES = [
    "Give cDPO a wrong share, twice the true one. What does it cost?",
    "Robust DPO is unbiased. Why may its gradient be larger than that of DPO, and what does "
    "the clipping of gradients do to it?",
    "Repeat with three epochs: which loss gains most from its robustness?",
]
LOSSES = ("sigmoid", "cdpo", "robust", "ipo_sum")
SMOOTHED = ("no smoothing", "smoothing")


def policy(lab: Lab, seed: int, flipped: float, loss: str) -> dict:
    knows = loss in ("cdpo", "robust")
    if knows and not flipped:
        loss, knows = "sigmoid", False  # with a share of 0 both are the sigmoid loss
    flags = ("--label_smoothing", flipped) if knows else ()
    trained = lab.train_dpo(
        data(lab, seed, flipped), seed, "--loss", loss, "--batch_size", 32, *flags
    )
    return lab.graded(trained, seed)


def model(lab: Lab, seed: int, flipped: float, smoothed: str) -> dict:
    flags = ("--label_smoothing", flipped) if flipped and smoothed == "smoothing" else ()
    trained = lab.train_rm(data(lab, seed, flipped), seed, "--batch_size", 32, *flags)
    return lab.ranked(trained, test=lab.test_pairs())["test"]


def data(lab: Lab, seed: int, flipped: float):
    records = lab.pairs(lab.pick(500, 1500), seed)
    return lab.runs.write("flipped", relabelled(records, 0.0, flipped, seed))


def run(lab: Lab) -> Findings:
    shares = lab.pick((0.0, 0.4), (0.0, 0.2, 0.4))
    policies = lab.grid(policy, flipped=shares, loss=LOSSES)
    models = lab.grid(model, flipped=shares, smoothed=SMOOTHED)
    most = shares[-1]
    cost = {loss: policies[0.0, loss]["true"] - policies[most, loss]["true"] for loss in LOSSES}
    return Findings(
        table={
            "flipped": [f"{share:.0%}" for share, _ in (*policies, *models)],
            "trained by": [loss for _, loss in policies]
            + [f"reward model, {how}" for _, how in models],
            "true reward": column(policies, "true") + [""] * len(models),
            "true accuracy": [""] * len(policies) + column(models, "true", SHARE),
        },
        panels=[
            Panel(
                "policies",
                "share of flipped labels",
                "true reward",
                {
                    loss: [(share, policies[share, loss]["true"]) for share in shares]
                    for loss in LOSSES
                },
            ),
            Panel(
                "reward models",
                "share of flipped labels",
                "agreement with the ground truth",
                {
                    how: [(share, models[share, how]["true"]) for share in shares]
                    for how in SMOOTHED
                },
                scale=SHARE,
            ),
        ],
        claims=[
            (
                f"{most:.0%} of flipped labels [lower|raise] the true reward of DPO",
                cost["sigmoid"],
            ),
            *(
                (
                    f"{most:.0%} of flipped labels cost {loss} [less|more] true reward than DPO",
                    cost["sigmoid"] - cost[loss],
                )
                for loss in LOSSES[1:]
            ),
            (
                "without flips the true reward of DPO is [above|below] that of IPO",
                policies[0.0, "sigmoid"]["true"] - policies[0.0, "ipo_sum"]["true"],
            ),
            (
                f"{most:.0%} of flipped labels [lower|raise] the true accuracy of a reward model",
                models[0.0, SMOOTHED[0]]["true"] - models[most, SMOOTHED[0]]["true"],
            ),
            (
                f"at {most:.0%} smoothing [raises|lowers] the true accuracy of a reward model",
                models[most, SMOOTHED[1]]["true"] - models[most, SMOOTHED[0]]["true"],
            ),
        ],
    )

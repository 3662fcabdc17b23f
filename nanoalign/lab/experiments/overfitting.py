"""Reward models of few and of many pairs, seen once and often."""

from nanoalign.lab.findings import Findings, Panel, column
from nanoalign.lab.lab import Lab
from nanoalign.tiny import world

TITLE = "Overfitting: pairs and epochs"
QUESTION = "When does a reward model memorize its pairs, and what does it cost?"
GUESS = (
    "With few pairs and many epochs the accuracy on the training pairs goes to 1, and the "
    "held-out accuracy falls. More pairs help more than more epochs."
)
METHOD = [
    "Reward models of different numbers of pairs and epochs, in batches of 20. All rank the "
    "same held-out pairs, and the first of their training pairs. Labels are drawn with noise: "
    "the ceiling is the accuracy that the rule behind them has on average."
]
LIMITS = [
    "The learning rate is one for all, and its schedule ends with the last epoch.",
    "The data have few forms of wrong answers, which some hundred pairs show already.",
    "Of 100 pairs one epoch is five steps.",
    "An accuracy counts a pair once, however sure the model is. The loss also counts how sure "
    "it is.",
]
EXERCISES = [
    "Why may the held-out loss rise while the held-out accuracy does not fall?",
    "Train with --keep_best on few pairs. Which step does it keep, and what does that gain?",
    "Do --label_smoothing or --weight_decay keep the loss of 12 epochs down?",
]


def model(lab: Lab, seed: int, pairs: int, epochs: int) -> dict:
    data = lab.runs.write("pairs", lab.pairs(pairs, seed))
    again = lab.runs.write("again", lab.pairs(100, seed))  # the first of them
    trained = lab.train_rm(data, seed, "--epochs", epochs, "--batch_size", 20)
    figures = lab.ranked(trained, test=lab.test_pairs(), train=again)
    return {
        "train": figures["train"]["label"],
        "test": figures["test"]["label"],
        "true": figures["test"]["true"],
        "loss": figures["test"]["loss"],
    }


def best(figures: dict, pairs: int) -> int:
    """The epochs with the highest held-out accuracy."""
    epochs = [e for p, e in figures if p == pairs]
    return max(epochs, key=lambda e: figures[pairs, e]["test"].mean())


def run(lab: Lab) -> Findings:
    sizes = lab.pick((100, 400), (100, 400, 1600))
    often = 12
    figures = lab.grid(model, pairs=sizes, epochs=lab.pick((1, often), (1, 4, often)))
    few, many = sizes[0], sizes[-1]
    once, again = figures[few, 1], figures[few, often]
    ceiling = world.label_ceiling(world.records("test")[: lab.prompts])
    return Findings(
        table={
            "pairs": [f"{pairs:,}" for pairs, _ in figures],
            "epochs": [epochs for _, epochs in figures],
            "accuracy, training": column(figures, "train"),
            "accuracy, held out": column(figures, "test"),
            "by the true rule": column(figures, "true"),
            "loss, held out": column(figures, "loss"),
        },
        panels=[
            Panel(
                title,
                "epochs",
                name,
                {
                    f"{pairs:,} pairs": [
                        (e, cell[key]) for (p, e), cell in figures.items() if p == pairs
                    ]
                    for pairs in sizes
                },
                log=True,
            )
            for title, name, key in (
                ("training pairs", "accuracy", "train"),
                ("held-out pairs", "accuracy", "test"),
                ("held-out pairs", "loss, nats", "loss"),
            )
        ],
        claims=[
            (
                f"with {few} pairs, {often} epochs rank the training pairs better than one",
                again["train"] - once["train"],
            ),
            (
                f"with {few} pairs, {often} epochs lower the held-out accuracy",
                once["test"] - again["test"],
            ),
            (
                f"with {few} pairs, {often} epochs raise the held-out loss",
                again["loss"] - once["loss"],
            ),
            (
                f"with {many:,} pairs, {often} epochs lower the held-out accuracy",
                figures[many, 1]["test"] - figures[many, often]["test"],
            ),
            (
                f"{many // few} times the pairs raise the held-out accuracy more than "
                f"{often} times the epochs",
                figures[many, 1]["test"] - again["test"],
            ),
        ],
        notes=[
            f"The ceiling of the held-out accuracy is {ceiling:.3f}.",
            *(
                f"With {pairs:,} pairs the held-out accuracy is highest after "
                f"{best(figures, pairs)} epochs."
                for pairs in sizes
            ),
        ],
    )

"""Reward models of few and of many pairs, seen once and often."""

from collections.abc import Sequence

from nanoalign.lab.findings import POSITIVE, SHARE, Findings, Panel, column
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
    "The best number of epochs is chosen by the held-out pairs that measure it, which favours it.",
    "An accuracy counts a pair once, however sure the model is. The loss also counts how sure "
    "it is.",
]
EXERCISES = [
    "Why may the held-out loss rise while the held-out accuracy does not fall?",
    "Train with --keep_best on few pairs. Which step does it keep, and what does that gain?",
    "Do --label_smoothing or --weight_decay keep the loss of 12 epochs down?",
]
LN_2 = 0.693


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


def run(lab: Lab) -> Findings:
    sizes, epochs = lab.pick((100, 400), (100, 400, 1600)), lab.pick((1, 12), (1, 4, 12))
    figures = lab.grid(model, pairs=sizes, epochs=epochs)
    few, many, often = sizes[0], sizes[-1], epochs[-1]
    ceiling = world.label_ceiling(world.records("test")[: lab.prompts])
    accurate = {
        pairs: max(epochs, key=lambda e, n=pairs: figures[n, e]["test"].mean()) for pairs in sizes
    }
    return Findings(
        table={
            "pairs": [f"{pairs:,}" for pairs, _ in figures],
            "epochs": [each for _, each in figures],
            "accuracy, training": column(figures, "train", SHARE),
            "accuracy, held out": column(figures, "test", SHARE),
            "by the ground truth": column(figures, "true", SHARE),
            "loss, held out": column(figures, "loss", POSITIVE),
        },
        panels=[
            Panel(
                title,
                "epochs",
                name,
                {
                    f"{pairs:,} pairs": [(e, figures[pairs, e][key]) for e in epochs]
                    for pairs in sizes
                },
                log=True,
                scale=scale,
                lines=lines,
            )
            for title, name, key, scale, lines in (
                ("training pairs", "accuracy", "train", SHARE, {}),
                ("held-out pairs", "accuracy", "test", SHARE, {"the most": ceiling}),
                ("held-out pairs", "loss, nats", "loss", POSITIVE, {"without learning": LN_2}),
            )
        ],
        claims=[
            *(
                claim
                for pairs in (few, *sizes[:0:-1])
                for claim in against_the_best(figures, pairs, epochs)
            ),
            (
                f"{many // few} times the pairs, seen once, give a [higher|lower] held-out "
                f"accuracy than the best number of epochs of {few} pairs, {accurate[few]}",
                figures[many, 1]["test"] - figures[few, accurate[few]]["test"],
            ),
            (
                f"with {few} pairs, {often} epochs rank the training pairs [better|worse] than one",
                figures[few, often]["train"] - figures[few, 1]["train"],
            ),
        ],
        notes=[f"The most that a held-out accuracy can be on average is {ceiling:.3f}."],
    )


def against_the_best(figures: dict, pairs: int, epochs: Sequence[int]) -> list[tuple]:
    """Guesses: most epochs are worse than the best of fewer, by the accuracy and by the loss."""
    often = epochs[-1]
    found, many = [], figures[pairs, often]
    for key, name, words, sign in (
        ("test", "accuracy", "lower|raise", 1),
        ("loss", "loss", "raise|lower", -1),
    ):
        fewer = {e: sign * figures[pairs, e][key] for e in epochs[:-1]}
        best = max(fewer, key=lambda e: fewer[e].mean())
        guess = (
            f"with {pairs:,} pairs, {often} epochs [{words}] the held-out {name} against the best "
            f"number of fewer epochs, {best}"
        )
        found.append((guess, fewer[best] - sign * many[key]))
    return found

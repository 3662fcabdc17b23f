"""Writes the embedded training pairs with labels that are wrong in a known way.

    python -m nanoalign.lab.plant --length_bias 0.1 --out runs/biased.jsonl    prefers long answers
    python -m nanoalign.lab.plant --flip 0.2 --out runs/flipped.jsonl          flips a fifth
    python -m nanoalign.lab.plant --world 7 --length_bias 0.1 --out runs/7.jsonl   pairs of tiny:7

A label is drawn with the probability

    P(response 1 is better) = sigmoid((r_1 - r_0 + length_bias * (words of 1 - words of 0)) / noise)

of the true rewards r and the noise of the world (1 in the embedded one), and then flipped with the
probability `flip`. The labels of the held-out pairs, tiny:test or tiny:test:SEED, stay right.
"""

import math
from pathlib import Path
from random import Random

from nanoalign.distributed import run
from nanoalign.flags import Parser, number
from nanoalign.ranks import report
from nanoalign.tiny import world


def relabelled(records: list[dict], length_bias: float, flip: float, seed: int = 0) -> list[dict]:
    """The records with new labels "better", as the docstring of this file says.

    length_bias: the reward of a word. flip: the probability in [0, 1] that a label is flipped. The
    draw depends on the seed and the prompt alone.
    """
    result = []
    for record in records:
        draw = Random(f"plant {seed} {record['prompt']}")
        responses = [record[f"response_{i}"] for i in (0, 1)]
        rewards = [
            world.true_reward(record["prompt"], r) + length_bias * len(r.split()) for r in responses
        ]
        noise = world.rule(world.seed_of(record["prompt"])).noise
        # sigmoid(difference / noise), by a function that does not overflow
        better = int(draw.random() < (1 + math.tanh((rewards[1] - rewards[0]) / noise / 2)) / 2)
        better = 1 - better if draw.random() < flip else better
        result.append(record | {"better_response_id": better})
    return result


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--length_bias", type=float, default=0.0, help="the reward of a word")
    add(
        "--flip", type=number(float, 0), default=0.0, help="the probability that a label is flipped"
    )
    add("--source", choices=tuple(world.SOURCES), default="tiny-a", help="whose answers")
    add("--world", type=number(int, 0), metavar="SEED", help="of the world tiny:SEED")
    add("--seed", type=number(int, 0), default=0, help="random seed of the labels")
    add("--out", type=Path, required=True, metavar="FILE", help="the .jsonl file to write")
    args = parser.parse_args(argv)
    if args.flip > 1:
        parser.error(f"--flip {args.flip:g} is a probability; give 1 or less")
    records = world.records("train", args.source, args.world)
    records = relabelled(records, args.length_bias, args.flip, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(world.to_jsonl(records), encoding="ascii", newline="\n")
    agreement = world.oracle_accuracy(records)
    print(
        f"{args.out}: {len(records):,} pairs; {agreement:.3f} of the labels follow the ground truth"
    )


if __name__ == "__main__":
    run(main, report.report)

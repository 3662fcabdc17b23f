"""The embedded pairs with labels that are wrong in a known way, to see what a method makes of it.

    python -m nanoalign.tiny.plant --length_bias 0.1 --out runs/biased.jsonl      longer answers preferred
    python -m nanoalign.tiny.plant --flip 0.2 --out runs/flipped.jsonl            a fifth of the labels turned

Labels are drawn anew: sigmoid(difference of true rewards + length_bias * difference in words), and then
turned with probability `flip`. The held-out pairs of `tiny:test` keep their honest labels.
"""

import argparse
import json
import math
from pathlib import Path
from random import Random

from nanoalign import tiny
from nanoalign.tiny import world


def planted(records: list[dict], length_bias: float, flip: float, seed: int = 0) -> list[dict]:
    """The records with new labels; a prompt's label depends on the seed and the prompt alone."""
    result = []
    for record in records:
        draw = Random(f"plant {seed} {record['prompt']}")
        responses = [record[f"response_{i}"] for i in (0, 1)]
        rewards = [
            world.true_reward(record["prompt"], r) + length_bias * len(r.split()) for r in responses
        ]
        # sigmoid(difference), by a function that does not overflow
        better = int(draw.random() < (1 + math.tanh((rewards[1] - rewards[0]) / 2)) / 2)
        better = 1 - better if draw.random() < flip else better
        result.append(record | {"better_response_id": better})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length_bias", type=float, default=0.0, help="reward of a word")
    parser.add_argument("--flip", type=float, default=0.0, help="probability of a wrong label")
    parser.add_argument("--source", choices=tiny.SOURCE_NAMES, default="tiny-a")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    honest = world.records("train", args.source)
    records = planted(honest, args.length_bias, args.flip, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    agree = sum(world.oracle_accuracy([record]) for record in records) / len(records)
    print(
        f"{args.out}: {len(records):,} pairs; the true rule agrees with {agree:.3f} of the labels"
    )


if __name__ == "__main__":
    main()

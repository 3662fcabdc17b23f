"""Writes the embedded preference pairs, the same bytes every time.

python -m nanoalign.tiny.make_data
"""

import json

from nanoalign import tiny
from nanoalign.tiny import world


def to_jsonl(records: list[dict]) -> str:
    """One record a line, keys in the records' own order, ASCII alone."""
    return "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in records)


def main():
    for path, split in ((tiny.TRAIN, "train"), (tiny.TEST, "test")):
        records = world.records(split)
        path.write_text(to_jsonl(records), encoding="ascii", newline="\n")
        ceiling, oracle = world.label_ceiling(records), world.oracle_accuracy(records)
        print(
            f"{path.name}: {len(records)} pairs; best expected accuracy {ceiling:.3f}, "
            f"true_reward's own {oracle:.3f}"
        )


if __name__ == "__main__":
    main()

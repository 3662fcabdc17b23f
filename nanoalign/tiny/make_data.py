"""Writes the embedded preference pairs, the same bytes every time.

python -m nanoalign.tiny.make_data
"""

import json

from nanoalign import hosts, tiny
from nanoalign.distributed import run
from nanoalign.flags import Parser
from nanoalign.tiny import world


def to_jsonl(records: list[dict]) -> str:
    """A record per line, with its keys in their order, in ASCII."""
    return "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in records)


def main(argv: list[str] | None = None) -> None:
    Parser(__doc__).parse_args(argv)
    for path, split in ((tiny.TRAIN, "train"), (tiny.TEST, "test")):
        records = world.records(split)
        path.write_text(to_jsonl(records), encoding="ascii", newline="\n")
        ceiling, oracle = world.label_ceiling(records), world.oracle_accuracy(records)
        print(
            f"{path.name}: {len(records)} pairs; best expected accuracy {ceiling:.3f}, "
            f"true_reward's own {oracle:.3f}"
        )


if __name__ == "__main__":
    run(main, hosts.report_error)

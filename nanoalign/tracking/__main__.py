"""python -m nanoalign.tracking RUN --track tensorboard|wandb|trackio"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from nanoalign import hosts
from nanoalign.checkpoints.runs import ARGS, METRICS
from nanoalign.distributed import run
from nanoalign.errors import RunError
from nanoalign.tracking import TRACKERS
from nanoalign.tracking.trackers import KINDS

SECONDS = 2.0  # between two looks at a run that is followed
WRITTEN_LAST = "curves.png"  # of a run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m nanoalign.tracking", allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run: runs/dpo")
    add("--track", choices=TRACKERS, required=True, help="the program, which must be installed")
    add("--project", default="nanoalign", help="of wandb and trackio")
    add("--name", help="of the run; default: its folder")
    add("--follow", action="store_true", help="go on until the run has ended")
    args = parser.parse_args(argv)
    folder = Path(args.run)
    if not (folder / ARGS).is_file():
        raise RunError(f"'{folder}' is no run: there is no {ARGS}; give the folder of a run")
    name = args.name or folder.resolve().name
    settings = json.loads((folder / ARGS).read_text())
    tracker = KINDS[args.track](folder, args.project, name, settings)
    count = 0
    for line in lines_of(folder, args.follow):
        tracker.log(line["step"], {key: line[key] for key in line if key != "step"})
        count += 1
    tracker.finish()
    print(f"{count:,} lines of {folder / METRICS} are in {args.track} as '{name}'")


def lines_of(folder: Path, follow: bool) -> Iterator[dict]:
    """The lines of metrics.jsonl; with `follow` also those that are written until the run ends."""
    path, place = folder / METRICS, 0
    while True:
        ended = not follow or (folder / WRITTEN_LAST).exists()  # before reading, so none is missed
        if path.exists():
            with path.open() as file:
                file.seek(place)
                for text in iter(file.readline, ""):
                    if not text.endswith("\n"):
                        break  # it is being written
                    place += len(text.encode())
                    yield json.loads(text)
        if ended:
            return
        time.sleep(SECONDS)


if __name__ == "__main__":
    run(main, hosts.report_error)

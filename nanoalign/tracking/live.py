"""--track: a run in a tracker while it trains."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoalign.checkpoints.runs import ARGS
from nanoalign.errors import RunError, in_a_line
from nanoalign.tracking.__main__ import lines_of
from nanoalign.tracking.trackers import KINDS, Metrics

Log = Callable[[int, Metrics], None]


@contextmanager
def tracked(log: Log, args: Namespace) -> Iterator[Log]:
    """The `log` of loop.train, which also sends its lines to --track; on rank 0.

    A run that continues is sent anew, with what it has already. A tracker that fails does not end
    the run: that is said, and nothing more is sent.
    """
    folder, works = Path(args.out), True
    settings = json.loads((folder / ARGS).read_text())

    def attempt(send: Callable[..., None], *arguments: object) -> None:
        nonlocal works
        if not works:
            return
        try:
            send(*arguments)
        except Exception as error:  # of any program, of a network
            works = False
            print(
                f"{'track':<11} {args.track} failed: {in_a_line(error)}; the run goes on, and "
                f"python -m nanoalign.tracking {folder} --track {args.track} sends it"
            )

    def log_both(step: int, metrics: Metrics) -> None:
        log(step, metrics)
        if metrics:
            attempt(tracker.log, step, metrics)

    try:
        tracker = KINDS[args.track](folder, args.track_project, folder.resolve().name, settings)
    except Exception as error:
        raise RunError(f"--track {args.track}: {in_a_line(error)}") from error
    for line in lines_of(folder, follow=False):
        attempt(tracker.log, line["step"], {key: line[key] for key in line if key != "step"})
    try:
        yield log_both
    finally:
        attempt(tracker.finish)

"""Errors of the self-checks: what was found, and what to do."""

from collections.abc import Sequence

from nanoalign.batch import Row
from nanoalign.errors import RunError


def not_finite(name: str, what: str, scores: list[float], rows: Sequence[Row]) -> RunError:
    """name: of the model. what: its scores, in words."""
    return RunError(
        f"self-check: {name} gives {what} of {scores} on {', '.join(row.name for row in rows)}; "
        "are its weights complete?"
    )


def layout(
    name: str, what: str, off: float, allowed: float, rows: Sequence[Row], advice: str
) -> RunError:
    """off: the largest difference from the model's own forward. name, what: as in not_finite."""
    return RunError(
        f"self-check: {name} gives {what} that differ by up to {off:.2g} from those of its own "
        f"forward on separate sequences, on {rows[-1].name} and others (at most {allowed:g} "
        f"allowed); {advice}"
    )


def start(
    loss_off: float, reward_off: float, pairs: int, tolerances: tuple[float, float]
) -> RunError:
    """loss_off, reward_off: the largest distances from those of policy == reference."""
    return RunError(
        f"self-check: with policy == reference, losses are up to {loss_off:.3g} from the loss of "
        f"log-ratios of 0, and rewards up to {reward_off:.3g} from 0, on the first {pairs} pairs; "
        f"at most {tolerances[0]:g} and {tolerances[1]:g} are allowed"
    )

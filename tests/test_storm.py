"""python -m pytest tests/test_storm.py a few mishaps of tests/storm.py, which has all of them."""

import pytest
import storm
from processes import Outcome
from storm_runs import World, bad_ending, train

# A seed and a number make a mishap: `python tests/storm.py KIND --only NUMBER` repeats it.
# Here are some of seed 0 of each kind that takes a few seconds.
FEW = {
    "kills": (0, 1),
    "full_disks": (0,),
    "signals": (0,),
    "writers": (0,),
    "scores": (0,),
    "caches": (0,),
    "power_cuts": (0,),
    "flips:run/*.distcp": (0,),
    "flips:run/metrics.jsonl": (0,),
    "flips:cache/*.npy": (0,),
    "data": (0, 1),
    "models": (0, 1, 2),
    "flags": (0,),
    "edited": (0,),
    "tables": (0,),
    "links": (0,),
    "unequal": (0,),
    "bombs": (0,),
    "locales": (0,),
    "sizes": (0,),
    "templates": (0,),
    "requests": (0, 1),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("storm") / "world")


def test_a_short_storm(world):
    mishaps = [(name, number) for name, numbers in FEW.items() for number in numbers]
    problems = {(name, n): storm.one(name, n, 0, world) for name, n in mishaps}
    assert {mishap: problem for mishap, problem in problems.items() if problem} == {}


def test_a_run_that_is_not_what_it_was_is_found(world, tmp_path):
    """A run of another learning rate has other metrics than the undisturbed one."""
    out = tmp_path / "run"
    assert train(world.argv(out, "--lr", 1e-3)).codes == [0]
    assert world.wrong(out, 1) == "other metrics than those of the undisturbed run"


def test_an_end_in_one_line_is_no_problem():
    """An error that a user can mend."""
    outcome = train(["--model", "nowhere/at/all"])
    assert outcome.codes == [1] and bad_ending(outcome) is None


def test_other_ends_are_found():
    assert "controls" in bad_ending(Outcome([], [0], "\x1b[2J", ""))
    assert "traceback" in bad_ending(Outcome([], [1], "", "Traceback\nKeyError: 1"))
    assert "0 errors" in bad_ending(Outcome([], [1], "", "something"))

"""python -m pytest tests/test_storm.py a few mishaps of tests/storm.py, which has all of them."""

import storm

# Of each kind the numbers of some mishaps of seed 0.
FEW = {"kills": (0, 1, 2), "full_disks": (0,), "signals": (0,), "writers": (0,),
       "flips:run/*.distcp": (0,), "flips:run/metrics.jsonl": (0,),
       "flips:cache/0*.safetensors": (0,), "data": (0, 1, 2), "models": (0, 1, 2, 3, 4, 5),
       "flags": (0, 1)}  # fmt: skip


def test_a_short_storm(tmp_path):
    world = storm.World(tmp_path / "world")
    mishaps = [(name, number) for name, numbers in FEW.items() for number in numbers]
    found = {(name, n): storm.one(name, n, 0, world) for name, n in mishaps}
    assert {mishap: problem for mishap, problem in found.items() if problem} == {}


def test_a_run_that_is_not_what_it_was_is_found(tmp_path):
    """The storm fails where a run differs, or ends without one line."""
    world = storm.World(tmp_path / "world")
    out = tmp_path / "run"
    assert storm.train(world.argv(out, "--lr", 1e-3)).codes == [0]
    assert world.wrong(out, 1) == "other metrics than those of the undisturbed run"
    outcome = storm.train(["--model", "nowhere/at/all"])
    assert outcome.codes == [1] and storm.bad_ending(outcome) is None
    assert "controls" in storm.bad_ending(outcome.__class__([], [0], "\x1b[2J", ""))
    assert "traceback" in storm.bad_ending(outcome.__class__([], [1], "", "Traceback\nKeyError: 1"))
    assert "0 errors" in storm.bad_ending(outcome.__class__([], [1], "", "something"))

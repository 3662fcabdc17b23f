"""The lab: a walk of one pair, exercises, golden values, and experiments whose truth is known."""

"""A margin with a target, beyond which a certain pair pulls no more."""

FLAGS = "--loss ipo_sum --eval_every 1000"

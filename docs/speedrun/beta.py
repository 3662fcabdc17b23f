"""A larger beta holds the policy nearer to its base; no time is spent on evaluations."""

FLAGS = "--beta 0.3 --eval_every 1000"

"""A training run in its folder: settings, log, checkpoints and resuming, signals, the result."""

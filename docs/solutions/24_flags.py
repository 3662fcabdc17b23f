"""Exercise 24: a policy with a true reward above 3."""


def flags() -> list[str]:
    """Flags of train_dpo.py, beside --model tiny --data tiny, which are given."""
    return ["--beta", "0.3", "--epochs", "2"]

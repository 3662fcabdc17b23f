"""What a reward model records of its training, and its variants: several preferences, length."""

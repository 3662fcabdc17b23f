"""Experiments: a question each, what varies, and guesses with the differences that test them."""

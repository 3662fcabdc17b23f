"""Evaluation of reward models and policies: how well they rank, how they compare, what they say."""

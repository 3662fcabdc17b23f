"""The embedded world: its rule and its records, a small language model and data on disk."""

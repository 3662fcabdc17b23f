"""Self-checks. Each stops a run that would train something wrong.

first_step.py   scores of a batch are those of the model's own forward; losses at the start are ln 2
"""

"""The experiments: a file each, which says what varies. `python -m nanoalign.lab` lists them.

TITLE, QUESTION, GUESS      texts; the guess is what one would expect before
METHOD, LIMITS, EXERCISES   lists of texts: what was done, what the numbers do not say, tasks
run(lab) -> Findings        what varies, by the functions of nanoalign/lab/lab.py
"""

from importlib import import_module
from types import ModuleType

NAMES = (
    "overfitting",  # pairs x epochs
    "elsewhere",  # trained on one assistant, tested on another
    "noise",  # wrong labels, and losses made for them
    "length",  # labels that prefer length, and remedies
    "attack",  # answers that a reward model overrates
    "several",  # several preferences
    "why_lose",  # why a policy may lose to its base
    "beta",  # reward against KL
    "own_samples",  # pairs of others, one round of own samples, three rounds
    "losses",  # KTO, SimPO, ORPO, IPO, APO beside DPO
    "best_of_n",  # sampling and filtering by a reward model
    "ensembles",  # several reward models as one judge
    "data",  # how much data
)


def load(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")

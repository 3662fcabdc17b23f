"""The experiments: a file each, which says what varies. `python -m nanoalign.lab` lists them.

TITLE, QUESTION, GUESS      texts; the guess is what one would expect before
METHOD, LIMITS, EXERCISES   lists of texts: what was done, what the numbers do not say, tasks
run(lab) -> Findings        what varies, by the functions of nanoalign/lab/lab.py
"""

from types import ModuleType

from nanoalign.lab.experiments import (
    attack,
    beta,
    conflicts,
    data,
    elsewhere,
    ensembles,
    filtering,
    length,
    noise,
    other_losses,
    overfitting,
    own_samples,
    why_lose,
)

EXPERIMENTS: dict[str, ModuleType] = {
    "overfitting": overfitting,  # pairs x epochs
    "elsewhere": elsewhere,  # trained on one assistant, tested on another
    "noise": noise,  # wrong labels, and losses made for them
    "length": length,  # labels that prefer length, and remedies
    "attack": attack,  # answers that a reward model overrates
    "several": conflicts,  # several preferences
    "why_lose": why_lose,  # why a policy may lose to its base
    "beta": beta,  # reward against KL
    "own_samples": own_samples,  # pairs of others, one round of own samples, three rounds
    "losses": other_losses,  # KTO, SimPO, ORPO, IPO, APO beside DPO
    "best_of_n": filtering,  # sampling and filtering by a reward model
    "ensembles": ensembles,  # several reward models as one judge
    "data": data,  # how much data
}

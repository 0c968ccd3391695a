"""FedProx (Li et al. 2020): the local loss gains mu/2 ||w - w_start||^2 (eq. 2).

The term itself is in :mod:`fedge_sim.training`; here is how mu changes over rounds.
"""

import math
from collections.abc import Sequence

from fedge_sim.config import Hierarchy


def proximal_mu(accuracies: Sequence[float], settings: Hierarchy) -> float:
    """Return mu for the next global round: it decays while accuracy is stable.

    It begins at ``prox_mu`` and is multiplied by ``prox_mu_decay`` after every round whose
    accuracy is within ``acc_stable_threshold`` of the round's before, down to ``prox_mu_min``.

    Parameters
    ----------
    accuracies : sequence of float
        Of the global rounds so far, in order; nan where no client answered.
    settings : Hierarchy
    """
    mu, before = settings.prox_mu, math.nan
    for accuracy in accuracies:
        mu, before = next_mu(mu, before, accuracy, settings), accuracy
    return mu


def next_mu(mu: float, before: float, accuracy: float, settings: Hierarchy) -> float:
    """Return mu after a round of an accuracy, from mu and accuracy of the round before."""
    if abs(accuracy - before) > settings.acc_stable_threshold or math.isnan(accuracy - before):
        return mu
    return min(mu, max(settings.prox_mu_min, mu * settings.prox_mu_decay))

"""Diversity is all you need (DIAYN) for discrete actions: on the soft actor-critic whose expectations are sums.

(DIAYN.1) to (DIAYN.5) stand in `zhixing.algorithms.diayn`, (DSAC.1) to (DSAC.6) in `zhixing.algorithms.discrete_sac`.
"""

from zhixing.algorithms.diayn import Skilled
from zhixing.algorithms.discrete_sac import DiscreteSAC
from zhixing.core import hyperparameters


@hyperparameters
class DiscreteDIAYN(Skilled, DiscreteSAC):  # type: ignore[misc]  # their states differ
    """Skills without a reward (DIAYN), for discrete actions."""

    temperature: float | None = 0.1  # α; None: learned

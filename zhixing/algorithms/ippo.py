"""Independent proximal policy optimisation (IPPO): every agent learns with PPO as if it were alone.

de Witt et al., "Is independent learning all you need in the StarCraft multi-agent challenge?", arXiv:2011.09533.
It is MAPPO (zhixing/algorithms/mappo.py) whose values see their own agent's observation only: the decentralised case.
"""

from zhixing.algorithms.mappo import MAPPO
from zhixing.core import hyperparameters


@hyperparameters
class IPPO(MAPPO):
    """Independent proximal policy optimisation: MAPPO without what the others see."""

    centralised: bool = False  # values see what all agents see; else their own observation

"""Asynchronous advantage actor-critic (A3C), for discrete and continuous actions.

Mnih et al., "Asynchronous methods for deep reinforcement learning", arXiv:1602.01783, Algorithm S3. The equations are
A2C's (zhixing/algorithms/a2c.py), and so is the code: what is asynchronous is where they are computed. Each of W
workers, with environments of its own, again and again:

    (A3C.1)  copies the shared parameters: θ' ← θ
    (A3C.2)  runs π(·|s; θ') for n steps, as in (A2C.1)
    (A3C.3)  Δθ = ∇L(θ'), as in (A2C.2) to (A2C.4)
    (A3C.4)  a step of the optimiser from θ, as it is by now, down Δθ, as in (A2C.5): g, RMSProp's average, is shared

Departures: T, the count of steps, is kept beside θ and moves with it; policy and value are two networks unless
`shared_trunk` says otherwise; Adam may be had.
"""

from zhixing.algorithms.a2c import A2C
from zhixing.core import hyperparameters


@hyperparameters
class A3C(A2C):
    """Asynchronous advantage actor-critic: A2C whose gradients come from workers that do not wait for each other."""

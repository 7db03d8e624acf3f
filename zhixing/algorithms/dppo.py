"""Distributed proximal policy optimisation (DPPO), for discrete and continuous actions.

Heess et al., "Emergence of locomotion behaviours in rich environments", arXiv:1707.02286, Algorithms 1 to 3. The
equations are PPO's (zhixing/algorithms/ppo.py), and so is the code; what is distributed is where they are computed.

    worker, each of W:  (DPPO.1)  collect a rollout with the parameters θ of the chief
                        (DPPO.2)  for each minibatch:  send the gradient of its part, wait for the chief's new θ
    chief:              (DPPO.3)  for each minibatch:  wait for the gradients of all but D workers,
                                  one step of the optimiser down their mean;  what comes later is dropped
                        (DPPO.4)  β doubles where KL > 1.5 x target, halves where KL < target / 1.5

Observations and rewards are normalised by statistics of all workers; so are the advantages of a minibatch. Departures:
policy and value learn together, in K epochs of M minibatches as PPO does; the clip of PPO stands beside the penalty.
"""

from zhixing.algorithms.ppo import PPO
from zhixing.core import hyperparameters


@hyperparameters
class DPPO(PPO):
    """Distributed proximal policy optimisation: PPO whose gradients are means over many workers."""

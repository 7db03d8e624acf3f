"""MAPPO with a memory: for teams whose observations do not say all that matters.

Yu et al., arXiv:2103.01955, Algorithm 1. MAPPO is in mappo.py, how PPO remembers in recurrent_ppo.py: here they meet.

    (RMAPPO.1)  mᵢ = cell(mᵢ, oᵢ), each agent's own memory, empty at the start of an episode; one cell for all agents
    (RMAPPO.2)  policies πᵢ(·|mᵢ) and values Vᵢ(mᵢ, mᵢ₊₁, ..., mᵢ₋₁) see memories in the place of observations
"""

from typing import Any

import jax

from zhixing.algorithms.mappo import MAPPO, Scale, State, in_units
from zhixing.algorithms.recurrent_ppo import Carry, RecurrentPPO
from zhixing.core import Spec, hyperparameters
from zhixing.networks import Encoder
from zhixing.recurrent import CELLS, RecurrentActorCritic, empty


@hyperparameters
class RecurrentMAPPO(MAPPO, RecurrentPPO):
    """Multi-agent proximal policy optimisation with a recurrent memory."""

    def init(self, key: jax.Array, spec: Spec) -> Any:
        assert spec.agents is not None
        cell_key, key = jax.random.split(key)
        size = spec.agents.observation_size
        team = self.team(key, spec.agents, self.memory_size)
        cell = CELLS[self.cell](size, self.memory_size, key=cell_key)
        net = RecurrentActorCritic(cell, team, Encoder((size,), None))
        return State(*self.start(net, spec), Scale.start(max(team.critic.of) + 1))

    def carry(self, spec: Spec, key: jax.Array) -> Carry:
        assert spec.agents is not None
        return Carry(empty(self.cell, self.memory_size, spec.num_environments, spec.agents.count), ())

    def assess(self, state: Any, rollout: Any) -> Any:
        return RecurrentPPO.assess(self, state, rollout)

    def value(self, state: Any, observation: jax.Array) -> jax.Array:
        return RecurrentPPO.value(self, state, observation)

    def worth(self, state: Any, seen: jax.Array) -> jax.Array:
        net = state.actor_critic.net.actor_critic
        return in_units(net, state.scale, net.value(seen))

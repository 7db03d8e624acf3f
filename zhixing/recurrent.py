"""Memories: recurrent cells in front of an actor-critic, and how they are unrolled over episodes."""

from dataclasses import replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing.core import Spec
from zhixing.environments.base import ACTION_MASK
from zhixing.networks import ActorCritic, ActorCriticSettings, Encoder

Cell = Literal["gru", "lstm"]
CELLS = {"gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}


class RecurrentActorCritic(eqx.Module):
    """An actor-critic that sees not the observation but what a recurrent cell remembers of the episode.

    GRU: Cho et al. 2014, arXiv:1406.1078. LSTM: Hochreiter & Schmidhuber 1997. The cells are Equinox's.
    """

    cell: Any  # GRUCell or LSTMCell
    actor_critic: Any  # an ActorCritic of the remembered vector [..., h], or that of a team
    encoder: Encoder = eqx.field(static=True)

    @classmethod
    def create(
        cls, key: jax.Array, spec: Spec, settings: ActorCriticSettings, cell: Cell, size: int
    ) -> "RecurrentActorCritic":
        """The spaces of `spec`; a memory of `size` units; `settings` say what the layers behind it are."""
        cell_key, key = jax.random.split(key)
        encoder = Encoder.of(spec.observation_space)
        actor_critic = ActorCritic.create(key, remembered_spec(spec, size), settings)
        return cls(CELLS[cell](encoder.size, size, key=cell_key), actor_critic, encoder)

    @property
    def critic(self) -> Any:
        return self.actor_critic.critic

    def step(self, memory: Any, observation: Any) -> tuple[Any, Any]:
        """One step of instances [...]: -> the memory after it, and what the actor-critic sees in its place."""
        x = self.encoder(observation)
        cell, leading = self.cell, x.ndim - 1
        for _ in range(leading):
            cell = jax.vmap(cell)
        memory = cell(x, memory)
        seen = memory[0] if isinstance(memory, tuple) else memory
        if isinstance(observation, dict) and ACTION_MASK in observation:
            return memory, {"remembered": seen, ACTION_MASK: observation[ACTION_MASK]}
        return memory, seen

    def unroll(self, memory: Any, observation: Any, ended: jax.Array) -> tuple[Any, Any]:
        """`step` over [T, ...] from `memory` [...], which is empty again after each step that `ended` an episode.

        -> the memories after each step, before they are emptied, and what the actor-critic sees; [T, ...].
        """

        def one(memory: Any, inputs: tuple[Any, jax.Array]) -> tuple[Any, tuple[Any, Any]]:
            observation, ended = inputs
            memory, seen = self.step(memory, observation)
            following = jax.tree.map(lambda x: jnp.where(ended[..., None], jnp.zeros_like(x), x), memory)
            return following, (memory, seen)

        return jax.lax.scan(one, memory, (observation, ended))[1]


def empty(cell: Cell, size: int, *leading: int) -> Any:
    """The memory of an episode that begins: zeros [..., size], for an LSTM two of them."""
    zeros = jnp.zeros((*leading, size))
    return (zeros, zeros) if cell == "lstm" else zeros


def remembered_spec(spec: Spec, size: int) -> Spec:
    """The task as the actor-critic behind the memory sees it."""
    space: spaces.Space = spaces.Box(-1.0, 1.0, (size,), np.float32)
    if isinstance(spec.observation_space, spaces.Dict) and ACTION_MASK in spec.observation_space.spaces:
        space = spaces.Dict({"remembered": space, ACTION_MASK: spec.observation_space[ACTION_MASK]})
    return replace(spec, observation_space=space)

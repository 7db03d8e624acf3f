"""What algorithms learn from: single transitions, and what a replay makes of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Transition(NamedTuple):
    """One step of an environment; arrays carry leading axes [B], [N] or [T, N].

    Of A agents everything has one more axis behind these, [T, N, A, ...], and what an agent does not share with the
    others differs along it: rewards, and where its own task ended.

    Bootstrapping stops at `terminated` only; recursions over time are cut at `terminated` and `truncated`.
    """

    observation: Any
    action: Any
    reward: Any
    next_observation: Any  # the true successor, never the reset one
    terminated: Any  # bool
    truncated: Any  # bool
    extras: Any = ()  # what `act` recorded: log-probabilities, ...
    active: Any = ()  # of several agents: bool, whether it was still there to act

    @property
    def steps(self) -> int:
        """Environment steps in a rollout [T, N]."""
        return self.reward.shape[0] * self.reward.shape[1]

    @property
    def bootstrap(self) -> jax.Array:
        """1 where a value follows, 0 where the episode terminated: what γ is multiplied with, everywhere."""
        return 1.0 - jnp.asarray(self.terminated, jnp.float32)

    @property
    def ended(self) -> jax.Array:
        """Where the episode ended, for whichever reason."""
        return self.terminated | self.truncated


class Experience(NamedTuple):
    """n ≤ `n_step` steps of one episode as a replay gives them, [B]: every target is reward + discount · value(s').

    Of A agents `reward`, `discount` and `active` are [B, A].
    """

    observation: Any  # sₜ
    action: Any  # aₜ
    reward: jax.Array  # rₜ₊₁ + γ rₜ₊₂ + ... + γⁿ⁻¹ rₜ₊ₙ
    next_observation: Any  # sₜ₊ₙ, never that of another episode
    discount: jax.Array  # γⁿ, and 0 where the episode terminated at sₜ₊ₙ
    weight: jax.Array  # what the sample's loss is multiplied with: 1, or prioritised replay's importance weight
    extras: Any = ()
    active: Any = ()  # of several agents: bool, whether it was still there to act

"""Diversity is all you need (DIAYN): skills learned without a reward, on soft actor-critic.

Eysenbach, Gupta, Ibarz & Levine, "Diversity is all you need: learning skills without a reward function",
arXiv:1802.06070, Algorithm 1.

    (DIAYN.1)  at the start of each episode: z ~ p(z), uniform over K skills
    (DIAYN.2)  a ~ π(·|s, z; θ); store (s, z, a, s') in the replay; sample a minibatch from it
    (DIAYN.3)  r = log q(z|s'; φ) - log p(z): the pseudo-reward, which takes the place of the environment's
    (DIAYN.4)  an update of the soft actor-critic on r, all of whose networks read (s, z)
    (DIAYN.5)  a gradient step on -log q(z|s'; φ) with respect to φ: the discriminator
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from gymnasium import spaces

from zhixing.algorithms.dqn import taken
from zhixing.algorithms.sac import SAC
from zhixing.core import Algorithm, Clock, Spec, hyperparameters, require_between, require_positive
from zhixing.errors import UsageError
from zhixing.learned import Learned
from zhixing.networks import QNetwork
from zhixing.off_policy import OffPolicyActorCritic
from zhixing.transition import Experience


class State(NamedTuple):
    agent: Any  # the soft actor-critic's state; its clock is the one below
    discriminator: Learned  # logits of q(·|s; φ)
    clock: Clock


class Carry(NamedTuple):
    skill: jax.Array  # [N] int32, z of the episodes under way
    noise: Any  # what the soft actor-critic carries


@hyperparameters
class Skilled(OffPolicyActorCritic):
    """What DIAYN adds to a soft actor-critic, whatever its actions."""

    skills: int = 8  # K
    discriminator_learning_rate: float = 3e-4

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_between(self, 2, 1_000, "skills")
        require_positive(self, "discriminator_learning_rate")
        for name, wanted in {"n_step": 1, "hindsight": "none", "replay_frames": False}.items():
            if getattr(self, name) != wanted:
                raise UsageError(
                    f"algorithm.{name} is {getattr(self, name)}, and a pseudo-reward is of one step and of the skill; "
                    f"set it to {str(wanted).lower()}"
                )

    def init(self, key: jax.Array, spec: Spec) -> State:
        agent_key, discriminator_key = jax.random.split(key)
        with_skill = spaces.Tuple((spec.observation_space, spaces.Discrete(self.skills)))
        agent = super().init(agent_key, replace(spec, observation_space=with_skill))
        net = QNetwork.create(discriminator_key, spec.observation_space, self.skills, self.hidden, self.activation)
        discriminator = Learned.create(net, self.discriminator_optimiser(agent.clock))
        return State(agent._replace(clock=()), discriminator, agent.clock)

    def carry(self, spec: Spec, key: jax.Array) -> Carry:
        skill_key, key = jax.random.split(key)
        skill = jax.random.randint(skill_key, (spec.num_environments,), 0, self.skills)  # (DIAYN.1)
        return Carry(skill, super().carry(spec, key))

    def act(self, state: State, carry: Carry, observation: Any, key: jax.Array):  # (DIAYN.2)
        action, noise, _ = super().act(self.agent(state), carry.noise, (observation, carry.skill), key)
        return action, Carry(carry.skill, noise), carry.skill

    def update(self, state: State, batch: Experience, key: jax.Array) -> tuple[State, dict]:
        skill = batch.extras
        log_q = taken(self.log_q(state, batch.next_observation), skill)
        reward = log_q + jnp.log(self.skills)  # (DIAYN.3)
        told = batch._replace(
            observation=(batch.observation, skill), next_observation=(batch.next_observation, skill), reward=reward
        )
        agent, metrics = super().update(self.agent(state), told, key)  # (DIAYN.4)

        def loss(q: QNetwork) -> tuple[jax.Array, dict]:  # (DIAYN.5)
            logits = q(batch.next_observation)
            found = logits.argmax(-1) == skill
            return -taken(jax.nn.log_softmax(logits), skill).mean(), {"accuracy": found.mean(dtype=jnp.float32)}

        discriminator, told_apart = state.discriminator.minimise(loss, self.discriminator_optimiser(state.clock))
        metrics |= {"pseudo_reward": reward.mean(), "accuracy": told_apart["accuracy"]}
        return State(agent._replace(clock=()), discriminator, state.clock), metrics

    def play(self, state: State, carry: Carry, observation: Any) -> tuple[Any, Carry]:
        return super().policy(self.agent(state), (observation, carry.skill)), carry

    def policy(self, state: State, observation: Any) -> Any:
        """The greedy action of the first skill; `play` knows which one it is that acts."""
        leading = self.log_q(state, observation).shape[:-1]
        return super().policy(self.agent(state), (observation, jnp.zeros(leading, jnp.int32)))

    value = Algorithm.value  # what is learned are values of the pseudo-reward, of which no evaluation knows

    def log_q(self, state: State, observation: Any) -> jax.Array:
        """log q(·|s; φ), by which state which skill is recognised: `observation` [B, ...] -> [B, K]."""
        return jax.nn.log_softmax(state.discriminator(observation))

    def agent(self, state: State) -> Any:
        """The state of the soft actor-critic."""
        return state.agent._replace(clock=state.clock)

    def discriminator_optimiser(self, clock: Clock) -> optax.GradientTransformation:
        return optax.adam(self.discriminator_learning_rate)


@hyperparameters
class DIAYN(Skilled, SAC):  # type: ignore[misc]  # their states differ
    """Skills without a reward (DIAYN), on SAC."""

    temperature: float | None = 0.1  # α, of the paper; None: learned

"""Off-policy learning: the base of the algorithms whose data are minibatches [B] that a replay samples."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zhixing import schedules
from zhixing.core import Algorithm, Clock, Spec, hyperparameters, require_between, require_positive
from zhixing.errors import UsageError
from zhixing.hindsight import Hindsight, Strategy
from zhixing.networks import Activation
from zhixing.priorities import Kind
from zhixing.replay import Replay, emphasised
from zhixing.transition import Experience, Transition


@hyperparameters
class OffPolicy(Algorithm):
    """Eats minibatches [B] that a replay samples."""

    discount: float = 0.99  # γ
    n_step: int = 1  # steps of a target before it bootstraps, fewer where the episode ends
    replay: Kind = "uniform"  # or prioritised: which transitions are sampled
    replay_capacity: int = 100_000  # transitions
    replay_frames: bool = False  # keep each image once, not in every observation that it is part of
    hindsight: Strategy = "none"  # or which goals, reached later, take the place of the desired ones
    hindsight_ratio: float = 0.8  # the part of a minibatch whose goals are replaced
    emphasis: float = 1.0  # η₀ of emphasising recent experience, which rises to 1 over the run: 1 is uniform
    emphasis_minimum: int = 5_000  # of the last so many transitions an emphasising update draws, at least
    priority_exponent: float = 0.6  # α of prioritised replay: 0 is uniform
    importance_exponent: float = 0.4  # β of prioritised replay at the start; it rises to 1 over the run
    batch_size: int = 64  # B
    learning_starts: int = 1_000  # environment steps before the first update
    rollout_length: int = 1  # T, steps of each environment between two learning phases
    gradient_steps: int = 1  # updates in one learning phase

    @property
    def steps_per_iteration(self) -> int:
        return self.rollout_length

    @property
    def updates_per_iteration(self) -> int:
        return self.gradient_steps

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "replay_capacity", "batch_size", "rollout_length", "gradient_steps", "n_step")
        require_between(self, 0, np.inf, "learning_starts", "priority_exponent")
        require_between(self, 0, 1, "discount", "importance_exponent", "hindsight_ratio", "emphasis")
        require_positive(self, "emphasis_minimum")
        if self.replay != "uniform" and np.any(np.asarray(self.emphasis) < 1):
            raise UsageError(
                f"algorithm.emphasis is {self.emphasis} and algorithm.replay is {self.replay}: both say which "
                "transitions are drawn; set emphasis to 1 or replay to uniform"
            )
        if self.hindsight != "none":
            self.check_hindsight(spec)
        if self.rollout_length * spec.num_environments > self.replay_capacity:
            raise UsageError(
                f"algorithm.replay_capacity is {self.replay_capacity}, less than the {self.rollout_length} x "
                f"{spec.num_environments} transitions of one rollout; make it larger"
            )

    def check_hindsight(self, spec: Spec) -> None:
        if spec.goals is None:
            raise UsageError(
                "algorithm.hindsight needs an environment whose observations have an achieved_goal and a desired_goal "
                "and that has compute_reward; set algorithm.hindsight to none"
            )
        if spec.max_episode_steps is None:
            raise UsageError(
                "algorithm.hindsight looks through whole episodes, and this environment does not say how long they can "
                "be; set environment.max_episode_steps"
            )
        if self.n_step > 1:
            raise UsageError(
                f"algorithm.n_step is {self.n_step}, and the rewards between belong to the goal that is replaced; set "
                "algorithm.n_step to 1, or algorithm.hindsight to none"
            )
        if self.replay_frames:
            raise UsageError("algorithm.hindsight reads goals, not images; set algorithm.replay_frames to false")

    def memory(self, spec: Spec, example: Transition) -> Replay:
        stack = 0 if spec.frame_stack == 1 else spec.frame_stack
        replay = Replay.create(self.replay_capacity, example, self.replay, stack if self.replay_frames else None)
        if self.hindsight == "none" or spec.goals is None or spec.max_episode_steps is None:
            return replay
        return replace(replay, hindsight=Hindsight(spec.goals, self.hindsight, spec.max_episode_steps))

    def forget_episodes(self, memory: Replay) -> Replay:
        return memory.cut()

    def update(self, state: Any, batch: Experience, key: jax.Array) -> tuple[Any, dict]:
        """-> state, metrics; among these, for prioritised replay, `td_error` [B], the |δ| of each sample."""
        raise NotImplementedError

    def learn(
        self, state: Any, memory: Replay, rollout: Transition, key: jax.Array, see: Callable[[Any], Any] = lambda x: x
    ) -> tuple[Any, Any, dict]:
        """`see`: what is done to observations [B, ...] of the replay before `update` reads them."""
        memory = memory.add(rollout, self.priority_exponent)
        clock = state.clock.tick(steps=rollout.steps)
        state = eqx.tree_at(lambda s: s.clock, state, clock)
        importance = schedules.linear(self.importance_exponent, 1.0, 1.0, clock.progress)

        # Only the priorities go through the loop and the branch: carrying the transitions along would copy them.
        def one(carry: tuple[Any, Any], inputs: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], dict]:
            (state, priorities), (key, recent) = carry, inputs
            sample_key, update_key = jax.random.split(key)
            replay = replace(memory, priorities=priorities)
            batch, index = replay.sample(sample_key, self.batch_size, self.discount, self.n_step, importance, recent)
            if replay.hindsight is not None:
                key = jax.random.fold_in(sample_key, 1)  # what is drawn does not depend on what is then relabelled
                batch = replay.hindsight.relabel(key, replay, index, batch, self.hindsight_ratio, self.discount)
            batch = batch._replace(observation=see(batch.observation), next_observation=see(batch.next_observation))
            state, metrics = self.update(state, batch, update_key)
            state = eqx.tree_at(lambda s: s.clock, state, state.clock.tick(updates=1))
            if self.replay != "uniform":
                priorities = replay.reprioritise(index, metrics["td_error"], self.priority_exponent)
            return (state, priorities), jax.tree.map(jnp.mean, metrics)

        def several(state: Any, priorities: Any) -> tuple[tuple[Any, Any], dict]:
            recent = emphasised(memory.capacity, self.gradient_steps, self.emphasis, clock.progress)
            recent = jnp.maximum(recent, self.emphasis_minimum).astype(jnp.int32)
            keys = jax.random.split(key, self.gradient_steps)
            carry, metrics = jax.lax.scan(one, (state, priorities), (keys, recent))
            return carry, jax.tree.map(jnp.mean, metrics)

        def none(state: Any, priorities: Any) -> tuple[tuple[Any, Any], dict]:
            _, metrics = jax.eval_shape(several, state, priorities)
            return (state, priorities), jax.tree.map(lambda x: jnp.full(x.shape, 0, x.dtype), metrics)

        # The clock is shared by all seeds, so that this stays a branch under their vmap.
        started = clock.steps >= self.learning_starts
        (state, priorities), metrics = jax.lax.cond(started, several, none, state, memory.priorities)
        return state, replace(memory, priorities=priorities), metrics


@hyperparameters
class OffPolicyActorCritic(OffPolicy):
    """With an actor, critics, and targets that follow slowly: what DDPG, TD3 and SAC share."""

    batch_size: int = 256  # B
    hidden: tuple[int, ...] = (256, 256)  # units of each hidden layer, of actor and critics
    activation: Activation = "relu"
    learning_rate: float = 3e-4  # of the actor, and of a temperature
    critic_learning_rate: float = 3e-4
    learning_rate_schedule: schedules.Schedule = "constant"
    polyak: float = 0.005  # τ

    def check(self, spec: Spec) -> None:
        super().check(spec)
        require_positive(self, "hidden", "learning_rate", "critic_learning_rate")
        require_between(self, 0, 1, "polyak")

    def optimiser(self, clock: Clock) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate * schedules.remaining(self.learning_rate_schedule, clock.progress))

    def critic_optimiser(self, clock: Clock) -> optax.GradientTransformation:
        return optax.adam(self.critic_learning_rate * schedules.remaining(self.learning_rate_schedule, clock.progress))

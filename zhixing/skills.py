"""What DIAYN has learned, skill by skill: episodes of each, the table and figure made of them, and a start from one.

Eysenbach et al., arXiv:1802.06070: section 3 for what is measured, section 4.2.1 for the start of another task.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zhixing import plotting
from zhixing.algorithms.diayn import Skilled
from zhixing.config import Config
from zhixing.drivers.loop import Loop
from zhixing.environments.base import Environment
from zhixing.errors import UsageError
from zhixing.learned import Learned, Vector
from zhixing.networks import MLP, Encoder
from zhixing.run import TrainedRun
from zhixing.shared import map_seeds, over_seeds

EPISODES = 10  # of each skill, where the best is looked for


class SkillEpisodes(NamedTuple):
    """Greedy episodes of every skill: m of each of the K, for S seeds; M is the length of the longest."""

    returns: np.ndarray  # [S, K, m] of the environment's own rewards
    observations: np.ndarray  # [S, K, m, M + 1, numbers] as the environment gave them, NaN after the end
    log_q: np.ndarray  # [S, K, m, M] log q(z|s') of the skill that acts, NaN after the end
    found: np.ndarray  # [S, K, m, M] whether it is the most likely one: 0 or 1, NaN after the end

    def summary(self) -> dict[str, Any]:
        """Mean return of the episodes; mean accuracy and log q - log p of their steps: of all, by seed and by skill."""
        seeds, skills = self.returns.shape[:2]

        def means(which: Any) -> dict[str, float]:
            return {
                "return": float(self.returns[which].mean()),
                "accuracy": float(np.nanmean(self.found[which])),
                "pseudo_reward": float(np.nanmean(self.log_q[which]) + np.log(skills)),
            }

        return {
            **means(np.s_[:]),
            "seeds": [means(np.s_[seed]) for seed in range(seeds)],
            "skills": [{"skill": skill, **means(np.s_[:, skill])} for skill in range(skills)],
        }


def require_skills(run: TrainedRun) -> Skilled:
    """The algorithm of `run`; UsageError if it has no skills."""
    if not isinstance(run.algorithm, Skilled):
        name = type(run.algorithm).__name__
        raise UsageError(f"{run.directory} is a run of {name}, which has no skills; name one of diayn")
    return run.algorithm


def play_skills(run: TrainedRun, episodes: int = EPISODES) -> SkillEpisodes:
    """Play `episodes` greedy episodes of each skill of each seed, side by side."""
    algorithm, loop, environment = require_skills(run), run.loop, run.environment
    count, skills = len(loop.seeds), algorithm.skills
    instances = skills * episodes
    batch = environment.batch(loop.seeds, instances)
    chain, limit = loop.chain, environment.max_episode_steps or run.config.evaluation.max_steps
    reset = jax.jit(batch.reset) if environment.saves_state else batch.reset
    step: Any = jax.jit(batch.step) if environment.compiled else batch.step
    spec = replace(loop.spec, num_environments=instances)
    skill = jnp.arange(instances) // episodes

    @jax.jit
    def begin(transforms: Any, observation: Any, key: jax.Array) -> tuple[Any, Any, Any]:
        transforms = over_seeds(lambda state: chain.for_evaluation(state, instances), count, transforms)
        seen = over_seeds(lambda state, x: chain.reset(state, x, training=False), count, transforms, observation)
        carry = over_seeds(lambda k: algorithm.carry(spec, k)._replace(skill=skill), count, key)
        return *seen, carry

    @jax.jit
    def decide(learner: Any, carry: Any, observation: Any) -> Any:
        return chain.action(over_seeds(algorithm.play, count, learner, carry, observation)[0])

    @jax.jit
    def look(learner: Any, transforms: Any, timestep: Any) -> tuple[Any, Any, jax.Array]:
        transforms, told = over_seeds(
            lambda state, t: chain.step(state, t, training=False), count, transforms, timestep
        )
        return transforms, told.observation, over_seeds(algorithm.log_q, count, learner, told.next_observation)

    keys = jax.vmap(lambda seed: jax.random.PRNGKey(seed))(jnp.asarray(loop.seeds))
    state, raw = reset(keys)
    transforms, observation, carry = begin(run._transforms, raw, keys)
    encoder = Encoder.of(environment.observation_space)
    observations, log_q = [np.asarray(encoder(raw))], list[np.ndarray]()
    returns = np.zeros((count, instances))
    going_on = np.ones((count, instances), bool)
    while going_on.any() and len(log_q) < limit:
        keys = jax.vmap(lambda key: jax.random.split(key)[0])(keys)
        state, timestep = step(state, decide(run._learner, carry, observation), keys)
        transforms, observation, known = look(run._learner, transforms, timestep)
        returns += np.where(going_on, np.asarray(timestep.reward), 0.0)
        alive = going_on[..., None]
        observations.append(np.where(alive, np.asarray(encoder(timestep.next_observation)), np.nan))
        log_q.append(np.where(alive, np.asarray(known), np.nan))
        going_on &= ~(np.asarray(timestep.terminated) | np.asarray(timestep.truncated))
    batch.close()

    def of_skills(steps: list[np.ndarray]) -> np.ndarray:  # [M][S, K m, ...] -> [S, K, m, M, ...]
        return np.stack(steps, axis=2).reshape(count, skills, episodes, len(steps), -1)

    known = of_skills(log_q)  # [S, K, m, M, K]
    own = np.take_along_axis(known, np.arange(skills).reshape(1, -1, 1, 1, 1), axis=-1)[..., 0]
    found = np.where(np.isnan(own), np.nan, own == known.max(-1))
    return SkillEpisodes(returns.reshape(count, skills, episodes), of_skills(observations), own, found)


def draw_skills(run: TrainedRun, played: SkillEpisodes, output: Path, axes: tuple[int, int] = (0, 1)) -> Path:
    """The trajectories of all skills in the plane of two of the observation's numbers, a panel a seed."""
    numbers = played.observations.shape[-1]
    for axis in axes:
        if not 0 <= axis < numbers:
            raise UsageError(f"the observation has no number {axis}; --axes takes two from 0 to {numbers - 1}")
    return plotting.plot_trajectories(
        played.observations[..., list(axes)],
        output,
        labels=[f"observation[{axis}]" for axis in axes],
        titles=[f"seed {seed}" for seed in run.loop.seeds],
    )


# ------------------------------------------------------------------------- a soft actor-critic that starts as a skill


def started(config: Config, environment: Environment, loop: Loop, learner: Any) -> Any:
    """`learner`, new, of every seed, with the networks of a skill that `config.start` names.

    The skill is what it was, one input of the first layers that never changes: its weights go into their biases, and
    the networks act as before without reading it. Each seed starts from a skill of its own: from the run's seed at the
    same place, by its best skill if none is named, the one with the highest mean return of the new task.
    """
    run, skill = start_of(config, environment), config.start.skill
    algorithm = require_skills(run)
    if skill is None:
        on_task = TrainedRun(run.directory, run.file, replace(run.config, environment=config.environment), environment)
        chosen = play_skills(on_task).returns.mean(-1).argmax(-1)
    else:
        chosen = np.full(len(run.loop.seeds), skill)
    rows = np.arange(len(loop.seeds)) % len(run.loop.seeds)
    trained = map_seeds(lambda x: x[rows], run._learner).agent
    first = Encoder.of(run.loop.spec.observation_space).size

    def fixed(old: Any, new: Any, skill: jax.Array) -> Any:
        return without_skill(old, new, first, algorithm.skills, skill)

    networks = {
        name: jax.vmap(fixed)(getattr(trained, name), new, jnp.asarray(chosen[rows]))
        for name, new in zip(learner._fields, learner, strict=True)
        if isinstance(new, Vector)
    }
    return learner._replace(**networks)


def without_skill(old: Vector, new: Vector, first: int, skills: int, skill: jax.Array) -> Vector:
    """`new` as `old` is for one `skill`, whose one-hot input begins at the number `first` of the first layer's."""

    def fold(old: Any, new: Any) -> Any:
        if not isinstance(old, MLP) or old.weights[0].shape == new.weights[0].shape:
            return old
        weight = old.weights[0]  # [..., outputs, inputs]
        bias = old.biases[0] + jnp.take(weight, first + skill, axis=-1)
        rest = jnp.concatenate([weight[..., :first], weight[..., first + skills :]], -1)
        return replace(old, weights=[rest, *old.weights[1:]], biases=[bias, *old.biases[1:]])

    # The two nets differ in what they read, so that only their layers correspond.
    layers = jax.tree.leaves(new.net, is_leaf=is_mlp)
    net = jax.tree.unflatten(
        jax.tree.structure(old.net, is_leaf=is_mlp),
        [fold(a, b) for a, b in zip(jax.tree.leaves(old.net, is_leaf=is_mlp), layers, strict=True)],
    )
    folded = Vector(Vector.of(net).parameters, new.structure)
    return Learned(folded, new.optimiser_state) if isinstance(new, Learned) else folded


def is_mlp(x: Any) -> bool:
    return isinstance(x, MLP)


def start_of(config: Config, environment: Environment) -> TrainedRun:
    """The run that `config.start` names; UsageError unless its skills fit the algorithm and the environment."""
    run = TrainedRun.load(str(config.start.run))
    name, new, old, skill = config.start.run, config.algorithm, require_skills(run), config.start.skill
    if skill is not None and not 0 <= skill < old.skills:
        raise UsageError(f"start.skill is {skill}; {name} has the skills 0 to {old.skills - 1}")
    if not isinstance(old, type(new)) or isinstance(new, Skilled):
        wanted = "discrete_sac" if "Discrete" in type(old).__name__ else "sac"
        raise UsageError(f"{type(new).__name__} cannot start from a skill of {name}; train {wanted}")
    for setting in ("hidden", "activation", "layer_norm", "state_value"):
        if getattr(new, setting, None) != getattr(old, setting, None):
            raise UsageError(
                f"algorithm.{setting} is {getattr(new, setting)}, and {name} has {getattr(old, setting)}; set it so"
            )
    for space in ("observation_space", "action_space"):
        if getattr(environment, space) != getattr(run.environment, space):
            raise UsageError(
                f"{environment.id} has another {space} than {run.environment.id}, where {name} was trained"
            )
    if run.config.environment.normalize_observation or config.environment.normalize_observation:
        raise UsageError(
            "a skill's networks read observations as they are; set environment.normalize_observation to false in both"
        )
    if run.config.environment.frame_stack != config.environment.frame_stack:
        frames = run.config.environment.frame_stack
        raise UsageError(f"environment.frame_stack is not that of {name}; set it to {frames}")
    return run

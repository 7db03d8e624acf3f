"""Tasks whose answer is known, and how an algorithm is run on them.

Probe environments: each is solved only if one mechanism works, so that a failure points at it. After Jones,
"Debugging RL, without the agonizing pain", andyljones.com/posts/rl-debugging.html.
Counting environments: the observation says which episode and which step it is, so that every transition can be checked.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from zhixing import environments
from zhixing.agents import Agents, StackAgents
from zhixing.algorithms import ALGORITHMS, algorithm_class
from zhixing.core import Algorithm, Clock, Episodic, OnPolicy, Spec, Transition, hyperparameters
from zhixing.drivers.compiled import CompiledDriver
from zhixing.drivers.host import HostDriver
from zhixing.drivers.loop import Loop, Run
from zhixing.environments.base import Environment
from zhixing.environments.jax_adapter import JaxAdapter, JaxEnvironment
from zhixing.environments.transforms import Chain, RescaleAction, Spaces, Transform
from zhixing.errors import UsageError
from zhixing.shared import over_seeds

DISCOUNT = 0.5
END = -1


@dataclass(frozen=True)
class Probe:
    """A deterministic task with a few states and two actions."""

    reward: tuple[tuple[float, float], ...]  # [states][actions]
    successor: tuple[int, ...]  # [states], END where the episode terminates
    values: tuple[float, ...]  # [states], V of the best policy at DISCOUNT
    starts: int = 1  # episodes start in one of so many first states
    actions: tuple[int, ...] | None = None  # [states], the best ones, where it matters
    max_episode_steps: int | None = None  # truncated there
    returns: tuple[float, ...] | None = None  # [states], the mean return up to there, where it is not `values`


PROBES = {
    "constant_reward": Probe(reward=((1, 1),), successor=(END,), values=(1.0,)),
    "reward_by_observation": Probe(reward=((-1, -1), (1, 1)), successor=(END, END), values=(-1.0, 1.0), starts=2),
    "two_steps": Probe(reward=((0, 0), (1, 1)), successor=(1, END), values=(DISCOUNT, 1.0)),
    "reward_by_action": Probe(reward=((0, 1),), successor=(END,), values=(1.0,), actions=(1,)),
    "reward_by_both": Probe(
        reward=((1, -1), (-1, 1)), successor=(END, END), values=(1.0, 1.0), starts=2, actions=(0, 1)
    ),
    "termination": Probe(
        reward=((1, 1),) * 3, successor=(1, 2, END), values=(1 + DISCOUNT + DISCOUNT**2, 1 + DISCOUNT, 1.0)
    ),
    "truncation": Probe(
        reward=((1, 1),),
        successor=(0,),
        values=(1 / (1 - DISCOUNT),),
        max_episode_steps=3,
        returns=((1.75 + 1.5 + 1) / 3,),
    ),
    # Where an episode is cut, the first state of the next one is worth less than the true successor.
    "truncation_successor": Probe(
        reward=((0, 0), (1, 1)),
        successor=(1, 1),
        values=(DISCOUNT / (1 - DISCOUNT), 1 / (1 - DISCOUNT)),
        max_episode_steps=3,
        returns=(0.75, (1.5 + 1) / 2),
    ),
}


class ProbeState(NamedTuple):
    probe: jax.Array  # [] int32, which of PROBES
    state: jax.Array  # [] int32
    steps: jax.Array  # [] int32, since the episode began


class ProbeEnvironment:
    """All of PROBES in gymnax's protocol, with its own reset; an instance stays in the probe that its state names.

    So one compiled program serves all: a row of the seeds axis has one probe, see `train_on_probes`.
    The observation is the state's index, or a number for it as a vector. With `continuous` actions -1 and 1 are the two
    actions, and what lies between them has a reward between theirs.
    """

    max_episode_steps = 3  # of none is an episode longer

    def __init__(self, tabular: bool, continuous: bool = False):
        probes = list(PROBES.values())
        self.continuous = continuous
        self.tabular, self.states = tabular, max(len(probe.successor) for probe in probes)
        padding = [self.states - len(probe.successor) for probe in probes]
        pairs = list(zip(probes, padding, strict=True))
        self.reward = jnp.float32([probe.reward + ((0, 0),) * pad for probe, pad in pairs])  # [P, states, actions]
        self.successor = jnp.int32([probe.successor + (END,) * pad for probe, pad in pairs])  # [P, states]
        self.starts = jnp.int32([probe.starts for probe in probes])
        self.limit = jnp.int32([probe.max_episode_steps or 1_000_000 for probe in probes])
        self.observations = jnp.arange(self.states) if tabular else jnp.linspace(1.0, -1.0, self.states)[:, None]

    def observation_space(self, params: Any) -> spaces.Space:
        return spaces.Discrete(self.states) if self.tabular else spaces.Box(-1, 1, (1,), np.float32)

    def action_space(self, params: Any) -> spaces.Space:
        return spaces.Box(-1, 1, (1,), np.float32) if self.continuous else spaces.Discrete(2)

    def begin(self, key: jax.Array, probe: jax.Array) -> tuple[Any, ProbeState]:
        state = jax.random.randint(key, (), 0, self.starts[probe])
        return self.observations[state], ProbeState(probe, state, jnp.int32(0))

    def reset(self, key: jax.Array, params: Any) -> tuple[Any, ProbeState]:
        return self.begin(key, jnp.int32(0))

    def step(self, key: jax.Array, state: ProbeState, action: jax.Array, params: Any) -> tuple:
        probe = state.probe
        successor = self.successor[probe, state.state]
        terminated, truncated = successor == END, state.steps + 1 >= self.limit[probe]
        going_on = ProbeState(probe, jnp.maximum(successor, 0), state.steps + 1)
        last = self.observations[going_on.state]
        following = jax.tree.map(
            lambda new, old: jnp.where(terminated | truncated, new, old), self.begin(key, probe), (last, going_on)
        )
        rewards = self.reward[probe, state.state]
        share = 0.5 * (action[0] + 1) if self.continuous else action  # of the second action
        reward = (1 - share) * rewards[0] + share * rewards[1]
        return *following, reward, terminated, truncated, {"final_observation": last}


class ContinuousProbeEnvironment(JaxEnvironment):
    """One step; the reward is -(action - observation)²."""

    max_episode_steps = 2  # never reached
    observations = np.float32([[-1.0], [1.0]])

    def observation_space(self, params: Any) -> spaces.Space:
        return spaces.Box(-1, 1, (1,), np.float32)

    def action_space(self, params: Any) -> spaces.Space:
        return spaces.Box(-2, 2, (1,), np.float32)

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        observation = jnp.asarray(self.observations)[jax.random.randint(key, (), 0, 2)]
        return observation, observation

    def step_env(self, key: jax.Array, state: jax.Array, action: jax.Array, params: Any) -> tuple:
        return state, state, -jnp.square(action - state).sum(), True, {}


class OneOfMany:
    """An environment with one agent as one with several, of whom there is one. It resets by itself."""

    agents = ("agent_0",)

    def __init__(self, inner: Any):
        self.inner, self.max_episode_steps = inner, inner.max_episode_steps
        self.observations = jnp.asarray(inner.observations)[:, None]  # as an algorithm sees them, [states, A, d]

    def observation_space(self, params: Any) -> spaces.Space:
        return spaces.Dict(agent_0=self.inner.observation_space(params))

    def action_space(self, params: Any) -> spaces.Space:
        return spaces.Dict(agent_0=self.inner.action_space(params))

    def begin(self, key: jax.Array, probe: jax.Array) -> tuple[Any, Any]:
        observation, state = self.inner.begin(key, probe)
        return {"agent_0": observation}, state

    def reset(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        observation, state = self.inner.reset(key, params)
        return {"agent_0": observation}, state

    def step(self, key: jax.Array, state: Any, action: Any, params: Any) -> tuple:
        observation, state, reward, *ends, info = self.inner.step(key, state, action["agent_0"], params)
        last = {"agent_0": info["final_observation"]}
        return {"agent_0": observation}, state, jnp.stack([reward]), *ends, {"final_observation": last}


# ------------------------------------------------------------------------------- how an algorithm is run on a task

# Of these an algorithm takes those that it has. A new algorithm that needs others gets a line in SETTINGS.
COMMON = {
    "discount": DISCOUNT,
    "hidden": (32,),
    "learning_rate": 1e-2,
    "learning_rate_schedule": "linear",
    "batch_size": 32,
    "replay_capacity": 512,
    "learning_starts": 64,
}
TABULAR = {"learning_rate": 0.2, "epsilon_start": 0.3, "epsilon_end": 0.3, "initial_value": 1.0}
CONTINUOUS_CONTROL = {
    "learning_rate": 1e-2,
    "critic_learning_rate": 1e-2,
    "polyak": 0.1,
    "noise_std": 0.5,
    "hidden": (64,),
    "batch_size": 64,
}
SOFT = {
    "learning_rate": 3e-3,
    "critic_learning_rate": 1e-2,
    "polyak": 0.1,
    "temperature": 0.01,
    "hidden": (64,),
    "batch_size": 64,
}
SETTINGS = {
    "q_learning": TABULAR,
    "double_q_learning": TABULAR,
    "sarsa": TABULAR,
    "expected_sarsa": TABULAR,
    "n_step_td": TABULAR | {"n_step": 2, "initial_value": 1.5},
    "sarsa_lambda": TABULAR | {"learning_rate_schedule": "constant"},
    "dqn": {"target_period": 10, "epsilon_end": 0.2},
    "reinforce": {"rollout_length": 16},
    "ac": {"critic_learning_rate": 1e-2},
    "a2c": {"rollout_length": 4},
    "acer": {"rollout_length": 8, "average_decay": 0.9},
    "trpo": {"rollout_length": 16, "minibatches": 2},
    "ppo": {"rollout_length": 16, "minibatches": 2},
    "recurrent_ppo": {"rollout_length": 16, "minibatches": 2, "memory_size": 16},
    "ddpg": CONTINUOUS_CONTROL,
    "td3": CONTINUOUS_CONTROL,
    "sac": SOFT,
    "discrete_sac": SOFT,
    "diayn": SOFT,
    "discrete_diayn": SOFT,
    # tanh: a rectified unit whose input is 0 up to rounding, as where nothing is seen, may learn or not.
    "mappo": {"rollout_length": 16, "minibatches": 2, "activation": "tanh"},
    "recurrent_mappo": {"rollout_length": 16, "minibatches": 2, "memory_size": 16, "activation": "tanh"},
    "ippo": {"rollout_length": 16, "minibatches": 2, "activation": "tanh"},
    # Rectified critics of one number often fit three values by a line, and stay there. The penalty keeps both actions
    # in play until the critic knows them.
    "maddpg": CONTINUOUS_CONTROL | {"activation": "tanh", "learning_rate": 3e-3, "logit_penalty": 1e-2},
}
TOTAL_STEPS = {
    "q_learning": 1_000,
    "double_q_learning": 2_000,
    "sarsa": 1_000,
    "expected_sarsa": 1_000,
    "n_step_td": 1_000,
    "sarsa_lambda": 1_000,
    "dqn": 4_000,
    "reinforce": 8_000,
    "ac": 8_000,
    "a2c": 8_000,
    "acer": 4_000,
    "trpo": 8_000,
    "ppo": 8_000,
    "recurrent_ppo": 8_000,
    "ddpg": 6_000,
    "td3": 6_000,
    "sac": 6_000,
    "discrete_sac": 4_000,
    "mappo": 8_000,
    "recurrent_mappo": 8_000,
    "ippo": 8_000,
    "maddpg": 6_000,
}
DEFAULT_TOTAL_STEPS = 10_000

# Settings that change what an algorithm does: in the generic suites each is a case of its own.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dqn_naive": ("dqn", {"target_update": "none"}),
    "dqn_polyak": ("dqn", {"target_update": "polyak", "polyak": 0.1}),
    "dqn_double": ("dqn", {"double": True}),
    "dqn_dueling_mean": ("dqn", {"dueling": "mean"}),
    "dqn_dueling_max": ("dqn", {"dueling": "max"}),
    "dqn_n_step": ("dqn", {"n_step": 3}),
    "dqn_proportional": ("dqn", {"replay": "proportional"}),
    "dqn_rank": ("dqn", {"replay": "rank"}),
    "dqn_all": ("dqn", {"double": True, "dueling": "mean", "replay": "proportional", "n_step": 2}),
    "reinforce_alone": ("reinforce", {"baseline": False}),
    "reinforce_discounted": ("reinforce", {"discount_states": True, "normalize_advantage": True}),
    "ac_q": ("ac", {"critic": "q"}),
    "ac_discounted": ("ac", {"discount_states": True}),
    "a2c_adam": ("a2c", {"optimiser": "adam", "gae_lambda": 0.9, "normalize_advantage": True}),
    "a2c_kfac": ("a2c", {"optimiser": "kfac", "learning_rate": 0.25, "rollout_length": 8}),
    "a2c_shared": ("a2c", {"shared_trunk": True}),
    "acer_adam": ("acer", {"optimiser": "adam", "trust_region": None, "replay_ratio": 0}),
    "acer_shared": ("acer", {"shared_trunk": True, "trust_region": 0.1, "replay_ratio": 2}),
    "recurrent_ppo_lstm": ("recurrent_ppo", {"cell": "lstm", "sequence_length": 8, "minibatches": 4}),
    "trpo_stride": ("trpo", {"fisher_stride": 4, "normalize_advantage": False}),
    "trpo_reuse": ("trpo", {"reuse": 2}),
    "ddpg_noise": ("ddpg", {"noise": "ornstein_uhlenbeck", "noise_dt": 1.0, "layer_norm": True}),
    "td3_proportional": ("td3", {"replay": "proportional", "gradient_steps": 2, "dropout": 0.01, "n_step": 2}),
    "sac_first_form": ("sac", {"state_value": True}),
    "sac_learned_temperature": ("sac", {"temperature": None, "initial_temperature": 0.01, "target_entropy": -4.0}),
    "mappo_plain": ("mappo", {"normalize_value": "none", "activation": "relu"}),
    "mappo_running": ("mappo", {"normalize_value": "running", "sharing": "all"}),
    "mappo_unshared": ("mappo", {"sharing": "none", "agent_index": False}),
    "maddpg_ensemble": ("maddpg", {"ensemble": 2}),
    "maddpg_guesses": ("maddpg", {"infer_others": True}),
    "maddpg_twins": ("maddpg", {"twin_critics": True, "policy_delay": 2, "smoothing_std": 0.2}),
}
# A2C and PPO to the letter, in the hands of drivers that have tests of their own.
SHARED = ("a3c", "dppo")
OWN = tuple(name for name in ALGORITHMS if name not in SHARED)
REWARDED = tuple(name for name in OWN if "diayn" not in name)  # DIAYN does not look at the reward
CASES = (*REWARDED, *VARIANTS)
# Those that keep or carry something of another structure: the rest differs in arithmetic alone, which probes test.
STRUCTURES = (
    *OWN,
    *("dqn_naive", "dqn_proportional", "dqn_rank", "dqn_all"),
    *("ac_q", "a2c_kfac", "recurrent_ppo_lstm", "trpo_reuse"),
    *("ddpg_noise", "td3_proportional", "sac_first_form", "sac_learned_temperature"),
    *("mappo_running", "mappo_unshared", "maddpg_ensemble", "maddpg_guesses", "maddpg_twins"),
)


def variant(case: str) -> tuple[str, dict[str, Any]]:
    """-> the algorithm's name, and the settings that make the case."""
    return VARIANTS.get(case, (case, {}))


def make_algorithm(case: str, **more: Any) -> Algorithm:
    """The algorithm of that name, or the variant, set to learn small tasks fast."""
    name, varied = variant(case)
    cls = algorithm_class(name)
    known = {field.name for field in fields(cls)}
    settings = {key: value for key, value in COMMON.items() if key in known}
    return cls(**(settings | SETTINGS.get(name, {}) | varied | more))


def task(environment: Environment, num_environments: int, total_steps: int) -> tuple[Chain, Spec]:
    """The transforms that every run has, and what the algorithm is told."""
    transforms: list[Transform] = [RescaleAction()]
    agents, inner = None, Spaces(environment.observation_space, environment.action_space)
    if environment.agents:
        agents = Agents.of(environment.agents, *inner)
        transforms.insert(0, StackAgents(agents))
    chain = Chain(tuple(transforms), inner)
    sizes = num_environments, total_steps, 1, environment.max_episode_steps
    return chain, Spec(*chain.spaces, *sizes, environment.goals, agents)


def box(*shape: int) -> spaces.Box:
    return spaces.Box(-1, 1, shape, np.float32)


def team(observation_spaces: Any, action_spaces: Any, names: Any = None, num_environments: int = 4) -> Spec:
    """The task of agents with these spaces, as the drivers tell it."""
    names = names or tuple(f"agent_{i}" for i in range(len(observation_spaces)))
    each = (dict(zip(names, found, strict=True)) for found in (observation_spaces, action_spaces))
    inner = Spaces(*map(spaces.Dict, each))
    agents = Agents.of(names, *inner)
    seen = Chain((StackAgents(agents), RescaleAction()), inner).spaces
    return Spec(*seen, num_environments, 1_000, agents=agents)


def observations_of(spec: Spec, *leading: int, key: Any = None) -> jax.Array:
    """Random ones of all agents [*leading, A, d], with zeros where one sees less than others do."""
    sizes = np.array([encoder.size for encoder in spec.agents.encoders])
    there = np.arange(spec.agents.observation_size) < sizes[:, None]
    return jax.random.normal(jax.random.PRNGKey(0) if key is None else key, (*leading, *there.shape)) * there


def accepts(algorithm: Algorithm, environment: Environment, num_environments: int = 4) -> bool:
    try:
        algorithm.check(task(environment, num_environments, 1)[1])
    except UsageError:
        return False
    return True


def known_values(algorithm: Algorithm, probe: Probe) -> tuple[float, ...]:
    """[states], what `algorithm.value` must say: the return up to the limit if it never bootstraps, NaN if nothing."""
    if not getattr(algorithm, "baseline", True):
        return (np.nan,) * len(probe.values)
    return probe.returns if isinstance(algorithm, Episodic) and probe.returns is not None else probe.values


def probe_environment(algorithm: Algorithm) -> JaxAdapter:
    """With vectors as observations, or with indices or continuous actions for an algorithm that wants these."""
    kinds = {"tabular": False}, {"tabular": True}, {"tabular": False, "continuous": True}
    made = (JaxAdapter("probes", for_agents(algorithm, ProbeEnvironment(**kind))) for kind in kinds)
    return next(environment for environment in made if accepts(algorithm, environment))


def for_agents(algorithm: Algorithm, environment: Any) -> Any:
    """The environment of one agent, or, where the algorithm is for many, of many of whom there is one."""
    return OneOfMany(environment) if algorithm.many_agents else environment


def continuous_probe(algorithm: Algorithm) -> JaxAdapter:
    return JaxAdapter("continuous", for_agents(algorithm, ContinuousProbeEnvironment()))


def realistic_environment(algorithm: Algorithm) -> Environment:
    """CartPole; a maze for an algorithm that wants indices, Pendulum for one that wants continuous actions.

    For many agents a particle world of three, who do not all see and want the same.
    """
    ids = ("CartPole-v1", "zhixing/Maze-v0", "Pendulum-v1", "simple_adversary_v3")
    return next(environment for environment in map(environments.make, ids) if accepts(algorithm, environment))


def make_driver(
    environment: Environment, seeds: tuple[int, ...] = (0,), num_environments: int = 4, total_steps: int = 10_000
) -> CompiledDriver | HostDriver:
    chain, spec = task(environment, num_environments, total_steps)
    loop, batch = Loop(seeds, chain, spec), environment.batch(seeds, num_environments)
    return CompiledDriver(loop, batch, True) if environment.compiled else HostDriver(loop, batch)


def train(algorithm: Algorithm, environment: Environment, total_steps: int, seeds: tuple[int, ...] = (0, 1)) -> Run:
    """Four environments of each seed, for `total_steps` or a little more."""
    driver = make_driver(environment, seeds, total_steps=total_steps)
    return train_from(driver, algorithm, driver.start(algorithm))


def train_on_probes(algorithm: Algorithm, total_steps: int, seeds: int = 2) -> Run:
    """A run [S, ...] whose rows 0, ..., `seeds` - 1 learned on the first of PROBES, the next ones on the second..."""
    environment = probe_environment(algorithm)
    rows = seeds * len(PROBES)
    driver = make_driver(environment, tuple(range(rows)), total_steps=total_steps)
    run = driver.start(algorithm)
    keys = jax.random.split(jax.random.PRNGKey(0), (rows, 4))
    probes = jnp.repeat(jnp.arange(len(PROBES)), seeds)[:, None] + jnp.zeros(4, jnp.int32)
    observation, state = jax.vmap(jax.vmap(environment.environment.begin))(keys, probes)
    observation = driver.loop.chain.observe(run.transforms, observation)
    run = run._replace(environment=run.environment._replace(environment=state), observation=observation)
    return train_from(driver, algorithm, run)


def train_from(driver: CompiledDriver | HostDriver, algorithm: Algorithm, run: Run) -> Run:
    spec, length = driver.loop.spec, algorithm.steps_per_iteration
    return driver.advance(algorithm, run, -(-spec.total_steps // (spec.num_environments * length)), length)


def ask(function: Any, run: Run, observations: jax.Array) -> np.ndarray:
    """`algorithm.value` or `algorithm.policy` of every seed at `observations` [states, ...] -> [S, states, ...]."""
    count = run.key.shape[0]
    repeated = jnp.broadcast_to(observations, (count, *observations.shape))
    return np.asarray(over_seeds(function, count, run.learner, repeated))


def successors(observation: np.ndarray, last: np.ndarray, ended: np.ndarray) -> np.ndarray:
    """The true successors of a rollout [T, N, ...]: the next row, but `last` where an episode ended, and at the end."""
    following = np.concatenate([observation[1:], last[-1:]])
    return np.where(ended.reshape(*ended.shape, *[1] * (observation.ndim - 2)), last, following)


# --------------------------------------------------------------------------------------------- counting environments

TERMINATES_AFTER, TRUNCATES_AFTER = 3, 5  # steps; the first in even episodes, the second in odd ones
COUNTING_SPACE = spaces.Box(-1e6, 1e6, (2,), np.float32)  # (episode, step in the episode)


def counting_step(episode: Any, step: Any, action: Any) -> tuple[Any, Any, Any]:
    """-> reward, terminated, truncated of one step; for Python numbers as for arrays."""
    even = episode % 2 == 0
    reward = 10.0 * episode + step + 0.25 * action
    return reward, even & (step + 1 >= TERMINATES_AFTER), ~even & (step + 1 >= TRUNCATES_AFTER)


class CountingEnvironment:
    """In gymnax's protocol with its own reset: the only way to know how many episodes there were."""

    max_episode_steps = TRUNCATES_AFTER

    def observation_space(self, params: Any) -> spaces.Space:
        return COUNTING_SPACE

    def action_space(self, params: Any) -> spaces.Space:
        return spaces.Discrete(3)

    def reset(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        return jnp.zeros(2), jnp.zeros(2)

    def step(self, key: jax.Array, state: jax.Array, action: jax.Array, params: Any) -> tuple:
        episode, step = state.astype(jnp.int32)
        reward, terminated, truncated = counting_step(episode, step, action)
        last = state + jnp.array([0.0, 1.0])
        state = jnp.where(terminated | truncated, jnp.array([1.0, 0.0]) + state * jnp.array([1.0, 0.0]), last)
        return state, state, reward, terminated, truncated, {"final_observation": last}


class TimeLimitedEnvironment(JaxEnvironment):
    """Written with `reset_env` and `step_env`: an episode is known by a random number; cut off after four steps.

    A third of the episodes terminate after two.
    """

    max_episode_steps = 4

    def observation_space(self, params: Any) -> spaces.Space:
        return COUNTING_SPACE

    def action_space(self, params: Any) -> spaces.Space:
        return spaces.Discrete(3)

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        state = jnp.array([1.0, 0.0]) * jax.random.randint(key, (), 0, 900_000)
        return state, state

    def step_env(self, key: jax.Array, state: jax.Array, action: jax.Array, params: Any) -> tuple:
        last = state + jnp.array([0.0, 1.0])
        return last, last, state[1] + 0.25 * action, (state[0] % 3 == 0) & (last[1] >= 2), {}


class GymnasiumCountingEnvironment(gymnasium.Env):
    """`CountingEnvironment` for Gymnasium."""

    observation_space = COUNTING_SPACE
    action_space = spaces.Discrete(3)

    def __init__(self) -> None:
        self.episode, self.steps = -1, 0

    def observation(self) -> np.ndarray:
        return np.array([self.episode, self.steps], np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action: int) -> tuple:
        reward, terminated, truncated = counting_step(np.int64(self.episode), np.int64(self.steps), action)
        self.steps += 1
        return self.observation(), float(reward), bool(terminated), bool(truncated), {}


class RecorderState(NamedTuple):
    rollout: Transition  # [T, N], the last one
    clock: Clock


@hyperparameters
class Recorder(OnPolicy):
    """Learns nothing and keeps its rollout; its policy is a fixed function of the observation (and of its carry).

    The carry counts the steps since the episode's start; what it was when the action was chosen is in `extras`.
    """

    rollout_length: int = 7

    def init(self, key: jax.Array, spec: Spec) -> RecorderState:
        shape = (self.rollout_length, spec.num_environments)
        observation, flags = jnp.zeros((*shape, 2)), jnp.zeros(shape, bool)
        integers = jnp.zeros(shape, jnp.int32)
        rollout = Transition(observation, integers, jnp.zeros(shape), observation, flags, flags, integers)
        return RecorderState(rollout, Clock.start(spec))

    def carry(self, spec: Spec, key: jax.Array) -> jax.Array:
        return jnp.zeros(spec.num_environments, jnp.int32)

    def act(self, state: RecorderState, carry: jax.Array, observation: jax.Array, key: jax.Array):
        return self.policy(state, observation), carry + 1, carry

    def update(self, state: RecorderState, rollout: Transition, key: jax.Array) -> tuple[RecorderState, dict]:
        return RecorderState(rollout, state.clock), {"reward": rollout.reward.mean()}

    def policy(self, state: RecorderState, observation: jax.Array) -> jax.Array:
        return ((observation[..., 0] + 2 * observation[..., 1]) % 3).astype(jnp.int32)

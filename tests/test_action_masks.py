"""Actions that the environment forbids are never taken: in training, in evaluation, with compiled and host drivers."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from probes import SHARED

import zhixing as zx
from zhixing.algorithms import ALGORITHMS, algorithm_class
from zhixing.core import Spec
from zhixing.environments.jax_adapter import JaxEnvironment
from zhixing.environments.tabular import TabularEnv
from zhixing.errors import UsageError

ACTIONS = 5
SPACE = spaces.Dict({"observation": spaces.Box(-1, 1, (2,), np.float32), "action_mask": spaces.MultiBinary(ACTIONS)})
READERS = [name for name in ALGORITHMS if algorithm_class(name).reads_action_mask]
FORBIDDEN = -1_000.0


class Minefield(JaxEnvironment):
    """A random mask at every step; a forbidden action costs 1000, and the forbidden ones look best otherwise."""

    max_episode_steps = 10

    def observation_space(self, params):
        return SPACE

    def action_space(self, params):
        return spaces.Discrete(ACTIONS)

    def observe(self, key):
        mask = jax.random.bernoulli(key, 0.5, (ACTIONS,)).at[jax.random.randint(key, (), 0, ACTIONS)].set(True)
        return {"observation": jnp.ones(2), "action_mask": mask.astype(jnp.int8)}

    def reset_env(self, key, params):
        observation = self.observe(key)
        return observation, observation["action_mask"]

    def step_env(self, key, state, action, params):
        observation = self.observe(key)
        reward = jnp.where(state[action] == 1, 1.0, FORBIDDEN)
        return observation, observation["action_mask"], reward, False, {}


class StrictEnv(gymnasium.Env):
    """For Gymnasium: raises at a forbidden action."""

    observation_space, action_space = SPACE, spaces.Discrete(ACTIONS)

    def observation(self):
        self.mask = (self.np_random.random(ACTIONS) < 0.5).astype(np.int8)
        self.mask[self.np_random.integers(ACTIONS)] = 1
        return {"observation": np.ones(2, np.float32), "action_mask": self.mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation(), {}

    def step(self, action):
        if not self.mask[action]:
            raise ValueError("forbidden")
        self.steps += 1
        return self.observation(), float(action), self.steps == 10, False, {}


def test_who_reads_masks():
    assert {"ppo", "recurrent_ppo", "a2c", "trpo", "reinforce", "ac", "acer"} == set(READERS) - set(SHARED)
    algorithm = algorithm_class("dqn")()
    with pytest.raises(UsageError, match="mask forbids; use PPO"):
        algorithm.check(Spec(SPACE, spaces.Discrete(ACTIONS), 1, 1))


@pytest.mark.parametrize("name", [name for name in READERS if name not in SHARED])
def test_never_taken(name, tmp_path):
    """Every return is that of ten allowed steps: of the episodes in training and of those in evaluation."""
    settings = {"total_steps": 1_600, "num_environments": 8, "record": {"tensorboard": False}}
    settings["evaluation"] = {"final_episodes": 20, "episodes": 4}
    settings["environment"] = {"normalize_observation": True}
    run = zx.train(name, Minefield(), run_dir=tmp_path / "run", quiet=True, **settings)
    trained = run.metrics["episode/return"]
    assert np.nanmin(trained) == 10.0 and np.nanmax(trained) == 10.0
    assert run.evaluate(20)["min"] == 10.0


def test_never_taken_on_the_host(tmp_path):
    """The environment would raise. Also with actions chosen one by one."""
    settings = {"total_steps": 400, "num_environments": 4, "record": {"tensorboard": False}}
    settings["evaluation"] = {"final_episodes": 4, "episodes": 4}
    algorithm = {"rollout_length": 20, "epochs": 2}
    run = zx.train("ppo", StrictEnv, run_dir=tmp_path / "run", quiet=True, algorithm=algorithm, **settings)
    assert np.isfinite(run.evaluate(4)["iqm"])
    for mask in np.eye(ACTIONS, dtype=np.int8):
        observation = {"observation": np.ones(2, np.float32), "action_mask": mask}
        assert run.policy(observation) == mask.argmax()
        assert run.player()(observation) == mask.argmax()


def test_table_masks_what_changes_nothing():
    """Taxi's mask is Gymnasium's own."""
    table = TabularEnv.from_gymnasium("Taxi-v4", action_mask=True)
    own = gymnasium.make("Taxi-v4").unwrapped
    reachable = [state for state in range(table.num_states) if not _passenger_at_destination(own, state)]
    np.testing.assert_array_equal(table.action_mask[reachable], [own.action_mask(state) for state in reachable])
    observation, _ = table.reset_env(jax.random.PRNGKey(0), ())
    assert table.observation_space(()).contains(jax.tree.map(lambda x: np.asarray(x)[()], observation))


def _passenger_at_destination(environment, state):
    """States that no episode goes through."""
    _, _, passenger, destination = environment.decode(state)
    return passenger == destination

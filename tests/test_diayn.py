"""DIAYN: its update against SAC and NumPy, its skills, and what is made of them: table, figure, video, a start."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import (
    kept_programs,  # noqa: F401
    refused,
    succeed,
)
from gymnasium import spaces
from probes import make_driver

import zhixing as zx
from zhixing.algorithms.diayn import DIAYN
from zhixing.algorithms.discrete_diayn import DiscreteDIAYN
from zhixing.algorithms.discrete_sac import DiscreteSAC
from zhixing.algorithms.sac import SAC
from zhixing.core import Spec, hyperparameters
from zhixing.environments.jax_adapter import JaxAdapter
from zhixing.environments.point import Point
from zhixing.errors import UsageError
from zhixing.learned import Vector
from zhixing.skills import play_skills
from zhixing.transition import Experience

pytestmark = pytest.mark.usefixtures("kept_programs")

B, K = 6, 3
BOX = spaces.Box(-1, 1, (2,), np.float32)
ACTIONS = {"continuous": BOX, "discrete": spaces.Discrete(4)}
KINDS = {"continuous": (DIAYN, SAC), "discrete": (DiscreteDIAYN, DiscreteSAC)}
KEY = jax.random.PRNGKey(0)
SMALL = {"hidden": (8,), "learning_rate": 1e-2, "critic_learning_rate": 1e-2, "temperature": 0.2}


class Plain:
    def discriminator_optimiser(self, clock):
        return optax.sgd(self.discriminator_learning_rate)


@hyperparameters
class PlainDIAYN(Plain, DIAYN):
    pass


@hyperparameters
class PlainDiscreteDIAYN(Plain, DiscreteDIAYN):
    pass


def make_batch(kind):
    keys = jax.random.split(KEY, 5)
    observation, next_observation = jax.random.normal(keys[0], (2, B, 2))
    action = jax.random.uniform(keys[1], (B, 2), minval=-1) if kind == "continuous" else jnp.arange(B) % 4
    skill = jnp.arange(B) % K
    reward = 1e3 * jax.random.normal(keys[2], (B,))  # which must not matter
    return Experience(observation, action, reward, next_observation, jnp.full(B, 0.9), jnp.ones(B), skill)


@pytest.mark.parametrize("kind", KINDS)
def test_update(kind):
    """An update of the soft actor-critic on log q - log p, given the skill; a step of the discriminator."""
    plain = {"continuous": PlainDIAYN, "discrete": PlainDiscreteDIAYN}[kind]
    algorithm = plain(**SMALL, skills=K, discriminator_learning_rate=0.5)
    spec = Spec(BOX, ACTIONS[kind], 4, 1_000)
    state, batch = jax.jit(lambda: algorithm.init(KEY, spec))(), make_batch(kind)
    new, metrics = jax.jit(algorithm.update)(state, batch, KEY)

    logits = np.asarray(state.discriminator(batch.next_observation), np.float64)
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    own = q[np.arange(B), batch.extras]
    reward = np.log(own) - np.log(1 / K)
    np.testing.assert_allclose(metrics["pseudo_reward"], reward.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (q.argmax(-1) == batch.extras).mean(), rtol=1e-6)

    agent = KINDS[kind][1](**SMALL)
    given = [(x, batch.extras) for x in (batch.observation, batch.next_observation)]
    told = batch._replace(observation=given[0], next_observation=given[1], reward=jnp.float32(reward), extras=())
    expected, _ = jax.jit(agent.update)(state.agent._replace(clock=state.clock), told, KEY)
    for name in ("actor", "critics", "temperature"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
            getattr(new.agent, name),
            getattr(expected, name),
        )

    def loss(parameters):
        logits = Vector(parameters, state.discriminator.structure)(batch.next_observation)
        return float(-jax.nn.log_softmax(logits)[jnp.arange(B), batch.extras].mean())

    with jax.enable_x64(True):
        begin = np.asarray(state.discriminator.parameters, np.float64)
        steps = 1e-6 * np.eye(len(begin))
        gradient = [(loss(jnp.asarray(begin + s)) - loss(jnp.asarray(begin - s))) / 2e-6 for s in steps]
    moved = np.asarray(new.discriminator.parameters) - np.asarray(state.discriminator.parameters)
    np.testing.assert_allclose(moved, -0.5 * np.array(gradient), rtol=1e-3, atol=1e-5)


def test_skills_are_drawn_once_an_episode():
    """Kept through the episode, stored with each transition, uniform over episodes."""
    algorithm = DIAYN(hidden=(8,), skills=4, learning_starts=10_000, replay_capacity=8 * 500)
    driver = make_driver(JaxAdapter("point", Point()), (0,), num_environments=8, total_steps=10_000)
    run = driver.advance(algorithm, driver.start(algorithm), 500, 1)
    skill = np.asarray(run.memory.data.extras)[0].reshape(10, 50, 8)  # [episodes, steps, instances]
    assert np.all(skill == skill[:, :1])
    counts = np.bincount(skill[:, 0].ravel(), minlength=4)
    assert counts.shape == (4,) and counts.min() >= 8 and counts.max() <= 34  # 80 episodes, 20 each expected


@pytest.fixture(scope="module")
def run(kept_programs, tmp_path_factory):  # noqa: F811
    """Four skills of two seeds on the point; enough to tell them apart."""
    folder = tmp_path_factory.mktemp("diayn") / "run"
    settings = {"skills": 4, "hidden": [32, 32], "batch_size": 64}
    return zx.train(
        "diayn",
        "zhixing/Point-v0",
        total_steps=16_000,
        seeds=2,
        run_dir=folder,
        quiet=True,
        algorithm=settings,
        evaluation={"every": 16_000, "final_episodes": 8},
    )


@pytest.fixture(scope="module")
def played(run):
    return play_skills(run, 3)


def test_skills_are_told_apart(played):
    summary = played.summary()
    assert summary["accuracy"] >= 0.6 and summary["pseudo_reward"] >= 0.6  # bounds 1 and log 4 = 1.39
    assert played.observations.shape == (2, 4, 3, 51, 2) and played.log_q.shape == (2, 4, 3, 50)
    ends = played.observations[:, :, 0, -1]  # [S, K, 2]
    apart = np.linalg.norm(ends[:, :, None] - ends[:, None], axis=-1)[:, ~np.eye(4, dtype=bool)]
    assert np.median(apart) > 0.5


def test_summary_counts_what_was_played(played):
    """The returns are those of the task, the positions those of the point."""
    near = np.linalg.norm(1 - played.observations[..., 1:, :], axis=-1) <= 0.5
    np.testing.assert_allclose(played.returns, near.sum(-1))
    rows = played.summary()["skills"]
    np.testing.assert_allclose([row["return"] for row in rows], played.returns.mean((0, 2)))


def test_command(run):
    out = json.loads(succeed("skills", run.directory, "--episodes", "2", "--json"))
    assert len(out["skills"]) == 4 and len(out["seeds"]) == 2 and out["accuracy"] >= 0.6
    text = succeed("skills", run.directory, "--episodes", "2", "--output", run.directory / "paths.svg")
    assert "log q - log p" in text and (run.directory / "paths.svg").stat().st_size > 1_000
    assert "no number 2" in refused("skills", run.directory, "--axes", "0", "2")


def test_watch_one_skill(run, tmp_path):
    gif = tmp_path / "skill.gif"
    succeed("watch", run.directory, "--skill", "2", "--output", gif)
    assert gif.stat().st_size > 1_000
    assert "no skill 4" in refused("watch", run.directory, "--skill", "4", "--output", gif)


def test_player_takes_the_skills_in_turn(run, played):
    """Without a choice, one after the other; the actions are those of the skills."""
    player, first = run.player(seed=0), []
    for _ in range(5):
        player.reset()
        first.append(player(np.zeros(2, np.float32)))
    alone = [run.player(seed=0, skill=k)(np.zeros(2, np.float32)) for k in range(4)]
    assert len({tuple(action) for action in alone}) == 4
    np.testing.assert_array_equal(first, [*alone, alone[0]])
    # The first step of each skill's episode leads where the table says.
    np.testing.assert_allclose(0.1 * np.clip(alone, -1, 1), played.observations[0, :, 0, 1], atol=1e-6)


def start(run, tmp_path, *more, algorithm="sac", environment="zhixing/Point-v0"):
    settings = ["--algorithm.hidden", "32", "32", "--total-steps", "400", "--algorithm.learning-starts", "400"]
    folder = tmp_path / "started"
    arguments = "train", algorithm, environment, *settings, "--start.run", run.directory, "--run-dir", folder
    return folder, (*arguments, "--seeds", "2", "--quiet", *more)


def test_start_from_a_skill(run, tmp_path):
    """Another task's SAC begins as the skill is, without reading it: actor, critics and their targets."""
    folder, arguments = start(run, tmp_path, "--start.skill", "3", "--algorithm.learning-starts", "1000")
    succeed(*arguments)
    sac = zx.load(folder)
    observation = np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32)
    skill = jnp.full(20, 3)
    for seed in range(2):
        old, new = (jax.tree.map(lambda x, s=seed: x[s], learner) for learner in (
            run._learner._replace(clock=()), sac._learner._replace(clock=())
        ))  # fmt: skip
        a, b = old.agent.actor((observation, skill)), new.actor(observation)
        np.testing.assert_allclose(a.mode, b.mode, atol=1e-5)
        for name in ("critics", "target"):
            q, other = getattr(old.agent, name), getattr(new, name)
            np.testing.assert_allclose(
                q((observation, skill), a.mode), other(observation, a.mode), rtol=1e-4, atol=1e-4
            )


def test_start_from_the_best_skill(run, played, tmp_path):
    """Each seed from its own best one: before any step it plays as that skill does."""
    folder, arguments = start(run, tmp_path)
    succeed(*arguments)
    first = zx.load(folder).metrics
    scores = first["evaluation/return"][first["step"] == 0]
    np.testing.assert_allclose(scores, played.returns.mean(-1).max(-1))


@pytest.mark.parametrize(
    "more, says",
    [
        (("--start.skill", "9"), "skills 0 to 3"),
        (("--algorithm.hidden", "16"), "algorithm.hidden is (16,)"),
        (("--environment.normalize-observation",), "normalize_observation to false"),
    ],
)
def test_start_that_does_not_fit(run, tmp_path, more, says):
    assert says in refused(*start(run, tmp_path, *more)[1])


def test_start_from_another_kind_of_run(run, tmp_path):
    assert "TD3 cannot start from a skill" in refused(*start(run, tmp_path, algorithm="td3")[1])
    assert "another observation_space" in refused(*start(run, tmp_path, environment="Pendulum-v1")[1])
    assert "start.run is not" in refused("train", "sac", "Pendulum-v1", "--start.skill", "1")


@pytest.mark.parametrize("settings, says", [
    ({"n_step": 3}, "algorithm.n_step is 3"),
    ({"skills": 1}, "algorithm.skills is 1"),
    ({"hindsight": "future"}, "algorithm.hindsight"),
    ({"discriminator_learning_rate": 0.0}, "discriminator_learning_rate"),
])  # fmt: skip
def test_bad_settings(settings, says):
    with pytest.raises(UsageError, match=says):
        DIAYN(**settings).check(Spec(BOX, BOX, 1, 100))


def test_others_have_no_skills(tmp_path):
    other = zx.train("q_learning", "zhixing/Maze-v0", total_steps=200, run_dir=tmp_path / "maze", quiet=True)
    assert "has no skills" in refused("skills", other.directory)
    assert "has no skills" in refused("watch", other.directory, "--skill", "0", "--window")


def test_values_are_not_of_the_task(run):
    with pytest.raises(UsageError, match="does not say what an observation is worth"):
        run.value(np.zeros(2, np.float32))


def test_point():
    """Walls stop it, the corner rewards it, fifty steps end it."""
    world = Point()
    _, state = world.reset(KEY)
    for _ in range(12):
        observation, state, reward, terminated, truncated, _ = world.step(KEY, state, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(observation, [1.0, 1.0], atol=1e-6)
    assert reward == 1.0 and not terminated and not truncated
    assert world.render_text(observation).splitlines()[0].endswith("@")
    for _ in range(38):
        _, state, reward, _, truncated, _ = world.step(KEY, state, jnp.array([-0.5, 0.0]))
    assert truncated and reward == 0.0

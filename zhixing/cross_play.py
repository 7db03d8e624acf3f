"""Agents of one run against those of another: what self-play cannot tell.

Rivals that learn together can score the same for good play as for bad: both sides are better, or neither. Against an
opponent that is held fixed, or one that acts at random, a higher return is better play.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zhixing import statistics
from zhixing.agents import Agents, StackAgents
from zhixing.assembly import build_evaluator
from zhixing.core import Algorithm, Spec
from zhixing.environments.transforms import RescaleAction, Transform
from zhixing.errors import UsageError
from zhixing.run import TrainedRun
from zhixing.shared import map_seeds

RANDOM = "random"


class Carry(NamedTuple):
    ours: Any
    theirs: Any
    key: jax.Array  # [N, 2], what is drawn at random comes from it


class Side:
    """One who plays: a run's greedy policies, or, without a run, uniformly random actions."""

    def __init__(self, run: TrainedRun | None, agents: Agents, rows: np.ndarray):
        """`rows` [S]: which of the run's seeds plays in each."""
        self.run, self.agents = run, agents
        self.seen_through: tuple[Transform, ...] = ()
        self.state: Any = ()
        if run is not None:
            learner, transforms = (map_seeds(lambda x: x[rows], part) for part in (run._learner, run._transforms))
            # The first two are the same for everyone: the arrays of all agents, and actions from -1 to 1.
            self.seen_through, self.state = run.loop.chain.transforms[2:], (learner, transforms[2:])

    def carry(self, spec: Spec, key: jax.Array) -> Any:
        return () if self.run is None else self.run.algorithm.carry(spec, key)

    def play(self, state: Any, carry: Any, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """`observation` [N, A, d], `key` [N, 2] -> actions of all agents."""
        if self.run is not None:
            for transform, its in zip(self.seen_through, state[1], strict=True):
                observation = transform.observe(its, observation)
            return self.run.algorithm.play(state[0], carry, observation)
        agents = self.agents
        if agents.discrete:
            logits = jnp.where(agents.allowed, 0.0, -jnp.inf)
            return jax.vmap(lambda k: jax.random.categorical(k, logits))(key).astype(jnp.int32), carry
        return jax.vmap(lambda k: jax.random.uniform(k, agents.allowed.shape, minval=-1.0))(key), carry


@jax.tree_util.register_static
class CrossPlay(Algorithm):
    """Some agents are played by one side, the rest by the other. It cannot learn."""

    __eq__, __hash__ = object.__eq__, object.__hash__  # not those of settings, of which it has none
    ours: Side
    theirs: Side
    mine: np.ndarray

    def __init__(self, ours: Side, theirs: Side, mine: np.ndarray):
        """`mine` [A] bool: whom the first side plays."""
        self.__dict__.update(ours=ours, theirs=theirs, mine=mine)

    def carry(self, spec: Spec, key: jax.Array) -> Carry:
        own = key if key.ndim == 1 else key[0]
        keys = jax.random.split(own, spec.num_environments)
        return Carry(self.ours.carry(spec, key), self.theirs.carry(spec, key), keys)

    def play(self, state: tuple[Any, Any], carry: Carry, observation: jax.Array) -> tuple[jax.Array, Carry]:
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(carry.key)
        first, ours = self.ours.play(state[0], carry.ours, observation, keys[:, 0])
        second, theirs = self.theirs.play(state[1], carry.theirs, observation, keys[:, 1])
        mine = self.mine.reshape(1, -1, *[1] * (first.ndim - 2))
        return jnp.where(mine, first, second), Carry(ours, theirs, keys[:, 2])


def cross_play(run: TrainedRun, other: TrainedRun | None, episodes: int) -> dict[str, Any]:
    """The returns when one team is played by `run` and the rest by `other`, None being random; each way round.

    Seed after seed meets the seed of the other run in the same place, from the first again where these are fewer.
    -> for each team that `run` plays ("all": everyone, "none": nobody) the summary of each agent's returns.
    Raises UsageError for runs of a single agent, or on different environments.
    """
    agents = run.loop.spec.agents
    if agents is None:
        raise UsageError(f"{run.environment.id} has one agent; --against is for environments with several")
    if other is not None and (other.environment.id, other.loop.spec.agents) != (run.environment.id, agents):
        raise UsageError(
            f"the runs were trained on {run.environment.id} and on {other.environment.id}, or with other options; "
            "both sides play the same environment"
        )
    count = len(run.loop.seeds)
    rows = np.arange(count)
    ours = Side(run, agents, rows)
    theirs = Side(other, agents, rows if other is None else rows % len(other.loop.seeds))
    shared = replace(run.loop.chain, transforms=(StackAgents(agents), RescaleAction()))
    loop = replace(run.loop, chain=shared)

    teams = {"all": tuple(range(agents.count)), **(agents.teams if len(agents.teams) > 1 else {}), "none": ()}
    found = {}
    for team, members in teams.items():
        mine = np.isin(np.arange(agents.count), members)
        evaluator = build_evaluator(run.config, run.environment, loop, episodes)
        nothing: Any = ((), ())
        played = evaluator(CrossPlay(ours, theirs, mine), (ours.state, theirs.state), nothing, run.step + 1)
        evaluator.close()
        returns = (played.of_agents[..., i] for i in range(agents.count))
        found[team] = dict(zip(agents.names, map(statistics.summary, returns), strict=True))
    return found


def table(found: dict[str, Any], ours: str, theirs: str) -> str:
    """What was found, as text: a row for each team that the first run plays, a column for each agent."""
    names = list(next(iter(found.values())))
    head = [f"{ours} plays", *names]
    rows = [[team, *(f"{agents[name]['iqm']:.2f}" for name in names)] for team, agents in found.items()]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join([*lines, f"IQM over seeds of each agent's mean return; the rest is played by {theirs}"])

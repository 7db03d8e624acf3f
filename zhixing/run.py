"""A finished or stopped run, loaded: its policy, its values, its numbers."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from zhixing import checkpoint, plotting, records
from zhixing import config as configs
from zhixing.assembly import build_environment, build_evaluator, build_loop
from zhixing.checkpoint import Checkpoints
from zhixing.config import Config
from zhixing.core import Algorithm
from zhixing.drivers.loop import Run
from zhixing.environments.base import Environment, Timestep
from zhixing.errors import UsageError
from zhixing.evaluate import score
from zhixing.shared import map_seeds


class TrainedRun:
    """What was learned, by every seed of a run.

    Attributes:
        directory: the run's folder, or the file it was loaded from.
        config: its settings.
        environment: what it was trained on.
        step: environment steps of each seed that the checkpoint has seen.
    """

    def __init__(self, path: Path, file: Path, config: Config, environment: Environment):
        self.directory, self.file, self.config, self.environment = path, file, config, environment
        self.algorithm: Algorithm = config.algorithm
        self.loop = build_loop(config, environment)
        run, metadata = checkpoint.restore(file, self._template())
        self.step: int = metadata["step"]
        self._learner, self._transforms = run.learner, run.transforms
        self._policy, self._value = jax.jit(self._greedy), jax.jit(self._estimate)
        self._begin, self._go_on = jax.jit(self._first), jax.jit(self._next)

    @classmethod
    def load(
        cls, path: str | Path, environment: Any = None, algorithm: Algorithm | None = None, which: str = "latest"
    ) -> "TrainedRun":
        """From a run's folder (its "latest" or "best" checkpoint) or from a saved file.

        A user's own environment or algorithm is given again: a file can never bring code along.
        """
        path = Path(path)
        if path.is_dir():
            configs.load_run(path)  # says so where the folder is no run
            file = Checkpoints(path / "checkpoints", 1).path(which)
        else:
            file = path
        _, metadata = checkpoint.read(file)
        if not isinstance(metadata.get("config"), dict):
            raise UsageError(f"{file} names no settings; load a run's folder or a file that `run.save` wrote")
        config = configs.from_mapping(metadata["config"], algorithm)
        return cls(path, file, config, build_environment(config, environment))

    def _template(self) -> Run:
        """The shapes of what is read from a checkpoint: [S, ...]."""
        count = len(self.loop.seeds)
        transforms = jax.eval_shape(lambda: self.loop.chain.init(self.config.num_environments))
        parts = self.loop.shapes(self.algorithm)[0], transforms
        learner, transforms = (
            map_seeds(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), part) for part in parts
        )
        empty: Any = ()
        return Run(learner, empty, empty, transforms, empty, empty, empty, empty, empty)

    @cached_property
    def best_seed(self) -> int:
        """The seed with the highest evaluation return: of the summary, or of the last evaluation in the records."""
        try:
            scores = self.summary["evaluation"]["per_seed"]
        except UsageError:
            scores = self._last_evaluation()
        return self.loop.seeds[int(np.argmax(scores))]

    def _last_evaluation(self) -> np.ndarray:
        if not self.directory.is_dir():
            return np.zeros(len(self.loop.seeds))
        table = self.metrics
        known = ~np.isnan(table[records.EVALUATION])
        last = known & (table["step"] == table["step"][known].max(initial=0))
        scores = table[records.EVALUATION][last]
        return scores if scores.size else np.zeros(len(self.loop.seeds))

    def _of_seed(self, seed: int | None) -> int:
        seed = self.best_seed if seed is None else seed
        if seed not in self.loop.seeds:
            raise UsageError(f"the run has no seed {seed}; it has {list(self.loop.seeds)}")
        return self.loop.seeds.index(seed)

    def _observe(self, index: Any, observation: Any) -> tuple[Any, Any]:
        """The learner of one seed, and the observation as its policy sees it, [1, ...]."""
        learner, transforms = (map_seeds(lambda x: x[index], part) for part in (self._learner, self._transforms))
        batch = jax.tree.map(lambda x: jnp.asarray(x)[None], observation)
        return learner, self.loop.chain.observe(transforms, batch)

    def _greedy(self, index: Any, observation: Any) -> Any:
        action = self.loop.chain.action(self.algorithm.policy(*self._observe(index, observation)))
        return jax.tree.map(lambda x: x[0], action)

    def _estimate(self, index: Any, observation: Any) -> Any:
        return self.algorithm.value(*self._observe(index, observation))[0]

    def _first(self, index: Any, observation: Any, skill: Any) -> tuple[Any, Any]:
        """-> the greedy action for the first observation of an episode, and what the player keeps."""
        spec = replace(self.loop.spec, num_environments=1)
        learner, transforms = (map_seeds(lambda x: x[index], part) for part in (self._learner, self._transforms))
        transforms = self.loop.chain.for_evaluation(transforms, 1)
        batch = jax.tree.map(lambda x: jnp.asarray(x)[None], observation)
        transforms, seen = self.loop.chain.reset(transforms, batch, training=False)
        carry = self.algorithm.carry(spec, jax.random.PRNGKey(0))
        if skill is not None:
            carry = carry._replace(skill=jnp.full(1, skill))
        return self._decide(learner, transforms, carry, seen)

    def _next(self, index: Any, kept: tuple[Any, Any], observation: Any) -> tuple[Any, Any]:
        learner = map_seeds(lambda x: x[index], self._learner)
        batch, going_on = jax.tree.map(lambda x: jnp.asarray(x)[None], observation), jnp.zeros(1, bool)
        timestep = Timestep(batch, batch, jnp.zeros(1), going_on, going_on)
        transforms, timestep = self.loop.chain.step(kept[0], timestep, training=False)
        return self._decide(learner, transforms, kept[1], timestep.observation)

    def _decide(self, learner: Any, transforms: Any, carry: Any, seen: Any) -> tuple[Any, Any]:
        action, carry = self.algorithm.play(learner, carry, seen)
        return jax.tree.map(lambda x: x[0], self.loop.chain.action(action)), (transforms, carry)

    def policy(self, observation: Any, seed: int | None = None) -> Any:
        """The greedy action for one observation, as a Gymnasium action; by default that of the best seed.

        With `frame_stack`, `observation` is the stack; `player` makes it. A policy with a memory needs a `player`.
        """
        if type(self.algorithm).play is not Algorithm.play:
            raise UsageError("this policy remembers its episode; use player = run.player(), then player(observation)")
        return plain(self._policy(self._of_seed(seed), self._fitting(observation)))

    def player(self, seed: int | None = None, skill: int | None = None) -> "Player":
        """Who plays episodes with the greedy policy, by default that of the best seed, observation by observation.

        Of a run of DIAYN it plays one `skill`, or by default the first in the first episode, then the second, ...
        """
        skills = getattr(self.algorithm, "skills", None)
        if skill is not None and skills is None:
            raise UsageError(f"{type(self.algorithm).__name__} has no skills; only DIAYN learns some")
        if skills is not None and skill is not None and not 0 <= skill < skills:
            raise UsageError(f"the run has no skill {skill}; it has 0 to {skills - 1}")
        order = None if skills is None else range(skills) if skill is None else (skill,)
        return Player(self, self._of_seed(seed), order)

    def value(self, observation: Any, seed: int | None = None) -> float | np.ndarray:
        """The critic's V(s) for one observation: for value learners, the largest Q(s, a); of several agents [A]."""
        value = np.asarray(self._value(self._of_seed(seed), self._fitting(observation)))
        return value if value.ndim else float(value)

    def _fitting(self, observation: Any, space: gymnasium.Space | None = None) -> Any:
        """`observation`, of the policy's space or of the one given, as an array."""
        space = space or (self.environment if self.environment.agents else self.loop.spec).observation_space
        if self.environment.agents:
            missing = [name for name in self.environment.agents if name not in observation]
            if missing:
                raise UsageError(f"the observation lacks {', '.join(missing)}; give that of every agent, by name")
            return {name: jax.tree.map(np.asarray, observation[name]) for name in self.environment.agents}
        if space.shape is None:  # of a dictionary or a tuple, whose parts have shapes of their own
            return observation
        if np.shape(observation) != space.shape:
            raise UsageError(
                f"the observation has the shape {np.shape(observation)}, not {space.shape}; give one, as it is"
            )
        return np.asarray(observation, space.dtype)

    def evaluate(self, episodes: int = 100) -> dict[str, Any]:
        """The greedy returns of every seed over `episodes` each, as in `zhixing evaluate --json`."""
        if episodes < 1:
            raise UsageError(f"episodes is {episodes}; it must be 1 or more")
        evaluator = build_evaluator(self.config, self.environment, self.loop, episodes)
        played = evaluator(self.algorithm, self._learner, self._transforms, self.step + 1)
        evaluator.close()
        return score(self.environment, played)

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """The run's table, a column a name; `pandas.DataFrame(run.metrics)` makes a frame of it."""
        return records.read_metrics(self._folder())

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds; there once the run is over."""
        try:
            return json.loads((self._folder() / "summary.json").read_text())
        except FileNotFoundError:
            raise UsageError(f"{self.directory} has no summary.json; the run is not over, resume it") from None

    def plot(self, output: str | Path | None = None, metric: str = records.EVALUATION) -> Path:
        """Draw the learning curve, by default to `curve.png` in the run's folder."""
        return plotting.plot_runs([self._folder()], Path(output or self._folder() / "curve.png"), metric=metric)

    def save(self, path: str | Path) -> Path:
        """Copy the checkpoint, with its settings inside, to a file of its own; `zx.load` reads it."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.file, path)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; name another file") from None
        return path

    def _folder(self) -> Path:
        if not self.directory.is_dir():
            raise UsageError(f"{self.directory} is a single file, without the run's records; load the run's folder")
        return self.directory


class Player:
    """Plays with a trained run's greedy policy; keeps what one episode needs: the memory, the stacked observations.

    player = run.player()
    observation, _ = environment.reset()
    player.reset()
    while True:
        observation, reward, terminated, truncated, _ = environment.step(player(observation))
    """

    def __init__(self, run: TrainedRun, index: int, skills: Sequence[int] | None = None):
        """`skills`: which of them play, one episode each in turn; None where there are none."""
        self._run, self._index = run, index
        self._skills = None if skills is None else cycle(skills)
        self._kept: Any = None

    def reset(self) -> None:
        """A new episode begins."""
        self._kept = None

    def __call__(self, observation: Any) -> Any:
        """The action, as Gymnasium's, for the next observation of the episode as the environment gave it."""
        observation = self._run._fitting(observation, self._run.environment.observation_space)
        if self._kept is None:
            skill = None if self._skills is None else next(self._skills)
            action, self._kept = self._run._begin(self._index, observation, skill)
        else:
            action, self._kept = self._run._go_on(self._index, self._kept, observation)
        return plain(action)


def plain(action: Any) -> Any:
    """A JAX action as NumPy's, a single index as an int; of several agents a dictionary of such."""
    if isinstance(action, dict):
        return {name: plain(part) for name, part in action.items()}
    action = np.asarray(action)
    return int(action) if action.ndim == 0 else action

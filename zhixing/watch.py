"""`watch`: see a policy act, in a window, in the terminal, or as a .gif or .mp4."""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import chain, islice
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from zhixing.environments import GOALS, PARTICLES, PLANES, TEACHING, is_pettingzoo
from zhixing.errors import UsageError, unknown

if TYPE_CHECKING:
    from PIL import Image, ImageFont

GIF_WIDTH = 400  # pixels; a wider .gif is megabytes
GIF_FPS = 50  # browsers slow down a .gif that asks for more
CELL = 48  # pixels, of one letter of a text world
INK = {"@": "#1f5fbf", "X": "#c0392b", "G": "#1e8449"}


def watch(
    environment_id: str,
    act: Callable[[Any], Any],
    output: Path | str | None,
    episodes: int = 1,
    fps: int | None = None,
    seed: int = 0,
    max_steps: int = 1000,
    options: Mapping[str, Any] | None = None,
    make: Callable[..., gymnasium.Env] | None = None,
) -> Path | list[float]:
    """Play `episodes` with `act`, print their returns, and show them.

    Args:
        environment_id: an id that Gymnasium has, or one of ours, which is drawn as text.
        act: raw observation -> action in the environment's own units. If it has a `reset`, that is called before each
            episode: a `run.player()` needs it.
        output: a .gif or .mp4 to write; None: a window, or the terminal for what is drawn as text.
        fps: frames a second; None: the environment's own, else 30.
        seed: of the first episode; the others follow from it.
        max_steps: where an episode is cut that has not ended.
        options: keyword arguments of the environment.
        make: makes the environment instead, called with `render_mode` and the options.

    Returns `output`, or without one the return of each episode.

    Raises UsageError: unknown id or suffix, a folder that cannot be written, a package that is missing, no frames.
    """
    for name, value in {"episodes": episodes, "max_steps": max_steps, "fps": fps}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be 1 or more")
    os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"
    if output is None:
        with made(environment_id, "human", options or {}, make, fps) as environment:
            returns: list[float] = []
            show(frames(environment, act, episodes, seed, max_steps, returns), environment.metadata["render_fps"])
            return returns

    output = Path(output)
    write = {".gif": write_gif, ".mp4": write_mp4}.get(output.suffix.lower())
    if write is None:
        raise UsageError(f"{output} ends in neither .gif nor .mp4; name a file that does")
    if write is write_mp4:
        require_ffmpeg(output)
    with (
        no_display(),
        made(environment_id, "rgb_array", options or {}, make, fps) as environment,
        whole_file(output) as part,
    ):
        write(part, frames(environment, act, episodes, seed, max_steps, []), environment.metadata["render_fps"])
    return output


# ---------------------------------------------------------------------------------------------- playing


@contextmanager
def made(
    id: str, render_mode: str, options: Mapping[str, Any], make: Callable[..., gymnasium.Env] | None, fps: int | None
) -> Iterator[gymnasium.Env]:
    """The environment, closed at the end; what it lacks, now or while drawing, is a UsageError."""
    environment = None
    try:
        if make is not None:
            environment = make(render_mode=render_mode, **options)
        elif id in TEACHING:
            environment = TextWorld(id)
        elif id in GOALS + PLANES + PARTICLES:
            environment = JaxWorld(id, options)
        elif is_pettingzoo(id):
            environment = PettingZooWorld(id, render_mode, options)
        else:
            environment = gymnasium.make(id, render_mode=render_mode, disable_env_checker=True, **options)
        # On the instance: a window keeps time by it, and the class's belongs to everyone.
        inner = environment.unwrapped
        inner.metadata = {**inner.metadata, "render_fps": fps or inner.metadata.get("render_fps") or 30}
        yield environment
    except gymnasium.error.DependencyNotInstalled as error:
        commands = re.findall(r"pip3? install [^`]*", str(error))
        advice = "pip install 'zhixing[video]'" if "pygame" in str(error) else " && ".join(commands) or str(error)
        raise UsageError(f"'{id}' needs a package that is missing; {advice}") from error
    except gymnasium.error.UnregisteredEnv as error:
        hint = "only what Gymnasium has can be watched"
        raise unknown("environment", id, {*gymnasium.registry, *TEACHING, *GOALS, *PLANES, *PARTICLES}, hint) from error
    except Exception as error:
        if environment is None:
            raise UsageError(
                f"'{id}' cannot be made with render_mode={render_mode}: {error}; check its options"
            ) from error
        if type(error).__module__.partition(".")[0] == "pygame":
            raise UsageError(f"no window can be opened ({error}); name a .gif or .mp4 to write") from error
        raise
    finally:
        if environment is not None:
            environment.close()


def frames(
    environment: gymnasium.Env, act: Callable, episodes: int, seed: int, max_steps: int, returns: list[float]
) -> Iterator[Any]:
    """Play; yield what is drawn at the start and after each step, and print and append each episode's return."""
    for episode in range(episodes):
        observation, _ = environment.reset(seed=seed if episode == 0 else None)
        getattr(act, "reset", lambda: None)()
        yield drawn(environment)
        total, steps, ended = 0.0, 0, False
        while not ended and steps < max_steps:
            action = act(observation)
            if isinstance(environment.action_space, gymnasium.spaces.Discrete):
                action = int(action)  # the toy-text tables are looked up with it, and an array is no key
            observation, reward, terminated, truncated, _ = environment.step(action)
            total, steps, ended = total + float(reward), steps + 1, terminated or truncated
            yield drawn(environment)
        returns.append(total)
        print(f"episode {episode + 1}: return {total:g} in {steps} steps")


def drawn(environment: gymnasium.Env) -> Any:
    """The frame: uint8 [height, width, 3], text, or None where a window shows it."""
    if environment.render_mode == "human":
        pygame = sys.modules.get("pygame")
        # Without a screen SDL falls back to a window that nobody sees, and says nothing.
        if pygame and pygame.display.get_init() and pygame.display.get_driver() == "offscreen":
            raise UsageError("there is no screen to open a window on; name a .gif or .mp4 to write")
        return None
    frame: Any = environment.render()
    if not isinstance(frame, str) and np.ndim(frame) != 3:
        raise UsageError("the environment draws no pictures with render_mode=rgb_array; it cannot be watched")
    return frame


class TextWorld(gymnasium.Env):
    """A teaching environment, stepped from Python and drawn as text."""

    metadata = {"render_modes": ["ansi"], "render_fps": 4}
    render_mode = "ansi"

    def __init__(self, id: str):
        from zhixing.environments.teaching import TEACHING as MAKERS  # imports JAX

        self.world = MAKERS[id]()
        self.observation_space = gymnasium.spaces.Discrete(int(self.world.observations.max()) + 1)
        self.action_space = gymnasium.spaces.Discrete(self.world.num_actions)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.steps, self.state = 0, self.draw(self.world.initial_distribution)
        return int(self.world.observations[self.state]), {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        place = self.state, action, self.draw(self.world.probabilities[self.state, action])
        self.steps, self.state = self.steps + 1, int(self.world.successors[place])
        truncated = self.steps == self.world.max_episode_steps
        observation = int(self.world.observations[self.state])
        return observation, float(self.world.rewards[place]), bool(self.world.terminated[place]), truncated, {}

    def draw(self, probabilities: np.ndarray) -> int:
        return int(self.np_random.choice(len(probabilities), p=probabilities))

    def render(self) -> str:
        return self.world.render_text(self.state)


class JaxWorld(gymnasium.Env):
    """A JAX environment of ours that is no table, stepped from Python and drawn as text or as a picture."""

    metadata = {"render_modes": ["ansi"], "render_fps": 8}
    render_mode = "ansi"

    def __init__(self, id: str, options: Mapping[str, Any]):
        import jax

        from zhixing.environments import make

        adapter: Any = make(id, "jax", **options)
        self.world, self.params, self.limit = adapter.environment, adapter.params, adapter.max_episode_steps
        self.observation_space, self.action_space = adapter.observation_space, adapter.action_space
        self.begin, self.go_on = jax.jit(self.world.reset_env), jax.jit(self.world.step_env)

    def key(self) -> np.ndarray:
        return self.np_random.integers(2**32, size=2, dtype=np.uint32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        observation, self.state = self.begin(self.key(), self.params)
        self.steps = 0
        return observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        observation, self.state, reward, terminated, _ = self.go_on(self.key(), self.state, action, self.params)
        self.steps += 1
        return observation, float(np.mean(reward)), bool(terminated), self.steps == self.limit, {}

    def render(self) -> Any:
        draw = getattr(self.world, "render_frame", None) or self.world.render_text
        return draw(self.state)


class PettingZooWorld(gymnasium.Env):
    """A PettingZoo environment, whose agents' mean reward counts."""

    def __init__(self, id: str, render_mode: str, options: Mapping[str, Any]):
        from zhixing.environments.pettingzoo_adapter import PettingZooAdapter

        adapter = PettingZooAdapter(id, None, **{**options, "render_mode": render_mode})
        self.inner, self.render_mode = adapter.function(**adapter.options), render_mode
        self.metadata = dict(self.inner.metadata)
        self.observation_space, self.action_space = adapter.observation_space, adapter.action_space
        parts: Any = adapter.observation_space.spaces
        self.nothing = {name: np.zeros(space.shape, space.dtype) for name, space in parts.items()}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        observation, _ = self.inner.reset(seed=seed)
        return self.nothing | observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        present = {name: action[name] for name in self.inner.agents}
        observation, reward, _, truncated, _ = self.inner.step(present)
        over = not self.inner.agents
        mean = sum(reward.values()) / len(self.inner.possible_agents)
        return self.nothing | observation, mean, over and not any(truncated.values()), over, {}

    def render(self) -> Any:
        return self.inner.render()

    def close(self) -> None:
        self.inner.close()


# ---------------------------------------------------------------------------------------------- showing


def show(frames: Iterator[Any], fps: int) -> None:
    """Print text frames at their pace; a window has drawn its own."""
    for frame in frames:
        if frame is not None and not isinstance(frame, str):
            raise UsageError("this environment is drawn as pictures, not in a window; name a .gif or .mp4 to write")
        if frame is not None:
            print(frame, end="\n\n", flush=True)
            sleep(1 / fps)


def write_gif(path: Path, frames: Iterator[Any], fps: int) -> None:
    """An endless .gif that lasts as long as what it shows."""
    stride = math.ceil(fps / GIF_FPS)

    def images() -> "Iterator[Image.Image]":
        for i, frame in enumerate(islice(frames, 0, None, stride)):
            image = picture(frame)
            if image.width > GIF_WIDTH:
                image = image.resize((GIF_WIDTH, round(image.height * GIF_WIDTH / image.width)))
            # The format counts hundredths of a second: rounding the times, not the durations, keeps the sum right.
            image.info["duration"] = 10 * (round(100 * stride * (i + 1) / fps) - round(100 * stride * i / fps))
            yield image

    rest = images()
    next(rest).save(path, format="GIF", save_all=True, append_images=rest, loop=0)


def write_mp4(path: Path, frames: Iterator[Any], fps: int) -> None:
    """An .mp4, H.264."""
    import imageio_ffmpeg

    first = picture(next(frames))
    size = (first.width // 2 * 2, first.height // 2 * 2)  # the codec takes even sizes only
    writer = imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=1, ffmpeg_log_level="error")
    writer.send(None)
    try:
        for image in chain([first], map(picture, frames)):
            writer.send(image.crop((0, 0, *size)).tobytes())
    finally:
        writer.close()


def require_ffmpeg(output: Path) -> None:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"{output} needs ffmpeg; pip install 'zhixing[video]', or name a .gif, which needs nothing more"
        ) from error


def picture(frame: Any) -> "Image.Image":
    """A frame, or the letters of a text world, as an RGB image."""
    from PIL import Image, ImageDraw

    if not isinstance(frame, str):
        return Image.fromarray(np.asarray(frame, np.uint8)).convert("RGB")
    lines = frame.split("\n")
    image = Image.new("RGB", (CELL * max(map(len, lines)), CELL * len(lines)), "white")
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        for column, letter in enumerate(line):
            x, y = CELL * column, CELL * row
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline="#d0d0d0")
            draw.text((x + CELL / 2, y + CELL / 2), letter, INK.get(letter, "#404040"), font(), anchor="mm")
    return image


@cache
def font() -> "ImageFont.FreeTypeFont":
    """A monospaced font; Matplotlib brings it along."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", CELL * 2 // 3)


@contextmanager
def no_display() -> Iterator[None]:
    """Let pygame draw without a screen and a loudspeaker, in here only: a window may be wanted next."""
    names = [name for name in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER") if name not in os.environ]
    os.environ.update(dict.fromkeys(names, "dummy"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


@contextmanager
def whole_file(output: Path) -> Iterator[Path]:
    """A place beside `output` to write to, moved there once it is complete and removed otherwise."""
    part = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise UsageError(f"cannot write to {output.parent}: {error.strerror}; name another folder") from None
    try:
        if output.is_dir():
            raise UsageError(f"{output} is a folder; name a file")
        yield part
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)

"""Watching: files that others can read, the right length and size, one clear error for each slip, nothing left over."""

import os
import sys
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from PIL import Image

from zhixing.errors import UsageError
from zhixing.watch import picture, watch


class Stripes(gymnasium.Env):
    """Five steps of a picture whose red channel says which step it is."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None, size=(33, 51)):
        self.render_mode, self.size = render_mode, size

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2, np.float32), 0.5, self.steps == 5, False, {}

    def render(self):
        return np.full((*self.size, 3), (40 * self.steps, 0, 0), np.uint8)


def left(observation):
    return 0


def read_mp4(path):
    """-> frames [T, height, width, 3], frames per second."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    reader = ffmpeg.read_frames(str(path))
    metadata = next(reader)
    width, height = metadata["size"]
    return np.array([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]), metadata["fps"]


def read_gif(path):
    """-> durations in milliseconds, size, loop count."""
    with Image.open(path) as image:
        durations = [image.seek(i) or image.info["duration"] for i in range(image.n_frames)]
        return durations, image.size, image.info["loop"]


def test_gif_of_cartpole(tmp_path, capsys):
    path = tmp_path / "new" / "cartpole.gif"
    assert watch("CartPole-v1", left, path, episodes=2) == path
    printed = capsys.readouterr().out.splitlines()
    steps = [int(line.split()[-2]) for line in printed]
    assert printed == [f"episode {i + 1}: return {n} in {n} steps" for i, n in enumerate(steps)]
    assert all(8 <= n <= 11 for n in steps)  # as long as it takes to fall
    durations, size, loop = read_gif(path)
    assert sum(durations) == 20 * (sum(steps) + 2)  # 50 frames a second; the first frame of each episode counts too
    assert size == (400, 267) and loop == 0
    assert [p.name for p in path.parent.iterdir()] == ["cartpole.gif"]


def test_mp4_of_cartpole(tmp_path, capsys):
    path = watch("CartPole-v1", left, tmp_path / "cartpole.mp4", max_steps=6, fps=25)
    frames, fps = read_mp4(path)
    assert frames.shape == (7, 400, 600, 3) and fps == 25
    assert frames[0].mean() > 200  # a white sky, not a black screen
    assert capsys.readouterr().out == "episode 1: return 6 in 6 steps\n"


def test_the_episode_is_the_one_of_the_seed(tmp_path):
    def record(seed):
        seen = []
        watch("CartPole-v1", lambda x: seen.append(x) or 1, tmp_path / "a.gif", seed=seed, max_steps=3)
        return np.array(seen)

    expected, _ = gymnasium.make("CartPole-v1").reset(seed=7)
    assert (record(7)[0] == expected).all()
    assert (record(7) == record(7)).all() and (record(7) != record(8)).any()


def test_toy_text_takes_array_actions_and_options(tmp_path, capsys):
    pytest.importorskip("pygame")
    path = [2, 2, 1, 1, 1, 2]  # round the holes, without slipping
    actions = iter(np.array(path))
    watch("FrozenLake-v1", lambda s: next(actions), tmp_path / "lake.gif", options={"is_slippery": False})
    assert capsys.readouterr().out == "episode 1: return 1 in 6 steps\n"
    durations, size, _ = read_gif(tmp_path / "lake.gif")
    assert (len(durations), size) == (7, (256, 256)) and set(durations) == {250}


def test_own_factory_odd_sizes_and_rates(tmp_path):
    path = watch("mine", lambda x: np.zeros(1), tmp_path / "mine.mp4", make=Stripes)
    frames, fps = read_mp4(path)
    assert frames.shape == (6, 32, 50, 3) and fps == 30
    assert np.allclose(frames[:, :, :, 0].mean((1, 2)), 40 * np.arange(6), atol=6)  # in order, nothing lost

    watch("mine", lambda x: np.zeros(1), tmp_path / "mine.gif", make=Stripes)
    durations, size, _ = read_gif(tmp_path / "mine.gif")
    assert durations == [30, 40, 30, 30, 40, 30] and size == (51, 33)

    # Browsers slow down what is faster than 50 frames a second: half of the frames, at half the rate.
    watch("mine", lambda x: np.zeros(1), tmp_path / "fast.gif", make=Stripes, fps=100, options={"size": (10, 500)})
    durations, size, _ = read_gif(tmp_path / "fast.gif")
    assert durations == [20, 20, 20] and size == (400, 8)
    assert "render_fps" not in Stripes.metadata


def test_text_world_in_the_terminal(capsys):
    assert watch("zhixing/TreasureLine-v0", lambda s: 1, None, fps=1000) == [1.0]
    shown = capsys.readouterr().out.split("\n\n")
    assert shown[:2] == ["@....G", "S@...G"] and shown[5:] == ["S....@", "episode 1: return 1 in 5 steps\n"]
    moves = iter([2, 2, 1])
    assert watch("zhixing/Maze-v0", lambda s: next(moves), None, fps=1000) == [-1.0]  # into the pit
    assert watch("zhixing/Maze-v0", lambda s: 0, None, fps=10_000) == [0.0]
    assert capsys.readouterr().out.endswith("return 0 in 100 steps\n")  # its own limit


def test_text_world_as_a_picture(tmp_path):
    watch("zhixing/TreasureLine-v0", lambda s: 1, tmp_path / "line.gif")
    durations, size, _ = read_gif(tmp_path / "line.gif")
    assert durations == [250] * 6 and size == (6 * 48, 48)
    cells = np.asarray(picture("@.\n.X")).reshape(2, 48, 2, 48, 3).swapaxes(1, 2)
    ink = (cells.min(-1) < 150).sum((2, 3))
    assert ink[0, 0] > 50 and ink[1, 1] > 50 and ink[0, 1] == ink[1, 0] < ink[1, 1]
    agent = cells[0, 0].reshape(-1, 3)
    assert (agent == (0x1F, 0x5F, 0xBF)).all(-1).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "a.avi"}, "neither .gif nor .mp4"),
        ({"output": "a"}, "neither .gif nor .mp4"),
        ({"environment_id": "CartPol-v1"}, "did you mean 'CartPole-v1'"),
        ({"environment_id": "Breakout-MinAtar-v0x"}, "unknown environment"),
        ({"options": {"gravitas": 1}}, "check its options"),
        ({"episodes": 0}, "episodes is 0; it must be 1 or more"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"fps": -1}, "fps is -1"),
        ({"make": lambda render_mode: Stripes()}, "render_mode"),
        ({"make": lambda: Stripes()}, "cannot be made with render_mode=rgb_array"),
    ],
)
def test_slips(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stripes, "render", lambda self: None)
    with pytest.raises(UsageError, match=message):
        watch(**{"environment_id": "CartPole-v1", "act": left, "output": "a.gif"} | arguments)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="name another folder"):
        watch("CartPole-v1", left, tmp_path / "file" / "a.gif")
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        watch("CartPole-v1", left, tmp_path / "folder.gif")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.gif"]


def test_a_failure_while_playing_keeps_the_old_file(tmp_path):
    old = tmp_path / "a.gif"
    old.write_bytes(b"old")
    for name in ("a.gif", "a.mp4"):
        answers = [0, 1]
        with pytest.raises(IndexError):
            watch("CartPole-v1", lambda x, answers=answers: answers.pop(), tmp_path / name)
    assert old.read_bytes() == b"old" and list(tmp_path.iterdir()) == [old]


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UsageError, match=r"pip install 'zhixing\[video\]', or name a .gif, which needs nothing more"):
        watch("CartPole-v1", left, tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(UsageError, match=r"missing; pip install 'zhixing\[video\]'"):
        watch("CartPole-v1", left, tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_window(monkeypatch):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("SDL_AUDIODRIVER", "dummy")
    assert watch("CartPole-v1", left, None, max_steps=3) == [3.0]
    assert not pygame.display.get_init()  # closed again
    monkeypatch.setenv("SDL_VIDEODRIVER", "offscreen")  # what SDL takes by itself where there is no screen
    with pytest.raises(UsageError, match="no screen to open a window on"):
        watch("CartPole-v1", left, None, max_steps=3)
    monkeypatch.setenv("SDL_VIDEODRIVER", "nonesuch")
    with pytest.raises(UsageError, match="no window can be opened"):
        watch("CartPole-v1", left, None, max_steps=3)


def test_no_screen_is_asked_for_only_while_writing(tmp_path, monkeypatch):
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    monkeypatch.setenv("SDL_AUDIODRIVER", "pulse")
    seen = []

    def act(observation):
        seen.append((os.environ["SDL_VIDEODRIVER"], os.environ["SDL_AUDIODRIVER"]))
        return 0

    watch("CartPole-v1", act, tmp_path / "a.gif", max_steps=1)
    assert seen == [("dummy", "pulse")] and "SDL_VIDEODRIVER" not in os.environ

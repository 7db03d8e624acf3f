"""A replay that keeps each image once reads the same experiences as one that keeps every observation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zhixing.replay import Replay
from zhixing.transition import Transition


def play(steps, instances, stack, seed=0, ends=0.25):
    """Transitions [steps, N, ...] of environments whose images are numbered; stacks as `FrameStack` makes them."""
    generator, images = np.random.default_rng(seed), iter(range(1, 1_000_000))
    current = [[next(images)] * max(stack, 1) for _ in range(instances)]
    rows = []
    for _ in range(steps):
        row = []
        for n in range(instances):
            following = [*current[n][1:], next(images)]
            terminated, truncated = generator.random(2) < ends / 2
            row.append((current[n], generator.integers(3), generator.normal(), following, terminated, truncated))
            current[n] = [next(images)] * max(stack, 1) if terminated or truncated else following
        rows.append(row)
    fields = [np.array([[step[i] for step in row] for row in rows]) for i in range(6)]
    for i in (0, 3):  # [steps, N, k] -> an image of 2 x 1 pixels, single or stacked
        image = np.stack([fields[i], -fields[i]], -1)[..., None]
        fields[i] = image if stack else image[:, :, 0]
    types = (np.float32, np.int32, np.float32, np.float32, bool, bool)
    return Transition(*(jnp.asarray(field, t) for field, t in zip(fields, types, strict=True)))


compiled_add = jax.jit(Replay.add)
compiled_sample = jax.jit(Replay.sample, static_argnames=("size", "n_step"))
compiled_read = jax.jit(Replay.read, static_argnames="n_step")


@pytest.mark.parametrize("kind", ["uniform", "proportional"])
@pytest.mark.parametrize("stack", [0, 2, 4])
@pytest.mark.parametrize(
    "capacity, lengths, instances", [(64, [5] * 5, 2), (40, [7] * 9, 1), (45, [4, 4, 4, 3] * 4, 3)]
)
def test_same_experiences(capacity, lengths, instances, stack, kind):
    transitions = play(sum(lengths), instances, stack)
    once = Replay.create(capacity, transitions, kind, stack)
    plain = Replay.create(capacity, transitions, kind)
    start = 0
    for length in lengths:
        rollout = jax.tree.map(lambda x, s=start, n=length: x[s : s + n], transitions)
        once, plain = compiled_add(once, rollout, 0.6), compiled_add(plain, rollout, 0.6)
        start += length
    for n_step in (1, 3):
        experience, index = compiled_sample(
            once, jax.random.PRNGKey(0), size=500, discount=0.9, n_step=n_step, importance=0.4
        )
        expected = compiled_read(plain, index, jnp.ones(500), 0.9, n_step=n_step)
        bootstraps = np.asarray(expected.discount) > 0
        kept = np.asarray(experience.weight) > 0
        assert kept.mean() > 0.8 and bootstraps.any()
        for name in ("observation", "action", "reward", "discount"):
            np.testing.assert_array_equal(getattr(experience, name), getattr(expected, name))
        compared = bootstraps & kept
        np.testing.assert_array_equal(
            np.asarray(experience.next_observation)[compared], np.asarray(expected.next_observation)[compared]
        )
    readable = int(once.readable)
    assert len(set(np.asarray(index))) == readable  # all that can be read is drawn, and nothing else


def test_lost_frames_are_no_targets():
    """More truncations than there is room for: the oldest of them get no weight, and the others their true frame."""
    steps = 200
    transitions = play(steps, 1, 2, ends=0.0)
    every = jnp.ones((steps, 1), bool)
    transitions = transitions._replace(truncated=every, terminated=~every)
    replay = compiled_add(Replay.create(320, transitions, stack=2), transitions)
    room = len(replay.frames.last)
    assert room == 20
    index = jnp.arange(steps)
    experience = compiled_read(replay, index, jnp.ones(steps), 0.9, n_step=1)
    np.testing.assert_array_equal(experience.weight, index >= steps - room)
    np.testing.assert_array_equal(experience.next_observation[-room:], transitions.next_observation[-room:, 0])


@pytest.mark.parametrize("stack, ratio", [(0, 1.8), (4, 6.5)])
def test_memory(stack, ratio):
    """Each image once, where it was stored 2 or 2k times."""
    shape = (1, 1, *([stack] if stack else []), 84, 84)
    image, number, flag = jnp.zeros(shape, jnp.uint8), jnp.zeros((1, 1)), jnp.zeros((1, 1), bool)
    example = Transition(image, number.astype(jnp.int32), number, image, flag, flag)
    once, plain = (jax.eval_shape(lambda s=s: Replay.create(10_000, example, stack=s)) for s in (stack, None))

    def size(replay):
        return sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(replay))

    assert size(plain) / size(once) > ratio

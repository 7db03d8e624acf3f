"""Checkpoint files: what was put in comes out, and nothing else is ever taken for one."""

import errno
import os
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from zhixing import checkpoint
from zhixing.checkpoint import Checkpoints
from zhixing.errors import UsageError

TREE = {
    "weights": jnp.linspace(-1.0, 1.0, 7),
    "counts": (jnp.int32(5), jnp.uint32([1, 2])),
    "flags": jnp.array([True, False]),
    "nothing": jnp.zeros((0, 3)),
    "rest": (),
}
METADATA = {"step": 12, "best": 1.5, "config": {"algorithm": {"name": "ppo"}}}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "one.safetensors"
    checkpoint.save(file, TREE, METADATA)
    return file


def refusal(function, *arguments) -> str:
    with pytest.raises(UsageError) as caught:
        function(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_round_trip_to_the_bit(path):
    tree, metadata = checkpoint.restore(path, TREE)
    assert metadata == METADATA
    assert tree["rest"] == ()
    for name, leaf, expected in zip(*checkpoint.names_of(tree)[:2], checkpoint.names_of(TREE)[1], strict=True):
        assert leaf.dtype == expected.dtype and leaf.shape == expected.shape, name
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes(), name


def test_part_of_a_checkpoint_can_be_restored(path):
    tree, _ = checkpoint.restore(path, {"weights": TREE["weights"], "counts": ()})
    np.testing.assert_array_equal(tree["weights"], TREE["weights"])


def test_special_numbers_survive(tmp_path):
    special = {"x": jnp.array([jnp.nan, jnp.inf, -jnp.inf, -0.0, 1e-45])}
    checkpoint.save(tmp_path / "x", special, {})
    tree, _ = checkpoint.restore(tmp_path / "x", special)
    assert np.asarray(tree["x"]).tobytes() == np.asarray(special["x"]).tobytes()


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_truncated_file_is_refused(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is damaged or no checkpoint (" in refusal(checkpoint.read, path)


def test_every_flipped_bit_is_noticed(path):
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        assert str(path) in refusal(checkpoint.read, path)


@pytest.mark.parametrize(
    "data", [b"", b"hello, world\n", b"\x00" * 1000, pickle.dumps({"a": np.ones(3)}), b"PK\x03\x04"]
)
def test_foreign_file_is_refused(tmp_path, data):
    file = tmp_path / "foreign"
    file.write_bytes(data)
    assert "is damaged or no checkpoint" in refusal(checkpoint.read, file)


@pytest.mark.parametrize("header", [None, {}, {"format": "pt"}, {"format": "zhixing-checkpoint-0"}])
def test_safetensors_of_another_program_are_refused(tmp_path, header):
    file = tmp_path / "foreign.safetensors"
    file.write_bytes(safetensors.numpy.save({"a": np.ones(3, np.float32)}, header))
    assert "was not written by zhixing, or by another version" in refusal(checkpoint.read, file)


def test_header_without_digest_or_metadata_is_refused(tmp_path):
    file = tmp_path / "half.safetensors"
    file.write_bytes(safetensors.numpy.save({"a": np.ones(3, np.float32)}, {"format": checkpoint.FORMAT}))
    assert "its digest does not match" in refusal(checkpoint.read, file)


def test_edited_settings_inside_are_noticed(path):
    data = path.read_bytes()
    edited = data.replace(b"ppo", b"dqn")
    assert len(edited) == len(data) and edited != data
    path.write_bytes(edited)
    assert "its digest does not match" in refusal(checkpoint.read, path)


def test_missing_file_and_folder(tmp_path):
    assert refusal(checkpoint.read, tmp_path / "none").startswith(f"there is no checkpoint at {tmp_path}/none; ")
    assert refusal(checkpoint.read, tmp_path) == f"the checkpoint {tmp_path} cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"weights": jnp.zeros(8)}, "['weights'] is float32[7], not float32[8]; was config.yaml edited?"),
        ({"weights": jnp.zeros(7, jnp.int32)}, "['weights'] is float32[7], not int32[7]"),
        ({"bias": jnp.zeros(7)}, "it has no ['bias']; was config.yaml edited?"),
    ],
)
def test_other_shapes_are_refused(path, template, message):
    line = refusal(checkpoint.restore, path, template)
    assert line.startswith(f"{path} does not fit this run's settings: ") and message in line


def test_killed_while_writing_leaves_the_old_one(path, monkeypatch):
    """Whatever happens before the last step, the file's name stands for the old file."""
    old = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            line = refusal(checkpoint.save, path, {"weights": jnp.ones(2)}, {})
        assert line == f"cannot write {path}: No space left on device; make room, what was saved before is whole"
        assert path.read_bytes() == old
        assert list(path.parent.iterdir()) == [path]  # nothing half-written stays


def test_the_last_few_and_the_best_are_kept(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step, best in ((0, True), (10, True), (20, False), (30, False)):
        kept.save(step, {"x": jnp.float32(step)}, {"step": step}, best)
    assert [checkpoint.read(path)[1]["step"] for path in kept.all()] == [20, 30]
    assert checkpoint.read(kept.path("best"))[1]["step"] == 10
    assert checkpoint.read(kept.path())[1]["step"] == 30
    assert kept.latest_readable() == (kept.all()[-1], [])


def test_best_is_kept_without_links(tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", fail)
    kept = Checkpoints(tmp_path, keep=1)
    for step, best in ((0, True), (10, False)):
        kept.save(step, {"x": jnp.float32(step)}, {"step": step}, best)
    assert checkpoint.read(kept.path("best"))[1]["step"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.safetensors", "step-000000000010.safetensors"]


def test_no_checkpoint_at_all(tmp_path):
    empty = Checkpoints(tmp_path, keep=2)
    assert empty.latest_readable() == (None, [])
    assert refusal(empty.path).startswith(f"there is no checkpoint in {tmp_path}; ")
    assert refusal(checkpoint.read, empty.path("best")).startswith(f"there is no checkpoint at {tmp_path}/best")


def test_nothing_that_is_loaded_can_run_code():
    """No module of the library unpickles or evaluates anything, but what its own Ray processes tell each other."""
    from importlib import resources

    package = resources.files("zhixing")
    sources = list(package.rglob("*.py"))  # type: ignore[attr-defined]
    assert len(sources) > 30
    for source in sources:
        text = source.read_text(encoding="utf-8")
        if source.name in ("assembly.py", "fan_out.py", "distributed.py"):
            text = text.replace("cloudpickle", "")
        for word in (
            "pickle",
            "marshal",
            "shelve",
            "joblib",
            "yaml.load(",
            "unsafe_load",
            "allow_pickle",
            " eval(",
            " exec(",
        ):
            assert word not in text, (source, word)

"""Checkpoints: one safetensors file each, arrays and a text header and nothing that can be run.

A checkpoint is written beside its place and moved there in one step, so that a process killed at any instant
leaves either the old or the new one. Each holds a digest of its arrays; what does not match it is refused.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from zhixing.errors import UsageError

FORMAT = "zhixing-checkpoint-1"
BEST = "best.safetensors"


def names_of(tree: Any) -> tuple[list[str], list[Any], Any]:
    """-> a name for each leaf of `tree`, the leaves, the structure."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in paths], [leaf for _, leaf in paths], structure


def digest(arrays: Mapping[str, np.ndarray], metadata: str) -> str:
    hasher = hashlib.blake2b(metadata.encode(), digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        hasher.update(f"{name}{array.dtype}{array.shape}".encode())
        hasher.update(array.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror}; make room, what was saved before is whole") from None


def save(path: Path, tree: Any, metadata: Mapping[str, Any]) -> None:
    """Write the arrays of `tree` and `metadata` (numbers and text)."""
    names, leaves, _ = names_of(tree)
    arrays = {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}
    text = json.dumps(dict(metadata))
    header = {"format": FORMAT, "digest": digest(arrays, text), "metadata": text}
    write_atomically(path, safetensors.numpy.save(arrays, header))


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """-> arrays by name, metadata. UsageError for what is damaged or no checkpoint of ours."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint at {path}; give a run's folder or one of its checkpoints") from None
    except OSError as error:
        raise UsageError(f"the checkpoint {path} cannot be read: {error.strerror}") from None
    return parse(data, path)


def parse(data: bytes, path: Path | str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `read` gives, of a checkpoint's bytes; `path` is what errors call it."""
    try:
        arrays = safetensors.numpy.load(data)
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except Exception as error:  # whatever a parser makes of arbitrary bytes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{path} is damaged or no checkpoint ({reason}); use another one of the run") from None
    if header.get("format") != FORMAT:
        raise UsageError(f"{path} was not written by zhixing, or by another version; use one of this version")
    if header.get("digest") != digest(arrays, header.get("metadata", "")):
        raise UsageError(f"{path} is damaged, its digest does not match; use another checkpoint of the run")
    return arrays, json.loads(header["metadata"])


def restore(path: Path, template: Any) -> tuple[Any, dict[str, Any]]:
    """-> a tree shaped as `template` (arrays or shapes) with the checkpoint's arrays, and the metadata.

    The checkpoint may hold more than `template` asks for.
    """
    arrays, metadata = read(path)
    names, leaves, structure = names_of(template)
    missing = sorted(set(names) - set(arrays))
    if missing:
        raise UsageError(f"{path} does not fit this run's settings: it has no {missing[0]}; was config.yaml edited?")
    for name, leaf in zip(names, leaves, strict=True):
        found = arrays[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise UsageError(
                f"{path} does not fit this run's settings: {name} is {found.dtype}{list(found.shape)}, "
                f"not {leaf.dtype}{list(leaf.shape)}; was config.yaml edited?"
            )
    return structure.unflatten([jnp.asarray(arrays[name]) for name in names]), metadata


class Checkpoints:
    """The checkpoints of one run: the last few, and the best."""

    def __init__(self, directory: Path, keep: int):
        self.directory, self.keep = directory, keep

    def all(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.directory.glob("step-*.safetensors"))

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any], best: bool) -> Path:
        """Write the checkpoint of `step`, keep it as the best if it is, and let the oldest go.

        Those of later steps go too: they were damaged, or else the run would have gone on from them.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step-{step:012d}.safetensors"
        save(path, tree, metadata)
        if best:
            link = self.directory / (BEST + ".part")
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)  # the same bytes under a second name, which rotation leaves alone
            except OSError:  # a file system without links
                link.write_bytes(path.read_bytes())
            os.replace(link, self.directory / BEST)
        kept = [other for other in self.all() if other.name <= path.name][-self.keep :]
        for other in {*self.all(), *self.directory.glob("*.part")} - set(kept):  # a killed process leaves half a file
            other.unlink()
        return path

    def path(self, which: str = "latest") -> Path:
        """The path of "latest" or "best"."""
        if which == "best":
            return self.directory / BEST
        found = self.all()
        if not found:
            raise UsageError(f"there is no checkpoint in {self.directory}; give the folder of a run that has begun")
        return found[-1]

    def latest_readable(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole (None if there is none at all), and what is wrong with the newer ones."""
        problems: list[str] = []
        for path in reversed(self.all()):
            try:
                read(path)
            except UsageError as error:
                problems.append(str(error))
            else:
                return path, problems
        if problems:
            raise UsageError(f"no checkpoint in {self.directory} is whole; the newest: {problems[0]}")
        return None, []

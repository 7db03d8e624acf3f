"""Ray workers, and what happens when one of them fails.

A worker that is killed, whose environment raises, or that gives no answer in time is replaced by a new one, with new
episodes: what is lost is its unfinished rollout. What went wrong is written to `workers.log`, with the worker's index
and the traceback.
"""

import re
import socket
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from zhixing.errors import UsageError

START_SECONDS = 300.0
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def start_ray(address: str | None, processes: int) -> Any:
    """Ray, begun on this machine or joined at `address`; UsageError where it cannot be."""
    import logging
    import os

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # it would warn otherwise
    try:
        import ray
    except ImportError:
        raise UsageError("this needs Ray; pip install 'zhixing[distributed]'") from None
    if ray.is_initialized():
        return ray
    require_answer(address)
    # A machine of its own may have fewer cores than workers: they then share them.
    own: dict[str, Any] = {"num_cpus": max(processes, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **({} if address else own))
    except (ConnectionError, ValueError, RuntimeError):
        raise UsageError(f"no Ray cluster answers at {address}; start one with: ray start --head") from None
    return ray


def require_answer(address: str | None) -> None:
    """Raise UsageError where nobody answers at "host:port": Ray would try for minutes, and then end the process."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except (OSError, ValueError):
        raise UsageError(f"no Ray cluster answers at {address}; start one with: ray start --head") from None


class Crew:
    """W actors that are asked in parallel.

    Args:
        make: makes actor number w, in its k-th life.
        seconds: after which an actor that gives no answer counts as hung; its first answer, for which it begins a
            process and compiles, may take START_SECONDS more.
        restarts: how often actors may be replaced before the run ends with an error.
        log: where failures are written; None: nowhere.
    """

    def __init__(
        self, ray: Any, make: Callable[[int, int], Any], count: int, seconds: float, restarts: int, log: Path | None
    ):
        self.ray, self.make, self.seconds, self.restarts, self.log = ray, make, seconds, restarts, log
        self.failures = 0
        self.lives = [0] * count
        self.actors = [make(worker, 0) for worker in range(count)]
        self.asked: dict[Any, tuple[int, float]] = {}  # pending call -> worker, when it counts as hung
        self.new = set(range(count))  # who has not answered yet

    def idle(self) -> list[int]:
        """Who has answered all that was asked."""
        busy = {worker for worker, _ in self.asked.values()}
        return [worker for worker in range(len(self.actors)) if worker not in busy]

    def ask(self, worker: int, method: str, *arguments: Any) -> None:
        """Let `worker` begin with a call; `next_answer` brings what comes of it."""
        call = getattr(self.actors[worker], method).remote(*arguments)
        patience = self.seconds + (START_SECONDS if worker in self.new else 0.0)
        self.asked[call] = worker, time.monotonic() + patience

    def next_answer(self) -> tuple[int, Any]:
        """-> the next worker that answers, and what; None if it has failed and a new one is in its place."""
        while True:
            remaining = max(0.0, min(end for _, end in self.asked.values()) - time.monotonic())
            ready, _ = self.ray.wait(list(self.asked), num_returns=1, timeout=remaining)
            if ready:
                worker, _ = self.asked.pop(ready[0])
                try:
                    answer = self.ray.get(ready[0])
                    self.new.discard(worker)
                    return worker, answer
                except self.ray.exceptions.RayTaskError as error:  # its environment raised, or our own code
                    self.replace(worker, str(error))
                except self.ray.exceptions.RayActorError as error:
                    self.replace(worker, f"its process has ended: {error}")
                return worker, None
            for call, (worker, end) in list(self.asked.items()):
                if time.monotonic() >= end:
                    del self.asked[call]
                    self.replace(worker, f"no answer in {self.seconds:g} seconds")
                    return worker, None

    def ready(self) -> bool:
        """Whether there is an answer that nobody has to wait for."""
        return bool(self.asked) and bool(self.ray.wait(list(self.asked), num_returns=1, timeout=0)[0])

    def all(self, workers: Sequence[int], method: str, arguments: Sequence[Any], need: int) -> dict[int, Any]:
        """Ask all `workers`; the answers of the first `need`, and of who else has answered by then.

        Who fails is left out; the late are busy still.
        """
        for worker in workers:
            self.ask(worker, method, *arguments)
        answers: dict[int, Any] = {}
        waiting = set(workers)
        while waiting and (len(answers) < need or self.ready()):
            worker, answer = self.next_answer()
            if worker in waiting:  # else one that was late before: too late
                waiting.remove(worker)
                if answer is not None:
                    answers[worker] = answer
        return answers

    def replace(self, worker: int, why: str) -> None:
        """A new actor in the place of `worker`; UsageError once there were too many."""
        why = COLOURS.sub("", why).rstrip()
        self.failures += 1
        self.lives[worker] += 1
        self.new.add(worker)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} worker {worker}: {why}\n")
        if self.failures > self.restarts:
            where = f"; {self.log} has the traceback" if self.log else ""
            raise UsageError(f"worker {worker} failed, after {self.restarts} replacements: {last_line(why)}{where}")
        self.ray.kill(self.actors[worker])
        self.actors[worker] = self.make(worker, self.lives[worker])

    def close(self) -> None:
        """End all actors."""
        for actor in self.actors:
            self.ray.kill(actor)
        self.asked.clear()


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]

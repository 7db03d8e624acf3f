"""The errors that a user meets, each one line long, and the nearest valid name for a wrong one."""

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """What is wrong and what to do, in one line. The command line prints it and exits with 2."""


class Interrupted(Exception):
    """The run was stopped by a signal; its state is saved."""


class Diverged(Exception):
    """A quantity became NaN or infinite; the last good checkpoint is kept."""


def unknown(kind: str, name: object, valid: Iterable[str], hint: str = "") -> UsageError:
    """`unknown("algorithm", "pppo", ["ppo", "dqn"])` -> unknown algorithm 'pppo'; did you mean 'ppo'?"""
    valid = sorted(valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.4)
    advice = f"did you mean '{close[0]}'?" if close else hint or "one of: " + ", ".join(valid)
    return UsageError(f"unknown {kind} '{name}'; {advice}")

"""`zhixing list`: what there is to train, and on what."""

import importlib.util

from zhixing import environments
from zhixing.algorithms import ALGORITHMS, algorithm_class
from zhixing.config import presets
from zhixing.ladders import ladder_names, load_ladder


def print_list(what: str | None) -> None:
    """Print algorithms, environments, presets, ladders, or all of them."""
    sections = {
        "algorithms": algorithms,
        "environments": environment_ids,
        "presets": preset_lines,
        "ladders": ladder_lines,
    }
    for name, lines in sections.items():
        if what in (None, name):
            print(f"{name}:")
            print(*(f"  {line}" for line in lines()), sep="\n")


def algorithms() -> list[str]:
    width = max(map(len, ALGORITHMS))
    return [f"{name:<{width}}  {(algorithm_class(name).__doc__ or '').splitlines()[0]}" for name in ALGORITHMS]


def environment_ids() -> list[str]:
    extras = {"envpool": "envpool", "gymnax": "gymnax", "mpe2": "marl"}
    missing = {name: importlib.util.find_spec(name) is None for name in extras}
    note = {name: f"; not installed: pip install 'zhixing[{extras[name]}]'" if missing[name] else "" for name in extras}
    return [
        f"compiled, in JAX: {', '.join(environments.CLASSIC_CONTROL)}",
        f"compiled tables: {', '.join(environments.TOY_TEXT + environments.TEACHING)}",
        f"compiled, with goals: {', '.join(environments.GOALS)}; for skills: {', '.join(environments.PLANES)}",
        f"compiled, of several agents: {', '.join(environments.PARTICLES)}",
        f"compiled, gymnax: Breakout-MinAtar, Asterix-MinAtar, SpaceInvaders-MinAtar, Catch-bsuite, …{note['gymnax']}",
        f"compiled, EnvPool: {', '.join(environments.BOX2D + environments.MUJOCO)}, and with "
        f"--environment.backend envpool whatever it has{note['envpool']}",
        "from Python: whatever is registered in Gymnasium; your own class with zhixing.train(…, MyEnvironment)",
        f"from Python, of several agents: mpe2's and PettingZoo's, by their modules' names{note['mpe2']}",
    ]


def preset_lines() -> list[str]:
    width = max(map(len, ALGORITHMS))
    return [f"{name:<{width}}  {', '.join(id for id in presets(name) if id != 'default')}" for name in ALGORITHMS]


def ladder_lines() -> list[str]:
    width = max(map(len, ladder_names()))
    return [f"{name:<{width}}  {', '.join(load_ladder(name).rungs)}" for name in ladder_names()]

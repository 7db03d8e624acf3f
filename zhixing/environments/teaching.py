"""Two small worlds to watch an algorithm learn in: a maze with pits, and a treasure at the end of a line."""

from collections.abc import Callable, Sequence

import numpy as np

from zhixing.environments.tabular import Table, TabularEnv

LEFT, DOWN, RIGHT, UP = range(4)
_MOVES = {LEFT: (0, -1), DOWN: (1, 0), RIGHT: (0, 1), UP: (-1, 0)}
_REWARDS = {"X": -1.0, "G": 1.0}  # entering one of these ends the episode


class Maze4x4(TabularEnv):
    """zhixing/Maze-v0: an explorer seeks the goal (+1) between two pits (-1); goal and pits end the episode.

    Actions 0 left, 1 down, 2 right, 3 up; a move into the border stays. State = 4 row + column. At most 100 steps.
    """

    def __init__(self):
        super().__init__(**_grid_world(["S...", "..X.", ".XG.", "...."], (LEFT, DOWN, RIGHT, UP)))


class TreasureLine(TabularEnv):
    """zhixing/TreasureLine-v0: six cells in a line, a treasure (+1, the end) in the rightmost.

    Actions 0 left, 1 right; a move into the border stays. State = cell from the left. At most 100 steps.
    """

    def __init__(self):
        super().__init__(**_grid_world(["S....G"], (LEFT, RIGHT)))


def _grid_world(grid: Sequence[str], moves: Sequence[int]) -> dict:
    """The arguments of `TabularEnv` for a deterministic grid: S start, X pit, G goal."""
    shape = (len(grid), len(grid[0]))
    letters = "".join(grid)
    table: Table = {
        state: {action: [_outcome(letters, shape, state, move)] for action, move in enumerate(moves)}
        for state in range(len(letters))
    }
    start = np.array([letter == "S" for letter in letters], np.float64)
    return {"table": table, "initial_distribution": start, "max_episode_steps": 100, "grid": grid}


def _outcome(letters: str, shape: tuple[int, int], state: int, move: int) -> tuple[float, int, float, bool]:
    """-> probability, successor, reward, terminated of one move; a pit and the goal are never left."""
    if letters[state] in _REWARDS:
        return 1.0, state, 0.0, True
    row, column = np.clip(np.add(divmod(state, shape[1]), _MOVES[move]), 0, np.subtract(shape, 1))
    successor = int(row) * shape[1] + int(column)
    letter = letters[successor]
    return 1.0, successor, _REWARDS.get(letter, 0.0), letter in _REWARDS


TEACHING: dict[str, Callable[[], TabularEnv]] = {
    "zhixing/Maze-v0": Maze4x4,
    "zhixing/TreasureLine-v0": TreasureLine,
}

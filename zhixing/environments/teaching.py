"""Small worlds to watch an algorithm learn in: a maze with pits, a treasure on a line, a corridor to remember in."""

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


class TMaze(TabularEnv):
    """zhixing/TMaze-v0: a corridor whose first cell says at which side of its far end the treasure lies.

    Actions 0 up, 1 down. In the corridor either goes one cell on; at the junction they turn, and end the episode: +1
    on the side that was shown, -1 on the other. Observations: 0 "up" or 1 "down" in the first cell, 2 in the corridor,
    3 at the junction, 4 at its sides: who does not remember the first cell gets 0 on average, whatever he does.

    After Bakker, "Reinforcement learning with long short-term memory", NeurIPS 2001, section 4.
    """

    LENGTH = 10  # steps from the first cell to the junction

    def __init__(self):
        places = self.LENGTH + 2  # cells of the corridor, the junction, a side
        table: dict = {}
        for side, place in np.ndindex(2, places):
            state = side * places + place
            rewards = [0.0, 0.0] if place != self.LENGTH else [1.0, -1.0] if side == 0 else [-1.0, 1.0]
            successor, ended = min(state + 1, side * places + places - 1), place >= self.LENGTH
            table[state] = {action: [(1.0, successor, reward, ended)] for action, reward in enumerate(rewards)}
        seen = [[side, *[2] * (self.LENGTH - 1), 3, 4] for side in range(2)]
        start = np.tile(np.arange(places) == 0, 2) / 2
        super().__init__(table, start, max_episode_steps=50, observations=[*seen[0], *seen[1]])

    def render_text(self, state: int) -> str:
        """The corridor with the agent as "@", the treasure G, the pit X; U or D is what the first cell shows."""
        side, position = divmod(int(state), self.LENGTH + 2)
        corridor = ["UD"[side], *"." * self.LENGTH]
        if position <= self.LENGTH:
            corridor[position] = "@"
        ends = ["GX"[side], "XG"[side]]
        return "\n".join([" " * self.LENGTH + ends[0], "".join(corridor), " " * self.LENGTH + ends[1]])


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
    "zhixing/TMaze-v0": TMaze,
}

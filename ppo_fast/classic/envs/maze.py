"""ppo_fast/Maze-v0: a grid maze in which the exit can always be reached."""

from collections import deque
from collections.abc import Mapping
from typing import TypedDict

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from ppo_fast.common.errors import UserError

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left as (row, column)
MOVE_NAMES = ("up", "right", "down", "left")
EXIT_REWARD, STEP_REWARD, WALL_REWARD = 10.0, -0.1, -0.3
FLOOR, WALL, EXIT, AGENT = (245, 245, 240), (52, 58, 70), (76, 175, 80), (33, 118, 210)
CELL = 24  # pixels of a cell in pictures

Cell = tuple[int, int]
Walls = npt.NDArray[np.bool_]  # [size, size], True for a wall
Maps = npt.NDArray[np.float32]  # [size, size, 3]


class MazeState(TypedDict):
    """The state of an episode; in JSON the cells are lists."""

    walls: list[list[int]]
    agent: Cell
    exit: Cell
    steps: int
    random: Mapping[str, object]


def carve(size: int, openings: float, random: np.random.Generator) -> Walls:
    """Make the walls [size, size] of a random maze, True for a wall.

    Depth-first search (the "recursive backtracker" of Jamis Buck) makes a tree of corridors, so that every floor cell
    can be reached from every other in exactly one way; then each inner wall between two corridors is removed with
    probability `openings`, which makes loops.
    """
    walls = np.ones((size, size), dtype=bool)
    walls[1, 1] = False
    stack = [(1, 1)]
    while stack:
        row, column = stack[-1]
        ahead = [(row + 2 * r, column + 2 * c) for r, c in MOVES]
        free = [(r, c) for r, c in ahead if 0 < r < size - 1 and 0 < c < size - 1 and walls[r, c]]
        if not free:
            stack.pop()
            continue
        r, c = free[random.integers(len(free))]
        walls[(row + r) // 2, (column + c) // 2] = walls[r, c] = False
        stack.append((r, c))
    for r, c in np.argwhere(walls[1:-1, 1:-1]) + 1:
        between = (not walls[r - 1, c] and not walls[r + 1, c]) or (not walls[r, c - 1] and not walls[r, c + 1])
        if between and (r + c) % 2 and random.random() < openings:
            walls[r, c] = False
    return walls


def distances(walls: Walls, goal: Cell) -> npt.NDArray[np.int64]:
    """Compute the steps [size, size] from each cell to `goal`, -1 where there is no path."""
    steps = np.full(walls.shape, -1)
    steps[goal] = 0
    queue = deque([goal])
    while queue:
        row, column = queue.popleft()
        for r, c in MOVES:
            there = (row + r, column + c)
            if not walls[there] and steps[there] < 0:
                steps[there] = steps[row, column] + 1
                queue.append(there)
    return steps


class Maze(gymnasium.Env[Maps, np.int64]):
    """A maze with four moves, and an exit with a reward of 10.

    The observation [size, size, 3] has three maps of 0 and 1: walls, agent, exit. A step has a reward of -0.1, a step
    against a wall -0.3 (the agent does not move). The exit ends the episode (terminated); so does the step limit
    (truncated). The exit is the cell with the largest distance from the start.

    Args:
        size: cells along each side, odd, at least 5; the border is wall.
        layout_seed: seed of the walls; None: new walls for each episode.
        random_start: the agent starts on a random floor cell instead of at the top left.
        openings: probability that an inner wall is removed, 0 for a maze with one path only.
        max_steps: step limit; None: 4 size^2.
        render_mode: "ansi": render returns a text; "human": prints it; "rgb_array": returns a picture.

    >>> env = Maze(size=5, layout_seed=0, render_mode="ansi")
    >>> _ = env.reset(seed=0)
    >>> env.render().splitlines()[0]
    '#####'
    """

    ppo_fast_saves_state = True  # get_state and set_state cover the whole state, for checkpoints
    metadata = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 8}  # noqa: RUF012  # Gymnasium's

    def __init__(
        self,
        size: int = 11,
        layout_seed: int | None = None,
        random_start: bool = False,
        openings: float = 0.1,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if not isinstance(size, int) or size < 5 or size % 2 == 0:
            raise UserError(f"size must be an odd number of at least 5 cells, got {size!r}")
        if not 0 <= openings <= 1:
            raise UserError(f"openings must be in [0, 1], got {openings}")
        if max_steps is not None and max_steps < 1:
            raise UserError(f"max_steps must be at least 1, got {max_steps}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode must be ansi, human, rgb_array or None, got {render_mode!r}")
        self.size, self.layout_seed, self.random_start, self.openings = size, layout_seed, random_start, openings
        self.max_steps = 4 * size * size if max_steps is None else max_steps
        self.render_mode = render_mode
        self.action_space = spaces.Discrete(len(MOVES))
        self.observation_space = spaces.Box(0.0, 1.0, (size, size, 3), np.float32)
        self.steps = 0
        self._build(np.random.default_rng(layout_seed))

    def _build(self, random: np.random.Generator) -> None:
        self.walls = carve(self.size, self.openings, random)
        self.agent: Cell = (1, 1)
        away = distances(self.walls, self.agent)
        row, column = np.unravel_index(int(away.argmax()), away.shape)
        self.exit: Cell = (int(row), int(column))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Maps, dict[str, object]]:
        super().reset(seed=seed)
        if self.layout_seed is None:
            self._build(self.np_random)
        self.agent, self.steps = (1, 1), 0
        if self.random_start:
            cells = [cell for cell in self.floor() if cell != self.exit]
            self.agent = cells[self.np_random.integers(len(cells))]
        self._print()
        return self.observation(self.agent), {}

    def step(self, action: int | np.int64) -> tuple[Maps, float, bool, bool, dict[str, object]]:
        if not self.action_space.contains(action):
            raise UserError(f"an action must be 0 (up), 1 (right), 2 (down) or 3 (left), got {action!r}")
        row, column = MOVES[int(action)]
        there = (self.agent[0] + row, self.agent[1] + column)
        blocked = bool(self.walls[there])
        self.agent = self.agent if blocked else there
        self.steps += 1
        terminated = self.agent == self.exit
        truncated = not terminated and self.steps >= self.max_steps
        reward = (WALL_REWARD if blocked else STEP_REWARD) + EXIT_REWARD * terminated
        self._print()
        return self.observation(self.agent), reward, terminated, truncated, {}

    def floor(self) -> list[Cell]:
        """List the cells without a wall."""
        return [(int(row), int(column)) for row, column in np.argwhere(~self.walls)]

    def observation(self, agent: Cell) -> Maps:
        """Make the observation of an agent in a cell."""
        maps = np.zeros((self.size, self.size, 3), np.float32)
        maps[..., 0] = self.walls
        maps[*agent, 1] = maps[*self.exit, 2] = 1.0
        return maps

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        if self.render_mode == "rgb_array":
            return self.picture()
        rows = np.where(self.walls, "#", " ")
        rows[self.exit], rows[self.agent] = "E", "A"
        text = "\n".join("".join(row) for row in rows)
        if self.render_mode == "human":
            print(text + "\n")
        return text if self.render_mode == "ansi" else None

    def picture(self, *, with_agent: bool = True) -> npt.NDArray[np.uint8]:
        """Draw an RGB picture [CELL size, CELL size, 3]: dark walls, a green exit, a blue agent."""
        cells = np.where(self.walls[..., None], WALL, FLOOR).astype(np.uint8)
        cells[self.exit] = EXIT
        image = cells.repeat(CELL, 0).repeat(CELL, 1)
        if with_agent:
            y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
            top, left = self.agent[0] * CELL, self.agent[1] * CELL
            image[top : top + CELL, left : left + CELL][y**2 + x**2 < (0.36 * CELL) ** 2] = AGENT
        return image

    def get_state(self) -> MazeState:
        """Return the whole state of the episode, for JSON."""
        return {
            "walls": self.walls.astype(int).tolist(),
            "agent": self.agent,
            "exit": self.exit,
            "steps": self.steps,
            "random": self.np_random.bit_generator.state,
        }

    def set_state(self, state: MazeState) -> None:
        """Restore what `get_state` returned."""
        self.walls, self.steps = np.array(state["walls"], dtype=bool), state["steps"]
        self.agent, self.exit = (state["agent"][0], state["agent"][1]), (state["exit"][0], state["exit"][1])
        self.np_random.bit_generator.state = state["random"]

    def _print(self) -> None:
        if self.render_mode == "human":
            self.render()

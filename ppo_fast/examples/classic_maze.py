"""Solve a random maze with PPO, and draw what was learned: an arrow for the likeliest move, colour for the value.

    python -m ppo_fast.examples.classic_maze [--seed N] [--size CELLS] [--out DIR]

The environment is ppo_fast/Maze-v0 with one layout, drawn from the seed, and a random start in each episode. Before and
after, the policy's likeliest moves are followed from every cell. Half a minute on a laptop.

DIR then holds policy.png, summary.json, metrics.jsonl, TensorBoard events and checkpoints.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch

from ppo_fast.classic import ClassicConfig, ClassicTrainer
from ppo_fast.classic.envs.maze import MOVES, Cell, Maze, distances
from ppo_fast.common.errors import UserError, print_error

if TYPE_CHECKING:
    from matplotlib.patches import Rectangle


def make_config(seed: int, out: str, *, total_steps: int, quiet: bool, overwrite: bool = False) -> ClassicConfig:
    return ClassicConfig(
        env="ppo_fast/Maze-v0",
        num_envs=16,
        rollout_steps=128,
        total_steps=total_steps,
        gamma=0.97,
        lr=2e-3,
        entropy_coef=0.1,
        normalize_observations=True,  # walls never change in one maze: they become 0, and the cell of the agent large
        eval_episodes=0,  # the walks below say more
        seed=seed,
        out=out,
        quiet=quiet,
        overwrite=overwrite,
    )


def ask(trainer: ClassicTrainer, maze: Maze) -> tuple[dict[Cell, int], dict[Cell, float]]:
    """The likeliest move and the value of every floor cell but the exit."""
    cells = [cell for cell in maze.floor() if cell != maze.exit]
    seen = np.stack([maze.observation(cell) for cell in cells])
    moves, values = trainer.act(seen).tolist(), trainer.values(seen).tolist()
    return dict(zip(cells, moves, strict=True)), dict(zip(cells, values, strict=True))


def walks(maze: Maze, moves: dict[Cell, int]) -> tuple[float, float]:
    """Shares of cells from which the moves reach the exit, and reach it by a shortest way."""
    best, reached, shortest = distances(maze.walls, maze.exit), 0, 0
    for start in moves:
        cell, steps = start, 0
        while cell != maze.exit and steps <= len(moves):
            row, column = MOVES[moves[cell]]
            there = (cell[0] + row, cell[1] + column)
            cell, steps = cell if maze.walls[there] else there, steps + 1
        reached += int(cell == maze.exit)
        shortest += int(cell == maze.exit and steps == best[start])
    return reached / len(moves), shortest / len(moves)


def draw(maze: Maze, moves: dict[Cell, int], values: dict[Cell, float], path: Path, title: str) -> None:
    """A PNG of the maze: walls dark, the value of a cell as its colour, its likeliest move as an arrow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6.8), layout="constrained")
    axis = figure.subplots()
    colours = np.full(maze.walls.shape, np.nan)
    for cell, value in values.items():
        colours[cell] = value
    axis.set_facecolor("#343a46")  # what has no value is wall
    image = axis.imshow(colours, cmap="viridis")
    figure.colorbar(image, label="value of the cell (discounted reward to come)", shrink=0.85)
    for (row, column), move in moves.items():
        down, right = MOVES[move]
        axis.annotate(
            "",
            xy=(column + 0.34 * right, row + 0.34 * down),
            xytext=(column - 0.34 * right, row - 0.34 * down),
            arrowprops={"arrowstyle": "-|>", "color": "white", "linewidth": 1.3, "mutation_scale": 9},
        )
    axis.add_patch(_square(maze.exit, "#e53935"))
    axis.text(maze.exit[1], maze.exit[0], "exit", color="white", ha="center", va="center", fontsize=8)
    axis.set_title(title, fontsize=11)
    axis.set_xticks([])
    axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _square(cell: Cell, colour: str) -> "Rectangle":
    from matplotlib.patches import Rectangle

    return Rectangle((cell[1] - 0.5, cell[0] - 0.5), 1, 1, color=colour)


class MazeOptions(TypedDict):
    size: int
    layout_seed: int
    random_start: bool
    max_steps: int


def run(config: ClassicConfig, size: int) -> dict[str, float]:
    """Learn and draw; the shares of cells that lead to the exit before and after."""
    # A short step limit: the more episodes, the more starts, and those near the exit teach first
    arguments: MazeOptions = {
        "size": size,
        "layout_seed": config.seed,
        "random_start": True,
        "max_steps": 10 * size,
    }
    maze, trainer = Maze(**arguments), ClassicTrainer(config, env_kwargs={**arguments})
    before, _ = walks(maze, ask(trainer, maze)[0])
    trainer.train()
    moves, values = ask(trainer, maze)
    after, shortest = walks(maze, moves)
    path = Path(str(config.out)) / "policy.png"
    title = f"{100 * after:.0f} % of the cells lead to the exit, {100 * shortest:.0f} % by a shortest way"
    draw(maze, moves, values, path, title)
    if not config.quiet:
        print(f"cells from which the likeliest moves reach the exit: {100 * before:.0f} % before,", end=" ")
        print(f"{100 * after:.0f} % after, {100 * shortest:.0f} % by a shortest way; see {path}")
    return {"before": before, "after": after, "shortest": shortest}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.classic_maze", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the layout and all else (default: 0)")
    parser.add_argument("--size", type=int, default=11, help="cells along each side, odd (default: 11)")
    parser.add_argument("--out", default="runs/classic_maze", help="folder of the results (default: runs/classic_maze)")
    parser.add_argument("--total-steps", type=int, default=300_000, help="moves in all (default: 300000)")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        more = {"quiet": arguments.quiet, "overwrite": arguments.overwrite}
        config = make_config(arguments.seed, arguments.out, total_steps=arguments.total_steps, **more)
        run(config, arguments.size)
    except UserError as error:
        print_error(f"classic_maze: error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The included environments pass Gymnasium's checker and behave as documented."""

import json
import warnings

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install "ppo_fast[classic]"')

from gymnasium.utils.env_checker import check_env  # noqa: E402

import ppo_fast.classic.envs  # noqa: E402
from ppo_fast.classic.envs import text_generation as text  # noqa: E402
from ppo_fast.classic.envs.maze import MOVES, Maze, carve, distances  # noqa: E402
from ppo_fast.classic.envs.text_generation import ALPHABET, TextGeneration, WordScorer  # noqa: E402
from ppo_fast.common.errors import UserError  # noqa: E402

NAMES = ["ppo_fast/TextGeneration-v0", "ppo_fast/Maze-v0"]


def write(env: TextGeneration, letters: str) -> list[tuple]:
    return [env.step(ALPHABET.index(letter)) for letter in letters]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [None, "ansi", "human", "rgb_array"])
def test_environments_pass_gymnasiums_checker(name, mode):
    if mode == "rgb_array" and "Text" in name:
        pytest.skip("a text has no picture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(name, render_mode=mode).unwrapped)


def test_human_mode_prints_the_text(capsys):
    env = gymnasium.make("ppo_fast/TextGeneration-v0", render_mode="human")
    env.reset(seed=0)
    for letter in "ab.":
        env.step(ALPHABET.index(letter))
    assert capsys.readouterr().out.split() == ["_", "a_", "ab_", "ab."]


def test_a_second_import_does_not_warn():
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(ppo_fast.classic.envs)
    assert set(NAMES) <= set(gymnasium.registry)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_restores_the_episode(name):
    env, other = gymnasium.make(name).unwrapped, gymnasium.make(name).unwrapped
    env.reset(seed=1)
    other.reset(seed=2)
    for action in (0, 1, 2):
        env.step(action)
    other.set_state(json.loads(json.dumps(env.get_state())))
    for action in (3, 1, 0, 2):
        for ours, theirs in zip(env.step(action), other.step(action), strict=True):
            assert np.array_equal(ours, theirs)
    assert np.array_equal(env.reset()[0], other.reset()[0])  # also the next layout


@pytest.mark.parametrize("name", NAMES)
def test_two_episodes_of_one_seed_are_equal(name):
    env, other = gymnasium.make(name).unwrapped, gymnasium.make(name).unwrapped
    assert np.array_equal(env.reset(seed=5)[0], other.reset(seed=5)[0])


def test_a_full_stop_ends_the_text():
    env = TextGeneration(max_steps=6)
    env.reset(seed=0)
    steps = write(env, "ab.")
    assert [step[1:4] for step in steps] == [(0.0, False, False), (0.0, False, False), (1.0, True, False)]
    assert steps[-1][4] == {"text": "ab."}
    with pytest.raises(UserError, match="call reset"):
        env.step(0)


def test_the_last_position_ends_the_text():
    env = TextGeneration(max_steps=3)
    env.reset(seed=0)
    assert [step[1:4] for step in write(env, "abc")][-1] == (0.0, True, False)


def test_the_observation_is_the_text_backwards():
    env = TextGeneration(max_steps=4)
    first, _ = env.reset(seed=0)
    assert not first.any()
    observation = write(env, "ba")[-1][0]
    letters = ["".join(ALPHABET[i] for i in np.flatnonzero(row)) for row in observation]
    assert letters == ["a", "b", "", ""]  # the newest first
    assert env.reset()[0].sum() == 0


def test_a_scorer_of_the_user_is_called_for_each_character():
    calls = []
    env = TextGeneration(max_steps=3, scorer=lambda *given: calls.append(given) or 0.5)
    env.reset()
    assert [step[1] for step in write(env, "a.")] == [0.5, 0.5]
    assert calls == [("a", False), ("a.", True)]


@pytest.mark.parametrize("scorer", text.SCORERS)
def test_a_scorer_can_be_named(scorer):
    env = gymnasium.make("ppo_fast/TextGeneration-v0", scorer=scorer, max_steps=4)
    env.reset(seed=0)
    rewards = [env.step(ALPHABET.index(letter))[1] for letter in "a b."]
    expected = {
        "sentence_end": [0, 0, 0, 1],
        "words": [0.1, 0.5, 0.1, 0],
        "length": [0, 0, 0, 0],
        "diversity": [0, 0, 0, 1],
    }
    assert rewards == expected[scorer]


def test_words_may_come_from_a_generator():
    assert WordScorer(x for x in ("cat", "dog"))("cat.", True) == 1.5


def test_a_word_is_rewarded_once():
    score = WordScorer(["cat"])
    texts = ["cat cat x cat."[:n] for n in range(1, 15)]
    assert [n for n, x in enumerate(texts) if score(x, False) == 1.5] == [3]


@pytest.mark.parametrize("size", [5, 7, 21])
def test_the_exit_can_be_reached(size):
    for seed in range(30):
        maze = Maze(size=size)
        maze.reset(seed=seed)
        steps = distances(maze.walls, maze.agent)
        assert (steps[~maze.walls] >= 0).all()
        assert steps[maze.exit] == steps.max() > 0
        assert maze.walls[[0, -1]].all()
        assert maze.walls[:, [0, -1]].all()


def test_openings_make_loops():
    tree, open_ = (carve(15, share, np.random.default_rng(0)) for share in (0.0, 1.0))
    assert (~tree).sum() == 2 * 7 * 7 - 1  # 49 rooms and the 48 doors of a tree
    assert (~open_).sum() == 49 + 2 * 7 * 6


def test_walls_stop_the_agent_and_the_exit_is_worth_ten():
    maze = Maze(size=7, layout_seed=1)
    maze.reset(seed=0)
    steps = distances(maze.walls, maze.exit)
    rewards, terminated, bumps = [], False, 0
    while not terminated:
        for action, (row, column) in enumerate(MOVES):
            there = (maze.agent[0] + row, maze.agent[1] + column)
            if maze.walls[there]:
                before = maze.agent
                assert maze.step(action)[1:4] == (-0.3, False, False)
                assert maze.agent == before
                bumps += 1
            elif steps[there] < steps[maze.agent]:
                observation, reward, terminated, truncated, _ = maze.step(action)
                assert maze.agent == there
                assert observation[..., 1].sum() == observation[(*there, 1)] == 1
                rewards.append(reward)
                break
    assert not truncated
    assert bumps
    assert rewards[:-1] == [-0.1] * (len(rewards) - 1)
    assert rewards[-1] == pytest.approx(9.9)


def test_the_step_limit_is_a_truncation():
    maze = Maze(size=5, layout_seed=0, max_steps=3)
    maze.reset(seed=0)
    up = 0  # a wall
    assert [maze.step(up)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    maze.reset()
    assert maze.step(up)[2:4] == (False, False)


def test_layouts_follow_their_seed():
    fixed, drawn = Maze(size=9, layout_seed=3), Maze(size=9)
    layouts = []
    for seed in range(4):
        fixed.reset(seed=seed)
        drawn.reset(seed=seed)
        assert np.array_equal(fixed.walls, Maze(size=9, layout_seed=3).walls)
        layouts.append(drawn.walls.tobytes())
    assert len(set(layouts)) > 1


def test_random_starts_are_all_floor_cells_except_the_exit():
    maze = Maze(size=7, layout_seed=0, random_start=True)
    maze.reset(seed=0)
    starts = set()
    for _ in range(200):
        maze.reset()
        starts.add(maze.agent)
    assert starts == set(maze.floor()) - {maze.exit}


def test_text_and_picture_show_the_maze():
    maze = Maze(size=5, layout_seed=0, render_mode="ansi")
    maze.reset(seed=0)
    rows = maze.render().split("\n")
    assert [[cell == "#" for cell in row] for row in rows] == maze.walls.tolist()
    assert rows[maze.agent[0]][maze.agent[1]] == "A"
    assert rows[maze.exit[0]][maze.exit[1]] == "E"
    picture = maze.picture()
    assert picture.shape == (120, 120, 3)
    assert picture[0, 0].tolist() == [52, 58, 70]
    assert picture[36, 36].tolist() == [33, 118, 210]  # the middle of the agent's cell


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Maze(size=4), "size must be an odd number"),
        (lambda: Maze(openings=2), "openings must be in"),
        (lambda: Maze(max_steps=0), "max_steps must be at least 1"),
        (lambda: Maze(render_mode="braille"), "render_mode must be"),
        (lambda: TextGeneration(max_steps=0), "max_steps must be a whole number"),
        (lambda: TextGeneration(scorer="nice"), "scorer must be a function or one of"),
        (lambda: TextGeneration(scorer=3), "scorer must be a function or one of"),
        (lambda: TextGeneration(render_mode="rgb_array"), "render_mode must be"),
        (lambda: WordScorer([]), "words must be"),
        (lambda: WordScorer(["cat", "two words"]), r"words must be .* got \['two words'\]"),
        (lambda: WordScorer("cat"), "words must be"),  # its letters would be taken for the words c, a and t
        (lambda: text.SumScorer({"words": 1.0}), "scorers must be functions"),
        (lambda: text.LengthScorer(0), "length must be"),
    ],
)
def test_a_bad_argument_is_rejected(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_an_impossible_action_is_rejected(name):
    env = gymnasium.make(name, disable_env_checker=True).unwrapped
    env.reset(seed=0)
    with pytest.raises(UserError, match="an action must be"):
        env.step(99)


def test_the_examples_run(tmp_path, capsys):
    from ppo_fast.examples import classic_maze, classic_text

    out = str(tmp_path / "maze")
    assert classic_maze.main(["--size", "5", "--total-steps", "12000", "--out", out]) == 0
    assert "100 % after" in capsys.readouterr().out
    assert (tmp_path / "maze" / "policy.png").stat().st_size > 5000
    out = str(tmp_path / "text")
    assert classic_text.main(["--total-steps", "4000", "--out", out, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    texts = json.loads((tmp_path / "text" / "texts.json").read_text())
    before, after = (np.mean([reward for _, reward in texts[when]]) for when in ("before", "after"))
    assert after > before
    assert classic_text.main(["--total-steps", "2000", "--out", str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out.endswith(f"all texts are in {tmp_path / 'other' / 'texts.json'}\n")
    assert classic_text.main(["--total-steps", "4000", "--out", out]) == 1  # it has an earlier run
    assert classic_text.main(["--total-steps", "2000", "--out", out, "--overwrite", "--quiet"]) == 0
    assert "already holds a run" in capsys.readouterr().err

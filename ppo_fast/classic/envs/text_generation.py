"""ppo_fast/TextGeneration-v0: write a text one character at a time; a scorer gives the rewards."""

import string
from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from ppo_fast.common.errors import UserError

ALPHABET = string.ascii_lowercase + " ."
END = "."
# For WordScorer: short, so that a small network finds many of them within a minute
WORDS = """
a all an and are at bed bee big bird blue boy can car cat cow day dog door eat egg farm far fish fly for fox fun
girl go good green hat he hen her his hot house i in is it jam joy key king lake let lion little love man moon my
near new no not now of on one our owl pen pig red rose run sea see she sit sky so song star sun tea the they tree
two under up us was we well wind with wood yes you zoo
"""

# scorer(text, ended): the reward for the character written last; `ended` is True once, when the text is complete
Scorer = Callable[[str, bool], float]


def sentence_end(text: str, ended: bool) -> float:
    """Return 1 at the end of a text that ends with a full stop, else 0.

    >>> sentence_end("ab.", True), sentence_end("ab", True), sentence_end("ab", False)
    (1.0, 0.0, 0.0)
    """
    return float(ended and text.endswith(END))


class WordScorer:
    """Rewards for words of a list: 0.1 for a letter that continues a prefix, 0.5 for each letter of a new word, else 0.

    A word counts when a space or the full stop ends it, and once in a text. No reward is negative: a policy that is
    punished for ending a string that is no word learns to end none.

    >>> score = WordScorer(["a", "at"])
    >>> [score("at x a."[:n], n == 7) for n in range(1, 8)]
    [0.1, 0.1, 1.0, 0.0, 0.0, 0.1, 0.5]
    """

    def __init__(self, words: Iterable[str] = tuple(WORDS.split())) -> None:
        given = [] if isinstance(words, str) else list(words)  # a text would be a list of its letters
        wrong = [x for x in given if not (isinstance(x, str) and x and set(x) <= set(string.ascii_lowercase))]
        if wrong or not given:
            raise UserError(f"words must be a list of words of the letters a to z, got {wrong[:5] or words!r}")
        self.words = frozenset(given)
        self.prefixes = frozenset(x[:n] for x in self.words for n in range(1, len(x) + 1))

    def __call__(self, text: str, ended: bool) -> float:
        if text[-1] not in " .":
            return 0.1 if text.split(" ")[-1] in self.prefixes else 0.0
        *before, last = text[:-1].split(" ")
        return 0.5 * len(last) if last in self.words and last not in before else 0.0


class LengthScorer:
    """Return, at the end of a text, 1 minus the relative error of its length from `target` characters; at least 0.

    >>> LengthScorer(4)("abc.", True), LengthScorer(4)("a.", True), LengthScorer(4)("a.", False)
    (1.0, 0.5, 0.0)
    """

    def __init__(self, target: int) -> None:
        if target < 1:
            raise UserError(f"the target length must be at least 1 character, got {target}")
        self.target = target

    def __call__(self, text: str, ended: bool) -> float:
        return max(0.0, 1 - abs(len(text) - self.target) / self.target) if ended else 0.0


def diversity(text: str, ended: bool) -> float:
    """Return, at the end of a text, the fraction of its characters that differ from all before them.

    >>> diversity("abc.", True), diversity("aaaa", True)
    (1.0, 0.25)
    """
    return len(set(text)) / len(text) if ended else 0.0


class SumScorer:
    """Weighted sum of several scorers.

    >>> SumScorer({sentence_end: 2.0, diversity: 1.0})("ab.", True)
    3.0
    """

    def __init__(self, weights: dict[Scorer, float]) -> None:
        if not all(callable(scorer) for scorer in weights):
            raise UserError(f"scorers must be functions f(text, ended), got {list(weights)!r}")
        self.weights = weights

    def __call__(self, text: str, ended: bool) -> float:
        return sum(weight * scorer(text, ended) for scorer, weight in self.weights.items())


SCORERS: dict[str, Callable[[int], Scorer]] = {  # by name, for the command line; each takes max_steps
    "sentence_end": lambda max_steps: sentence_end,
    "words": lambda max_steps: WordScorer(),
    "length": lambda max_steps: LengthScorer(max(1, max_steps // 2)),
    "diversity": lambda max_steps: diversity,
}


Rows = npt.NDArray[np.float32]  # [max_steps, 28]


class TextState(TypedDict):
    """The state of an episode."""

    text: str
    random: Mapping[str, object]


class TextGeneration(gymnasium.Env[Rows, np.int64]):
    """A text, to which each action appends one character: "a" to "z", space, full stop.

    The observation [max_steps, 28] has a row for each position, counted backwards from the last character, so that a
    word has the same rows at every position: one-hot, or zeros before the beginning. A full stop or the last position
    ends the episode; both are terminations, not truncations, because the observation shows how many positions are
    left.

    Args:
        max_steps: maximum number of characters.
        scorer: f(text, ended), the reward for the last character; or one of the names sentence_end, words, length
            (half of max_steps), diversity.
        render_mode: "ansi": render returns the text; "human": prints it.

    >>> env = TextGeneration(max_steps=5)
    >>> _ = env.reset(seed=0)
    >>> env.step(ALPHABET.index("."))[1:4]
    (1.0, True, False)
    """

    ppo_fast_saves_state = True  # get_state and set_state cover the whole state, for checkpoints
    metadata = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012  # Gymnasium's interface

    def __init__(
        self, max_steps: int = 20, scorer: Scorer | str = "sentence_end", render_mode: str | None = None
    ) -> None:
        if not isinstance(max_steps, int) or max_steps < 1:
            raise UserError(f"max_steps must be a whole number of at least 1 character, got {max_steps!r}")
        if scorer not in SCORERS if isinstance(scorer, str) else not callable(scorer):
            raise UserError(f"scorer must be a function or one of {', '.join(SCORERS)}; got {scorer!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode must be ansi, human or None, got {render_mode!r}")
        self.max_steps, self.render_mode = max_steps, render_mode
        self.scorer = SCORERS[scorer](max_steps) if isinstance(scorer, str) else scorer
        self.action_space = spaces.Discrete(len(ALPHABET))
        self.observation_space = spaces.Box(0.0, 1.0, (max_steps, len(ALPHABET)), np.float32)
        self.text = ""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Rows, dict[str, object]]:
        super().reset(seed=seed)
        self.text = ""
        self._print()
        return self._observation(), {"text": self.text}

    def step(self, action: int | np.int64) -> tuple[Rows, float, bool, bool, dict[str, object]]:
        if not self.action_space.contains(action):
            raise UserError(f"an action must be a whole number from 0 to {len(ALPHABET) - 1}, got {action!r}")
        if self._complete():
            raise UserError("the text is complete: call reset before the next step")
        self.text += ALPHABET[int(action)]
        ended = self._complete()
        reward = float(self.scorer(self.text, ended))
        self._print()
        return self._observation(), reward, ended, False, {"text": self.text}

    def render(self) -> str | None:
        """Return the text, with a mark at the position of the next character."""
        text = self.text if self._complete() else self.text + "_"
        if self.render_mode == "human":
            print(text)
        return text if self.render_mode == "ansi" else None

    def get_state(self) -> TextState:
        """Return the whole state of the episode, for JSON."""
        return {"text": self.text, "random": self.np_random.bit_generator.state}

    def set_state(self, state: TextState) -> None:
        """Restore what `get_state` returned."""
        self.text = state["text"]
        self.np_random.bit_generator.state = state["random"]

    def _complete(self) -> bool:
        return self.text.endswith(END) or len(self.text) >= self.max_steps

    def _observation(self) -> Rows:
        rows = np.zeros((self.max_steps, len(ALPHABET)), np.float32)
        rows[range(len(self.text)), [ALPHABET.index(x) for x in reversed(self.text)]] = 1.0
        return rows

    def _print(self) -> None:
        if self.render_mode == "human":
            self.render()

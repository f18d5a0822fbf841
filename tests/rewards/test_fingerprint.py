"""The fingerprint of a reward changes with its code, options and weights, and with nothing else."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import byte_tokenizer, tiny_llama
from transformers import LlamaConfig, LlamaForSequenceClassification

from ppo_fast.llm.models.reward_model import RewardModel
from ppo_fast.llm.models.weights import weights_hash
from ppo_fast.llm.reward.fingerprint import reward_fingerprint
from ppo_fast.rewards import Configured, Fluency, Pool, load_reward, numeric, rouge_l

CODE = """
import functools
import re

WORDS = {"a", "b"}
FACTOR = 2.0
PATTERN = re.compile("a+")
calls = 0
seen = []

def helper(text):
    return len(text) * FACTOR

def reward(prompts, completions, answer=None, *, scale=1.0):
    global calls
    calls += 1
    seen.append(len(completions))
    inner = lambda text: helper(text) + (text in {"x", "y", "z"}) + bool(PATTERN.search(text))
    return [inner(text) * scale for text in completions]

class Judge:
    def __init__(self, threshold=0.5):
        self.threshold = threshold
        self.calls = 0

    def score(self, text):
        return float(len(text) > self.threshold)

    def __call__(self, prompts, completions):
        self.calls += 1
        return [self.score(text) for text in completions]

@functools.lru_cache
def cached(text):
    return len(text)

def with_cache(prompts, completions):
    return [cached(text) for text in completions]

def counting():
    count, texts = 0, []
    def inner(prompts, completions):
        nonlocal count
        count += 1
        texts.extend(completions)
        return [0.0] * len(completions)
    return inner
"""


def module_of(folder: Path, code: str, name: str = "rewards_of_test"):
    path = folder / f"{name}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of(function) -> str:
    return reward_fingerprint(function, weights_hash)


NAMES = ("reward", "with_cache", "Judge", "counting")


def made(module) -> list:
    """Make the rewards of CODE."""
    return [module.reward, module.with_cache, module.Judge(), module.counting()]


def test_a_fingerprint_stays_the_same_after_calls_and_in_other_places(tmp_path):
    functions = made(module_of(tmp_path, CODE))
    before = list(map(of, functions))
    for function in functions:
        function(["p"], ["abc"])
    assert list(map(of, functions)) == before
    assert list(map(of, made(module_of(tmp_path, "# a comment\n\n" + CODE, "another")))) == before


def test_a_fingerprint_is_the_same_in_another_process(tmp_path):
    before = list(map(of, made(module_of(tmp_path, CODE))))
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import rewards_of_test as r;"
        "from ppo_fast.llm.reward.fingerprint import reward_fingerprint;"
        "print(*(reward_fingerprint(x, str) for x in (r.reward, r.with_cache, r.Judge(), r.counting())))"
    )
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])}  # another order of sets
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("reward", "* scale for", "/ scale for"),
        ("reward", "scale=1.0", "scale=2.0"),
        ("reward", "answer=None", "answer=1"),
        ("reward", "FACTOR = 2.0", "FACTOR = 3.0"),
        ("reward", "len(text) * FACTOR", "len(text) + FACTOR"),
        ("reward", '"y", "z"', '"y", "w"'),
        ("reward", '"a+"', '"a*"'),
        ("with_cache", "return len(text)\n", "return -len(text)\n"),
        ("Judge", "> self.threshold", "< self.threshold"),
        ("Judge", "threshold=0.5", "threshold=0.6"),
        ("counting", "[0.0] *", "[1.0] *"),
    ],
)
def test_a_fingerprint_changes_with_the_code(name, old, new, tmp_path):
    assert CODE.count(old) == 1
    before = made(module_of(tmp_path, CODE, "before"))
    after = made(module_of(tmp_path, CODE.replace(old, new), "after"))
    differ = {which for which, x, y in zip(NAMES, before, after, strict=True) if of(x) != of(y)}
    assert differ == {name}


def fixed(prompts, completions, limit):
    return [float(len(text) < limit) for text in completions]


class Limited:
    def __init__(self, limit, device=None):
        self.limit = limit
        self.device = device

    def score(self, prompts, completions):
        return fixed(prompts, completions, self.limit)


def test_a_fingerprint_changes_with_options():
    def closed(limit):
        return lambda prompts, completions: fixed(prompts, completions, limit)

    different = [
        numeric,
        rouge_l,
        load_reward("ppo_fast.rewards:numeric(reference=answer)"),
        load_reward("ppo_fast.rewards:numeric(reference=result)"),
        load_reward("ppo_fast.rewards:numeric(reference=answer, tolerance=0.5)"),
        Configured(fixed, {"limit": [1, 2]}),
        Configured(fixed, {"limit": [1, 3]}),
        functools.partial(fixed, limit=1),
        functools.partial(fixed, limit=2),
        closed(1),
        closed(2),
        Limited(1).score,
        Limited(2).score,
    ]
    assert len({of(x) for x in different}) == len(different)
    assert of(closed(1)) == of(closed(1))
    assert of(Limited(1, device="cpu").score) == of(Limited(1, device="cuda").score)
    assert of(Configured(fixed, {"a": 1, "b": 2})) == of(Configured(fixed, {"b": 2, "a": 1}))


def test_a_pool_has_the_options_and_the_code_of_its_function():
    pytest.importorskip("pebble")
    spec = "ppo_fast.rewards:numeric(reference=answer{})"
    pools = [
        Pool(spec.format(""), timeout=1.0, fallback=0.0),
        Pool(spec.format(""), timeout=1.0, fallback=1.0),
        Pool(spec.format(", tolerance=1.0"), timeout=1.0, fallback=0.0),
    ]
    assert len({of(pool) for pool in pools}) == 3
    assert of(pools[0]) == of(Pool(spec.format(""), timeout=1.0, fallback=0.0, workers=1))


class Wrapped:
    """A tokenizer inside an object of the user's own that passes on what it lacks."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)


def test_a_wrapped_tokenizer_counts_by_what_it_does():
    templated = byte_tokenizer()
    templated.chat_template = "{{ messages }}"

    def of(tokenizer):
        return reward_fingerprint(functools.partial(numeric, tokenizer=tokenizer), weights_hash)

    assert of(Wrapped(byte_tokenizer())) == of(byte_tokenizer()) != of(Wrapped(templated))


def test_a_fingerprint_changes_with_the_weights_and_the_tokenizer_of_a_model():
    def classifier(seed):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        return LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=2, num_labels=1))

    templated = byte_tokenizer()
    templated.chat_template = "{{ messages[0]['content'] }}"
    judge = RewardModel(classifier(0), byte_tokenizer(), max_length=4)
    before = of(judge)
    judge(["a long prompt"], ["and an answer"])  # which is truncated
    assert of(judge) == before == of(RewardModel(classifier(0), byte_tokenizer(), max_length=4, batch_size=1))
    others = [
        RewardModel(classifier(1), byte_tokenizer(), max_length=4),
        RewardModel(classifier(0), templated, max_length=4),
        RewardModel(classifier(0), byte_tokenizer(), max_length=5),
        Fluency(tiny_llama(), byte_tokenizer()),
        Fluency(tiny_llama(seed=1), byte_tokenizer()),
    ]
    assert len({before, *map(of, others)}) == 6

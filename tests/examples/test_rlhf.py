"""The RLHF example: parts of the text never meet, the judge is a probability, and a small run takes all phases."""

import dataclasses
import itertools
import json
import math
import random
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_fast.common.errors import UserError
from ppo_fast.examples.rlhf import __main__ as command
from ppo_fast.examples.rlhf.common import Settings, coherence
from ppo_fast.examples.rlhf.judge import NGrams, repetition
from ppo_fast.examples.rlhf.phases import run
from ppo_fast.examples.rlhf.text import (
    ANSWER_TOKENS,
    KINDS,
    PROMPT_TOKENS,
    Stretch,
    cut,
    make_tokenizer,
    read_text,
    spoil,
    stretches,
)


@pytest.fixture(scope="module")
def text() -> str:
    return read_text(None)


def test_each_paragraph_is_in_one_part_of_the_text(text):
    parts = cut(text, seed=0)
    paragraphs = {name: {p for x in passages for p in x.split("\n\n") if p.strip()} for name, passages in parts.items()}
    assert sum(map(len, paragraphs.values())) > 1500
    for a, b in itertools.combinations(paragraphs.values(), 2):
        assert not a & b
    assert {p for p in text.strip().split("\n\n") if p.strip()} == set().union(*paragraphs.values())
    assert cut(text, seed=0) == parts
    assert cut(text, seed=1) != parts


def test_what_follows_a_prompt_follows_it_in_the_text(text):
    passages = cut(text, seed=0)["supervised"][:20]
    tokenizer = make_tokenizer(passages, 400)
    whole = "\n".join(passages)
    for stretch in stretches(tokenizer, passages, 20, seed=1):
        if "\ufffd" not in stretch.prompt + stretch.follows:
            assert stretch.prompt + stretch.follows in whole
        assert 1 <= len(tokenizer(stretch.prompt)["input_ids"]) <= PROMPT_TOKENS + 4
        assert 1 <= len(tokenizer(stretch.follows)["input_ids"]) <= ANSWER_TOKENS + 4


@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_text_differs_from_the_real_text(kind):
    real = [Stretch("p", f"the value of number {i} is computed when it is asked for {i}") for i in range(50)]
    spoilt = [spoil(stretch, real, kind, random.Random(i)) for i, stretch in enumerate(real)]
    assert sum(a == b.follows for a, b in zip(spoilt, real, strict=True)) <= 3
    if kind == "disorder":
        assert all(sorted(a.split()) == sorted(b.follows.split()) for a, b in zip(spoilt, real, strict=True))
    if kind in ("misspelt", "disorder"):
        assert all(len(a) == len(b.follows) for a, b in zip(spoilt, real, strict=True))


def test_the_judges_probabilities_add_up_to_one():
    judge = NGrams([[0, 1, 2, 1, 2, 3], [2, 1, 0]], vocabulary=5, order=3)
    for before in ([], [1], [2, 1], [4, 4], [0, 1, 2], [3, 2, 1]):
        assert sum(judge.probability(token, before) for token in range(5)) == pytest.approx(1)


def test_the_judge_counts_as_by_hand():
    judge = NGrams([[0, 1, 0, 1]], vocabulary=4, order=2)
    one = (2 + 2 * 0.25) / (4 + 2)  # twice among four tokens of two kinds
    assert judge.probability(1, []) == pytest.approx(one)
    assert judge.probability(1, [0]) == pytest.approx((2 + 1 * one) / (2 + 1))
    assert judge.probability(1, [3]) == pytest.approx(one), "a context that was never seen says nothing"
    expected = (math.log(judge.probability(1, [0])) + math.log(judge.probability(0, [0, 1]))) / 2
    assert judge.mean_log_likelihood([0], [1, 0]) == pytest.approx(expected)
    assert judge.mean_log_likelihood([0], []) == 0


@pytest.mark.parametrize(("ids", "share"), [([1, 2, 3, 1, 2, 3], 0.25), ([1] * 6, 0.75), ([1, 2], 0), ([], 0)])
def test_repetition_is_the_share_of_repeated_ngrams(ids, share):
    assert repetition(ids) == share


def test_coherence_rewards_neither_repetition_nor_other_words():
    prompts = ["the lambda expression"] * 3
    texts = ["a lambda expression", "a name", "lambda " * 9]
    assert coherence(prompts, texts, [[1, 2, 3], [4, 5, 6], [7] * 9]) == [1.0, 0.0, pytest.approx(0.5 - 6 / 7)]


SMALL = Settings(
    vocabulary=300,
    width=16,
    layers=1,
    supervised_steps=12,
    pair_count=64,
    held_out_pairs=24,
    prompts=20,
    eval_prompts=8,
    batch=4,
    ppo_steps=3,
    sweep=(0.0,),
    device="cpu",
    quiet=True,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (the extra ppo_fast[rewards])")
    out = tmp_path_factory.mktemp("rlhf") / "run"
    run(dataclasses.replace(SMALL, out=str(out)), Console(file=StringIO()))
    return out


def test_each_phase_leaves_a_folder_that_loads(done):
    tokenizer = AutoTokenizer.from_pretrained(done / "supervised")
    assert len(tokenizer) == 300
    for folder in ("supervised", "ppo/model", "sweep/0/model"):
        assert AutoModelForCausalLM.from_pretrained(done / folder).config.hidden_size == 16
    classifier = AutoModelForSequenceClassification.from_pretrained(done / "reward_model")
    assert classifier.config.num_labels == 1
    assert classifier.config.score_offset != 0
    found = json.loads((done / "report.json").read_text())
    assert set(found["reward_model"]) == {"all", "own", *KINDS}
    for who in ("real", "before", "after"):
        assert all(math.isfinite(x) for x in found[who].values())
    assert found["before"]["kl"] == pytest.approx(0, abs=1e-5)
    assert found["after"]["kl"] != 0
    metrics = [json.loads(line) for line in (done / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert {"reward/judge", "reward/coherence", "reward/fluency", "eval/reward/judge"} <= set(metrics[-1])
    assert "eval/kl_per_answer" in found["sweep"]["0"], "without a penalty the KL is shown all the same"
    page = (done / "report.md").read_text()
    for picture in ("learning_curves.png", "reward_against_kl.png", "sweep.png"):
        assert picture in page
        assert (done / picture).read_bytes().startswith(b"\x89PNG")


def test_a_finished_phase_is_not_repeated_and_a_changed_run_is_rejected(done):
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*.safetensors")}
    screen = StringIO()
    run(dataclasses.replace(SMALL, out=str(done)), Console(file=screen))
    assert "supervised: there already" in screen.getvalue()
    assert {p: p.stat().st_mtime_ns for p in done.rglob("*.safetensors")} == before
    with pytest.raises(UserError, match="was made with seed = 0, not 1: take another --out"):
        run(dataclasses.replace(SMALL, out=str(done), seed=1), Console(file=screen))


def test_pairs_from_a_file_are_used(tmp_path):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (the extra ppo_fast[rewards])")
    rows = [{"prompt": "The", "chosen": f" value {i}", "rejected": f" x{i}", "kind": "person"} for i in range(30)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dataclasses.replace(SMALL, out=str(tmp_path / "run"), pairs=str(tmp_path / "p.jsonl"), sweep=())
    found = run(settings, Console(file=StringIO()))
    assert set(found["reward_model"]) == {"all", "person"}


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--text", "", "has 0 characters: too few to learn from"),
        ("--pairs", "", "has no pairs: it is empty"),
        ("--pairs", '{"prompt": "a", "chosen": "b", "rejected": "b"}', "line 1: chosen and rejected are the same"),
    ],
)
def test_bad_input_is_rejected_before_training(tmp_path, capsys, option, content, message):
    (tmp_path / "file").write_text(content)
    assert command.main([option, str(tmp_path / "file"), "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "supervised").exists()

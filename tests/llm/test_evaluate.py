"""Evaluation: training does not notice it, its numbers are right, and its pages and pictures show them."""

import json
import math
import re
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.decoding import CompletionText
from ppo_fast.llm.generate import generate
from ppo_fast.llm.report.evaluation import Evaluation, distinct, own_random_state
from ppo_fast.llm.report.evaluation_page import markdown, show, write
from ppo_fast.llm.report.explanation import explain, visible
from ppo_fast.llm.sampler import SamplingParams
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": text, "base": i} for i, text in enumerate(("hi", "what time is it", "a", "the fox jumps", "no"))]
HELD_OUT = [{"prompt": text, "base": 0} for text in ("yes", "which *one*", "two")]


def variety(prompts: list[str], completions: list[str], base: list[int]) -> list[float]:
    return [len(set(text)) + 0.1 * b for text, b in zip(completions, base, strict=True)]


def trainer_of(out: Path | None, *, eval_rows=HELD_OUT, **changes) -> PPOTrainer:
    small = dict(
        total_steps=3,
        prompts_per_step=5,
        max_new_tokens=6,
        minibatches=1,
        epochs=2,
        lr=3e-3,
        critic_lr=1e-3,
        quiet=True,
        device="cpu",
        tensorboard=False,
        out=None if out is None else str(out),
    )
    config = PPOConfig(**{**small, **changes})
    return PPOTrainer(config, tiny_llama(258), byte_tokenizer(), ROWS, variety, eval_rows=eval_rows)


def evaluation_of(trainer: PPOTrainer) -> Evaluation:
    assert trainer.evaluator is not None
    return trainer.evaluator.run(trainer.steps_done, 0.05, trainer.last_experience)


def of_training(history: list[dict]) -> list[dict]:
    return [
        {
            k: v
            for k, v in row.items()
            if not k.startswith(("seconds", "tokens_per", "memory", "learn_tflops", "mfu", "eval/"))
        }
        for row in history
    ]


def test_evaluations_do_not_change_training():
    without = of_training(trainer_of(None, eval_rows=None).train())
    assert of_training(trainer_of(None, eval_every=1).train()) == without


def test_two_evaluations_of_one_policy_are_equal():
    trainer = trainer_of(None)
    trainer.step()
    first, again = evaluation_of(trainer), evaluation_of(trainer)
    assert first.metrics == again.metrics
    assert first.rollout.completions == again.rollout.completions
    trainer.step()
    assert evaluation_of(trainer).metrics != first.metrics, "the policy has moved, and the evaluation has not seen it"


def test_a_greedy_evaluation_samples_the_likeliest_completion():
    trainer = trainer_of(None, eval_greedy=True)
    tokenizer = byte_tokenizer()
    prompts = tokenizer([row["prompt"] for row in HELD_OUT])["input_ids"]
    likeliest = generate(trainer.actor, tokenizer, prompts, SamplingParams.from_config(trainer.config), greedy=True).ids
    assert evaluation_of(trainer).rollout.completion_ids == likeliest
    assert evaluation_of(trainer_of(None)).rollout.completion_ids != likeliest
    with pytest.raises(UserError, match="eval_greedy gives each prompt one answer, but eval_samples is 2"):
        PPOConfig(eval_greedy=True, eval_samples=2)


def test_min_p_leaves_out_tokens_that_are_too_unlikely():
    model, tokenizer = tiny_llama(258), byte_tokenizer()
    with torch.no_grad():
        model.lm_head.weight *= 40  # from nearly uniform to sharp
    prompts = tokenizer(["abc"] * 64)["input_ids"]
    ids = generate(model, tokenizer, prompts, SamplingParams(max_new_tokens=1, min_p=0.3)).ids
    logits = model(torch.tensor(prompts[:1])).logits[0, -1]
    allowed = (logits.softmax(-1) >= 0.3 * logits.softmax(-1).max()).nonzero().flatten().tolist()
    assert {row[0] for row in ids} <= set(allowed)
    assert {row[0] for row in generate(model, tokenizer, prompts, SamplingParams(max_new_tokens=1)).ids} > set(allowed)


def test_the_random_state_is_restored_after_the_block():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with own_random_state(7, torch.device("cpu")):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with own_random_state(7, torch.device("cpu")):
        assert torch.equal(torch.rand(3), inside)


def test_evaluations_are_made_at_the_steps_that_the_options_name():
    history = trainer_of(None, eval_every=2, total_steps=5).train()
    assert [row["step"] for row in history if "eval/score" in row] == [2, 4, 5]
    history = trainer_of(None, total_steps=3).train()
    assert [row["step"] for row in history if "eval/score" in row] == [3]


def test_metrics_are_those_of_the_held_out_completions():
    trainer = trainer_of(None, eval_samples=2)
    trainer.step()
    found = evaluation_of(trainer)
    rollout = found.rollout
    assert len(rollout) == 6
    assert rollout.columns["prompt"] == [row["prompt"] for row in HELD_OUT for _ in range(2)]
    scores = [float(len(set(text))) for text in rollout.completions]
    assert found.metrics["eval/score"] == pytest.approx(sum(scores) / 6)
    assert found.metrics["eval/answer_tokens"] == sum(rollout.completion_lengths) / 6
    assert found.kl is not None
    assert found.metrics["eval/kl_per_answer"] == pytest.approx(sum(found.kl) / 6, rel=1e-5)
    ids = [[i for i in row if i < 256] for row in rollout.completion_ids]
    assert found.metrics["eval/distinct_1"] == distinct(ids, 1)
    assert 0 < found.metrics["eval/distinct_2"] <= 1


@pytest.mark.parametrize(
    ("answers", "n", "expected"),
    [
        ([[1, 1, 1, 1]], 1, 0.25),
        ([[1, 1, 1, 1]], 2, 0.25),
        ([[1, 2], [3, 4]], 2, 0.5),  # {12, 34} of 4 tokens: n-grams do not reach over the end of an answer
        ([[], []], 1, 0.0),
        ([[1]], 2, 0.0),
    ],
)
def test_distinct_n_counts_as_in_the_paper(answers, n, expected):
    assert distinct(answers, n) == expected


def test_each_token_is_explained_by_its_own_numbers():
    trainer = trainer_of(None)
    trainer.step()
    trainer.step()  # in the first the policy is still its reference: no KL
    rollout, experience = trainer.last_rollout, trainer.last_experience
    assert rollout is not None
    assert experience is not None
    found = explain(trainer.policy, trainer.tokenizer, experience, with_kl=True)
    sums = experience.advantages.abs().sum(1).tolist()
    row = max(range(len(sums)), key=sums.__getitem__)
    ids = rollout.completion_ids[row]
    assert found.answer == rollout.completions[row]
    assert found.tokens == [visible(CompletionText(trainer.tokenizer, [[97]]), i) for i in ids]
    prompt = byte_tokenizer()(found.prompt)["input_ids"]
    with torch.no_grad():
        logits = trainer.actor(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    after = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
    ratio = (after - experience.logprobs[row, : len(ids)]).exp()
    assert found.numbers["ratio"] == pytest.approx(ratio.tolist(), rel=1e-5)
    assert max(abs(x - 1) for x in found.numbers["ratio"]) > 1e-3, "the policy did not move: nothing is explained"
    assert found.score - 0.05 * sum(found.numbers["kl"]) == pytest.approx(sum(found.numbers["reward"]), rel=1e-4)


@pytest.mark.parametrize(("token", "shown"), [(" ", "␣"), ("\n", "\\n"), ("\x1b", "\\x1b"), ("a", "a")])
def test_control_characters_of_a_token_are_visible_and_escaped(token, shown):
    tokenizer = byte_tokenizer()
    assert visible(CompletionText(tokenizer, []), tokenizer(token)["input_ids"][0]) == shown


def test_half_a_character_is_shown_by_the_name_of_its_token():
    tokenizer = byte_tokenizer()
    assert visible(CompletionText(tokenizer, []), tokenizer("é")["input_ids"][0]) == "Ã"  # its name in the vocabulary


def test_the_best_model_is_not_overwritten_by_a_worse_one(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    scores = iter([1.0, 3.0, 2.0])
    assert trainer.evaluator is not None
    for step, better in ((1, True), (2, True), (3, False)):
        trainer.step()
        metrics = {"eval/score": next(scores)}
        evaluation = Evaluation(step, metrics, trainer.last_rollout, None, None)  # type: ignore[arg-type]
        assert trainer.evaluator.keep_best(evaluation, trainer.save) is better
        if step == 2:
            second = {name: p.detach().clone() for name, p in trainer.actor.named_parameters()}
    assert json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text()) == {"step": 2, "eval/score": 3.0}
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best")
    assert all(torch.equal(p, second[name]) for name, p in best.named_parameters())


def test_the_page_of_an_evaluation_has_all_numbers_in_whole_tables(tmp_path):
    trainer = trainer_of(None)
    trainer.step()
    evaluation = evaluation_of(trainer)
    evaluation.rollout.completions[0] = "a | b\n<i>*c*</i> \x1b[31m"
    text = markdown(evaluation)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert "a \\| b \\<i\\>\\*c\\*\\</i\\> \\\\x1b\\[31m" in text
    assert "\x1b" not in text
    found = evaluation.explained
    assert found is not None
    for x in found.numbers["advantage"]:
        assert re.search(rf"\| {x:.4f} \|", text)
    write(evaluation, tmp_path / "eval", trainer.config)
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == ["step-1.jsonl", "step-1.md", "step-1.png"]
    lines = [json.loads(line) for line in (tmp_path / "eval" / "step-1.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in HELD_OUT]
    assert all(math.isfinite(line["kl"]) for line in lines)
    assert (tmp_path / "eval" / "step-1.png").read_bytes().startswith(b"\x89PNG")


def test_a_held_out_row_without_a_prompt_is_named():
    with pytest.raises(UserError, match=r"eval_rows\[0\]: no field 'prompt'; the fields are 'question', 'base'"):
        trainer_of(None, eval_rows=[{"question": "b", "base": 0}])


def test_the_terminal_shows_markup_in_texts_as_it_is():
    trainer = trainer_of(None, eval_rows=[{"prompt": "[red]x[/red]", "base": 0}, *HELD_OUT])
    trainer.step()
    screen = StringIO()
    show(evaluation_of(trainer), Console(file=screen, width=120))
    assert "[red]x[/red]" in screen.getvalue()
    assert "step 1, 4 held-out answers: score" in screen.getvalue()


def test_held_out_prompts_that_are_trained_on_are_counted_in_a_note():
    trainer = trainer_of(None, eval_rows=[*HELD_OUT, ROWS[0], {"prompt": "x" * 300, "base": 0}], dtype="float32")
    assert trainer.notes == [
        "1 held-out prompts are too long and were left out",
        "1 of 4 held-out prompts are among the training prompts, too",
    ]

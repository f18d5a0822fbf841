"""Models, data, rewards and samplers that are wrong or unusual: each is rejected with a sentence, or learned from
rightly.

Public reports of the same kind in comparable software are named beside the tests.
"""

import copy
import datetime
import enum
import json
import logging
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import PROMPTS, byte_tokenizer, distinct, save_tiny_model, tiny_gpt2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from ppo_fast.common.errors import RewardError, UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.data import read_prompts
from ppo_fast.llm.decoding import CompletionText, StopTexts
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.loading import load_actor
from ppo_fast.llm.models.reward_model import RewardModel
from ppo_fast.llm.report.explanation import visible
from ppo_fast.llm.sampler import Completions, SamplingParams
from ppo_fast.llm.trainer import PPOTrainer

END, PAD = 256, 257
ROWS = [{"prompt": text} for text in PROMPTS]
SMALL: dict[str, Any] = {
    "total_steps": 2,
    "prompts_per_step": 4,
    "max_new_tokens": 6,
    "minibatches": 2,
    "epochs": 2,
    "lr": 1e-3,
    "critic_lr": 1e-3,
    "device": "cpu",
    "quiet": True,
    "tensorboard": False,
}


def trainer_of(
    reward: Any = distinct,
    rows: Any = ROWS,
    actor: Any = None,
    tokenizer: Any = None,
    options: dict[str, Any] | None = None,
    **models: Any,
) -> PPOTrainer:
    """A small trainer; `models`: critic, reference, sampler, eval_rows, reward_weights."""
    config = PPOConfig(**{**SMALL, **(options or {})})
    return PPOTrainer(config, actor or tiny_llama(), tokenizer or byte_tokenizer(), rows, reward, **models)


def train(*args: Any, **kwargs: Any) -> list[dict[str, float]]:
    return trainer_of(*args, **kwargs).train()


# Rewards: what they return


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: dict.fromkeys(map(float, range(n)), 1.0), "must return a list, got dict"),
        (lambda n: {float(i) for i in range(n)}, "must return a list, got set"),
        (lambda n: "1234"[:n], "must return a list, got str"),
        (lambda n: b"1234"[:n], "must return a list, got bytes"),
        (lambda n: [10**400] * n, "expected a finite number, got inf"),
        (lambda n: [Fraction(10**400)] * n, "expected a finite number, got inf"),
        (lambda n: torch.zeros(n, device="meta"), "cannot be read: NotImplementedError"),
        (lambda n: [1e25] * n, r"has the score 1e\+25.*scale the rewards .*or set\s+score_clip"),
        (lambda n: np.ones((n, 2)), "2 values for 6 tokens"),
    ],
)
def test_values_of_a_reward_that_are_no_list_of_fp32_numbers_are_rejected(returned, message):
    with pytest.raises(RewardError, match=message):
        train(lambda prompts, completions: returned(len(completions)))


def test_an_object_whose_float_raises_any_error_is_no_number():
    class Strange:
        def __float__(self) -> float:
            raise RuntimeError("no")

    with pytest.raises(RewardError, match=r"expected a number, got <"):
        train(lambda prompts, completions: [Strange()] * len(completions))


def test_a_weight_that_makes_a_score_too_large_is_rejected():
    with pytest.raises(RewardError, match=r"has the score 3e\+39"):
        train({"f": lambda prompts, completions: [3e38] * len(completions)}, reward_weights={"f": 10.0})


def test_a_clipped_score_may_be_of_any_size():
    huge = {"f": lambda prompts, completions: [3e38] * len(completions)}
    history = train(huge, reward_weights={"f": 10.0}, options={"score_clip": 5.0})
    assert all(math.isfinite(x) for row in history for x in row.values())


def test_arrays_of_numpy_are_rewards_of_tokens():
    history = train(lambda prompts, completions, completion_ids: [np.ones(len(ids)) for ids in completion_ids])
    assert history[-1]["score"] == history[-1]["answer_tokens"]


def test_one_list_that_two_rewards_return_is_read_after_each():
    shared: list[float] = []

    def first(prompts, completions):
        shared[:] = [1.0] * len(completions)
        return shared

    def second(prompts, completions):
        shared[:] = [10.0] * len(completions)
        return shared

    assert train({"a": first, "b": second})[-1]["score"] == 11.0


# Rewards: how they are given


def test_a_reward_with_the_arguments_of_another_library_is_rejected_at_the_start():
    # TRL calls rewards by name: completions may come first there, and would get the prompts here
    def swapped(completions, prompts):
        return [0.0] * len(completions)

    def only_completions(completions, **columns):
        return [0.0] * len(completions)

    for function in (swapped, only_completions):
        with pytest.raises(UserError, match=r"takes \(completions.*give its arguments this order"):
            trainer_of(function)


def test_an_asynchronous_reward_is_rejected_at_the_start():
    # huggingface/trl#4130, #7213
    async def judge(prompts, completions):
        return [0.0] * len(completions)

    class Judge:
        async def __call__(self, prompts, completions):
            return [0.0] * len(completions)

    for function in (judge, Judge()):
        with pytest.raises(UserError, match=r"asynchronous: give a function that returns asyncio.run"):
            trainer_of(function)
    with pytest.raises(RewardError, match="must return a list, got coroutine"):
        train(lambda prompts, completions: judge(prompts, completions))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({}, "there is no reward"),
        ([distinct, distinct], "must be a function, got list; several rewards are a dict"),
        ({"a": distinct, "b": 1.0}, "reward 'b' must be a function, got float"),
        (max, "arguments of the reward 'max' cannot be read"),
    ],
)
def test_rewards_that_are_no_functions_are_rejected(reward, message):
    with pytest.raises(UserError, match=message):
        trainer_of(reward)


def test_weights_of_rewards_in_a_list_are_rejected():
    with pytest.raises(UserError, match="reward_weights must be a dict of numbers by reward, got list"):
        trainer_of(distinct, reward_weights=[1.0])
    with pytest.raises(UserError, match="the weight of reward 'distinct' must be finite, got 2"):
        trainer_of(distinct, reward_weights={"distinct": "2"})


def test_attributes_of_a_reward_object_have_no_meaning_for_the_trainer():
    class Keywords:
        def __init__(self) -> None:
            self.keywords, self.failed, self.place, self.func = ["answer"], ["none"], "first", None
            self.seen: list[Any] = []

        def __call__(self, prompts, completions, answer=None):
            self.seen = answer
            return [float(len(text)) for text in completions]

    reward = Keywords()
    train(reward, rows=[{"prompt": "a", "answer": "x"}])
    assert reward.seen == ["x"] * 4


def test_an_integer_failed_counts_the_completions_without_a_score():
    class Counts:
        failed = 0

        def __call__(self, prompts, completions):
            self.failed = len(completions) - 1
            return [0.0] * len(completions)

    assert trainer_of({"judge": Counts()}).step()["reward_failed/judge"] == 3


def test_a_timeout_that_is_no_exception_is_an_error_of_the_reward():
    # NVIDIA-NeMo/RL#465: math-verify's TimeoutException derives from BaseException
    class TimeoutException(BaseException):
        pass

    def slow(prompts, completions):
        raise TimeoutException("too slow")

    with pytest.raises(RewardError, match=r"'slow' raised TimeoutException: too slow \(.*, at answer 0"):
        train(slow)


def test_a_reward_that_closes_standard_output_is_an_error(monkeypatch, tmp_path):
    def closes(prompts, completions):
        sys.stdout.close()
        return [0.0] * len(completions)

    with open(tmp_path / "output", "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(RewardError, match=r"'closes' changed sys.stdout: it is closed now"):
            train(closes, options={"quiet": False})


# Reward models


def reward_model(*, vocabulary: int = 258, positions: int = 64, labels: int = 1) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=positions,
        num_labels=labels,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2ForSequenceClassification(config).eval()


def test_a_reward_model_that_cannot_give_one_score_for_its_tokens_is_rejected():
    with pytest.raises(UserError, match="2 outputs; one score is expected"):
        RewardModel(reward_model(labels=2), byte_tokenizer())
    # huggingface/trl#1867: a device-side assertion there
    with pytest.raises(UserError, match="ids up to 257 but the embedding of the reward model has 100 rows"):
        RewardModel(reward_model(vocabulary=100), byte_tokenizer())


def test_a_reward_model_that_truncates_leaves_the_saved_tokenizer_as_it_was(tmp_path):
    # vllm-project/llm-compressor#2917: the truncation of the last call is saved in tokenizer.json
    tokenizer = byte_tokenizer()
    judge = RewardModel(reward_model(positions=8), tokenizer)
    options = {"out": str(tmp_path), "total_steps": 1}
    train(judge, tokenizer=tokenizer, rows=[{"prompt": "a long prompt"}], options=options)
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text())["truncation"] is None


# Data


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (list(PROMPTS), r"rows\[0\] is 'hi'"),
        ({"prompt": list(PROMPTS)}, "got dict"),
        ("prompts.jsonl", "got str"),
        (None, "got NoneType"),
        ([{"prompt": "a", 1: 2}], r"rows\[0\]: the field 1 must have a text as its name"),
    ],
)
def test_rows_from_python_that_are_no_dicts_are_rejected(rows, message):
    with pytest.raises(UserError, match=message):
        trainer_of(rows=rows)


def test_rows_may_come_from_a_generator():
    assert len(trainer_of(rows=(dict(row) for row in ROWS)).prompts.rows) == len(ROWS)


@pytest.mark.parametrize("prompt", ["a\ud800b", [{"role": "user", "content": "a\ud800b"}]])
def test_half_of_a_character_in_a_prompt_is_rejected(prompt):
    # huggingface/transformers#43459: the tokenizer's own message names another cause
    with pytest.raises(UserError, match=r"rows\[0\]: the prompt has '\\ud800'.*a lone surrogate"):
        trainer_of(rows=[{"prompt": prompt}])


def test_a_field_that_a_line_has_twice_is_rejected(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n')
    with pytest.raises(UserError, match=r"line 2: .*the field 'prompt' twice"):
        read_prompts(tmp_path / "p.jsonl")


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8-sig")
    assert read_prompts(tmp_path / "p.jsonl") == [{"prompt": "a"}]


@pytest.mark.parametrize("kind", ["year", "days", "text"])
def test_parquet_values_that_python_cannot_hold_are_reported_with_the_file(tmp_path, kind):
    pytest.importorskip("pyarrow", reason='pyarrow is not installed: pip install "ppo_fast[data]"')
    import pyarrow as arrow
    from pyarrow import parquet

    odd = {
        "year": arrow.array([10**12], arrow.timestamp("s")),
        "days": arrow.array([10**17], arrow.timestamp("ms")),
        "text": arrow.array([b"\xff"]).view(arrow.string()),
    }[kind]
    parquet.write_table(arrow.table({"prompt": ["a"], "odd": odd}), str(tmp_path / "p.parquet"))
    with pytest.raises(UserError, match=r"cannot read the prompts: .*p\.parquet"):
        read_prompts(tmp_path / "p.parquet")


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
    )
    return tokenizer


def test_messages_may_have_dates_and_an_empty_system_text(tmp_path):
    user = {"role": "user", "content": "hi", "date": datetime.date(2020, 1, 1)}
    rows = [{"prompt": [{"role": "system", "content": ""}, user], "share": math.nan, "raw": b"x"}]
    options = {"out": str(tmp_path), "show_samples_every": 1, "total_steps": 1}
    train(rows=rows, eval_rows=rows, tokenizer=chat_tokenizer(), options=options)
    (line,) = (tmp_path / "eval" / "step-1.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"][1]["date"] == "2020-01-01"


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_prompts_of_special_tokens_are_sampled_as_they_are_learned(make):
    rows = [{"prompt": text} for text in ("<pad>", "<end>", "<pad><pad>a", "x<end>")]
    assert max(row["sampler_gap_max"] for row in train(rows=rows, actor=make())) < 1e-4


# Samplers of one's own


class Engine:
    """A sampler that gives the same kind of answer to each prompt."""

    def __init__(self, ids: Any, logprobs: Any = None, make: Any = list) -> None:
        self.ids, self.logprobs, self.make = ids, logprobs, make

    def sample(self, prompts: list[list[int]], params: SamplingParams) -> Completions:
        ids = self.make([self.ids for _ in prompts])
        logprobs = None if self.logprobs is None else [self.logprobs for _ in prompts]
        return Completions(ids, [True] * len(prompts), logprobs)


@pytest.mark.parametrize(
    ("ids", "make"),
    [(np.array([65, 66, END]), list), (torch.tensor([65, 66, END]), list), ([65, 66, END], torch.tensor)],
)
def test_tokens_of_a_sampler_may_be_arrays_and_tensors(ids, make):
    trainer = trainer_of(sampler=Engine(ids, make=make), rows=[{"prompt": "abc"}])
    trainer.train()
    assert trainer.last_rollout is not None
    assert trainer.last_rollout.completion_ids == [[65, 66, END]] * 4


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([65, 9999], r"token id 9999 for prompt 0; the model's are 0 to 257"),
        ([65, -1], "token id -1 for prompt 0"),
        ([65.5, 66.5], r"returned \[65.5, 66.5\] for prompt 0: a list of token ids is expected"),
        ("AB", "returned 'AB' for prompt 0"),
    ],
)
def test_tokens_of_a_sampler_that_the_model_lacks_are_rejected(ids, message):
    with pytest.raises(UserError, match=message):
        train(sampler=Engine(ids))


@pytest.mark.parametrize("wrong", [None, math.nan, -math.inf, 5.5])
def test_a_log_probability_of_a_sampler_that_is_none_is_rejected(wrong):
    # huggingface/trl#6166: vLLM reports NaN for a token that is nearly certain
    with pytest.raises(UserError, match="as log-probability of token 1 of the answer to prompt 0"):
        train(sampler=Engine([65, 66, END], [-5.5, wrong, -5.5]), options={"importance_cap": 2.0})


def test_an_importance_cap_needs_log_probabilities_of_the_sampler():
    with pytest.raises(UserError, match="importance_cap needs the sampler's log-probabilities"):
        train(sampler=Engine([65, END]), options={"importance_cap": 2.0})


def test_an_error_in_a_sampler_names_its_place_and_keeps_the_steps_before_it(tmp_path):
    class Breaks(Engine):
        calls = 0

        def sample(self, prompts: list[list[int]], params: SamplingParams) -> Completions:
            self.calls += 1
            if self.calls > 1:
                raise ConnectionError("the server has ended")
            return super().sample(prompts, params)

    options = {"out": str(tmp_path), "total_steps": 3}
    with pytest.raises(
        UserError, match=r"ConnectionError: the server has ended \(.*test_adversary_models.py, line \d+\)"
    ):
        train(sampler=Breaks([65, END]), options=options)
    assert (tmp_path / "checkpoints" / "step-1").is_dir()


def test_a_sampler_of_another_kind_is_rejected():
    with pytest.raises(UserError, match="must have a method sample"):
        trainer_of(sampler=object())

    class Pairs:
        def sample(self, prompts, params):
            return [[65]] * len(prompts), [True] * len(prompts)

    with pytest.raises(UserError, match=r"must return ppo_fast.llm.sampler.Completions, got tuple"):
        train(sampler=Pairs())


# Models


def test_a_critic_or_reference_that_lacks_tokens_of_the_actor_is_rejected():
    # huggingface/trl#3595: an index error there
    with pytest.raises(UserError, match="ids up to 257 but the embedding of the critic has 257 rows"):
        trainer_of(critic=Critic(tiny_llama(257).model, 32))
    with pytest.raises(UserError, match="ids up to 257 but the embedding of the reference has 100 rows"):
        trainer_of(reference=tiny_llama(100))


def test_a_critic_whose_head_does_not_fit_its_backbone_is_rejected():
    with pytest.raises(UserError, match=r"head reads 32 numbers, but its backbone gives 64: Critic\(backbone, 64\)"):
        trainer_of(critic=Critic(tiny_llama(hidden=64).model, 32))


@pytest.mark.parametrize("role", ["critic", "reference"])
def test_prompts_leave_room_in_the_positions_of_all_models(role):
    small = tiny_gpt2(positions=12, seed=1)
    models = {role: Critic(small.transformer, 32) if role == "critic" else small}
    trainer = trainer_of(actor=tiny_gpt2(), **models)
    trainer.train()
    assert trainer.prompts_left_out == sum(len(text) > 12 - SMALL["max_new_tokens"] for text in PROMPTS)


def test_a_reference_in_two_dtypes_or_in_fp16_beside_bf16_is_rejected():
    mixed = tiny_llama().bfloat16()
    mixed.lm_head.float()
    with pytest.raises(UserError, match="embedding and LM head in bfloat16 and float32"):
        trainer_of(reference=mixed)
    with pytest.raises(UserError, match="the reference is in float16, but dtype = bfloat16"):
        trainer_of(reference=tiny_llama().half(), options={"dtype": "bfloat16"})


def test_an_actor_in_fp64_is_rejected_with_the_reason():
    with pytest.raises(UserError, match=r"the actor is in float64 .*the losses are computed in fp32"):
        trainer_of(actor=tiny_llama().double())


def test_an_actor_that_is_only_a_name_is_rejected():
    with pytest.raises(UserError, match=r"the actor must be a model of transformers, .* got str"):
        trainer_of(actor="gpt2")


def test_a_model_that_returns_tuples_is_rejected():
    actor = tiny_llama()
    actor.config.return_dict = False
    with pytest.raises(UserError, match="return_dict = false"):
        trainer_of(actor=actor)


def test_an_id_beyond_the_embedding_is_found_although_the_tokenizer_is_small():
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["!"] = 400
    from tokenizers import Tokenizer

    sparse = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<end>", pad_token="<pad>"
    )
    assert len(sparse) <= 258
    with pytest.raises(UserError, match="ids up to 400 but the embedding of the model has 258 rows"):
        trainer_of(tokenizer=sparse)


def test_tokens_beyond_the_tokenizer_are_sampled_as_they_are_learned_and_have_a_visible_name():
    # verl-project/verl#1398, NVIDIA-NeMo/RL#237: an embedding with more rows than the tokenizer has tokens
    actor = tiny_llama()
    actor.resize_token_embeddings(512, mean_resizing=False)
    trainer = trainer_of(actor=actor, options={"max_new_tokens": 12})
    assert max(row["sampler_gap_max"] for row in trainer.train()) < 1e-4
    assert trainer.last_rollout is not None
    assert any(i > PAD for ids in trainer.last_rollout.completion_ids for i in ids)
    assert visible(CompletionText(byte_tokenizer(), [[65]]), 300) == "<300>"


def test_a_hook_on_the_lm_head_is_part_of_the_log_probabilities():
    actor = tiny_llama()
    actor.lm_head.register_forward_hook(lambda module, arguments, out: out * 2)
    with pytest.warns(UserWarning, match="are not its LM head times its hidden states"):
        trainer = trainer_of(actor=actor)
    assert max(row["sampler_gap_max"] for row in trainer.train()) < 1e-4


def test_a_window_of_attention_that_is_shorter_than_the_answers_is_learned_as_sampled():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    history = train(actor=MistralForCausalLM(config).eval(), options={"max_new_tokens": 12})
    assert max(row["sampler_gap_max"] for row in history) < 1e-4


def test_settings_of_the_models_generation_config_do_not_change_what_is_sampled():
    actor = tiny_llama()
    odd = {"repetition_penalty": 2.0, "do_sample": True, "top_k": 3, "num_beams": 3, "suppress_tokens": [1, 2, 3]}
    actor.generation_config.update(**odd, min_new_tokens=4, bad_words_ids=[[5]], no_repeat_ngram_size=1)
    actor.config.use_cache = False
    assert max(row["sampler_gap_max"] for row in train(actor=actor)) < 1e-4
    assert not actor.config.use_cache


@pytest.mark.parametrize("trained", ["lm_head.weight", "bias", "layers.0"])
def test_an_actor_may_be_trained_in_part(trained):
    actor = tiny_gpt2() if trained == "bias" else tiny_llama()
    for name, parameter in actor.named_parameters():
        parameter.requires_grad_(trained in name)
    before = {name: x.clone() for name, x in actor.state_dict().items()}
    train(actor=actor, options={"gradient_checkpointing": True})
    changed = {name for name, x in actor.state_dict().items() if not torch.equal(x, before[name])}
    assert changed
    assert all(trained in name for name in changed)


def test_an_actor_in_a_wrapper_is_rejected():
    for wrapped in (torch.nn.DataParallel(tiny_llama()), torch.compile(tiny_llama())):
        with pytest.raises(UserError, match=r"the actor must be a model of transformers, .*give the model itself"):
            PPOTrainer(PPOConfig(**SMALL), wrapped, byte_tokenizer(), ROWS, distinct)
    with pytest.raises(UserError, match="the reference must be a model of transformers, got DataParallel"):
        trainer_of(reference=torch.nn.DataParallel(tiny_llama()))


def test_a_damaged_generation_config_is_reported(tmp_path):
    save_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot load generation_config.json in .*Expecting property name"):
        load_actor(tmp_path)


# Tokenizers


def test_a_pad_token_that_is_part_of_texts_is_rejected():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "e"
    with pytest.raises(UserError, match=r"the pad token 'e' is an ordinary part of texts.*the end token will do"):
        trainer_of(tokenizer=tokenizer)


def test_rewards_read_an_ordinary_token_that_has_a_role():
    tokenizer = byte_tokenizer()
    tokenizer.unk_token = "e"
    texts = CompletionText(tokenizer, [tokenizer("p")["input_ids"]])
    assert texts.decode([[*tokenizer("hello there")["input_ids"], END]]) == ["hello there"]


def test_long_prompts_are_left_out_without_a_warning_of_indexing_errors(caplog):
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 4
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        trainer_of(tokenizer=tokenizer, rows=[{"prompt": "a longer prompt"}])
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "indexing errors" not in caplog.text


# Adapters


def adapters() -> Any:
    return pytest.importorskip("peft", reason='peft is not installed: pip install "ppo_fast[peft]"')


def test_lora_targets_must_all_be_modules_of_the_actor():
    # huggingface/peft#1959: a name that matches nothing is ignored beside one that does
    adapters()
    with pytest.raises(UserError, match=r"lora_targets names 'v_prj', which the actor lacks; its linear layers are "):
        trainer_of(options={"lora_rank": 2, "lora_targets": "q_proj,v_prj"})
    with pytest.raises(UserError, match=r"lora_targets names 'lm_head', which the critic lacks; .*critic = shared"):
        trainer_of(options={"lora_rank": 2, "lora_targets": "lm_head"})


def test_spaces_between_lora_targets_do_not_count():
    adapters()
    trainer = trainer_of(options={"lora_rank": 2, "lora_targets": "q_proj, v_proj"})
    for model in (trainer.actor, trainer.critic):
        names = {
            name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name
        }
        assert names == {"q_proj", "v_proj"}


def test_an_actor_with_adapters_of_an_earlier_run_is_rejected():
    adapters()
    actor = tiny_llama()
    trainer_of(actor=actor, options={"lora_rank": 2})
    for rank in (0, 2):  # without adapters the saved folder would not load, with them the first ones would be lost
        with pytest.raises(UserError, match="has adapters in its layers, which an earlier run or peft put there"):
            trainer_of(actor=actor, options={"lora_rank": rank})


@pytest.mark.parametrize("adapted", ["lm_head", "embed_tokens", "lm_head,embed_tokens"])
def test_an_adapter_of_tied_weights_is_merged_into_what_was_trained(tmp_path, adapted):
    # huggingface/peft#2018, #2777, unslothai/unsloth#9331: an adapter that is merged into weights that two layers share
    adapters()
    config = copy.deepcopy(tiny_llama().config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    options = {
        "lora_rank": 4,
        "lora_targets": adapted,
        "critic": "shared",
        "merge_adapters": True,
        "lr": 0.1,
        "out": str(tmp_path),
    }
    trainer = trainer_of(actor=LlamaForCausalLM(config).eval(), options=options)
    trainer.train()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits
        torch.testing.assert_close(saved, trainer.actor(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapters_that_are_merged_into_the_actor_are_rejected():
    peft = adapters()
    actor = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    actor.merge_adapter()
    with pytest.raises(UserError, match="the loss reaches none of the 4 trained weights of the actor"):
        trainer_of(actor=actor)


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_lora_with_warm_up_checkpointing_and_bf16_has_first_ratio_one_in_each_step(critic):
    adapters()
    options = {
        "lora_rank": 2,
        "critic": critic,
        "critic_warmup_steps": 1,
        "gradient_checkpointing": True,
        "dtype": "bfloat16",
        "minibatches": 1,
        "epochs": 1,
        "total_steps": 3,
    }
    history = train(options=options)
    assert [row["updates"] for row in history] == [0.0, 1.0, 1.0]
    assert [row["learn/ratio_max"] for row in history[1:]] == [1.0, 1.0]


# Options


def test_options_that_keep_others_from_having_an_effect_are_named_at_the_start():
    (note,) = trainer_of(options={"critic_warmup_steps": 2, "dtype": "float32"}).notes
    assert note == "critic_warmup_steps = 2 and total_steps = 2: the actor does not learn in this run"
    (note,) = trainer_of(options={"kl_coef": 0.0, "kl_controller": "adaptive", "dtype": "float32"}).notes
    assert note.startswith("kl_controller = adaptive has no effect with kl_coef = 0")


def test_options_may_be_numbers_of_numpy_and_members_of_an_enum(tmp_path):
    class Dtype(str, enum.Enum):  # noqa: UP042 (whose str is not its value)
        FLOAT32 = "float32"

    config = PPOConfig(**{**SMALL, "lr": np.float64(1e-3), "dtype": Dtype.FLOAT32})
    assert (type(config.lr), type(config.dtype), config.dtype) == (float, str, "float32")
    train(options={"lr": np.float64(1e-3), "out": str(tmp_path), "total_steps": 1})
    assert "lr: 0.001\n" in Path(tmp_path, "config.yaml").read_text()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 1.0])
def test_a_run_of_one_step_learns_with_every_schedule(schedule, ratio):
    # PrimeIntellect-ai/prime-rl#968: an error where all steps are warm-up
    (row,) = train(options={"total_steps": 1, "lr_schedule": schedule, "warmup_ratio": ratio, "epochs": 1})
    assert 0 < row["lr"] <= 1e-3


def test_packs_of_one_sequence_give_the_gradient_of_one_pack():
    first, second = (train(options={"micro_batch_tokens": n, "total_steps": 1})[0] for n in (1, 4096))
    assert first["learn/grad_norm"] == pytest.approx(second["learn/grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"minibatches": 8, "samples_per_prompt": 2},
        {"prompts_per_step": 9, "samples_per_prompt": 2},
        {"max_new_tokens": 1, "prompts_per_step": 1, "minibatches": 1},
        {"temperature": 1e-6},
        {"temperature": 1e6},
        {"top_k": 100_000, "top_p": 1e-6, "min_p": 1.0},
        {"gamma": 0.0, "lam": 0.0, "clip_low": 0.0, "clip_high": 0.0, "bootstrap_truncated": True},
        {"max_grad_norm": 1e-30, "kl_in": "loss", "aggregation": "seq-mean-token-sum-norm", "target_kl": 1e-9},
    ],
    ids=str,
)
def test_extreme_options_give_finite_numbers(options):
    history = train(rows=ROWS[:2], options=options)
    assert all(math.isfinite(x) for row in history for x in row.values())


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("。", "你好。再见"),
        ("кон", "в конце"),
        ("🙂", "a🙂b"),
        ("e\u0301", "cafe\u0301 x"),
        ("نهاية", "في نهاية ال"),
        ("끝", "이제 끝났다"),
        ("👨\u200d👩\u200d👧", "x👨\u200d👩\u200d👧y"),
        ("\n\n", "a\n\nb"),
    ],
)
def test_a_stop_text_in_any_language_ends_the_answer_with_its_last_byte(stop, text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    texts = CompletionText(tokenizer, [tokenizer("p")["input_ids"]])
    stops = StopTexts(texts, (stop,))
    length = next(n for n in range(1, len(ids) + 1) if stops.completed(0, ids, n))
    assert texts.decode([ids[:length]]) == [text[: text.index(stop) + len(stop)]]

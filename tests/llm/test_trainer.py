"""The loop: exact first ratios, gradients independent of the split, repeatable runs, stops that spare the weights."""

import dataclasses
import json
import math

import pytest
import torch
from support.learning import experience_of, learner_of
from support.tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from ppo_fast.common.errors import NonFiniteError, UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.experience import ExperienceMaker
from ppo_fast.llm.generate import GenerateSampler
from ppo_fast.llm.models.build import build_models
from ppo_fast.llm.models.policy import packed_mode
from ppo_fast.llm.packing.rollout import Rollout, mask_of_lengths
from ppo_fast.llm.reward.scoring import score
from ppo_fast.llm.sample import sample_rollout
from ppo_fast.llm.trainer import PPOTrainer

ROWS = [{"prompt": text, "weight": float(i)} for i, text in enumerate(["hi", "what time is it", "a", "the fox jumps"])]


def config(**options) -> PPOConfig:
    small = dict(
        total_steps=2,
        prompts_per_step=10,
        max_new_tokens=9,
        minibatches=2,
        micro_batch_tokens=40,
        epochs=2,
        lr=1e-3,
        critic_lr=1e-3,
        quiet=True,
        device="cpu",
    )
    return PPOConfig(**{**small, **options})


def count_e(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


@pytest.fixture
def actor():
    return tiny_llama(len(byte_tokenizer()))


def make_rollout(actor, options: PPOConfig) -> Rollout:
    torch.manual_seed(1)
    rows = [ROWS[i % len(ROWS)] for i in range(options.prompts_per_step)]
    sampler = GenerateSampler(actor, byte_tokenizer())
    rollout = sample_rollout(sampler, byte_tokenizer(), rows, options, torch.device("cpu"))
    for row in range(0, len(rollout), 3):  # ragged ends: an untrained model hardly ever ends by itself
        rollout.completion_lengths[row] = 1 + row % 5
    rollout.mask = mask_of_lengths(rollout.completion_lengths)
    return rollout


def prepare(actor, options: PPOConfig):
    rollout = make_rollout(actor, options)
    policy, reference = build_models(options, actor, None, None, torch.device("cpu"))
    torch.nn.init.normal_(policy.critic.head.weight, std=0.1)
    scores, _ = score(rollout, {"vowels": count_e}, options)
    return rollout, policy, experience_of(policy, reference, rollout, scores, options)


def test_first_ratio_is_exactly_one_and_first_kl_exactly_zero(actor):
    options = config()
    _, policy, experience = prepare(actor, options)
    history = learner_of(policy, options).update(experience)
    assert history[0]["ratio_max"] == 1.0
    assert history[0]["approx_kl"] == 0.0
    assert history[0]["clip_fraction"] == 0.0
    assert history[-1]["approx_kl"] > 0, "the policy never moved, so the first ratio proves nothing"


def test_other_packs_give_a_first_ratio_that_is_one_but_for_rounding(actor):
    options = config()
    rollout, policy, experience = prepare(actor, options)
    maker = ExperienceMaker(policy, None, dataclasses.replace(options, micro_batch_tokens=1000))
    others = maker.split_minibatches(rollout, range(len(rollout)))
    assert len(others[0]) < len(experience.minibatches[0])
    history = learner_of(policy, options).update(dataclasses.replace(experience, minibatches=others))
    assert abs(history[0]["ratio_max"] - 1) < 1e-4


def gradient_of(policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("critic", ["own", "shared"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_gradient_does_not_depend_on_the_packs(actor, aggregation, critic):
    options = config(minibatches=1, micro_batch_tokens=1000, aggregation=aggregation, entropy_coef=0.01, critic=critic)
    rollout, policy, experience = prepare(actor, options)
    gradients = []
    for budget, parts in ((1000, 1), (100, 2), (1, 10)):
        maker = ExperienceMaker(policy, None, dataclasses.replace(options, micro_batch_tokens=budget))
        (minibatch,) = maker.split_minibatches(rollout, range(10))
        assert len(minibatch) >= parts
        policy.zero_grad()
        with packed_mode(policy):
            learner_of(policy, options).accumulate_gradients(minibatch, experience)
        gradients.append(gradient_of(policy))
    scale = gradients[0].abs().max()
    assert scale > 0
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() <= 1e-5 * scale  # fp32 rounding of sums in another order


def test_a_sequence_has_the_logprobs_alone_that_it_has_in_a_pack(actor):
    """One sequence alone equals the same sequence in a pack with others."""
    options = config(micro_batch_tokens=1000, minibatches=1)
    rollout, policy, together = prepare(actor, options)
    scores, _ = score(rollout, {"vowels": count_e}, options)
    single = experience_of(policy, None, rollout, scores, dataclasses.replace(options, micro_batch_tokens=1))
    torch.testing.assert_close(single.logprobs, together.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(single.values, together.values, rtol=0, atol=1e-5)


def test_logprobs_equal_those_of_the_model_called_by_hand(actor):
    options = config(temperature=0.7)
    rollout, _, experience = prepare(actor, options)
    row = 1
    P, T = rollout.prompt_lengths[row], rollout.completion_lengths[row]
    start = rollout.tokens.shape[1] - rollout.completion_width
    ids = rollout.tokens[row : row + 1, start - P : start + T]
    with torch.no_grad():
        expected = torch.log_softmax(actor(ids).logits.double() / 0.7, -1)[0, P - 1 : -1]
    expected = expected.gather(-1, ids[0, P:].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(experience.logprobs[row, :T].double(), expected, rtol=0, atol=1e-5)


def test_two_runs_with_one_seed_give_identical_metrics(tmp_path):
    def run(seed: int) -> list[dict]:
        actor = tiny_llama(len(byte_tokenizer()))
        history = PPOTrainer(config(seed=seed), actor, byte_tokenizer(), ROWS, count_e).train()
        measured = ("seconds/", "tokens_per_second", "memory_mib", "learn_tflops", "mfu")
        return [{k: v for k, v in m.items() if not k.startswith(measured)} for m in history]

    first = run(3)
    assert first == run(3)
    assert first != run(4)


def test_a_not_finite_loss_stops_before_the_weights_and_is_named(actor):
    options = config()
    _, policy, experience = prepare(actor, options)
    experience.advantages[0, 0] = float("nan")
    before = [p.clone() for p in actor.parameters()]
    with pytest.raises(NonFiniteError, match="policy_loss = nan"):
        learner_of(policy, options).update(experience)
    assert all(torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True))


def test_training_raises_the_reward(actor):
    """Reward: share of lowercase letters. 25 steps lift it from about 0.1 (26 of 256 bytes) by at least 0.2."""

    def letters(prompts, completion_ids):
        ids = {i for i, token in enumerate(byte_tokenizer().convert_ids_to_tokens(range(256))) if "a" <= token <= "z"}
        return [[float(i in ids) for i in answer] for answer in completion_ids]

    options = config(
        total_steps=25,
        prompts_per_step=32,
        epochs=4,
        lr=3e-3,
        critic_lr=3e-3,
        kl_coef=0.0,
        lam=0.5,
    )
    history = PPOTrainer(
        options,
        actor,
        byte_tokenizer(),
        ROWS,
        lambda prompts, completions, completion_ids: letters(prompts, completion_ids),
    ).train()
    share = [m["score"] / m["answer_tokens"] for m in history]
    assert sum(share[:2]) / 2 < 0.2
    assert sum(share[-3:]) / 3 > sum(share[:2]) / 2 + 0.2


def test_a_run_leaves_metrics_events_samples_and_a_model_that_loads(actor, tmp_path):
    options = config(out=str(tmp_path / "run"), save_every=1)
    PPOTrainer(options, actor, byte_tokenizer(), ROWS, count_e).train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample) == {"step", "prompt", "answer", "score"}
    assert (tmp_path / "run" / "checkpoints" / "step-1" / "weights.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    trained = {k: v for k, v in loaded.state_dict().items()}
    assert all(torch.equal(trained[k], v) for k, v in actor.state_dict().items())


def test_saved_repetition_penalty_does_not_leak_into_sampling(actor):
    """A model's own generation config must not change the distribution that the loss assumes."""
    plain = make_rollout(actor, config()).tokens
    actor.generation_config.repetition_penalty = 5.0
    actor.generation_config.top_k = 1
    assert torch.equal(make_rollout(actor, config()).tokens, plain)
    assert actor.generation_config.repetition_penalty == 5.0


def test_answers_end_with_their_first_end_token_even_if_it_is_also_the_pad_token(actor):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    sampler = GenerateSampler(actor, tokenizer)
    rollout = sample_rollout(sampler, tokenizer, ROWS * 60, config(), actor.device)  # 1 token in 258 ends an answer
    assert 0 < sum(rollout.ended) < len(rollout)
    for ids, ended in zip(rollout.completion_ids, rollout.ended, strict=True):
        assert (256 in ids) == ended
        assert ids.count(256) == int(ended)
        assert 256 not in ids[:-1]


def test_prompts_that_leave_no_room_for_an_answer_are_dropped_and_counted():
    actor = tiny_llama(len(byte_tokenizer()), positions=24)
    rows = [*ROWS, {"prompt": "x" * 100}]
    trainer = PPOTrainer(config(), actor, byte_tokenizer(), rows, count_e)
    assert trainer.prompts_left_out == 1
    with pytest.raises(UserError, match="every prompt is longer than 15 tokens"):
        PPOTrainer(config(), actor, byte_tokenizer(), rows[-1:], count_e)


def test_a_tokenizer_without_pad_token_is_rejected_with_the_remedy(actor):
    with pytest.raises(UserError, match="no pad token"):
        PPOTrainer(config(), actor, byte_tokenizer(pad=False), ROWS, count_e)


def test_a_tokenizer_larger_than_the_embedding_is_rejected():
    with pytest.raises(UserError, match=r"258 tokens with ids up to 257 but the embedding of the model has 200 rows"):
        PPOTrainer(config(), tiny_llama(200), byte_tokenizer(), ROWS, count_e)


def test_memory_does_not_grow_over_steps(actor):
    """Nothing of a step outlives it but its metrics: tensors counted after step 2 and after step 6."""
    import gc

    def elements(x: object) -> int:
        """Of a real tensor; other tests leave the compiler's fake ones behind, whose sizes are symbols."""
        if type(x) not in (torch.Tensor, torch.nn.Parameter):
            return 0
        return math.prod(x.shape) if all(type(n) is int for n in x.shape) else 0

    trainer = PPOTrainer(config(total_steps=6), actor, byte_tokenizer(), ROWS, count_e)
    counts = []
    for _ in range(6):
        trainer.step()
        gc.collect()
        counts.append(sum(map(elements, gc.get_objects())))
    assert counts[-1] <= 1.01 * counts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"lr": "fast"}, "lr must be of type float, got 'fast'"),
        ({"epochs": True}, "epochs must be of type int, got True"),
        ({"kl_estimator": "k9"}, "kl_estimator must be one of k1, k2, k3, abs; got 'k9'"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"prompts_per_step": 3, "minibatches": 4}, "minibatches must be at most prompts_per_step"),
    ],
)
def test_an_option_out_of_range_is_rejected_with_its_range(options, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(**options)

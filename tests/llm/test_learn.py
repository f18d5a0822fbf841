"""What the options of learning do: KL controllers, warm-up, early stop, bootstrap, importance weights, LoRA, bf16."""

import copy

import pytest
import torch
from support import families
from support.learning import experience_of
from support.tiny import byte_tokenizer, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, OPTConfig, OPTForCausalLM

import ppo_fast as ppo
from ppo_fast.common.errors import RewardError, UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.controllers import EntropyController, KLController
from ppo_fast.llm.experience import advantages_of
from ppo_fast.llm.generate import GenerateSampler, generate
from ppo_fast.llm.learn import Learner
from ppo_fast.llm.models.build import build_models
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.loading import load_actor
from ppo_fast.llm.models.policy import packed_mode, reference_logprobs
from ppo_fast.llm.models.reference import AdapterReference
from ppo_fast.llm.models.reward_model import RewardModel
from ppo_fast.llm.optimizer import Optimizer, Optimizers
from ppo_fast.llm.packing.pack import make_pack
from ppo_fast.llm.sample import sample_rollout
from ppo_fast.llm.sampler import Completions, SamplingParams
from ppo_fast.llm.trainer import PPOTrainer

CPU = torch.device("cpu")
ROWS = [{"prompt": text} for text in ("hi", "what time is it", "a", "the fox jumps")]


def config(**options) -> PPOConfig:
    small = dict(
        total_steps=3,
        prompts_per_step=8,
        max_new_tokens=7,
        minibatches=2,
        epochs=2,
        lr=1e-3,
        critic_lr=1e-3,
        quiet=True,
        device="cpu",
    )
    return PPOConfig(**{**small, **options})


def trainer_of(actor=None, **options) -> PPOTrainer:
    actor = tiny_llama(258) if actor is None else actor
    names = [k for k in ("sampler", "reward_weights", "critic", "reference") if not isinstance(options.get(k, ""), str)]
    arguments = {k: options.pop(k) for k in names}
    rewards = options.pop("rewards", letters)
    return PPOTrainer(config(**options), actor, byte_tokenizer(), ROWS, rewards, **arguments)


def letters(prompts, completions):
    return [float(sum(c.isalpha() for c in text)) for text in completions]


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def test_the_adaptive_kl_coefficient_moves_towards_the_target_by_a_bounded_step():
    """Ziegler et al. 2019: the relative error is clipped to +-0.2, and one horizon of answers applies it once."""
    controller = KLController(PPOConfig(kl_coef=0.1, kl_controller="adaptive", kl_target=5.0, kl_horizon=100.0))
    controller.update(50.0, 10)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    controller.update(4.5, 100)
    assert controller.coef == pytest.approx(0.102 * (1 - 0.1))
    fixed = KLController(PPOConfig(kl_coef=0.1))
    fixed.update(50.0, 10)
    assert fixed.coef == 0.1


def test_the_adaptive_coefficient_is_used_in_the_next_step():
    trainer = trainer_of(kl_controller="adaptive", kl_target=1e-5, kl_horizon=8.0, kl_estimator="k3")
    history = trainer.train()
    assert history[0]["kl_coef"] == 0.05
    assert history[1]["kl_coef"] == pytest.approx(0.05 * 0.8), "the first KL is 0, far below the target"
    assert history[2]["kl_coef"] == pytest.approx(0.04 * 1.2), "and then it is beyond it"


def test_the_entropy_coefficient_moves_towards_the_target_and_stays_above_zero():
    """He et al. 2025: a step up below the target, a step down above it."""
    controller = EntropyController(PPOConfig(entropy_coef=0.003, entropy_target=2.0, entropy_step=0.002))
    found = []
    for entropy in (1.9, 2.1, 2.1, 2.1, 0.0):
        controller.update(entropy)
        found.append(controller.coef)
    assert found == pytest.approx([0.005, 0.003, 0.001, 0.0, 0.002])
    fixed = EntropyController(PPOConfig(entropy_coef=0.003))
    fixed.update(0.0)
    assert fixed.coef == 0.003


def test_the_adapted_entropy_coefficient_is_used_in_the_loss():
    """A bonus by far larger than everything else pulls the entropy up; the coefficient starts at 0."""
    runs = {}
    for step in (0.0, 100.0):
        trainer = trainer_of(entropy_target=50.0, entropy_step=step, total_steps=2, lr=1e-3)
        history = trainer.train()
        assert [x["entropy_coef"] for x in history] == [0.0, step]
        runs[step] = {name: p.detach().clone() for name, p in trainer.policy.actor.named_parameters()}
    assert any(not torch.equal(runs[0.0][name], runs[100.0][name]) for name in runs[0.0])


def test_kl_in_the_loss_is_not_in_the_reward():
    trainer = trainer_of(kl_in="loss", kl_coef=0.5, total_steps=2, kl_estimator="k3")
    second = trainer.train()[1]
    assert second["kl"] > 0
    assert second["learn/ref_kl"] > 0
    rollout = trainer.last_rollout
    experience = experience_of(trainer.policy, trainer.reference, rollout, torch.ones(len(rollout)), trainer.config)
    assert experience.rewards.sum() == len(rollout), "the score alone"


def test_critic_warm_up_trains_the_critic_alone():
    for critic in ("own", "shared"):
        trainer = trainer_of(critic_warmup_steps=2, critic=critic)
        actor, value_head = snapshot(trainer.actor), snapshot(trainer.critic)
        for _ in range(2):
            metrics = trainer.step()
        assert not changed(trainer.actor, actor)
        assert changed(trainer.critic, value_head)
        assert "learn/policy_loss" not in metrics
        trainer.step()
        assert changed(trainer.actor, actor)


def test_a_large_kl_stops_the_updates_of_the_actor():
    trainer = trainer_of(target_kl=1e-4, lr=3e-2, lr_schedule="constant", warmup_ratio=0.0)
    metrics = trainer.step()
    assert metrics["updates"] < 4
    assert all(p.grad is None for p in trainer.policy.parameters()), "a gradient is left over for the next step"
    assert trainer_of(lr=3e-2).step()["updates"] == 4


def test_bootstrap_truncated_adds_the_value_after_a_cut_completion():
    """With the option V(end) follows the last token; an answer that ended gets no such thing."""
    actor = tiny_llama(258)
    for bootstrap in (False, True):
        options = config(bootstrap_truncated=bootstrap, gamma=0.5, lam=0.0, whiten_advantages=False, kl_coef=0.0)
        policy, _ = build_models(options, actor, None, None, CPU)
        with torch.no_grad():
            policy.critic.head.bias.fill_(2.0)
        tokenizer = byte_tokenizer()
        torch.manual_seed(0)
        rollout = sample_rollout(GenerateSampler(actor, tokenizer), tokenizer, ROWS, options, CPU)
        rollout.ended = [False, True, False, True]
        experience = experience_of(policy, None, rollout, torch.zeros(4), options)
        last = [experience.advantages[row, n - 1].item() for row, n in enumerate(rollout.completion_lengths)]
        expected = 0.5 * 2.0 - 2.0 if bootstrap else -2.0
        assert last == pytest.approx([expected, -2.0, expected, -2.0])


def test_critic_lam_1_gives_the_critic_monte_carlo_returns_and_leaves_the_advantages():
    one, two = (trainer_of(lam=0.5, kl_coef=0.0, **options) for options in ({}, {"critic_lam": 1.0}))
    one.step()
    two.step()
    mask, experience = two.last_rollout.mask, two.last_experience
    assert torch.equal(experience.advantages, one.last_experience.advantages)
    assert not torch.allclose(experience.returns, one.last_experience.returns)
    total = experience.rewards.sum(-1, keepdim=True).expand_as(experience.returns)  # the score is the only reward
    torch.testing.assert_close(experience.returns[mask], total[mask], rtol=1e-5, atol=1e-5)


def test_the_lambda_of_an_answer_follows_its_length_in_sampled_tokens():
    """1 - 1 / (alpha length): alpha 0.4 and lengths 1 to 4 give 0, 0, 1/6 and 3/8."""
    torch.manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[1], [2], [3], [4], [0]])
    mask[3] = torch.tensor([True, False, True, False, True, True])  # tokens of a tool between sampled ones
    scores, (old, ref, values) = torch.randn(5), torch.randn(3, 5, 6)
    lams = torch.tensor([0, 0, 1 / 6, 3 / 8, 0])
    for critic_lam in (None, 0.9):
        options = config(lam_length_alpha=0.4, critic_lam=critic_lam)
        actual = advantages_of(scores, old, ref, values, mask, options, kl_coef=0.1, bootstrap=None)
        expected = ppo.rlhf_advantages(
            scores,
            old,
            ref,
            values,
            mask,
            kl_coef=0.1,
            lam=lams,
            critic_lam=critic_lam,
            kl_estimator=options.kl_estimator,
        )
        for a, e in zip(actual[:4], expected[:4], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"lam": 0.9}, {"lam": 0.9, "critic_lam": 1.0}, {"lam_length_alpha": 0.4, "critic_lam": 1.0}],
    ids=["one lambda", "critic_lam", "lam_length_alpha"],
)
def test_the_spread_of_advantages_before_whitening_is_recorded(options):
    """In units of the reward, in the first rollout (whose values change when the scale is set) and in the second."""
    plain = trainer_of(**options, whiten_advantages=False)
    trainer = trainer_of(**options)
    for step in range(2):
        recorded = [t.step()["advantage_std"] for t in (plain, trainer)]
        mask, raw = plain.last_rollout.mask, plain.last_experience.advantages
        assert recorded[0] == pytest.approx(raw[mask].std().item(), rel=1e-5)
        whitened = trainer.last_experience.advantages[trainer.last_rollout.mask]
        assert whitened.std().item() == pytest.approx(1, rel=1e-3)
        if step == 0:  # the same weights and rollout
            assert recorded[1] == pytest.approx(recorded[0], rel=1e-5)
            spread = (plain.last_experience.returns - plain.last_experience.values)[mask].std().item()
            assert (recorded[0] == pytest.approx(spread, rel=1e-3)) == ("critic_lam" not in options)


@pytest.mark.parametrize("head_dtype", ["auto", "float32"])
def test_hidden_states_in_bfloat16_reach_the_head(head_dtype):
    """OPT's decoder ends in a projection, whose output is bf16 under autocast."""
    torch.manual_seed(0)
    opt = OPTConfig(
        vocab_size=258,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        do_layer_norm_before=False,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
    )
    trainer = trainer_of(OPTForCausalLM(opt).eval(), dtype="bfloat16", head_dtype=head_dtype)
    assert trainer.policy.head.linear
    metrics = trainer.step()
    assert metrics["sampler_gap_max"] < 0.05


class Echo:
    """A sampler that is not generate(): it answers with the prompt, and claims to have been sure of it."""

    def sample(self, prompts, params):
        ids = [prompt[: params.max_new_tokens] for prompt in prompts]
        return Completions(ids, [False] * len(ids), [[-0.5] * len(answer) for answer in ids])


def test_a_given_sampler_is_used_and_its_gap_is_measured():
    trainer = trainer_of(sampler=Echo(), max_sampler_gap=None, importance_cap=0.01, rewards={"letters": letters})
    metrics = trainer.step()
    assert set(trainer.last_rollout.completions) == {"hi", "what ti", "a", "the fox"}
    assert metrics["sampler_gap_mean"] == pytest.approx(4.9, abs=1.0), "ln 258 = 5.6 against 0.5"
    rollout = trainer.last_rollout
    experience = experience_of(trainer.policy, None, rollout, torch.zeros(len(rollout)), trainer.config)
    expected = (experience.logprobs - rollout.logprobs).exp().clamp(max=0.01)[rollout.mask]
    torch.testing.assert_close(experience.weights[rollout.mask], expected)


def test_importance_weights_scale_the_loss():
    """Weights all equal to the cap scale the policy's gradient by it."""
    gradients = []
    for cap in (None, 0.004):
        trainer = trainer_of(
            sampler=Echo(), max_sampler_gap=None, importance_cap=cap, epochs=1, minibatches=1, max_grad_norm=None
        )
        trainer.learner.optimizers.actor.step = lambda: None
        trainer.step()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.actor.parameters()]))
    weights = 0.004
    share = (gradients[1] @ gradients[0]) / (gradients[0] @ gradients[0])
    assert share == pytest.approx(weights, rel=0.3), "a few tokens are likelier than the cap says"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda n: Completions([[1]] * (n - 1), [True] * n), "returned 7 ids for 8 prompts"),
        (lambda n: Completions([[1]] * n, [True]), "returned 1 ended for 8 prompts"),
        (lambda n: Completions([[1] * 8] * n, [True] * n), "8 tokens for prompt 0; 1 to max_new_tokens=7"),
        (lambda n: Completions([[]] * n, [True] * n), "0 tokens for prompt 0"),
        (lambda n: Completions([[1]] * n, [True] * n, [[-1.0, -1.0]] * n), "2 logprobs for the 1 tokens of prompt 0"),
    ],
)
def test_a_sampler_with_a_wrong_result_is_rejected(answers, message):
    class Broken:
        def sample(self, prompts, params):
            return answers(len(prompts))

    with pytest.raises(UserError, match=message):
        trainer_of(sampler=Broken()).step()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_of_generate_are_those_of_the_trainer(temperature):
    """At the sampling temperature, left padding and the KV cache included."""
    trainer = trainer_of(temperature=temperature)
    metrics = trainer.step()
    assert 0 < metrics["sampler_gap_max"] < 1e-4


def test_a_completion_ends_with_its_stop_text():
    actor, tokenizer = tiny_llama(258), byte_tokenizer()
    options = config(stop=("e", "zz"), max_new_tokens=40)
    torch.manual_seed(0)
    answers = generate(actor, tokenizer, [[1, 2]] * 64, SamplingParams.from_config(options))
    texts = tokenizer.batch_decode(answers.ids)
    stopped = [text for text in texts if "e" in text and not text.endswith("<end>")]
    assert stopped
    assert all(text.index("e") == len(text) - 1 for text in stopped)
    assert [ended for ended in answers.ended] == [text.endswith(("e", "zz", "<end>")) for text in texts]
    assert [len(row) for row in answers.logprobs] == [len(ids) for ids in answers.ids]


def test_lora_trains_the_adapters_alone_and_keeps_the_reference():
    pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    base = tiny_llama(258)
    plain = copy.deepcopy(base)
    trainer = trainer_of(base, lora_rank=4)
    assert isinstance(trainer.reference, AdapterReference)
    before, value_before = snapshot(trainer.actor), snapshot(trainer.critic)
    for _ in range(2):
        trainer.step()
    moved, value_moved = changed(trainer.actor, before), changed(trainer.critic, value_before)
    assert moved
    assert all("lora_" in name for name in moved)
    assert value_moved - {"head.weight", "head.bias"}
    assert all("lora_" in name or name.startswith("head.") for name in value_moved)
    pack = make_pack(trainer.last_rollout, [0, 1, 2])
    with torch.no_grad(), packed_mode(trainer.policy):
        ref = reference_logprobs(trainer.policy, trainer.reference, pack)
        now = trainer.policy.evaluate(pack).logprobs
    other, _ = build_models(config(), plain, None, None, CPU)
    with torch.no_grad(), packed_mode(other):
        expected = other.evaluate(pack).logprobs
    torch.testing.assert_close(ref, expected, rtol=0, atol=1e-5)
    assert (now - expected).abs().max() > 1e-4
    assert all(p.requires_grad == ("lora_" in name) for name, p in trainer.actor.named_parameters())


def test_trained_adapters_of_the_start_are_the_reference():
    """TRL #495, #4723: the reference of a run that starts from a trained adapter is that adapter."""
    peft = pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = trainer_of(peft.get_peft_model(tiny_llama(258), adapter), kl_estimator="k3")
    assert trainer.reference.starts_trained
    first = trainer.step()
    assert first["kl"] == 0
    before = {n: p for n, p in snapshot(trainer.actor).items() if AdapterReference.NAME in n}
    assert before
    second = trainer.step()
    assert second["kl"] > 0
    assert all(torch.equal(p, dict(trainer.actor.named_parameters())[n]) for n, p in before.items())
    assert trainer.actor.active_adapter == "default"


def test_bf16_compute_trains_fp32_weights():
    trainer = trainer_of(dtype="bfloat16")
    before = snapshot(trainer.actor)
    metrics = trainer.step()
    assert changed(trainer.actor, before)
    assert all(p.dtype == torch.float32 for p in trainer.policy.parameters())
    assert metrics["learn/ratio_max"] > 0
    again = trainer_of(dtype="bfloat16", epochs=1, minibatches=1).step()
    assert again["learn/ratio_max"] == 1.0
    exact = trainer_of(epochs=1, minibatches=1).step()
    assert again["entropy"] != exact["entropy"], "bf16 was not used"


def test_a_shared_critic_trains_the_backbone_of_the_actor():
    trainer = trainer_of(critic="shared", value_coef=1.0)
    assert trainer.critic.backbone is None
    before = snapshot(trainer.actor)
    trainer.step()
    assert changed(trainer.actor, before)


def reward_model(labels: int = 1) -> LlamaForSequenceClassification:
    shape = tiny_llama(258).config
    shape.num_labels = labels
    torch.manual_seed(4)
    return LlamaForSequenceClassification(shape).eval()


def test_a_reward_model_scores_each_text_as_alone():
    """Each score equals that of the text alone."""
    model, tokenizer = reward_model(), byte_tokenizer()
    score = RewardModel(model, tokenizer, batch_size=2)
    prompts, completions = ["a", "bcd", "what"], ["xyz", "", "is this longer"]
    together = score(prompts, completions)
    for prompt, completion, value in zip(prompts, completions, together, strict=True):
        ids = tokenizer(prompt + completion, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert model(ids).logits.item() == pytest.approx(value, abs=1e-5)


def test_a_reward_model_with_a_chat_template_reads_the_templated_text():
    model, tokenizer = reward_model(), byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    templated = RewardModel(model, tokenizer)(["hi"], ["yo"])
    tokenizer.chat_template = None
    assert templated == RewardModel(model, tokenizer)(["[user]hi[assistant]"], ["yo"])


def test_a_critic_from_a_reward_model_starts_with_its_scores():
    model = reward_model()
    critic = Critic.from_reward_model(model)
    ids = torch.arange(5).unsqueeze(0)
    with torch.no_grad():
        states = critic.backbone(ids).last_hidden_state[0]
        assert critic(states)[-1].item() == pytest.approx(model(ids).logits.item(), abs=1e-5)
        model.config.score_offset = 1.5  # as `preferences.calibrate` leaves it: rewards are that much lower
        calibrated = Critic.from_reward_model(model)
        assert calibrated(states)[-1].item() == pytest.approx(model(ids).logits.item() - 1.5, abs=1e-5)
    metrics = trainer_of(critic=critic).step()
    assert metrics["value"] != 0


def test_weights_of_rewards_scale_the_scores():
    rewards = {"a": letters, "b": lambda prompts, completions: [1.0] * len(prompts)}
    one, other = trainer_of(rewards=rewards), trainer_of(rewards=rewards, reward_weights={"a": 0.0, "b": 3.0})
    assert other.step()["score"] == 3.0
    assert one.step()["score"] > 1.0
    with pytest.raises(RewardError, match="names 'c', but the rewards are 'a'"):
        trainer_of(rewards={"a": letters}, reward_weights={"c": 1.0})


def test_a_reward_that_fails_for_one_sample_names_it():
    def fragile(prompts, completions):
        return [1.0 / (len(prompt) - 1) for prompt in prompts]

    with pytest.raises(RewardError, match=r"ZeroDivisionError.*at answer \d+ .* to 'a'"):
        trainer_of(rewards=fragile).step()


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2", "cohere"])
def test_a_family_trains_three_steps_and_is_loaded_again(name, tmp_path):
    families.load(name, tmp_path)
    byte_tokenizer().save_pretrained(tmp_path / name)
    actor, tokenizer = load_actor(tmp_path / name)
    trainer = PPOTrainer(config(out=str(tmp_path / "out"), tensorboard=False), actor, tokenizer, ROWS, letters)
    history = trainer.train()
    assert history[0]["learn/clip_fraction"] >= 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.actor(ids).logits)


def test_the_loss_in_packs_is_that_of_the_whole_batch():
    """One update's loss against ppo_loss on padded tensors of the model's own logits."""
    trainer = trainer_of(epochs=1, minibatches=1, kl_coef=0.0, entropy_coef=0.02, whiten_advantages=False)
    torch.nn.init.normal_(trainer.critic.head.weight, std=0.1)
    actor, critic = copy.deepcopy(trainer.actor), copy.deepcopy(trainer.critic)
    metrics = trainer.step()
    rollout = trainer.last_rollout
    P = rollout.tokens.shape[1] - rollout.completion_width
    column = torch.arange(rollout.tokens.shape[1])
    lengths = torch.tensor([rollout.prompt_lengths, rollout.completion_lengths]).unsqueeze(-1)
    attended = (column >= P - lengths[0]) & (column < P + lengths[1])
    position = (attended.cumsum(1) - 1).clamp(min=0)
    inputs = dict(input_ids=rollout.tokens, attention_mask=attended.long(), position_ids=position)
    with torch.no_grad():
        logits = actor(**inputs).logits[:, P - 1 : -1]
        values = critic(critic.backbone(**inputs).last_hidden_state[:, P - 1 : -1])
    mask = rollout.mask
    logprobs, entropy = ppo.token_logprobs(logits, rollout.tokens[:, P:], mask, with_entropy=True)
    scores = torch.tensor(rollout.scores)
    rewards, _ = ppo.shape_rewards(scores, logprobs, logprobs, mask, kl_coef=0.0)
    advantages, returns = ppo.gae(rewards, values, mask=mask)
    values, returns = trainer.critic.normalize(values), trainer.critic.normalize(returns)
    out = ppo.ppo_loss(
        logprobs, values, logprobs, values, advantages, returns, mask, entropy=entropy, entropy_coef=0.02
    )
    assert metrics["learn/loss"] == pytest.approx(out.loss.item(), rel=1e-4)


def test_a_learner_works_without_a_trainer():
    """The verbs work alone."""
    options = config(minibatches=1, epochs=1)
    policy, reference = build_models(options, tiny_llama(258), None, None, CPU)
    tokenizer = byte_tokenizer()
    rollout = sample_rollout(GenerateSampler(policy.actor, tokenizer), tokenizer, ROWS, options, CPU)
    optimizers = Optimizers(Optimizer(policy.actor, 1e-3, options), Optimizer(policy.critic, 1e-3, options))
    learner = Learner(policy, reference, optimizers, options)
    (stats,) = learner.update(learner.make_experience(rollout, torch.ones(4)))
    assert stats["ratio_max"] == 1.0

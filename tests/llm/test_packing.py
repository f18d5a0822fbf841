"""Packed rows equal padded ones for every family, and packed attention stays where it belongs."""

import dataclasses
import warnings

import pytest
import torch
from support import families
from support.learning import learner_of
from support.tiny import byte_tokenizer, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from ppo_fast.common.errors import UserError
from ppo_fast.kernels.linear import chunks as linear_chunks
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.experience import ExperienceMaker
from ppo_fast.llm.generate import GenerateSampler
from ppo_fast.llm.models.build import build_models
from ppo_fast.llm.models.modes import gradient_checkpointing
from ppo_fast.llm.models.policy import Policy, packed_mode
from ppo_fast.llm.models.probe import detect_head
from ppo_fast.llm.models.reference import frozen_copy
from ppo_fast.llm.packing.attention import Layout, copy_configs, packed_attention
from ppo_fast.llm.packing.pack import balance_packs, make_pack, split_minibatches
from ppo_fast.llm.packing.rollout import Rollout
from ppo_fast.llm.sample import sample_rollout
from ppo_fast.llm.sampler import SamplingParams

CPU = torch.device("cpu")
PROMPTS, ANSWERS = [3, 9, 1, 6, 2], [7, 2, 12, 1, 5]


def config(**options) -> PPOConfig:
    small = dict(prompts_per_step=5, minibatches=1, max_new_tokens=12, device="cpu", quiet=True, entropy_coef=0.01)
    return PPOConfig(**{**small, **options})


def rollout() -> Rollout:
    generator = torch.Generator().manual_seed(5)
    P, T = max(PROMPTS), max(ANSWERS)
    tokens = torch.full((len(PROMPTS), P + T), 257)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        tokens[row, P - prompt : P + answer] = torch.randint(0, 256, (prompt + answer,), generator=generator)
    return Rollout.from_lengths(tokens, PROMPTS, ANSWERS)


def policy_of(actor, options: PPOConfig) -> Policy:
    policy, _ = build_models(options, actor, None, None, CPU)
    torch.nn.init.normal_(policy.critic.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return policy


def experience_of(policy: Policy, batch: Rollout):
    """Old quantities a little beside the present ones, so that ratios and values differ from them."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(len(batch), generator=generator)
    experience = ExperienceMaker(policy, None, policy.config).make(batch, scores)
    assert len(experience.minibatches) == len(experience.minibatches[0]) == 1
    experience.logprobs += 0.1 * torch.randn(experience.logprobs.shape, generator=generator)
    return experience


def gradients(policy: Policy, batch: Rollout, experience, *, recompute: bool = False) -> dict[str, Tensor]:
    policy.zero_grad()
    with packed_mode(policy), gradient_checkpointing(policy, enabled=recompute):
        learner_of(policy, policy.config).accumulate_gradients([make_pack(batch, list(range(len(batch))))], experience)
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_gives_the_same_numbers_packed_and_one_by_one(name, tmp_path):
    """Log-probabilities, values and gradients of packs against the model's own forward on unpadded rows."""
    actor = families.load(name, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        policy = policy_of(actor, config(temperature=0.8))
    assert policy.head.linear
    assert policy.head.packed
    batch = rollout()
    with torch.no_grad(), packed_mode(policy):
        judged = policy.evaluate(make_pack(batch, [2, 0, 4, 1, 3]))
    start = batch.tokens.shape[1] - batch.completion_width
    at = 0
    for row in [2, 0, 4, 1, 3]:
        P, T = PROMPTS[row], ANSWERS[row]
        ids = batch.tokens[row : row + 1, start - P : start + T]
        with torch.no_grad():
            logp = (actor(ids).logits[0, P - 1 : -1].double() / 0.8).log_softmax(-1)
            expected = logp.gather(-1, ids[0, P:].unsqueeze(-1)).squeeze(-1)
            states = policy.critic.backbone(ids).last_hidden_state[0]
            values = policy.critic.head(states[P - 1 :]).squeeze(-1)
        torch.testing.assert_close(judged.logprobs[at : at + T].double(), expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(
            judged.entropy[at : at + T].double(), -(logp.exp() * logp).sum(-1), rtol=0, atol=2e-5
        )
        torch.testing.assert_close(judged.values[at : at + T], values[:-1], rtol=0, atol=2e-5)
        torch.testing.assert_close(judged.bootstrap_values[[2, 0, 4, 1, 3].index(row)], values[-1], rtol=0, atol=2e-5)
        at += T


@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_gets_the_same_gradients_packed_and_padded(name, tmp_path):
    """And than through its own logits, padded: the way of most PPO code."""
    policy, batch = policy_of(families.load(name, tmp_path), config()), rollout()
    experience = experience_of(policy, batch)
    ours = gradients(policy, batch, experience)
    for other in ({"packed": False}, {"packed": False, "linear": False, "softcap": None, "logit_scale": 1.0}):
        policy.head, head = dataclasses.replace(policy.head, **other), policy.head
        theirs = gradients(policy, batch, experience)
        policy.head = head
        assert ours.keys() == theirs.keys()
        for key, gradient in theirs.items():
            scale = gradient.abs().max().clamp(min=1e-6)
            assert (ours[key] - gradient).abs().max() <= 2e-4 * scale, key


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing_recomputes_and_keeps_the_gradients(name, tmp_path):
    policy, batch = policy_of(families.load(name, tmp_path), config()), rollout()
    experience = experience_of(policy, batch)
    plain = gradients(policy, batch, experience)
    calls = []
    layer = next(m for n, m in policy.actor.named_modules() if n.endswith(("mlp", "mlp.0")))
    hook = layer.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing ends before its end
    again = gradients(policy, batch, experience, recompute=True)
    hook.remove()
    assert len(calls) == 2
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert not any(module.training for module in policy.actor.modules())


def test_generation_is_the_same_after_learning_code_ran(tmp_path):
    """Custom attention in generate() would drop the padding mask without a word."""
    actor, tokenizer = families.load("llama", tmp_path), byte_tokenizer()
    options = config(gradient_checkpointing=True)
    sampler, prompts = GenerateSampler(actor, tokenizer), [[72, 105], [84] * 11, [5]]

    def sample() -> list[list[int]]:
        torch.manual_seed(3)
        return sampler.sample(prompts, SamplingParams.from_config(options)).ids

    implementation, before = actor.config._attn_implementation, sample()
    policy, batch = policy_of(actor, options), rollout()
    gradients(policy, batch, experience_of(policy, batch), recompute=True)
    assert actor.config._attn_implementation == implementation
    assert sample() == before


def test_packed_attention_of_one_model_leaves_another_of_the_same_config_alone():
    shared = LlamaConfig(**families.SHAPE)
    one, other = AutoModelForCausalLM.from_config(shared), AutoModelForCausalLM.from_config(shared)
    for model in (one, other):
        model.config = shared
        copy_configs(model)
    with packed_attention(one):
        assert other.config._attn_implementation == shared._attn_implementation != one.config._attn_implementation
        assert one.model.layers[0].self_attn.config is one.config
    assert one.config._attn_implementation == shared._attn_implementation


def test_packed_attention_rejects_inputs_for_which_it_would_be_wrong():
    model, ids = tiny_llama(), torch.arange(6).unsqueeze(0)
    arguments = Layout.from_lengths([4, 2], CPU).arguments()
    with packed_attention(model):
        mask = torch.zeros(1, 1, 6, 6)
        with pytest.raises(ValueError, match="met an attention mask"):
            model(ids, attention_mask=mask, use_cache=False, **arguments)
        with pytest.raises(ValueError, match="not told where sequences begin"):
            model(ids, use_cache=False)
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, **arguments)
        with pytest.raises(ValueError, match="met a cache"):
            model(ids, past_key_values=cache, **arguments)


def test_an_exception_switches_packed_attention_off():
    model = tiny_llama()
    before = model.config._attn_implementation
    with pytest.raises(KeyError), packed_attention(model):
        raise KeyError
    assert model.config._attn_implementation == before


def test_a_head_with_a_hidden_factor_is_not_linear(tmp_path):
    """The probe compares numbers: such a model goes through its own logits, with one warning."""
    actor = families.load("llama", tmp_path)
    forward = actor.forward
    actor.forward = lambda *args, **options: _scaled(forward(*args, **options))
    with pytest.warns(UserWarning, match="are not its LM head times its hidden states") as caught:
        head = detect_head(actor)
    assert len(caught) == 1
    assert not head.linear
    assert head.packed
    with pytest.raises(UserError, match="strict"):
        detect_head(actor, strict=True)


def _scaled(out):
    out.logits = out.logits * torch.linspace(0.5, 1.5, out.logits.shape[-1])
    return out


def test_lora_on_the_head_is_part_of_the_logits(tmp_path):
    """At the start LoRA changes no number, so comparing them is not enough."""
    peft = pytest.importorskip("peft", reason="peft is not installed (the extra ppo_fast[peft])")
    actor = peft.get_peft_model(
        families.load("llama", tmp_path), peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    )
    with pytest.warns(UserWarning, match="not a plain linear layer"):
        assert not detect_head(actor).linear


def test_a_model_that_ignores_the_layout_gets_padded_rows():
    """Bloom builds its positions from a mask: packed rows would be one long sequence to it."""
    from transformers import BloomConfig

    torch.manual_seed(0)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=258, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.warns(UserWarning, match="other hidden states on packed rows"):
        policy = policy_of(bloom, config())
    assert not policy.head.packed
    batch = rollout()
    with torch.no_grad(), packed_mode(policy):
        logprobs = policy.evaluate(make_pack(batch, [0])).logprobs
        start = batch.tokens.shape[1] - batch.completion_width
        ids = batch.tokens[:1, start - PROMPTS[0] : start + ANSWERS[0]]
        logp = bloom(ids).logits[0, PROMPTS[0] - 1 : -1].log_softmax(-1)
    expected = logp.gather(-1, ids[0, PROMPTS[0] :].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-5)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "window"), [((4, 4), None), ((8, 2), None), ((4, 2), 5)])
def test_flash_attention_on_a_gpu_equals_attention_sequence_by_sequence(dtype, heads, window):
    from ppo_fast.llm.packing import attention, flash, flash_calls

    torch.manual_seed(0)
    lengths = [7, 1, 30, 16, 129]
    layout, (H, G) = Layout.from_lengths(lengths, torch.device("cuda")), heads
    shapes = [(1, n, sum(lengths), 64) for n in (H, G, G)]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    options = dict(scaling=0.2, sliding_window=window)
    request = flash.Request(layout.cu_seqlens.device, dtype, 64, 64, grouped=H != G, window=window is not None)
    decision = flash.decide(request)
    assert decision.path != flash.BUCKETS, decision.reason
    packed_rows = (x[0].transpose(0, 1) for x in inputs)
    rows = flash_calls.Rows(*packed_rows, layout.cu_seqlens, layout.longest, scaling=0.2, window=window, softcap=None)
    out = flash.attend(decision, rows)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    exact = attention._by_buckets(*wide, layout, softcap=None, sinks=None, **options)
    upstream = torch.randn_like(exact)
    ours = torch.autograd.grad(out, inputs, upstream.to(dtype))
    theirs = torch.autograd.grad(exact, wide, upstream)
    for a, b in zip((out, *ours), (exact, *theirs), strict=True):
        assert (a.float() - b).abs().max() <= 8 * torch.finfo(dtype).eps * b.abs().max()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() // x.element_size() >= x.numel():
                self.elements = max(self.elements, x.numel())
        return out


def test_the_logits_of_a_pack_are_computed_in_chunks(monkeypatch):
    monkeypatch.setattr(linear_chunks, "CPU_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(linear_chunks, "CPU_CHUNK_ROWS", 4)
    actor, options = tiny_llama(5000, hidden=16), config()
    policy, batch = policy_of(actor, options), rollout()
    experience = experience_of(policy, batch)
    with Largest() as largest:
        gradients(policy, batch, experience)
    weight, logits = 5000 * 16, sum(ANSWERS) * 5000
    assert largest.elements <= weight < logits / 0.9


class Touched(TorchDispatchMode):
    """Products that have the vocabulary as a dimension, and how often [n, V] tensors are read or written otherwise."""

    def __init__(self, V: int) -> None:
        super().__init__()
        self.V, self.products, self.others = V, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, out) if isinstance(x, Tensor)]
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            self.products += any(self.V in x.shape for x in tensors)
        elif not func.is_view and "empty" not in str(func):
            self.others += sum(x.ndim == 2 and x.shape[1] == self.V and x.shape[0] > 1 for x in tensors)
        return out


def test_the_head_takes_three_products_and_few_passes():
    """Of a learn micro-step: h W^T, d W and d^T h. Elementwise work on whole logits is that of one chunk's row math."""
    policy, batch = policy_of(tiny_llama(5003, hidden=16), config(entropy_coef=0.0)), rollout()
    experience = experience_of(policy, batch)
    pack = make_pack(batch, list(range(len(batch))))
    counts = {}
    for linear in (True, False):
        policy.head = dataclasses.replace(policy.head, linear=linear)
        with packed_mode(policy), Touched(5003) as counts[linear]:
            learner_of(policy, policy.config).accumulate_gradients([pack], experience)
    assert counts[True].products == 3
    assert counts[True].others <= 13, "operands of the row math, on one block of rows, in cache"
    assert counts[False].others > 1.5 * counts[True].others


def test_a_frozen_copy_has_configs_of_its_own():
    actor = tiny_llama()
    assert frozen_copy(actor).config is not actor.config


@pytest.mark.parametrize("max_tokens", [1, 7, 20, 1000])
def test_packs_stay_within_the_budget_and_keep_every_sequence(max_tokens):
    lengths = [5, 9, 1, 7, 7, 3, 20, 2]
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    groups = balance_packs(order, lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == sorted(order)
    sizes = [sum(lengths[i] for i in group) for group in groups]
    assert all(size <= max_tokens or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    if max_tokens == 20:
        assert len(groups) == 3, "54 tokens need three packs, and fit in three"


def test_minibatches_have_almost_equal_numbers_of_sequences():
    batch = rollout()
    minibatches = split_minibatches(batch, [4, 2, 0, 1, 3], minibatches=2, max_tokens=12)
    assert [sum(len(p.sequences) for p in packs) for packs in minibatches] == [3, 2]
    assert sorted(i for packs in minibatches for p in packs for i in p.sequences) == [0, 1, 2, 3, 4]


def test_a_pack_has_the_tokens_of_the_rollout():
    batch = rollout()
    pack = make_pack(batch, [3, 0])
    start = batch.tokens.shape[1] - batch.completion_width
    assert pack.tokens.tolist() == [*batch.tokens[3, start : start + 1], *batch.tokens[0, start : start + 7]]
    assert pack.position_ids[0].tolist() == [*range(7), *range(10)]
    assert pack.last.tolist() == [6, 16]
    assert pack.cu_completions.tolist() == [0, 1, 8]
    per_token = torch.arange(5 * 12).view(5, 12)
    assert pack.gather(per_token).tolist() == [36, *range(7)]


def test_log_probabilities_of_the_sampler_have_the_width_of_the_completions(tmp_path):
    actor, tokenizer = families.load("llama", tmp_path), byte_tokenizer()
    batch = sample_rollout(GenerateSampler(actor, tokenizer), tokenizer, [{"prompt": "ab"}] * 4, config(), CPU)
    assert batch.logprobs is not None
    assert batch.logprobs.shape == (4, batch.completion_width)


def test_tokens_outside_the_mask_are_read_but_not_learned():
    """A completion with text of an environment: its tokens are in the pack, and have no log-probability and no loss."""
    policy, batch = policy_of(tiny_llama(258), config()), rollout()
    whole = make_pack(batch, [0, 1])
    batch.mask[0, 2:4] = False
    pack = make_pack(batch, [0, 1])
    assert torch.equal(pack.input_ids, whole.input_ids)
    assert pack.num_tokens == whole.num_tokens - 2 == int(batch.mask[:2].sum())
    assert not ((pack.rows == 0) & (pack.columns >= 2) & (pack.columns < 4)).any()
    with torch.no_grad(), packed_mode(policy):
        expected, found = policy.evaluate(whole), policy.evaluate(pack)
    full = torch.zeros(batch.mask.shape)
    whole.scatter_(full, expected.logprobs)
    torch.testing.assert_close(found.logprobs, pack.gather(full))
    experience = experience_of(policy, batch)
    assert not experience.advantages[~batch.mask].any()
    assert gradients(policy, batch, experience)

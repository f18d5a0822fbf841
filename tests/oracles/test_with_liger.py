"""A Llama with Liger's layer kernels under ppo_fast's loss: the numbers of the same Llama without them."""

import copy
from types import MethodType

import pytest
import torch
from oracles.cases import assert_equal

MISSING = "liger-kernel is not installed: pip install -c constraints.txt -r tests/oracles/peers.txt"
pytest.importorskip("liger_kernel", reason=MISSING)

import liger_kernel.ops.rms_norm as liger_rms_norm  # noqa: E402
import liger_kernel.ops.swiglu as liger_swiglu  # noqa: E402
from liger_kernel.transformers import apply_liger_kernel_to_llama  # noqa: E402
from liger_kernel.transformers.model import llama as liger_llama  # noqa: E402
from support.tiny import byte_tokenizer, tiny_llama  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import ppo_fast as ppo  # noqa: E402
from ppo_fast.examples import with_liger  # noqa: E402
from ppo_fast.llm.config import PPOConfig  # noqa: E402
from ppo_fast.llm.models.probe import detect_head  # noqa: E402
from ppo_fast.llm.trainer import PPOTrainer  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs Liger on CPU tensors")
IDS = torch.arange(14).view(2, 7) * 5 % 250


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Restore what Liger replaces in the whole process."""
    for module, name in (
        (modeling_llama, "apply_rotary_pos_emb"),  # what Liger replaces for the whole process, for one model, too
        (modeling_llama, "LlamaRMSNorm"),
        (modeling_llama, "LlamaMLP"),
        (modeling_llama.LlamaForCausalLM, "forward"),
        (torch.nn.functional, "cross_entropy"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture
def calls(monkeypatch):
    """Count what Liger computes."""
    seen = {"norm": 0, "swiglu": 0, "rope": 0, "fused cross entropy": 0}

    def counted(place, name, label):
        original = getattr(place, name)

        def count(*arguments, **options):
            seen[label] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(place, name, count)

    counted(liger_rms_norm, "rms_norm_forward", "norm")
    counted(liger_swiglu, "swiglu_forward", "swiglu")
    counted(liger_llama, "LigerForCausalLMLoss", "fused cross entropy")
    return seen


def with_liger_kernels(model, **options):
    options = {"fused_linear_cross_entropy": False, "cross_entropy": False, **options}
    apply_liger_kernel_to_llama(model=model, **options)
    return model


def gradients(model, *, critic: bool) -> list[torch.Tensor]:
    """Of all weights, from PPO's loss on hidden states, which with a shared critic two heads read."""
    hidden = model.model(input_ids=IDS, use_cache=False).last_hidden_state[:, :-1]
    tokens, old = IDS[:, 1:], torch.linspace(-6, -5, 12).view(2, 6)
    advantages = torch.linspace(-1, 1, 12).view(2, 6)
    loss = ppo.linear_ppo_loss(hidden, model.lm_head.weight, tokens, old, advantages, entropy_coef=0.1).loss
    if critic:
        values = hidden.sum(-1)
        loss = loss + ppo.value_loss(values, values.detach() + 0.1, values.detach() + 1).loss
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("critic", [False, True], ids=["own", "shared"])
def test_gradients_of_ppos_loss_match(critic, calls):
    plain, model = tiny_llama(), tiny_llama()
    expected = gradients(plain, critic=critic)
    found = gradients(with_liger_kernels(model), critic=critic)
    assert calls["norm"] == 5
    assert calls["swiglu"] == 2
    assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    for (name, _), ours, theirs in zip(model.named_parameters(), found, expected, strict=True):
        assert_equal(ours, theirs, name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_probe_accepts_a_model_whose_numbers_are_right(fused, recwarn):
    model = with_liger_kernels(tiny_llama(), fused_linear_cross_entropy=fused)
    assert isinstance(model.__dict__.get("forward"), MethodType) == fused
    head = detect_head(model, strict=True)
    assert head.linear
    assert head.packed
    assert not [w for w in recwarn if "logits" in str(w.message)]


def test_the_probe_rejects_a_forward_that_does_more():
    model = with_liger_kernels(tiny_llama(), fused_linear_cross_entropy=True)
    own = model.forward

    def scaled(*arguments, **options):
        out = own(*arguments, **options)
        out.logits = 1.01 * out.logits
        return out

    model.forward = scaled
    with pytest.warns(UserWarning, match="are not its LM head times its hidden states"):
        assert not detect_head(model).linear


def test_a_copy_computes_with_the_originals_weights():
    model = with_liger_kernels(tiny_llama())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    before, after = (m(input_ids=IDS, use_cache=False).logits for m in (model, other))
    assert_equal(after, 2 * before)


def steps(setting: dict | None, critic: str) -> list[dict[str, float]]:
    actor = tiny_llama(seed=1)
    with torch.no_grad():  # answers that depend on every layer
        for weight in actor.parameters():
            weight.mul_(4)
    if setting is not None:
        with_liger_kernels(actor, **setting)
    config = PPOConfig(
        total_steps=2,
        prompts_per_step=4,
        max_new_tokens=3,
        epochs=1,
        minibatches=2,
        lr=1e-3,
        critic_lr=1e-3,
        lr_schedule="constant",
        warmup_ratio=0.0,
        critic=critic,
        strict=True,
        quiet=True,
    )
    rows = [{"prompt": text} for text in ("ab", "c", "def", "g", "hi", "jkl", "m", "n")]

    def count_vowels(prompts, completions):
        return [float(sum(c in "aeiou" for c in text)) for text in completions]

    trainer = PPOTrainer(config, actor, byte_tokenizer(), rows, count_vowels)
    return [trainer.step() for _ in range(config.total_steps)]


@pytest.mark.parametrize(
    ("setting", "critic"),
    [({}, "own"), ({}, "shared"), ({"fused_linear_cross_entropy": True}, "own"), ({"cross_entropy": True}, "own")],
    ids=["own", "shared", "fused", "cross-entropy"],
)
def test_the_trainers_steps_match_and_avoid_ligers_cross_entropy(setting, critic, calls, monkeypatch):
    plain = steps(None, critic)
    assert not calls["norm"]

    if "cross_entropy" in setting:
        import liger_kernel.transformers.monkey_patch as place

        def refused(*_arguments, **_options):
            raise AssertionError("torch.nn.functional.cross_entropy was called")

        monkeypatch.setattr(place, "liger_cross_entropy", refused)
    found = steps(setting, critic)
    assert calls["norm"]
    assert not calls["fused cross entropy"]
    for before, after in zip(plain, found, strict=True):
        for name in before:
            if not name.startswith(("seconds", "tokens_per_second", "memory_mib", "learn_tflops", "mfu")):
                assert after[name] == pytest.approx(before[name], rel=2e-3, abs=1e-4), name


def test_ligers_default_returns_no_logits_in_a_loop_of_your_own(monkeypatch):
    """What the page warns of."""
    model = with_liger_kernels(tiny_llama(), fused_linear_cross_entropy=True).train()
    assert model(input_ids=IDS, labels=IDS, skip_logits=False, use_cache=False).logits is not None
    monkeypatch.setattr(liger_llama, "LigerForCausalLMLoss", lambda **_: torch.zeros(()))
    assert model(input_ids=IDS, labels=IDS, use_cache=False).logits is None


def test_the_example_runs(capsys):
    assert with_liger.main([]) == 1
    assert "Liger's kernels need a GPU" in capsys.readouterr().err
    config = PPOConfig(
        total_steps=1, prompts_per_step=4, max_new_tokens=3, epochs=1, minibatches=1, lr=1e-3, quiet=True
    )
    plain, liger = (with_liger.train(config, hidden=32, liger=on)[0] for on in (False, True))
    assert plain["score"] == liger["score"]
    assert liger["learn/approx_kl"] == pytest.approx(plain["learn/approx_kl"], abs=1e-5)

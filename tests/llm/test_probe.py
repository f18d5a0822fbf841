"""The probe at load: which attention a run takes, and whether its models take packed rows at all."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import families
from support import flash_attn_stand_in as stand_in
from support.tiny import byte_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

from ppo_fast.common.errors import UserError
from ppo_fast.llm.models.head import HeadInfo, decoder_of
from ppo_fast.llm.models.probe import PROBE_LENGTHS, detect_head, detect_heads
from ppo_fast.llm.packing import attention, flash
from ppo_fast.rewards.fluency import Fluency

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = [torch.float32, BF16, FP16]
TAKEN = HeadInfo(linear=True, packed=True)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    flash.reset()
    yield
    flash.reset()


@contextmanager
def messages() -> Iterator[list[str]]:
    """The warnings of this project inside this block."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(x.message) for x in caught if x.category is UserWarning]


def bloom() -> Any:
    """A model that builds its positions from a mask: packed rows are one long sequence to it."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BloomConfig(vocab_size=258, hidden_size=32, n_layer=2, n_head=4)).eval()


def deep(layers: int, hidden: int, initializer_range: float) -> Any:
    torch.manual_seed(0)
    shape = {**families.SHAPE, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": initializer_range}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()


@pytest.fixture
def one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that takes a packed row for one sequence: each attends to those before it, too."""
    by_buckets = attention._by_buckets

    def leaking(q: Tensor, k: Tensor, v: Tensor, layout: attention.Layout, **options: Any) -> Tensor:
        return by_buckets(q, k, v, attention.Layout.from_lengths([q.shape[2]], q.device), **options)

    monkeypatch.setattr(attention, "_by_buckets", leaking)


# Fast paths


@pytest.mark.parametrize("fault", ["raises after the trial", "leak after the trial"])
@pytest.mark.parametrize("precision", ["autocast", "bf16 weights", "fp16 weights"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fast_path_that_fails_in_the_model_gives_way_to_buckets(name, precision, fault, tmp_path):
    model = families.load(name, tmp_path / "model")
    model.to({"autocast": torch.float32, "bf16 weights": BF16, "fp16 weights": FP16}[precision])
    dtype = "bfloat16" if precision == "autocast" else "float32"
    with stand_in.machine(tmp_path, "2.8.3"), stand_in.fault(fault), messages() as said:
        head = detect_head(model, dtype=dtype)
        paths = {flash.decide(x).path for x in flash.requests() if x.dtype != torch.float32}
    assert head == TAKEN
    assert paths == {flash.BUCKETS}
    assert len(said) == 1
    assert "flash-attn 2.8.3 cannot be used" in said[0]


def test_a_reward_that_probes_its_own_model_brings_no_rejected_path_back(tmp_path):
    """Nor does it say that it learns."""
    actor, reward = families.load("llama", tmp_path / "actor").bfloat16(), Fluency(bloom(), byte_tokenizer())
    with stand_in.machine(tmp_path, "2.8.3"), stand_in.fault("leak after the trial"), messages() as said:
        detect_head(actor)
        (request,) = flash.requests()
        before = flash.decide(request).path
        reward(["hi"], ["you"])
        assert flash.decide(request).path == before == flash.BUCKETS
    assert len(said) == 1, said


def test_the_next_fast_path_takes_over_before_buckets_do(tmp_path):
    model = families.load("llama", tmp_path / "model")

    def raises(*args: Any, **options: Any) -> Tensor:
        if len(args[0]) == stand_in.TRIAL:
            return stand_in.flash_attn_2_6(*args, **options)
        raise RuntimeError("an illegal instruction was encountered")

    stand_in.raises = raises
    stand_in.write_package(
        tmp_path, "2.8.3", "from support.flash_attn_stand_in import raises as flash_attn_varlen_func"
    )
    with stand_in.machine(tmp_path, varlen=stand_in.torch_2_12), messages() as said:
        assert detect_head(model, dtype="bfloat16") == TAKEN
        assert {flash.decide(x).path for x in flash.requests() if x.dtype == BF16} == {"torch varlen"}
    assert len(said) == 1
    assert "an illegal instruction" in said[0]


@pytest.mark.parametrize("name", families.NAMES)
def test_a_working_fast_path_is_taken_silently_in_the_precision_of_the_run(name, tmp_path):
    model = families.load(name, tmp_path / "model")
    with stand_in.machine(tmp_path, "2.8.3") as calls, messages() as said:
        head = detect_head(model, dtype="bfloat16")
        assert {len(call["q"]) for _, call in calls} == {stand_in.TRIAL, sum(PROBE_LENGTHS)}
        assert {call["q"].dtype for _, call in calls} == {BF16}
    assert (head.linear, head.packed) == (True, True)
    assert not said


def test_a_full_precision_run_on_a_gpu_gives_no_message(tmp_path):
    with stand_in.machine(tmp_path, "2.8.3") as calls, messages() as said:
        assert detect_head(families.load("llama", tmp_path / "model")) == TAKEN
        assert not calls
    assert not said


def test_flash_attn_that_cannot_be_imported_is_announced_at_load(tmp_path):
    stand_in.write_package(tmp_path, "2.8.3", "raise ImportError('undefined symbol: _ZN3c10')")
    with stand_in.machine(tmp_path, varlen=stand_in.torch_2_12), messages() as said:
        assert detect_head(families.load("llama", tmp_path / "model"), dtype="bfloat16", strict=True) == TAKEN
    assert len(said) == 1
    assert "flash-attn 2.8.3 cannot be imported (undefined symbol: _ZN3c10)" in said[0]


def test_the_probe_uses_the_device_of_the_run_before_the_model_is_moved(tmp_path, monkeypatch):
    """Under FSDP2 models are probed on the CPU."""
    device = torch.device("cuda:1")
    monkeypatch.setattr(flash.devices, "compute_capability", lambda x: (7, 5) if x == device else None)
    with messages() as said:
        assert detect_head(families.load("llama", tmp_path), dtype="bfloat16", device=device) == TAKEN
    assert len(said) == 1
    assert "needs compute capability 8.0, and cuda:1 has 7.5" in said[0]


def test_each_run_reports_it_again(tmp_path):
    model = families.load("llama", tmp_path / "model")
    with stand_in.machine(tmp_path, capability=(7, 5)), messages() as said:
        for _ in range(2):
            detect_head(model, dtype="bfloat16")
    assert len(said) == 2


# Packed rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", families.NAMES)
def test_attention_that_leaks_between_sequences_is_found(name, dtype, one_sequence, tmp_path):
    model = families.load(name, tmp_path).to(dtype)
    with messages() as said:
        assert not detect_head(model).packed
    assert len(said) == 1
    assert "gives other hidden states on packed rows than one by one: it learns from padded rows" in said[0]
    with pytest.raises(UserError, match="strict"):
        detect_head(model, strict=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_takes_packed_rows_in_every_precision(name, dtype, tmp_path):
    model = families.load(name, tmp_path).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        head = detect_head(model)
    assert head.packed
    assert head.linear


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(96, 64, 0.2), (48, 128, 0.1), (24, 64, 0.02)])
def test_a_deep_model_takes_packed_rows(shape, dtype):
    """At 96 layers two orders of summation differ by more than 64 units in the last place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert detect_head(deep(*shape).to(dtype)) == TAKEN


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("shape", [(96, 64, 0.2), (48, 128, 0.1), (24, 64, 0.02)])
def test_a_leak_is_found_in_a_deep_model(shape, dtype, one_sequence):
    with messages() as said:
        assert not detect_head(deep(*shape).to(dtype)).packed
    assert len(said) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hidden_factor_of_the_logits_is_found_in_every_precision(dtype, tmp_path):
    actor = families.load("llama", tmp_path).to(dtype)
    forward = actor.forward

    def scaled(*args: Any, **options: Any) -> Any:
        out = forward(*args, **options)
        out.logits = out.logits * torch.linspace(0.8, 1.2, out.logits.shape[-1]).to(dtype)
        return out

    actor.forward = scaled
    with pytest.warns(UserWarning, match="are not its LM head times its hidden states"):
        assert not detect_head(actor).linear


def test_a_critic_or_reference_that_does_not_take_packed_rows_is_found(tmp_path):
    actor = families.load("llama", tmp_path)
    padded = HeadInfo(linear=True, packed=False)
    with messages() as said:
        found = detect_heads(actor, decoder_of(bloom()), None)
        assert (found.actor, found.critic) == (TAKEN, padded)
        found = detect_heads(actor, None, bloom())
        assert (found.actor, found.reference) == (TAKEN, padded)
    assert len(said) == 2
    assert "this BloomModel gives other hidden states" in said[0]
    assert "this BloomForCausalLM gives other hidden states" in said[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = detect_heads(actor, decoder_of(actor), families.load("gpt2", tmp_path))
    assert found.actor == found.critic == found.reference == TAKEN


def test_a_critic_with_another_head_size_is_announced(tmp_path):
    actor = families.load("llama", tmp_path / "model")
    critic = AutoModelForCausalLM.from_config(LlamaConfig(**{**families.SHAPE, "head_dim": 12}))
    with stand_in.machine(tmp_path, "2.8.3"), messages() as said:
        assert detect_heads(actor, decoder_of(critic), None, dtype="bfloat16").critic == TAKEN
    assert len(said) == 1
    assert "multiple of 8 up to 256, not 12" in said[0]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_exact_while_the_probe_compares_and_as_before_afterwards(precision, tmp_path):
    model, seen = families.load("llama", tmp_path), set()

    def note(*_: Any) -> None:
        seen.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        # both interfaces to the setting: PyTorch raises an error if they differ
        seen.add((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))

    hook = model.lm_head.register_forward_pre_hook(note)
    torch.set_float32_matmul_precision(precision)
    try:
        detect_head(model)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")
    finally:
        torch.set_float32_matmul_precision("highest")
        hook.remove()
    assert seen == {("ieee", "ieee"), ("highest", False)}


def test_a_precision_set_by_the_newer_interface_is_as_before_after_the_probe(tmp_path):
    model, matmul = families.load("llama", tmp_path), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        detect_head(model)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def refuse(*_: Any, **__: Any) -> Any:
    raise NotImplementedError


def test_an_error_without_a_message_is_named_by_its_type(tmp_path, monkeypatch):
    model = families.load("llama", tmp_path)
    monkeypatch.setattr(model, "forward", copy.deepcopy(model).forward)
    monkeypatch.setattr(decoder_of(model), "forward", refuse)
    with messages() as said:
        detect_head(model)
    assert "do not fit its LM head (NotImplementedError)" in said[0]


def test_an_error_of_packed_rows_without_a_message_is_named_by_its_type(tmp_path, monkeypatch):
    model = families.load("llama", tmp_path)
    monkeypatch.setattr(attention, "_by_buckets", refuse)
    with messages() as said:
        assert not detect_head(model).packed
    assert "does not take packed rows (NotImplementedError)" in said[0]


def test_an_error_in_the_model_restores_the_precision_of_products(tmp_path):
    model = families.load("llama", tmp_path)
    torch.set_float32_matmul_precision("high")
    try:
        model.forward = None
        with pytest.raises(TypeError):
            detect_head(model)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")

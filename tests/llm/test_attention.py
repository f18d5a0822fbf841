"""Packed attention takes the fastest path that works, calls it rightly, and says why it takes no faster one."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import families
from support import flash_attn_stand_in as stand_in
from support.tiny import byte_tokenizer
from torch import Tensor
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, LlamaConfig

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.packing import attention, flash
from ppo_fast.llm.packing.attention import Layout, cudnn_attention, packed_attention, repeats_heads
from ppo_fast.llm.packing.flash import Request
from ppo_fast.llm.packing.flash_calls import TRIAL_LENGTHS, trial
from ppo_fast.llm.trainer import PPOTrainer

CPU = torch.device("cpu")
LENGTHS = [7, 12, 1, 9]
BF16, FP16 = torch.bfloat16, torch.float16
VARLEN_2_11, VARLEN_2_12 = stand_in.torch_2_11, stand_in.torch_2_12


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
    found += [str(x.message) for x in caught if x.category is UserWarning and "attention" in str(x.message)]


def request(**changes: Any) -> Request:
    needs = {"device": CPU, "dtype": BF16, "head_size": 64, **changes}
    return Request(**{"value_size": needs["head_size"], **needs})


# The decision


@pytest.mark.parametrize(
    ("versions", "capability", "expected"),
    [
        (["3.0.0", "2.8.3"], (9, 0), "flash-attn 3"),
        (["3.0.0b1"], (9, 0), "flash-attn 3"),
        (["3.0.0", "2.8.3"], (8, 0), "flash-attn 2"),
        (["3.0.0", "2.8.3"], (10, 0), "flash-attn 2"),
        (["2.4.1"], (8, 6), "flash-attn 2"),
        (["2.7.0"], (9, 0), "flash-attn 2"),
        (["2.7.0"], (10, 0), "torch varlen"),  # which it was not built for
        (["2.7.4"], (12, 0), "flash-attn 2"),
        (["3.0.0"], (8, 0), "torch varlen"),
        ([], (8, 0), "torch varlen"),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_fastest_installed_path_is_taken(versions, capability, expected, dtype, tmp_path):
    with stand_in.machine(tmp_path, *versions, capability=capability, varlen=VARLEN_2_12):
        assert flash.decide(request(dtype=dtype)).path == expected
        assert flash.decide(request(dtype=dtype, grouped=True, window=True)).path == expected


@pytest.mark.parametrize(
    ("changes", "versions", "capability", "reason"),
    [
        ({"dtype": torch.float32}, ["2.8.3"], (9, 0), "needs float16 or bfloat16, not float32"),
        ({}, ["2.8.3"], (7, 5), "needs compute capability 8.0, and cpu has 7.5"),
        ({}, ["2.8.3"], None, "needs an NVIDIA GPU"),
        ({"head_size": 84}, ["2.8.3", "3.0.0"], (9, 0), "multiple of 8 up to 256, not 84"),
        ({"head_size": 264}, ["2.8.3", "3.0.0"], (9, 0), "multiple of 8 up to 256, not 264"),
        ({"head_size": 192, "value_size": 128}, ["2.8.3"], (9, 0), "not 192 for keys and 128 for values"),
        ({"sinks": True}, ["2.8.3", "3.0.0"], (9, 0), "no attention sinks"),
        ({"softcap": True}, [], (9, 0), "flash-attn is not installed; torch.nn.attention.varlen has no softcap"),
        ({"softcap": True}, ["2.5.9"], (9, 0), "a softcap needs flash-attn 2.6, and flash-attn 2.5.9 is older"),
    ],
)
def test_buckets_are_taken_for_a_reason(changes, versions, capability, reason, tmp_path):
    with stand_in.machine(tmp_path, *versions, capability=capability, varlen=VARLEN_2_12):
        decision = flash.decide(request(**changes))
    assert decision.path == flash.BUCKETS
    assert reason in decision.reason


@pytest.mark.parametrize("head_size", [8, 80, 128, 192, 256])
@pytest.mark.parametrize("version", ["2.6.3", "2.7.4", "2.8.3", "3.0.0"])
def test_a_softcap_and_head_sizes_up_to_256_are_taken(head_size, version, tmp_path):
    with stand_in.machine(tmp_path, version):
        decision = flash.decide(request(head_size=head_size, softcap=True, grouped=True))
    assert decision.path == f"flash-attn {version[0]}"
    assert version in decision.label


def test_a_cpu_run_imports_nothing(tmp_path):
    stand_in.write_package(tmp_path, "2.8.3", "raise SystemExit('imported')")
    with stand_in.machine(tmp_path, capability=None), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flash.decide_and_warn(request()).path == flash.BUCKETS


@pytest.mark.parametrize(
    "code",
    [
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS')",
        "raise OSError('libcudart.so.12: cannot open shared object file')",
        "raise RuntimeError('Tried to register an operator')",
        "",  # a folder without the function
    ],
)
@pytest.mark.parametrize("version", ["2.8.3", "3.0.0"])
def test_a_package_that_cannot_be_imported_gets_one_sentence(code, version, tmp_path):
    stand_in.write_package(tmp_path, version, code)
    with stand_in.machine(tmp_path, varlen=VARLEN_2_12), messages() as caught:
        for window in (False, True):
            assert flash.decide_and_warn(request(window=window)).path == "torch varlen"
    assert len(caught) == 1
    message = caught[0]
    assert f"{version} cannot be imported (" in message
    assert f"reinstall it for PyTorch {torch.__version__}, or remove it" in message
    assert "\n" not in message
    if "undefined symbol" in code:
        assert "undefined symbol: _ZN3c105ErrorC2ENS" in message


def test_flash_attn_4_in_the_same_folder_is_not_taken_for_2(tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "cute.py").write_text("")
    metadata = tmp_path / "flash_attn_4-4.0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0\n")
    with stand_in.machine(tmp_path, varlen=VARLEN_2_12), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flash.decide_and_warn(request()).path == "torch varlen"


# The trial


@pytest.mark.parametrize("fault", ["leak", "window", "scale", "raises", "backward"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("version", ["2.8.3", "3.0.0"])
def test_a_path_that_fails_its_trial_gives_way_with_one_message(fault, dtype, version, tmp_path):
    needs = request(dtype=dtype, window=True, grouped=True)
    with stand_in.machine(tmp_path, version), stand_in.fault(fault), messages() as caught:
        for _ in range(3):
            decision = flash.decide_and_warn(needs)
    assert decision.path == flash.BUCKETS  # PyTorch's own fails on the CPU, too
    assert len(caught) == 1
    expected = {"raises": "no kernel image", "backward": "does not support backward"}.get(
        fault, "wrong numbers: output"
    )
    assert expected in caught[0]
    assert "for head size 64 in " in caught[0]


def test_pytorch_takes_over_when_flash_attn_fails_its_trial(tmp_path):
    def broken(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    stand_in.broken = broken
    stand_in.write_package(
        tmp_path, "2.8.3", "from support.flash_attn_stand_in import broken as flash_attn_varlen_func"
    )
    with stand_in.machine(tmp_path, varlen=VARLEN_2_12), messages() as caught:
        assert flash.decide_and_warn(request()).path == "torch varlen"
    assert len(caught) == 1
    assert "attention runs through torch.nn.attention.varlen" in caught[0]


def test_flash_attn_3_is_not_taken_where_its_backward_is_not_deterministic(tmp_path):
    with stand_in.machine(tmp_path, "3.0.0", "2.8.3"):
        assert flash.decide(request(head_size=256)).path == "flash-attn 3"
        torch.use_deterministic_algorithms(True)
        try:
            assert flash.decide(request(head_size=256)).path == "flash-attn 2"
            assert flash.decide(request(head_size=128)).path == "flash-attn 3"
            assert stand_in.CALLS[-1][1]["deterministic"] is True
        finally:
            torch.use_deterministic_algorithms(False)


def test_a_trial_changes_no_random_state_and_ignores_the_state_of_its_caller(tmp_path):
    before = torch.get_rng_state()
    with stand_in.machine(tmp_path, "2.8.3"), torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        assert flash.decide(request()).path == "flash-attn 2"
    assert torch.equal(before, torch.get_rng_state())


def test_a_trial_inside_gradient_checkpointing_saves_nothing_there(tmp_path):
    """Recomputing would find fewer saved tensors than there were, since a trial runs once."""
    x = torch.randn(3, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        flash.decide(request())
        return (x * x).sum()

    with stand_in.machine(tmp_path, "2.8.3"):
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).backward()
        assert len(stand_in.CALLS) == 1
    torch.testing.assert_close(x.grad, 2 * x)


# Signatures


def test_the_stand_in_has_the_signature_of_the_installed_pytorch():
    newer = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 12)
    assert list(inspect.signature(varlen.varlen_attn).parameters) == list(
        inspect.signature(VARLEN_2_12 if newer else VARLEN_2_11).parameters
    )


def test_the_stand_in_has_the_signature_of_the_installed_flash_attn():
    flash_attn = pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    assert list(inspect.signature(flash_attn.flash_attn_varlen_func).parameters) == list(
        inspect.signature(stand_in.flash_attn_2_6).parameters
    )


# Model families

IMPLEMENTATIONS = {
    "flash-attn 2.7": ("2.7.4", None),
    "flash-attn 2.8": ("2.8.3", None),
    "flash-attn 3": ("3.0.0", None),
    "torch 2.11": (None, VARLEN_2_11),
    "torch 2.12": (None, VARLEN_2_12),
}
PRECISIONS = {"autocast": BF16, "bf16 weights": BF16, "fp16 weights": FP16}


def in_precision(model: Any, precision: str) -> Any:
    return model if precision == "autocast" else model.to(PRECISIONS[precision])


def packed_logits(model: Any, precision: str = "own") -> Tensor:
    ids = ((torch.arange(sum(LENGTHS)) * 7919 + 1) % families.VOCABULARY).unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    autocast = torch.autocast("cpu", dtype=BF16) if precision == "autocast" else nullcontext()
    with packed_attention(model), autocast:
        layout = Layout.from_lengths(LENGTHS, CPU).arguments()
        return model(input_ids=ids, position_ids=positions, use_cache=False, **layout).logits[0].float()


def expected_window(model: Any, layer: int) -> int | None:
    """The family's own: every second layer of Gemma 2, the second of this Qwen 2."""
    kinds = getattr(model.config, "layer_types", None)
    return model.config.sliding_window if kinds and kinds[layer] == "sliding_attention" else None


def check_call(model: Any, layer: int, name: str, call: dict[str, Any], dtype: torch.dtype) -> None:
    """Every argument of one layer's call."""
    config, (q, k, v, cu_q, cu_k, max_q, max_k) = model.config, list(call.values())[:7]
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    repeated = heads if name == "torch_2_11" else groups
    assert (q.shape, k.shape, v.shape) == ((29, heads, size), (29, repeated, size), (29, repeated, size))
    assert {q.dtype, k.dtype, v.dtype} == {dtype}
    assert cu_q.tolist() == cu_k.tolist() == [0, 7, 19, 20, 29]
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (type(max_q), max_q, type(max_k), max_k) == (int, 12, int, 12)
    window = expected_window(model, layer)
    scale = getattr(config, "attention_multiplier", None) or size**-0.5
    if name.startswith("torch"):
        assert call["window_size"] == (-1 if window is None else window - 1, 0)
        assert call["scale"] == pytest.approx(scale)
        assert name == "torch_2_11" or call["enable_gqa"] == (heads != groups)
        return
    assert call["window_size"] == ((-1, -1) if window is None else (window - 1, 0))
    assert call["softmax_scale"] == pytest.approx(scale)
    assert call["causal"] is True
    assert call["deterministic"] is False
    assert call["softcap"] == (getattr(config, "attn_logit_softcapping", None) or 0.0)
    assert call.get("dropout_p", 0.0) == 0.0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_calls_the_right_function_with_the_right_arguments(name, precision, implementation, tmp_path):
    """And its logits are as near to fp32 as those of buckets: at most twice the error, plus two units of rounding."""
    version, function = IMPLEMENTATIONS[implementation]
    model = in_precision(families.load(name, tmp_path / "model"), precision)
    exact = families.load(name, tmp_path / "model").load_state_dict  # a second model with the same rounded weights
    truth_model = exact.__self__
    exact({key: x.float() for key, x in model.state_dict().items()})
    falls_back = name == "gemma2" and function is not None  # PyTorch's has no softcap
    with torch.no_grad():
        truth, buckets = packed_logits(truth_model), packed_logits(model, precision)
        with stand_in.machine(tmp_path, *([version] if version else []), varlen=function) as calls:
            with pytest.warns(UserWarning, match="has no softcap") if falls_back else nullcontext():
                logits = packed_logits(model, precision)
            rows = [(called, call) for called, call in calls if len(next(iter(call.values()))) == sum(LENGTHS)]
    if falls_back:
        assert not rows
        assert torch.equal(logits, buckets)
        return
    assert {called for called, _ in rows} == {(stand_in.FUNCTIONS[version] if version else function.__name__)}
    assert len(rows) == model.config.num_hidden_layers
    for layer, (called, call) in enumerate(rows):
        check_call(model, layer, called, call, PRECISIONS[precision])
    rounding = 2 * torch.finfo(PRECISIONS[precision]).eps * truth.abs().max()
    assert (logits - truth).abs().max() <= 2 * (buckets - truth).abs().max() + rounding


@pytest.mark.parametrize("implementation", ["flash-attn 2.8", "flash-attn 3", "torch 2.11", "torch 2.12"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_gradients_through_a_fast_path_are_as_near_to_fp32_as_those_through_buckets(
    name, precision, implementation, tmp_path
):
    version, function = IMPLEMENTATIONS[implementation]
    model = in_precision(families.load(name, tmp_path / "model"), precision)
    truth_model = families.load(name, tmp_path / "model")
    truth_model.load_state_dict({key: x.float() for key, x in model.state_dict().items()})

    def gradients(which: Any, precision: str) -> Tensor:
        which.zero_grad()
        logits = packed_logits(which, precision)
        logits.log_softmax(-1)[:, 5].sum().backward()
        attention = (p.grad.float().flatten() for n, p in which.named_parameters() if "attn" in n)
        return torch.cat(list(attention))

    truth, buckets = gradients(truth_model, "own"), gradients(model, precision)
    with stand_in.machine(tmp_path, *([version] if version else []), varlen=function) as calls:
        fast = gradients(model, precision)
        assert calls
    assert fast.norm() > 0
    assert (fast - truth).norm() <= 2 * (buckets - truth).norm()


@pytest.mark.parametrize("case", ["head size 84", "head size 264", "capability 7.5", "softcap", "sinks"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_that_no_fast_path_takes_is_reported_once(case, precision, tmp_path):
    shape = {**families.SHAPE, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    shape["head_dim"] = int(case.split()[-1]) if case.startswith("head size") else 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()
    if case == "softcap":
        model = families.load("gemma2", tmp_path / "model")
    if case == "sinks":
        model = gpt_oss()
    model = in_precision(model, precision)
    capability = (7, 5) if case == "capability 7.5" else (9, 0)
    versions = [] if case == "softcap" else ["2.8.3"]
    reason = {"capability 7.5": "and cpu has 7.5", "softcap": "has no softcap", "sinks": "no attention sinks"}
    with stand_in.machine(tmp_path, *versions, capability=capability, varlen=VARLEN_2_12) as calls, torch.no_grad():
        with messages() as caught:
            packed_logits(model, precision)
            packed_logits(model, precision)
        assert not [x for x in calls if len(x[1].get("q", x[1].get("query"))) != sum(TRIAL_LENGTHS)]
    assert len(caught) == 1
    assert "attention runs through PyTorch's SDPA by buckets" in caught[0]
    assert reason.get(case, f"not {shape['head_dim']}") in caught[0]


def gpt_oss() -> Any:
    from transformers import GptOssConfig

    torch.manual_seed(0)
    shape = {**families.SHAPE, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    return AutoModelForCausalLM.from_config(GptOssConfig(**shape), attn_implementation="eager").eval()


def test_a_full_precision_model_gives_no_message(tmp_path):
    model = families.load("llama", tmp_path / "model")
    with stand_in.machine(tmp_path, "2.8.3") as calls, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        packed_logits(model)
        assert not calls


def test_strided_queries_and_a_window_that_covers_all_are_passed_on_cheaply(tmp_path):
    """Only the last dimension must be dense; a window of the longest sequence or more is none."""
    from transformers import MistralConfig

    torch.manual_seed(0)
    shape = {**families.SHAPE, "sliding_window": 12}
    model = AutoModelForCausalLM.from_config(MistralConfig(**shape)).to(BF16).eval()
    with stand_in.machine(tmp_path, "2.8.3") as calls, torch.no_grad():
        packed_logits(model)
        assert [call["window_size"] for _, call in calls if len(call["q"]) == 29] == [(-1, -1)] * 2
        model.config.sliding_window = 11
        for layer in model.model.layers:
            layer.self_attn.sliding_window = 11
        packed_logits(model)
        assert [call["window_size"] for _, call in calls if len(call["q"]) == 29][2:] == [(10, 0)] * 2
    x = torch.randn(4, 2, 8).transpose(0, 1)
    assert flash.CALLS["flash-attn 2"].__globals__["_dense"](x) is x


# SDPA


def tensor(heads: int, size: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.empty(1, heads, 4, size, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("dtype", "size", "value_size", "masked", "capability", "expected"),
    [
        (BF16, 128, 128, False, (8, 0), False),  # the flash kernel takes it
        (FP16, 128, 128, False, (9, 0), False),
        (torch.float32, 128, 128, False, (9, 0), True),
        (BF16, 128, 128, True, (9, 0), True),
        (BF16, 264, 264, False, (9, 0), True),
        (BF16, 192, 128, False, (9, 0), True),
        (FP16, 64, 64, False, (7, 5), True),
        (BF16, 128, 128, False, None, False),  # a GPU of another maker
        (torch.float32, 128, 128, False, None, True),
    ],
)
def test_keys_and_values_are_repeated_where_no_fused_kernel_takes_groups(
    dtype, size, value_size, masked, capability, expected, monkeypatch
):
    monkeypatch.setattr(attention.devices, "compute_capability", lambda device: capability)
    q, v = tensor(4, size, dtype, "meta"), tensor(4, value_size, dtype, "meta")
    assert repeats_heads(q, v, masked=masked) == expected
    assert not repeats_heads(tensor(4, size, dtype), tensor(4, value_size, dtype), masked=masked)  # on a CPU


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("repeats", [True, False])
def test_repeated_heads_give_the_numbers_of_grouped_ones(window, repeats, monkeypatch):
    seen = []
    sdpa = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((k.shape[1], options["enable_gqa"]))
        return sdpa(q, k, v, **options)

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (4, 2, 2))
    options = {"scaling": 0.3, "sliding_window": window, "softcap": None, "sinks": None}
    expected = attention._causal(q, k, v, **options)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    monkeypatch.setattr(attention, "repeats_heads", lambda *args, **kinds: repeats)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    out = attention._causal(q, k, v, **options)
    assert seen == [(4, False)] if repeats else [(2, True)]
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_cudnn_is_left_out_of_packed_attention_unless_asked_for(tmp_path):
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    model = families.load("llama", tmp_path)
    assert enabled()
    with packed_attention(model):
        assert not enabled()
    assert enabled()
    with packed_attention(model, cudnn=True):
        assert enabled()
    with pytest.raises(KeyError), packed_attention(model):
        raise KeyError
    assert enabled()


def test_cudnn_stays_off_where_the_user_has_switched_it_off():
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with cudnn_attention(enabled=True):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


# Score matrices


@pytest.mark.parametrize("feature", ["a softcap", "attention sinks"])
def test_score_matrices_above_the_limit_are_announced_once_with_their_size(feature, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_LIMIT_BYTES", 4 * (2 * 4 * 16 * 16) - 1)  # of fp32 [2, 4, 16, 16]
    options = {"scaling": 0.3, "sliding_window": None, "softcap": None, "sinks": None}
    options |= {"softcap": 2.0} if feature == "a softcap" else {"sinks": torch.zeros(4)}
    q, k, v = (torch.randn(2, heads, 16, 8) for heads in (4, 2, 2))
    with messages() as caught:
        for _ in range(2):
            attention._causal(q, k, v, **options)
        attention._causal(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)), **options)
    assert len(caught) == 1
    message = caught[0]
    assert feature in message
    assert "2 sequences of 16 tokens, 4 heads" in message
    assert "0.0 GiB" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash.reset()
        attention._causal(q[:1], k[:1], v[:1], **options)  # half of it is below the limit


def test_the_size_of_score_matrices_is_that_of_the_softmax(monkeypatch):
    said = []
    monkeypatch.setattr(flash, "warn_once", lambda message, key=None: said.append(message))
    attention._warn_of_scores(torch.empty(2, 8, 4096, 256, device="meta"), "a softcap")
    assert "1.0 GiB" in said[0]  # 2 * 8 * 4096^2 * 4 bytes
    assert "flash-attn 2.6" in said[0]
    attention._warn_of_scores(torch.empty(1, 8, 2048, 256, device="meta"), "a softcap")
    assert len(said) == 1


# A run


@pytest.mark.parametrize(
    ("name", "version", "checkpointing"),
    [
        ("llama", "2.8.3", False),
        ("llama", "2.8.3", True),
        ("llama", "3.0.0", False),
        ("llama", None, True),
        ("gpt2", None, False),
        ("gemma2", "2.8.3", True),
        ("gemma2", None, False),
    ],
)
def test_a_step_in_bf16_runs_through_the_fast_path_and_learns_the_same(name, version, checkpointing, tmp_path):
    """The first ratio is exactly 1, and other metrics are those of buckets within bf16."""

    def step() -> dict[str, float]:
        options = dict(prompts_per_step=4, minibatches=1, epochs=1, max_new_tokens=6, micro_batch_tokens=24)
        quiet = dict(dtype="bfloat16", device="cpu", quiet=True, total_steps=1)
        config = PPOConfig(**options, **quiet, gradient_checkpointing=checkpointing)
        actor = families.load(name, tmp_path / "model")
        rows = [{"prompt": text} for text in ("a", "what time is it", "no", "the fox")]
        rewards = {"length": lambda prompts, completions: [float(len(x)) for x in completions]}
        return PPOTrainer(config, actor, byte_tokenizer(), rows, rewards).train()[0]

    slow = step()
    falls_back = name == "gemma2" and version is None
    with stand_in.machine(tmp_path, *([version] if version else []), varlen=VARLEN_2_12) as calls, messages() as said:
        fast = step()
        packed = [call for _, call in calls if len(next(iter(call.values()))) != sum(TRIAL_LENGTHS)]
    assert bool(packed) != falls_back
    assert len(said) == falls_back
    assert fast["learn/approx_kl"] == fast["learn/clip_fraction"] == 0
    assert fast["score"] == slow["score"]  # sampling does not change
    for key in ("learn/policy_loss", "learn/value_loss", "entropy", "kl", "return"):
        assert fast[key] == pytest.approx(slow[key], rel=0.05, abs=0.02), key


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("path", list(flash.CALLS))
def test_every_installed_path_passes_its_trial_on_this_gpu(path, head_size, grouped, window, softcap, dtype):
    needs = request(
        device=torch.device("cuda:0"), dtype=dtype, head_size=head_size, grouped=grouped, window=window, softcap=softcap
    )
    if path == "flash-attn 3" and torch.cuda.get_device_capability(0) != (9, 0):
        pytest.skip("flash-attn 3 needs compute capability 9.0")
    package = flash._PACKAGES[path]()
    reason = flash._why_not(path, package, needs)
    if reason is not None:
        pytest.skip(reason)
    assert trial(path, package.function, needs) is None

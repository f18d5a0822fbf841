"""token_logprobs of both backends over generated shapes, strides, masks and values, against fp64."""

import math

import pytest
import torch
from support.backends import BACKENDS
from support.logprob_cases import check, make
from torch import Tensor

hypothesis = pytest.importorskip("hypothesis")  # a GPU machine may have pytest and nothing more

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, about lanes that are not stored
]
INF = math.inf


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, float]:
    B, T = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    V = draw(st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 4097])))
    logits, tokens = make((B, T, V), torch.device("cpu"), scale=draw(st.sampled_from([0.0, 1.0, 30.0, 3000.0])))
    logits = logits + draw(st.sampled_from([-1e4, 0.0, 1e3]))
    if V > 1 and draw(st.booleans()):
        holes = torch.rand(B, T, V, generator=torch.Generator().manual_seed(V)) < draw(st.sampled_from([0.1, 0.9]))
        logits = logits.masked_fill(holes.scatter(-1, tokens.unsqueeze(-1), False), -INF)
    if draw(st.booleans()):
        logits, tokens = logits.transpose(0, 1), tokens.transpose(0, 1)
    if draw(st.booleans()):
        logits, tokens = logits[1:], tokens[1:]
    if draw(st.booleans()):
        logits = logits.half()
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(T)) < 0.6 if draw(st.booleans()) else None
    return logits, tokens, mask, draw(st.sampled_from([0.3, 1.0, 4.0]))


@pytest.mark.parametrize("backend", list(BACKENDS))
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_every_mix_of_shape_stride_mask_and_value_is_as_exact_as_eager(backend, device, problem):
    logits, tokens, mask, temperature = problem
    mask = None if mask is None else mask.to(device)
    check(BACKENDS[backend].token_logprobs, logits.to(device), tokens.to(device), mask, temperature=temperature)

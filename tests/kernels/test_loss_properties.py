"""The losses with random combinations of options, on both backends."""

import itertools
from typing import Any

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")  # a GPU machine may have pytest and nothing more

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from support.loss_cases import AGGREGATIONS, OPTIONAL, check, make, make_mask, norm_length  # noqa: E402
from support.loss_cases import backend as backend_fixture  # noqa: E402
from torch import Tensor  # noqa: E402

from ppo_fast.kernels import reference  # noqa: E402

backend = backend_fixture
pytestmark = pytest.mark.usefixtures("nan_empty")


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict, Tensor | None, str, dict]:
    kind = draw(st.sampled_from(["ppo", "policy", "value"]))
    options: dict[str, Any] = {"aggregation": draw(st.sampled_from(AGGREGATIONS))}
    lengths = draw(st.none() | st.lists(st.integers(0, 9), max_size=4))
    cu_seqlens = None
    if lengths is None:
        shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=3)))
    else:
        shape, cu_seqlens = (sum(lengths),), torch.tensor([0, *itertools.accumulate(lengths)])
    seed = draw(st.integers(0, 2**20))
    x, mask = make(shape, torch.device("cpu"), seed), make_mask(shape, torch.device("cpu"), seed + 1)
    x = {name: t for name, t in x.items() if name not in OPTIONAL or draw(st.booleans())}
    options |= {"cu_seqlens": cu_seqlens}
    if cu_seqlens is not None or draw(st.booleans()):
        options |= norm_length(options["aggregation"], draw(st.floats(1, 20)))
    if options["aggregation"] != "token-sum":
        options["denominator"] = draw(st.none() | st.floats(1, 50))
    clip = st.none() | st.floats(0.05, 2)
    if kind == "value":
        options["clip"] = draw(clip)
    if kind == "ppo":
        options |= {"value_clip": draw(clip), "value_coef": draw(st.floats(0, 2))}
        options["value_mask"] = draw(st.sampled_from([None, ~mask]))
    if kind != "value":
        options |= {"clip_low": draw(st.floats(0, 1)), "clip_high": draw(st.floats(0, 1))}
        options |= {"dual_clip": draw(st.none() | st.floats(1.1, 4)), "log_ratio_clamp": draw(st.floats(0.1, 20))}
        options["kl_coef"] = draw(st.floats(-1, 1)) if "ref_logprobs" in x else 0.0
        options["kl_estimator"] = draw(st.sampled_from(reference.KL_ESTIMATORS))
        options["entropy_coef"] = draw(st.floats(-1, 1)) if "entropy" in x else 0.0
    return x, draw(st.sampled_from([None, mask])), kind, options


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_every_combination_of_options_matches_the_reference(backend, device, problem):
    x, mask, kind, options = problem
    move = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    x = {name: t.to(device) for name, t in x.items()}
    check(backend, x, None if mask is None else mask.to(device), kind=kind, **move)

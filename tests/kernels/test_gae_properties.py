"""gae on random shapes and flags, on both backends."""

import pytest

hypothesis = pytest.importorskip("hypothesis")  # a GPU machine may have pytest and nothing more

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from support.gae_cases import backend as backend_fixture  # noqa: E402
from support.gae_cases import check, everything  # noqa: E402

backend = backend_fixture
pytestmark = pytest.mark.usefixtures("nan_empty")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 4),
    T=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    left_out=st.sets(st.sampled_from(["mask", "terminated", "truncated", "bootstrap"])),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
    time_major=st.booleans(),
)
def test_every_mix_of_shape_and_flags_matches_the_reference(backend, rows, T, seed, left_out, gamma, time_major):
    options = everything((T, rows) if time_major else (rows, T), rows, seed)
    if "mask" in left_out:
        options |= {name: x.nan_to_num(0.3) for name, x in options.items() if x.is_floating_point()}
    if "truncated" in left_out:
        del options["final_values"]
    check(backend, **{k: x for k, x in options.items() if k not in left_out}, gamma=gamma, time_major=time_major)

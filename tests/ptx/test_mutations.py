"""Faults put into a compiled kernel of this project are detected."""

import pytest
import torch
from ptx.mutations import outcomes


@pytest.fixture(autouse=True)
def emulator_of_the_session(emulator):
    if emulator is None:
        pytest.skip("needs the PTX interpreter: there is a GPU, or TRITON_INTERPRET=1 is set")


def test_every_removed_barrier_is_detected():
    """Two rows of two whole blocks and a tail, so that every loop runs."""
    inputs = {"logits": torch.randn(1, 2, 8200, dtype=torch.float64), "tokens": torch.tensor([[7, 8199]])}
    inputs["mask"] = torch.tensor([[True, True]])
    found = list(outcomes("token_logprobs", ("barrier",), inputs))
    assert len(found) >= 8
    assert {outcome.result for outcome in found} == {"detected"}


@pytest.mark.parametrize("kind", ["mask", "element", "program"])
def test_a_dropped_mask_a_short_buffer_or_a_shared_row_is_detected_or_harmless(kind):
    found = list(outcomes("gae", (kind,)))
    assert "detected" in {outcome.result for outcome in found}
    assert "wrong results" not in {outcome.result for outcome in found}

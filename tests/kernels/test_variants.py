"""Every variant of every kernel: the launchers list exactly what launches ask for, and each one runs compiled."""

import pytest
import torch
from support import random_calls

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only")
if torch.cuda.is_available():
    pytest.skip(
        "captures launches of CPU tensors; on a GPU the other tests launch these kernels", allow_module_level=True
    )

from support import variants

LISTED = variants.listed()


@pytest.fixture(scope="module")
def captured():
    return variants.captured()


def test_random_calls_launch_listed_variants_only(captured):
    unknown = [variants.name(found.launch) for key, found in captured.items() if key not in LISTED]
    assert not unknown, f"{len(unknown)} of {len(captured)} variants are not listed: {unknown[:5]}"


def test_random_calls_launch_every_listed_variant(captured):
    missing = [variant.name for key, variant in LISTED.items() if key not in captured]
    assert not missing, f"{len(missing)} of {len(LISTED)} listed variants are never launched: {missing[:5]}"


def test_no_launch_depends_on_values_or_alignments(captured):
    """Liger #146, fla #669: a kernel that is compiled anew for other lengths, or for the integer 1."""
    assert {found.launch.attributes for found in captured.values()} == {()}


def test_names_of_variants_differ():
    names = [variant.name for variant in LISTED.values()]
    assert len(set(names)) == len(names)


def close(actual: torch.Tensor, expected: torch.Tensor, rounding: float) -> None:
    """A few roundings of the least precise dtype of the call. Other tests compare errors with fp64."""
    scale = max(1.0, expected.double().nan_to_num().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding * scale, equal_nan=True)


def rounding_of(launch: variants.Launch) -> float:
    kinds = {kind for _, kind in launch.types}
    return 2.0**-6 if "*bf16" in kinds else 2.0**-9 if "*fp16" in kinds else 1e-4


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("key", LISTED, ids=lambda key: LISTED[key].name)
def test_a_compiled_variant_matches_the_torch_backend(captured, emulator, key):
    """The call that launches it, run in the PTX interpreter, which reports races, bounds and unwritten memory."""
    _, call = random_calls.make_call(captured[key].call)
    before = emulator.launches.copy()
    actual, expected = call("triton"), call("torch")
    started = [launch for launch, count in emulator.launches.items() if count > before[launch]]
    assert captured[key].launch in started
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, max(map(rounding_of, started)))

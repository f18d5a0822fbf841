"""How many matrix operations a device can do in a second: published for NVIDIA GPUs, measured once on a CPU."""

import functools
import re
import time
from typing import NamedTuple

import torch

from ppo_fast.common.device import compute_capability, device_module


class Rates(NamedTuple):
    """Dense peak rates of a GPU in TFLOP/s, without sparsity, with fp32 accumulation; None: it has no such units."""

    half: float  # bf16 and fp16
    tf32: float | None
    fp32: float


# By the whole name that PyTorch gives, without NVIDIA, Tesla and GeForce in front. From NVIDIA's data sheets and
# architecture white papers, which give most rates of tensor cores with sparsity: half of them are here.
PUBLISHED: dict[str, Rates] = {
    r"G?B200": Rates(2250.0, 1125.0, 75.0),
    r"H200|GH200.*|H[18]00 (80GB HBM3|SXM).*": Rates(989.4, 494.7, 66.9),
    r"H[12]00 NVL": Rates(835.5, 417.7, 60.0),
    r"H100 PCIe": Rates(756.0, 378.0, 51.0),
    r"A[18]00.*": Rates(312.0, 156.0, 19.5),
    r"A40": Rates(149.7, 74.8, 37.4),
    r"A30": Rates(165.0, 82.0, 10.3),
    r"A10": Rates(125.0, 62.5, 31.2),
    r"A10G": Rates(70.0, 35.0, 31.5),
    r"L40S": Rates(362.0, 183.0, 91.6),
    r"L40": Rates(181.0, 90.5, 90.5),
    r"L4": Rates(121.0, 60.0, 30.3),
    r"T4": Rates(65.0, None, 8.1),
    r"V100-SXM2.*": Rates(125.0, None, 15.7),
    r"V100-PCIE.*": Rates(112.0, None, 14.0),
    r"RTX 6000 Ada Generation": Rates(364.2, 182.1, 91.1),
    r"RTX A6000": Rates(154.8, 77.4, 38.7),
    r"RTX 5090": Rates(209.5, 104.8, 104.8),
    r"RTX 4090": Rates(165.2, 82.6, 82.6),
    r"RTX 3090": Rates(71.0, 35.6, 35.6),
}

PROBE = (128, 256, 256)
SIZE, LEAST_SECONDS = 1024, 0.05  # of a product of SIZE^3, measured only where it takes no longer than that


def published_rate(name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Return the published FLOP/s of a GPU by its name; None for an unknown one, or a part of one (MIG).

    >>> published_rate("NVIDIA H100 80GB HBM3", torch.bfloat16)
    989400000000000.0
    >>> published_rate("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16)
    """
    name = re.sub(r"^(NVIDIA|Tesla|GeForce| )+", "", name)
    rates = next((rates for known, rates in PUBLISHED.items() if re.fullmatch(known, name)), None)
    if rates is None or " MIG " in name:
        return None
    if dtype in (torch.bfloat16, torch.float16):
        return 1e12 * rates.half
    return 1e12 * (rates.tf32 if tf32 and rates.tf32 is not None else rates.fp32)


@functools.cache
def measured_rate(dtype: torch.dtype, threads: int) -> float:
    """Measure once the FLOP/s of a matrix product in `dtype` on this CPU, with the present number of threads.

    It takes a fraction of a second: a CPU without instructions for `dtype` is measured by a small product.
    """
    shapes = [PROBE, (SIZE, SIZE, SIZE)]
    rate = 0.0
    for m, n, k in shapes:
        flops = 2 * m * n * k
        if rate and flops / rate > 10 * LEAST_SECONDS:
            break
        a, b = torch.ones(m, k, dtype=dtype, device="cpu"), torch.ones(k, n, dtype=dtype, device="cpu")
        torch.mm(a, b)
        spent = 0.0
        while spent < LEAST_SECONDS:
            start = time.perf_counter()
            torch.mm(a, b)
            passed = time.perf_counter() - start
            rate, spent = max(rate, flops / passed), spent + passed
    return rate


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the FLOP/s of matrix products in `dtype` that the device reaches at most; None where that is unknown."""
    if device.type == "cpu":
        return measured_rate(dtype, torch.get_num_threads())
    if compute_capability(device) is None:
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return published_rate(device_module(device).get_device_properties(device).name, dtype, tf32=tf32)

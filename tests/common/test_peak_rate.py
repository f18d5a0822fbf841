"""Peak rates: the published ones by a GPU's name, and the measured one of a CPU."""

import time

import pytest
import torch

from ppo_fast.common import peak_rate
from ppo_fast.common.peak_rate import measured_rate, published_rate

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "half", "tf32", "fp32"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA H200", 989.4, 494.7, 66.9),
        ("NVIDIA B200", 2250, 1125, 75),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA L40", 181, 90.5, 90.5),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA A10G", 70, 35, 31.5),
        ("Tesla T4", 65, 8.1, 8.1),  # no TF32
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("NVIDIA RTX A6000", 154.8, 77.4, 38.7),
    ],
)
def test_a_gpu_has_the_rates_of_its_data_sheet(name, half, tf32, fp32):
    assert published_rate(name, BF16) == published_rate(name, torch.float16) == pytest.approx(half * 1e12)
    assert published_rate(name, FP32, tf32=True) == pytest.approx(tf32 * 1e12)
    assert published_rate(name, FP32) == pytest.approx(fp32 * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_an_unknown_gpu_and_a_part_of_one_have_no_rate(name):
    assert published_rate(name, BF16) is None


def test_each_name_of_the_table_is_found_once():
    for name in (
        "H200",
        "GH200 480GB",
        "H100 NVL",
        "H200 NVL",
        "H800 SXM5",
        "A800-SXM4-80GB",
        "V100-SXM2-16GB",
        "GB200",
    ):
        matches = [known for known in peak_rate.PUBLISHED if peak_rate.re.fullmatch(known, name)]
        assert len(matches) == 1, name


def test_the_rate_of_a_cpu_is_measured_once_and_bounds_a_product_of_its_own():
    start = time.perf_counter()
    rate = measured_rate(FP32, torch.get_num_threads())
    assert time.perf_counter() - start < 10
    assert peak_rate.peak_rate(torch.device("cpu"), FP32) is rate, "the second call is cached"
    a = torch.ones(512, 512)
    torch.mm(a, a)
    start = time.perf_counter()
    torch.mm(a, a)
    assert 2 * 512**3 / (time.perf_counter() - start) < 3 * rate


def test_a_slow_dtype_is_measured_by_the_small_product_alone(monkeypatch):
    """A CPU without instructions for bf16 would take seconds for the large one."""
    shapes = []

    def slow(a: torch.Tensor, b: torch.Tensor) -> None:
        shapes.append(tuple(a.shape))
        time.sleep(0.06)

    monkeypatch.setattr(peak_rate.torch, "mm", slow)
    rate = measured_rate.__wrapped__(BF16, 1)
    assert set(shapes) == {(128, 256)}
    assert rate == pytest.approx(2 * 128 * 256 * 256 / 0.06, rel=0.3)

"""Rows of a record: their providers, groups, and the format of their numbers."""

import re
import statistics
from typing import Any

OURS = "ppo_fast"
CEILINGS = ("three GEMMs", "one GEMM")  # parts of the work, for comparison

Row = dict[str, Any]
Groups = dict[str, list[Row]]  # shape and dtype -> rows


def groups_of(rows: list[Row]) -> dict[str, Groups]:
    """operation -> shape and dtype -> rows, in the order of the records."""
    found: dict[str, Groups] = {}
    for row in rows:
        shape = f"{row['shape']}, {row['dtype']}"
        found.setdefault(row["operation"], {}).setdefault(shape, []).append(row)
    return found


def is_ours(row: Row) -> bool:
    """ppo_fast, or ppo_fast with something switched off."""
    return row["provider"].startswith(OURS)


def is_rival(row: Row) -> bool:
    return not is_ours(row) and row["provider"] not in CEILINGS


def has_floor(row: Row) -> bool:
    """Records of before 21 Nov 2026 have no rate of a matrix product, so no floor where FLOPs are the limit."""
    return "floor_ms" in row and ("gemm" in row or not row["flops"])


def floor_ms(rows: list[Row]) -> float:
    """The least time that the rows' task takes. A ceiling is a part of this task: the floor is not above its time."""
    return min([rows[0]["floor_ms"], *(spread(row)[0] for row in rows if row["provider"] in CEILINGS)])


def memory_mib(row: Row) -> float | None:
    """Peak extra memory; None where it is not measured: NumPy's arrays are not allocated by PyTorch."""
    return None if row["provider"] == "sb3" or "peak_extra_bytes" not in row else row["peak_extra_bytes"] / 2**20


def axes_of(row: Row) -> dict[str, int]:
    """{"N": 1024, "V": 32000} of "N=1024 V=32000"."""
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", row["shape"])}


def spread(row: Row) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the samples, in ms."""
    if len(row["samples_ms"]) == 1:
        return (row["samples_ms"][0],) * 3
    deciles = statistics.quantiles(row["samples_ms"], n=10, method="inclusive")
    return statistics.median(row["samples_ms"]), deciles[1], deciles[7]


def shown_number(x: float | None) -> str:
    """Three digits, and no exponent."""
    return "" if x is None else f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


def shown(ms: float) -> str:
    if ms < 1:
        return f"{1e3 * ms:.3g} us"
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"

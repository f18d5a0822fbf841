"""Two processes, each with a test device of its own, compute what one computes on a CPU: DDP and FSDP2."""

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator.collectives import run_child
from accelerator.runs import PARALLEL, FixedAnswers, assert_same_metrics, metrics, parallel_runs, trainer

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ppo_fast.llm.trainer", "torch.utils.tensorboard", "peft"])


@pytest.fixture(scope="module")
def histories(_registered: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Any]]]]:
    """The runs of each of two processes."""
    store = tmp_path_factory.mktemp("parallel") / "store"
    children = [SERVER.Process(target=run_child, args=(rank, 2, store, parallel_runs)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
        assert child.exitcode is not None, "the processes hang"
    found = [pickle.loads(Path(f"{store}.{rank}").read_bytes()) for rank in range(2)]
    failures = [failure for failure, _ in found if failure]
    assert not failures, "\n".join(failures)
    return [result for _, result in found]


@pytest.mark.parametrize("name", PARALLEL)
def test_two_devices_compute_what_one_cpu_does(name: str, histories: list[dict[str, list[dict[str, Any]]]]) -> None:
    options = {**PARALLEL[name], "parallel": "auto", "dtype": "float32"}
    expected = trainer("cpu", given={"sampler": FixedAnswers()}, micro_batch_tokens=24, **options).train()
    half = PARALLEL[name].get("dtype") == "bfloat16"
    for history in histories:
        # fp32: sums in another order. bf16: 8 bits, as in test_trainer.py.
        rtol, atol = (0.05, 0.03) if half else (1e-5, 2e-6)
        assert_same_metrics(history[name], expected, rtol=rtol, atol=atol)


def test_two_devices_agree_on_a_run_with_their_own_samples(histories: list[dict[str, list[dict[str, Any]]]]) -> None:
    first, second = (history["fsdp, own samples"] for history in histories)
    assert list(map(metrics, first)) == list(map(metrics, second))
    assert all(torch.isfinite(torch.tensor(x)) for x in metrics(first[0]).values())

"""ppo-fast doctor: every check passes, and a wrong operation is an error."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import flash_attn_stand_in as stand_in

import ppo_fast as ppo
from ppo_fast import doctor, ops
from ppo_fast.cli.commands import main
from ppo_fast.ops import advantages


def test_doctor_finds_every_operation_right_and_is_quick(capsys):
    assert main(["doctor", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["passed"]
    assert record["seconds"] < 30
    examined = {(c["operation"], c["device"], c["backend"], c["dtype"]) for c in record["checks"]}
    assert examined == {
        (name, device, backend, str(dtype).removeprefix("torch."))
        for name in doctor.CHECKS
        for device, backend, dtype in doctor.plan()
    }
    assert record["machine"]["torch"] == version("torch")


def test_every_public_operation_is_checked():
    public = {name for name in vars(ops) if hasattr(getattr(ops, name), "__wrapped__")}
    assert public == {name for name in ppo.__all__ if name[0].islower()}
    assert {name.partition(",")[0] for name in doctor.CHECKS} == public


@pytest.mark.parametrize("triton", [True, False])
def test_every_backend_of_a_gpu_machine_is_planned(triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "find_spec", lambda name: triton or None)
    dtypes = {torch.float32, torch.bfloat16, torch.float16}
    places = {("cpu", "torch"), ("cuda", "torch")} | ({("cuda", "triton")} if triton else set())
    assert set(doctor.plan()) == {(*place, dtype) for place in places for dtype in dtypes}


def test_doctor_prints_a_table(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "verdict" in shown
    assert "WRONG" not in shown
    count = len(doctor.CHECKS) * len(doctor.plan())
    assert f"{count} of {count} checks are right" in shown


def test_the_report_can_be_pasted_and_lists_the_compiled_kernels(capsys):
    assert main(["doctor", "--report"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("```\n")
    assert shown.endswith("```\n")
    assert "ppo_fast" in shown
    assert "bfloat16" in shown
    assert "SHA-256" in shown if torch.cuda.is_available() else "no GPU: no compiled kernels" in shown


def test_the_ptx_hash_of_a_kernel_depends_on_its_code_and_not_on_the_folder_of_the_source(monkeypatch):
    from triton.runtime.jit import JITFunction

    from ppo_fast.kernels.common import memory

    def variant(folder: str, code: str) -> SimpleNamespace:
        ptx = f".version 8.7\n.visible .entry probe()\n{{\n\t.loc 1 3 0 // {folder}/a.py:3\n\t{code}\n}}\n"
        ptx += f'\t.file 1 "{folder}/a.py"\n\t.section .debug_str {{ .b8 47 }}\n'
        asm = {"cubin": ptx.encode(), "ptx": ptx}
        return SimpleNamespace(asm=asm, metadata=SimpleNamespace(name="probe", num_warps=4))

    def probe(x_ptr):
        pass

    variants = {"a": variant("/here", "ret;"), "b": variant("/there", "ret;"), "c": variant("/here", "exit;")}
    function = JITFunction(probe)
    function.device_caches = {0: (variants, {}, None, None, None)}
    monkeypatch.setattr(memory, "probe", function, raising=False)
    found = [kernel for kernel in doctor.compiled_kernels() if kernel.name == "probe"]
    assert len(found) == 3
    assert len({kernel.binary for kernel in found}) == 3
    assert len({kernel.ptx for kernel in found}) == 2
    assert all(len(kernel.binary) == 64 for kernel in found)


def test_the_driver_is_named_by_nvidia_smi(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.10\necho 570.86.10\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._driver() == "570.86.10"


def test_doctor_reports_a_wrong_operation_and_fails(monkeypatch, capsys):
    right = advantages.gae

    def slightly_wrong(*args, **kwargs):
        advantages, returns = right(*args, **kwargs)
        return advantages + 1e-3, returns

    monkeypatch.setattr(doctor.ppo, "gae", slightly_wrong)
    assert main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_doctor_reports_nan_and_exceptions(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor.ppo, "masked_whiten", lambda x, mask, **kwargs: x * torch.nan)
    monkeypatch.setattr(doctor.ppo, "shape_rewards", broken)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "RuntimeError: no kernel image" in shown
    assert shown.count("WRONG") >= 2


def test_doctor_reports_how_low_precision_products_are_computed(monkeypatch):
    assert doctor.describe()["products"].startswith("bfloat16 ")
    monkeypatch.setattr(doctor, "product_path", lambda device, dtype: "rounded")
    assert doctor.describe()["products"].count("into the same dtype, and then to fp32") == 2


def test_doctor_reports_the_attention_of_a_run(tmp_path):
    facts = doctor.describe()
    assert facts["attention float32"] == "PyTorch's SDPA by buckets"
    with stand_in.machine(tmp_path, "2.8.3"):
        facts = doctor.describe()
        assert facts["attention float32"] == "PyTorch's SDPA by buckets"
        assert facts["attention bfloat16"] == facts["attention float16"] == "flash-attn 2.8.3"
    with stand_in.machine(tmp_path / "old", "2.8.3", capability=(7, 5)):
        facts = doctor.describe()
    assert "buckets (FlashAttention needs compute capability 8.0" in facts["attention bfloat16"]


@pytest.mark.parametrize("fault", ["raises", "leak"])
def test_doctor_reports_flash_attn_that_is_installed_but_does_not_work(fault, tmp_path):
    with stand_in.machine(tmp_path, "2.8.3", varlen=stand_in.torch_2_12), stand_in.fault(fault):
        fact = doctor.describe()["attention bfloat16"]
    assert "flash-attn 2.8.3 cannot be used for head size 128 in bfloat16" in fact


def test_doctor_reports_flash_attn_that_cannot_be_imported(tmp_path):
    stand_in.write_package(tmp_path, "2.8.3", "raise ImportError('undefined symbol: _ZN3c10')")
    with stand_in.machine(tmp_path, varlen=stand_in.torch_2_12):
        fact = doctor.describe()["attention bfloat16"]
    assert fact.startswith("torch.nn.attention.varlen of PyTorch")
    assert "flash-attn 2.8.3 cannot be imported (undefined symbol: _ZN3c10)" in fact


def test_loops_are_compiled_ahead_of_time_and_found_by_later_processes(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("numba", reason="numba is not installed")
    from ppo_fast.kernels.advantages import cpu as cpu_advantages
    from ppo_fast.kernels.gae import cpu
    from ppo_fast.kernels.loss import cpu as cpu_loss

    assert main(["compile"]) == 0
    *loops, last = capsys.readouterr().out.splitlines()
    assert len(loops) == len([*cpu.ALL, *cpu_loss.ALL, *cpu_advantages.ALL]) == 12
    assert last.startswith("12 loops in ")
    cached = list(Path(last.partition(" are below ")[2]).rglob("cpu.*.nbc"))
    assert {re.search("(gae|loss|advantages)", x.parent.as_posix().rpartition("kernels")[2])[0] for x in cached} == {
        "gae",
        "loss",
        "advantages",
    }
    later = "from ppo_fast.kernels.gae import cpu; print([loop()[1].cache_hits for loop in cpu.ALL])"
    done = subprocess.run([sys.executable, "-c", later], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([1] * len(cpu.ALL))


def test_compile_without_numba_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(doctor, "numba_works", lambda: False)
    assert main(["compile"]) == 1
    assert capsys.readouterr().err == (
        'ppo-fast: error: there is nothing to compile without numba: pip install "ppo_fast[cpu]"\n'
    )

"""The command that runs the doctor's inputs in the PTX interpreter."""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux only")
if torch.cuda.is_available():
    pytest.skip("on a GPU the command also needs the GPU's results", allow_module_level=True)

from ptx import compare

import ppo_fast as ppo


@pytest.fixture
def arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare.py", "masked_whiten", "--dtype", "float32"])


@pytest.mark.usefixtures("arguments")
def test_the_command_exits_with_0_if_every_error_is_within_its_bound(capsys):
    assert compare.main() == 0
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.usefixtures("arguments")
@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_the_command_exits_with_1_if_a_result_is_wrong(monkeypatch, capsys, wrong):
    whiten = ppo.masked_whiten
    monkeypatch.setattr(compare.doctor.ppo, "masked_whiten", lambda *args, **kwargs: wrong * whiten(*args, **kwargs))
    assert compare.main() == 1
    assert "WRONG" in capsys.readouterr().out

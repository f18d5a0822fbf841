"""The doctor: right on a healthy machine, loud on a broken operation."""

import json

import torch

from ppo_fast import doctor, ops
from ppo_fast.cli import main


def test_doctor_finds_every_operation_right_and_is_quick(capsys):
    assert main(["doctor", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["passed"]
    assert record["seconds"] < 30
    assert {c["operation"] for c in record["checks"]} == set(doctor.CHECKS)
    assert record["machine"]["torch"] == torch.__version__


def test_doctor_prints_a_table(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "verdict" in shown
    assert "WRONG" not in shown
    assert f"{len(doctor.CHECKS)} of {len(doctor.CHECKS)} checks are right" in shown or torch.cuda.is_available()


def test_doctor_reports_a_wrong_operation_and_fails(monkeypatch, capsys):
    right = ops.gae

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

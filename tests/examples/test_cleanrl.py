"""The page for CleanRL-style scripts: its blocks compute the same, and the example runs them with the same curve."""

import argparse
import ast
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("gymnasium", reason='gymnasium is not installed: pip install "ppo_fast[classic]"')

import ppo_fast as ppo
from ppo_fast.examples import with_cleanrl

PAGE = Path(ppo.__file__).parent / "integrations" / "cleanrl.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
ADVANTAGES, LOSS = BLOCKS[0:2], BLOCKS[2:4]
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}  # some tens of roundings in fp32


def run(block: str, **names) -> dict:
    """What a block leaves in the names of a script."""
    names = {"torch": torch, "ppo": ppo, "LOGGED": with_cleanrl.LOGGED, **names}
    exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_example_runs_the_lines_of_the_page(block):
    script = ast.parse(Path(with_cleanrl.__file__).read_text(encoding="utf-8"))
    bodies = [getattr(node, name) for node in ast.walk(script) for name in ("body", "orelse") if hasattr(node, name)]
    bodies = ["\n".join(map(ast.unparse, body)) for body in bodies if isinstance(body, list)]
    assert any(ast.unparse(ast.parse(block)) in body for body in bodies)


@pytest.mark.parametrize(("steps", "ending"), [(16, 0.2), (16, 0.0), (16, 1.0), (1, 0.5), (130, 0.05)])
def test_advantages_and_returns_stay_the_same(steps, ending):
    torch.manual_seed(steps)
    ended = (torch.rand(steps + 1, 5) < ending).float()  # one flag more: next_done
    names = {
        "args": argparse.Namespace(num_steps=steps, gamma=0.99, gae_lambda=0.95),
        "agent": argparse.Namespace(get_value=lambda x: x.sum(-1, keepdim=True)),
        "next_obs": torch.randn(5, 3),
        "next_done": ended[-1],
        "dones": ended[:-1],
        "rewards": torch.randn(steps, 5),
        "values": torch.randn(steps, 5),
    }
    before, after = (run(block, **names) for block in ADVANTAGES)
    for name in ("advantages", "returns"):
        torch.testing.assert_close(after[name], before[name], **ROUNDING)


def loss_names(spread: float, clip_vloss: bool) -> dict:
    torch.manual_seed(1)
    old = -torch.rand(64)
    return {
        "args": argparse.Namespace(clip_coef=0.2, clip_vloss=clip_vloss, ent_coef=0.01, vf_coef=0.5),
        "newlogprob": (old[3:59] + spread * torch.randn(56)).requires_grad_(),
        "newvalue": torch.randn(56, 1, requires_grad=True),
        "entropy": torch.rand(56, requires_grad=True),
        "mb_inds": torch.arange(3, 59),
        "mb_advantages": torch.randn(56),
        "b_logprobs": old,
        "b_values": torch.randn(64),
        "b_returns": torch.randn(64),
        "clipfracs": [],
    }


@pytest.mark.parametrize("clip_vloss", [True, False])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_loss_gradients_and_metrics_stay_the_same(spread, clip_vloss):
    found = []
    for block in LOSS:
        names = run(block, **loss_names(spread, clip_vloss))
        names["loss"].backward()
        gradients = [names[name].grad for name in ("newlogprob", "newvalue", "entropy")]
        found.append(
            [names[name].detach() for name in ("loss", "pg_loss", "v_loss", "entropy_loss", "approx_kl")] + gradients
        )
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before, **ROUNDING)
    assert not spread or found[0][5].count_nonzero() < 56, "no ratio was clipped"


def test_the_clip_fraction_is_what_the_page_says():
    names = loss_names(0.3, True)
    before, after = (run(block, **{**names, "clipfracs": []})["clipfracs"][0] for block in LOSS)
    ratio = (names["newlogprob"] - names["b_logprobs"][names["mb_inds"]]).exp().detach()
    acts = torch.where(names["mb_advantages"] > 0, ratio > 1.2, ratio < 0.8).float().mean()
    assert 0 < acts < before
    assert after.item() == pytest.approx(acts.item(), rel=1e-6)


def test_one_runaway_ratio_is_finite_as_the_page_says():
    names = loss_names(0.0, True)
    names["newlogprob"] = names["newlogprob"].detach() + 100 * (torch.arange(56) == 7)
    names["mb_advantages"] = -torch.ones(56)
    before, after = (run(block, **names)["loss"] for block in LOSS)
    assert before.isinf()
    assert after.isfinite()


@pytest.mark.parametrize("rest", [[], ["--no-clip-vloss", "--num-steps", "33", "--num-envs", "3"]], ids=["", "odd"])
def test_the_script_has_the_same_training_curve_with_ppo_fast(rest, monkeypatch):
    calls = []
    for name in ("gae", "ppo_loss"):
        original = getattr(ppo, name)
        monkeypatch.setattr(ppo, name, lambda *a, _of=original, **k: calls.append(1) or _of(*a, **k))

    def curve(*more: str) -> list[dict[str, float]]:
        calls.clear()
        return with_cleanrl.train(with_cleanrl.options(["--updates", "6", "--quiet", *rest, *more]))

    plain = curve("--plain")
    assert not calls
    fast = curve()
    assert len(calls) == 6 * (1 + 4 * 4)
    for row, expected in zip(fast, plain, strict=True):
        assert row["return"] == expected["return"]  # the same episodes, action by action
        for name in with_cleanrl.LOGGED:
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)  # roundings grow over 96 updates


def test_the_command_runs_and_learns(capsys):
    assert with_cleanrl.main(["--updates", "30"]) == 0
    text = capsys.readouterr().out
    returns = [float(x) for x in re.findall(r"return +([0-9.]+)", text)]
    assert len(returns) == 3
    assert returns[-1] > 40  # a random policy has 22
    assert "ms for learning in an update" in text

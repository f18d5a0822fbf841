"""One update of verl's own actor and critic workers on a CPU, with our functions instead of its own.

verl's FSDP engine is not made for a CPU: ppo_fast/examples/with_verl.py describes one to it. Its workers import two
packages that verl's own requirements leave out: pip install fastapi uvicorn.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install -r tests/oracles/verl.txt")
pytest.importorskip("uvicorn", reason="verl's workers need two packages more: pip install fastapi uvicorn")

from ppo_fast.examples import with_verl

UPDATES = 2 * 2 * 2  # epochs, minibatches, micro-batches
JUDGED = 2  # passes without gradients, before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """verl on a CPU, a model for it, and afterwards all as it was."""
    from verl.plugin.platform import platform_manager

    model = importlib.import_module("verl.utils.model")
    before, load, environment = platform_manager._current_platform, model.load_valuehead_model, dict(os.environ)
    with_verl.use_cpu()
    importlib.import_module("verl.workers.engine_workers")
    folder = tmp_path_factory.mktemp("model")
    with_verl.save_model(folder)
    yield folder
    torch.distributed.destroy_process_group()
    platform_manager._current_platform, model.load_valuehead_model = before, load
    for name in set(os.environ) - set(environment):
        del os.environ[name]


@pytest.fixture(scope="module")
def plain(folder):
    return with_verl.step(folder)


@pytest.fixture
def calls(folder, monkeypatch):
    """How often each operation of ours is called."""
    from ppo_fast.integrations import verl as fast

    seen = dict.fromkeys(("gae", "policy_loss", "value_loss", "token_logprobs", "masked_whiten"), 0)
    for name in seen:
        original = getattr(fast.ppo, name)

        def count(*a, _name=name, _of=original, **k):
            seen[_name] += 1
            return _of(*a, **k)

        monkeypatch.setattr(fast.ppo, name, count)
    return seen


def assert_same(found, expected):
    """To rounding, after four steps of SGD on each model."""
    (metrics, weights), (their_metrics, their_weights) = found, expected
    assert metrics == pytest.approx(their_metrics, rel=1e-4, abs=1e-6)
    for ours, theirs in zip(weights, their_weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_update_of_verls_workers_matches_with_the_patch(folder, plain, calls):
    from ppo_fast.integrations import verl as fast

    assert not any(calls.values())
    with fast.patch(quiet=True):
        patched = with_verl.step(folder)
    assert calls == {
        "gae": 1,
        "masked_whiten": 1,
        "policy_loss": UPDATES,
        "value_loss": UPDATES,
        "token_logprobs": 2 * (UPDATES + JUDGED),  # log-probabilities, and entropies apart
    }
    assert_same(patched, plain)


def test_the_update_changes_weights(folder, plain):
    from transformers import AutoModelForCausalLM

    metrics, weights = plain
    assert metrics["actor/grad_norm"] > 0.1
    assert metrics["actor/pg_clipfrac"] > 0.1
    before = list(AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert max((a - b).abs().max() for a, b in zip(before, weights, strict=False)) > 1e-2


def test_the_registered_policy_loss_is_used_and_matches(folder, plain, calls):
    """loss_mode=ppo_fast in a YAML, without the patch."""
    found = with_verl.step(folder, loss_mode="ppo_fast")
    assert calls == {"gae": 0, "masked_whiten": 0, "policy_loss": UPDATES, "value_loss": 0, "token_logprobs": 0}
    assert_same(found, plain)


PROGRAM = """
import json, pathlib, sys
from ppo_fast.examples import with_verl
with_verl.use_cpu()
metrics, _ = with_verl.step(pathlib.Path(sys.argv[1]))
import verl.trainer.ppo.core_algos as core, verl.workers.engine.fsdp.transformer_impl as engine
import verl.workers.utils.losses as losses
found = [engine.logprobs_from_logits, engine.verl_F.entropy_from_logits, losses.agg_loss, losses.compute_value_loss]
found += [losses.kl_penalty, core.compute_gae_advantage_return, losses.get_policy_loss_fn("vanilla")]
print("RESULT" + json.dumps([metrics, [f.__module__ for f in found]]))
"""


def test_the_variable_that_ray_workers_get_replaces_verls_functions(folder, plain):
    """VERL_USE_EXTERNAL_MODULES, in a process that imports everything else of verl afterwards."""
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "ppo_fast.integrations.verl_everywhere"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(with_verl.__file__).parents[2]), *filter(None, sys.path)])
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics, modules = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))[6:])
    assert set(modules) == {"ppo_fast.integrations.verl"}
    assert metrics == pytest.approx(plain[0], rel=1e-4, abs=1e-6)

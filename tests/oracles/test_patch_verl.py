"""verl with our functions instead of its own: the same numbers and gradients, found by name, and taken back."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles.cases import MASKS, B, T, assert_equal, draw, policy_inputs, tokens_below, value_inputs, with_gradient

MISSING = "verl is not installed: pip install -r tests/oracles/verl.txt in an environment of its own"
pytest.importorskip("verl", reason=MISSING)

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils import torch_functional  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402
from verl.workers.utils import losses  # noqa: E402

from ppo_fast.integrations import verl as fast  # noqa: E402

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
GLOBAL = [
    {},
    {"dp_size": 4, "batch_num_tokens": 200, "global_batch_size": 32},
    {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 12, "loss_scale_factor": 7},
]
CASES = list(itertools.product(AGGREGATIONS, GLOBAL))


def actor_config(info: dict) -> ActorConfig:
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=0.1, clip_ratio_high=0.3)
    config.global_batch_info.update(info)
    return config


@pytest.mark.parametrize(("mode", "info"), CASES)
@pytest.mark.parametrize("mask", [MASKS["gaps"], MASKS["empty-row"]], ids=["gaps", "empty-row"])
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_loss_gradient_and_metrics_match(mode, info, mask, weighted):
    x, weights = policy_inputs(), draw(B, T, seed=7).exp() if weighted else None

    def found(function):
        arguments = (x["advantages"], mask.to(torch.float64), mode, actor_config(info), weights)
        loss, gradient = with_gradient(lambda p: function(x["old_logprobs"], p, *arguments)[0], x["logprobs"])
        return loss, gradient, function(x["old_logprobs"], x["logprobs"], *arguments)[1]

    theirs, their_gradient, their_metrics = found(core_algos.compute_policy_loss_vanilla)
    ours, gradient, metrics = found(fast.compute_policy_loss_vanilla)
    assert_equal(ours, theirs, "loss")
    assert_equal(gradient, their_gradient, "gradient")
    assert metrics == pytest.approx(their_metrics, rel=1e-6)


@pytest.mark.parametrize(("mode", "info"), CASES)
def test_value_loss_and_agg_loss_match(mode, info):
    x, mask = value_inputs(), MASKS["gaps"]

    def found(functions):
        arguments = (x["returns"], x["old_values"], mask.double(), 0.5, mode)
        value = with_gradient(lambda v: functions.compute_value_loss(v, *arguments, **info)[0], x["values"])
        share = functions.compute_value_loss(x["values"], *arguments, **info)[1]
        matrix = with_gradient(lambda m: functions.agg_loss(m, mask.double(), mode, **info), x["returns"])
        return *value, share.double(), *matrix

    for theirs, ours in zip(found(core_algos), found(fast), strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("function", ["agg_loss", "compute_value_loss"])
def test_what_verl_rejects_is_rejected(function):
    mask = MASKS["full"].float()
    arguments = (mask, mask) if function == "agg_loss" else (mask, mask, mask, mask, 0.5)
    for module in (core_algos, fast):
        with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
            getattr(module, function)(*arguments, "mean")
        with pytest.raises(ValueError, match="batch_num_tokens is required when dp_size > 1"):
            getattr(module, function)(*arguments, "token-mean", dp_size=2)


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+", "k2+", "abs+"])
def test_kl_penalty_and_its_gradient_match(name):
    logprob, ref = draw(B, T, seed=9, scale=3), draw(B, T, seed=10, scale=3)

    def found(functions):
        return with_gradient(lambda p: (functions.kl_penalty(p, ref, name) * torch.arange(T)).sum(), logprob)

    for theirs, ours in zip(found(core_algos), found(fast), strict=True):
        assert_equal(ours, theirs)
    with pytest.raises(NotImplementedError):
        fast.kl_penalty(logprob, ref, "full")


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gae_and_whitening_match_at_counted_steps(mask):
    rewards, values = draw(B, T, seed=17), draw(B, T, seed=18)
    theirs = core_algos.compute_gae_advantage_return(rewards, values, mask.double(), 0.99, 0.95)
    ours = fast.compute_gae_advantage_return(rewards, values, mask.double(), 0.99, 0.95)
    for a, b in zip(ours, theirs, strict=True):
        assert_equal(a[mask], b[mask])
        assert not a[~mask].any()
    for shift in (True, False):
        theirs = torch_functional.masked_whiten(rewards, mask.double(), shift)
        assert_equal(fast.masked_whiten(rewards, mask.double(), shift)[mask], theirs[mask])
    for count in (0, 1):
        few = torch.zeros(B, T)
        few[0, :count] = 1
        with pytest.raises(ValueError, match="mask"):
            fast.masked_whiten(rewards, few)


@pytest.mark.parametrize("name", ["logprobs_from_logits", "entropy_from_logits"])
def test_logprobs_and_entropies_match(name):
    logits, labels, up = draw(B, T, 31, seed=1, scale=3), tokens_below(31, B, T, seed=2), draw(B, T, seed=3)
    rest = (labels,) if name == "logprobs_from_logits" else ()

    def found(functions):
        return with_gradient(lambda x: (getattr(functions, name)(x, *rest) * up).sum(), logits)

    for theirs, ours in zip(found(torch_functional), found(fast), strict=True):
        assert_equal(ours, theirs)


def test_an_in_place_backward_keeps_logits_that_others_need():
    logits, labels = torch.randn(4, 9, requires_grad=True), torch.randint(9, (4,))
    kept = logits.detach().clone()
    fast.logprobs_from_logits(logits, labels).sum().backward()
    assert torch.equal(logits, kept)


def test_linear_cross_entropy_matches_logits():
    hidden, weight, labels = draw(2, 5, 8, seed=1), draw(31, 8, seed=2), tokens_below(31, 2, 5, seed=3)
    logprobs, entropy = fast.linear_cross_entropy(hidden, weight, labels, 0.7)
    logits = hidden.view(10, 8) @ weight.T / 0.7
    assert_equal(logprobs, torch_functional.logprobs_from_logits(logits, labels.view(-1)))
    assert_equal(entropy, torch_functional.entropy_from_logits(logits))
    with pytest.raises(NotImplementedError, match="one process"):
        fast.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def test_verl_finds_the_names():
    assert core_algos.get_policy_loss_fn("ppo_fast") is fast.compute_policy_loss_vanilla
    estimator = core_algos.get_adv_estimator_fn("gae_ppo_fast")
    assert estimator is fast.compute_gae_advantage_return
    fast.register()  # twice is once
    with pytest.raises(ValueError, match=r"verl hands values to its own estimator only: .*adv_estimator=gae"):
        estimator(token_level_rewards=torch.zeros(1, 2), response_mask=torch.ones(1, 2), config={}, index=None)


def test_a_patch_replaces_every_place_and_is_undone():
    before = (core_algos.agg_loss, losses.compute_value_loss, core_algos.POLICY_LOSS_REGISTRY["vanilla"])
    with fast.patch(quiet=True):
        assert core_algos.agg_loss is losses.agg_loss is fast.agg_loss
        assert losses.compute_value_loss is fast.compute_value_loss
        assert core_algos.get_policy_loss_fn("vanilla") is fast.compute_policy_loss_vanilla
        assert core_algos.get_adv_estimator_fn("gae") is fast.compute_gae_advantage_return
        assert torch_functional.logprobs_from_logits is fast.logprobs_from_logits
        with pytest.raises(RuntimeError, match="verl is patched already"):
            fast.patch()
    assert (core_algos.agg_loss, losses.compute_value_loss, core_algos.POLICY_LOSS_REGISTRY["vanilla"]) == before


def test_a_patch_says_what_it_replaces(capsys):
    with fast.patch():
        assert "ppo_fast: in verl 0.9" in capsys.readouterr().out


def test_the_module_for_every_process_replaces_verls_functions():
    """In a process of its own, through verl's own variable, as Ray's workers get it."""
    program = (
        "import verl.trainer.ppo.core_algos as core, verl.workers.utils.losses as losses\n"
        "names = ['agg_loss', 'compute_value_loss', 'kl_penalty']\n"
        "assert all(getattr(losses, n).__module__ == 'ppo_fast.integrations.verl' for n in names)\n"
        "assert core.get_policy_loss_fn('vanilla').__module__ == 'ppo_fast.integrations.verl'\n"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "ppo_fast.integrations.verl_everywhere"}
    environment["PYTHONPATH"] = str(Path(fast.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ppo_fast: in verl 0.9") == 1

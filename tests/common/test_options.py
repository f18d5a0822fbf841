"""Checked options: strict types, ranges, and checks on assignment, in both config classes."""

import copy
import dataclasses
import enum
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ppo_fast.classic.config import ClassicConfig
from ppo_fast.common.errors import UserError
from ppo_fast.common.options import options
from ppo_fast.llm.config import PPOConfig

CONFIGS = [PPOConfig, ClassicConfig]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": True}, "seed must be of type int, got True"),
        ({"seed": 1.0}, "seed must be of type int, got 1.0"),
        ({"seed": np.int64(3)}, "seed must be of type int, got np.int64(3)"),
        ({"seed": -1}, "seed must be in [0, 4294967295], got -1"),
        ({"lr": True}, "lr must be of type float, got True"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": float("inf")}, "lr must be a finite number, got inf"),
        ({"lr": 10**400}, f"lr must be a finite number, got {10**400}"),
        ({"lr": -1e-3}, "lr must be at least 0, got -0.001"),
        ({"target_kl": 0}, "target_kl must be above 0, got 0: none switches it off"),
        ({"target_kl": "1"}, "target_kl must be of type float or None, got '1'"),
        ({"quiet": 1}, "quiet must be of type bool, got 1"),
        ({"out": Path("x")}, f"out must be of type str or None, got {Path('x')!r}"),
        ({"backend": "numpy"}, "backend must be one of auto, triton, torch; got 'numpy'"),
        ({"backend": 3}, "backend must be of type str, got 3"),
    ],
)
@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_wrong_value_is_one_sentence_at_the_start_and_on_assignment(config_class, given, message):
    with pytest.raises(UserError) as error:
        config_class(**given)
    assert str(error.value) == message
    config = config_class()
    ((name, value),) = given.items()
    with pytest.raises(UserError) as error:
        setattr(config, name, value)
    assert str(error.value) == message
    assert config == config_class()


@pytest.mark.parametrize("value", ["abc", ("",), [1], None])
def test_a_tuple_of_strings_is_checked(value):
    for config_class, name in ((PPOConfig, "stop"), (ClassicConfig, "wrapper")):
        with pytest.raises(UserError, match=f"{name} must be a tuple of texts that are not empty, got "):
            config_class(**{name: value})
        assert getattr(config_class(**{name: ["a"]}), name) == ("a",)


def test_values_that_are_python_numbers_and_strings_become_those():
    class Name(enum.StrEnum):
        LOSS = "loss"

    config = PPOConfig(lr=np.float64(0.5), kl_in=Name.LOSS, gamma=1)
    assert (type(config.lr), type(config.kl_in), type(config.gamma)) == (float, str, float)


def test_an_assignment_checks_combinations_and_keeps_the_earlier_value():
    config = PPOConfig(prompts_per_step=4, minibatches=2)
    with pytest.raises(UserError, match=r"minibatches must be at most .* = 4, got 5"):
        config.minibatches = 5
    assert config.minibatches == 2
    config.minibatches = 4
    assert dataclasses.replace(config, prompts_per_step=8, minibatches=8).minibatches == 8
    with pytest.raises(UserError, match="at most"):
        dataclasses.replace(config, minibatches=8)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_unknown_options_are_the_errors_of_a_dataclass(config_class):
    with pytest.raises(TypeError, match="unexpected keyword argument 'gama'"):
        config_class(gama=1)
    with pytest.raises(AttributeError, match="has no option 'gama'; did you mean gamma"):
        config_class().gama = 1


@pytest.mark.parametrize("config_class", CONFIGS)
def test_configs_are_copied_pickled_and_compared_like_dataclasses(config_class):
    config = config_class(gamma=0.5, quiet=True)
    for other in (
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        config_class(**dataclasses.asdict(config)),
    ):
        assert other == config
        other.gamma = 0.25
        assert config.gamma == 0.5
    assert list(options(config_class)) == [field.name for field in dataclasses.fields(config_class)]
    defaults = {name: option.default for name, option in options(config_class).items()}
    if config_class is PPOConfig:
        defaults["lam"] = 0.95  # None stands for it where lam_length_alpha is not given
    assert defaults == dataclasses.asdict(config_class())


def test_help_needs_no_pydantic_and_is_quick():
    code = "import sys; sys.modules['pydantic'] = None; from ppo_fast.cli.commands import main; main(['--help'])"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train a model with PPO" in done.stdout
    assert time.perf_counter() - start < 5


def test_training_without_pydantic_names_the_extra():
    code = (
        "import sys; sys.modules['pydantic'] = None; from ppo_fast.cli.commands import main; sys.exit(main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("ppo-fast: error: ppo-fast train needs the extra ppo_fast[train]: ")

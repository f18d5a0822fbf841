"""The command line: ppo-fast train, ppo-fast doctor."""

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_fast.config import PPOConfig
from ppo_fast.errors import UserError


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest option when one is unknown."""

    def refuse_unknown(self, unknown: list[str]) -> None:
        options = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], options, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        self.error(f"unknown option {unknown[0]}{hint}")


def build_parser() -> tuple[_Parser, _Parser]:
    """The whole parser, and that of `train`, whose options are the fields of PPOConfig and what stands around it."""
    parser = _Parser(prog="ppo-fast", description="PPO for language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model with PPO on prompts and a reward function",
        description="Train a model with PPO on prompts and a reward function.",
        allow_abbrev=False,
    )
    train.add_argument("--model", required=True, metavar="DIR", help="folder of a causal language model and tokenizer")
    train.add_argument("--prompts", required=True, metavar="FILE", help="JSON Lines file, one object a line")
    train.add_argument("--prompt-field", default="prompt", metavar="NAME", help="field of the prompt (default: prompt)")
    train.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="reward function f(prompts, completions, **columns), as module:function or file.py:function; may be"
        " repeated, the numbers are added",
    )
    train.add_argument(
        "--reward-model",
        action="append",
        default=[],
        metavar="DIR",
        help="folder of a sequence classifier with one output and its tokenizer; may be repeated",
    )
    train.add_argument(
        "--reward-weight",
        type=float,
        nargs="+",
        metavar="FLOAT",
        help="a factor for each --reward, then for each --reward-model (default: 1 each)",
    )
    train.add_argument(
        "--critic-model",
        metavar="DIR",
        help="folder of a reward model that the critic starts from (default: actor)",
    )
    train.add_argument("--pad-token", metavar="TOKEN", help="a token of the vocabulary to pad with, if there is none")
    train.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    for option in dataclasses.fields(PPOConfig):
        _add_option(train, option)
    doctor = commands.add_parser("doctor", help="say what this machine will run, and check every operation on it")
    doctor.add_argument("--json", action="store_true", help="print the same as JSON")
    return parser, train


def _add_option(parser: argparse.ArgumentParser, option: dataclasses.Field) -> None:
    flag = "--" + option.name.replace("_", "-")
    text = f"{option.metadata['help']} (default: {option.default})".replace("%", "%%")
    kind = str(getattr(option.type, "__name__", option.type))
    if "bool" in kind:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=option.default, help=text)
        return
    if "tuple" in kind:
        parser.add_argument(flag, nargs="+", default=option.default, metavar="TEXT", help=text)
        return
    types: dict[str, Any] = {"int": int, "float": float, "str": str}
    kind = next(name for name in types if name in str(option.type).replace("None", ""))
    parser.add_argument(
        flag,
        type=types[kind],
        default=option.default,
        choices=option.metadata["choices"] or None,
        metavar=None if option.metadata["choices"] else kind.upper(),
        help=text,
    )


def load_reward(spec: str) -> Any:
    """The function that module:function or file.py:function names."""
    module_name, colon, function_name = spec.rpartition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"--reward must be MODULE:FUNCTION or FILE.py:FUNCTION, got {spec!r}")
    try:
        if module_name.endswith(".py"):
            module = _module_from_file(Path(module_name))
        else:
            sys.path.insert(0, str(Path.cwd()))
            module = importlib.import_module(module_name)
    except (ImportError, OSError, SyntaxError) as error:
        raise UserError(f"cannot import the reward {spec!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{module_name} has no function {function_name!r}, which --reward {spec} names")
    return function


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(arguments: argparse.Namespace) -> None:
    """Reads what the arguments name, trains, and says where the results are."""
    config = PPOConfig(**{o.name: getattr(arguments, o.name) for o in dataclasses.fields(PPOConfig)})
    if config.out is not None and (Path(config.out) / "metrics.jsonl").exists() and not arguments.overwrite:
        raise UserError(f"{config.out} already holds a run; choose another --out, or replace it with --overwrite")
    from ppo_fast.data import read_jsonl

    rows = read_jsonl(arguments.prompts, arguments.prompt_field)
    rewards = {spec: load_reward(spec) for spec in arguments.reward}
    names = [*arguments.reward, *arguments.reward_model]
    weights = arguments.reward_weight or [1.0] * len(names)
    if not names:
        raise UserError("nothing to train for: give --reward, --reward-model, or both")
    if len(weights) != len(names):
        raise UserError(f"--reward-weight has {len(weights)} numbers for {len(names)} rewards")
    # transformers takes seconds to import: bad input is reported before
    from ppo_fast.models import Critic, load_actor, load_reward_model, pick_device
    from ppo_fast.reward import RewardModel
    from ppo_fast.trainer import PPOTrainer

    actor, tokenizer = load_actor(arguments.model, pad_token=arguments.pad_token)
    for folder in arguments.reward_model:
        model, its_tokenizer = load_reward_model(folder)
        rewards[folder] = RewardModel(model, its_tokenizer, device=pick_device(config.device))
    critic = None
    if arguments.critic_model is not None:
        critic = Critic.from_reward_model(load_reward_model(arguments.critic_model)[0])
    reward_weights = dict(zip(names, weights, strict=True))
    trainer = PPOTrainer(config, actor, tokenizer, rows, rewards, reward_weights=reward_weights, critic=critic)
    history = trainer.train()
    if config.out is None:
        return
    from ppo_fast.plots import draw_learning_curves

    draw_learning_curves(history, Path(config.out) / "learning_curves.png", f"PPO on {Path(arguments.prompts).name}")
    if not config.quiet:
        print(f"model, metrics.jsonl, samples.jsonl, tensorboard and learning_curves.png are in {config.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0, 1 after bad input, 2 after a bad command line, 130 after Ctrl-C."""
    parser, train_parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        (train_parser if arguments.command == "train" else parser).refuse_unknown(unknown)
    if arguments.command == "doctor":
        from ppo_fast import doctor

        return doctor.main(as_json=arguments.json)
    try:
        train(arguments)
    except UserError as error:
        print(f"ppo-fast: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ppo-fast: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ppo-fast train, ppo-fast doctor."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence

from ppo_fast.cli.train import resolve, train
from ppo_fast.common.errors import UserError, plain_warnings
from ppo_fast.common.launched import process_count, this_rank
from ppo_fast.common.options import add_option, nearest
from ppo_fast.common.threads import wait_passively
from ppo_fast.llm.config import PPOConfig, options_of


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest option when one is unknown."""

    def refuse_unknown(self, unknown: list[str]) -> None:
        options = [name for action in self._actions for name in action.option_strings]
        self.error(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], options)}")


def build_parser() -> tuple[_Parser, _Parser]:
    """The whole parser, and that of `train`, whose options are the fields of PPOConfig and what stands around it."""
    parser = _Parser(prog="ppo-fast", description="PPO for language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model with PPO on prompts and a reward function",
        description="Train a model with PPO on prompts and a reward function.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given comes from the configuration file, or by default
    )
    train.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of these options, such as OUT/config.yaml of an earlier run; the command line wins",
    )
    train.add_argument(
        "--model", metavar="DIR", help="folder of a causal language model and tokenizer (required, no default)"
    )
    train.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON Lines or .parquet file, folder of .parquet files, or folder that save_to_disk of Hugging Face's"
        " datasets wrote (required, no default)",
    )
    train.add_argument(
        "--prompt-field",
        metavar="NAME",
        help="field of the prompt, a text, or a list of messages for the chat template (default: prompt)",
    )
    train.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="plain prompts become a user's message, too, and go through the tokenizer's chat template (default: no)",
    )
    train.add_argument(
        "--eval-prompts",
        metavar="FILE",
        help="held-out prompts to evaluate on, read as --prompts are (default: none, no evaluation)",
    )
    train.add_argument(
        "--reward",
        action="append",
        metavar="MODULE:FUNCTION",
        help="reward function f(prompts, completions, **columns), as module:function or file.py:function, perhaps with"
        " (option=value, argument=column), such as ppo_fast.rewards:f1(reference=answer); may be repeated, the numbers"
        " are added (default: none)",
    )
    train.add_argument(
        "--reward-model",
        action="append",
        metavar="DIR",
        help="folder of a sequence classifier with one output and its tokenizer; may be repeated (default: none)",
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
    train.add_argument(
        "--pad-token", metavar="TOKEN", help="a token of the vocabulary to pad with (default: the tokenizer's own)"
    )
    train.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        help="run Python files that lie in the folder of --model (default: no)",
    )
    earlier = train.add_mutually_exclusive_group()
    earlier.add_argument("--overwrite", action="store_true", default=False, help="replace an earlier run in OUT")
    earlier.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on from the newest checkpoint in OUT, or start if there is none yet; with the same options and data",
    )
    train.add_argument(
        "--allow-changes",
        action="store_true",
        default=False,
        help="with --resume: continue although prompts, rewards or tokenizer have changed since the checkpoint",
    )
    for option in dataclasses.fields(PPOConfig):
        add_option(train, option)
    commands.add_parser(
        "compile", help="compile the loops of numba ahead of time, before many processes start together"
    )
    commands.add_parser("classic", help="train on a Gymnasium environment: ppo-fast classic --help", add_help=False)
    label = commands.add_parser("label", help="choose the better of two answers, to train a reward model on")
    label.add_argument("answers", metavar="FILE", help='JSON Lines of {"prompt": text, "answers": [text, text]}')
    label.add_argument("--out", required=True, metavar="FILE", help="JSON Lines of pairs, to which choices are added")
    recipe = commands.add_parser("recipe", help="copy a configuration and a few prompts for a common task")
    recipe.add_argument("name", nargs="?", metavar="NAME", help="which; without it they are listed")
    recipe.add_argument("folder", nargs="?", metavar="FOLDER", help="where to (default: NAME)")
    memory = commands.add_parser(
        "memory",
        help="calculate the peak GPU memory of a run, by phase and part",
        description="Calculate the peak GPU memory of a run, by phase and part. All options of the trainer are taken.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    memory.add_argument(
        "--model", metavar="DIR", required=True, help="folder with the model's config.json; weights are not read"
    )
    memory.add_argument(
        "--prompt-tokens", type=int, default=256, metavar="INT", help="longest prompt, in tokens (default: 256)"
    )
    memory.add_argument(
        "--gpu-gib", type=float, default=None, metavar="FLOAT", help="memory of the GPU in GiB (default: enough)"
    )
    for option in dataclasses.fields(PPOConfig):
        add_option(memory, option)
    doctor = commands.add_parser("doctor", help="say what this machine will run, and check every operation on it")
    form = doctor.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the same as JSON, with a hash of each compiled kernel")
    form.add_argument("--report", action="store_true", help="print a report for an issue, with these hashes")
    return parser, train


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0, 1 after bad input, 2 after a bad command line, 130 after Ctrl-C,
    143 after SIGTERM."""
    wait_passively()
    plain_warnings()
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["classic"]:  # its options need Gymnasium, which nobody else should have to install
        return _classic(given[1:])
    parser, train_parser = build_parser()
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        (train_parser if arguments.command == "train" else parser).refuse_unknown(unknown)
    if arguments.command == "doctor":
        from ppo_fast import doctor

        return doctor.main(as_json=arguments.json, report=arguments.report)
    others = {"label": _label, "recipe": _recipe, "memory": _memory, "compile": _compile}
    if arguments.command in others:
        try:
            return others[arguments.command](arguments)
        except UserError as error:
            print(f"ppo-fast: error: {error}", file=sys.stderr)
            return 1
    name = "ppo-fast"
    try:
        if (size := process_count()) > 1:
            name = f"ppo-fast: rank {this_rank(size)}"
        status = train(arguments, *resolve(arguments, train_parser))
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        status = 130
    except RuntimeError as error:
        from ppo_fast.llm.distributed import peer_failure

        reason = peer_failure(error)
        if not reason:
            raise
        print(f"{name}: error: {reason}", file=sys.stderr)
        status = 1
    from ppo_fast.llm.distributed import shutdown

    shutdown(status)
    return status


def _classic(given: list[str]) -> int:
    try:
        from ppo_fast.classic import ppo as classic
    except ImportError as error:
        print(f"ppo-fast: error: classic RL needs the extra ppo_fast[classic]: {error}", file=sys.stderr)
        return 1
    parser = _Parser(prog="ppo-fast classic", description="PPO on a Gymnasium environment.", allow_abbrev=False)
    classic.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        parser.refuse_unknown(unknown)
    try:
        return classic.main(arguments)
    except UserError as error:
        print(f"ppo-fast: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ppo-fast: stopped", file=sys.stderr)
        return 130


def _label(arguments: argparse.Namespace) -> int:
    print(f"reading {arguments.answers}; importing transformers takes some seconds", flush=True)
    from ppo_fast.llm.preferences.label import label

    label(arguments.answers, arguments.out)
    return 0


def _memory(arguments: argparse.Namespace) -> int:
    from ppo_fast.llm import memory
    from ppo_fast.llm.models.loading import load_model_config

    fields = {option.name for option in dataclasses.fields(PPOConfig)}
    config = options_of({name: value for name, value in vars(arguments).items() if name in fields})
    gib = arguments.gpu_gib
    if gib is not None and not 0 < gib < float("inf"):
        raise UserError(f"--gpu-gib must be a number above 0, got {gib}")
    if config.dtype == "auto":  # which GPUs of compute capability 8.0 and newer compute in
        config = dataclasses.replace(config, dtype="bfloat16")
    bytes_ = None if gib is None else round(gib * 2**30)
    print(memory.table(load_model_config(arguments.model), config, arguments.prompt_tokens, bytes_))
    return 0


def _compile(arguments: argparse.Namespace) -> int:
    from ppo_fast import doctor

    doctor.compile_loops()
    return 0


def _recipe(arguments: argparse.Namespace) -> int:
    from ppo_fast import recipes

    if arguments.name is None:
        for name in recipes.NAMES:
            print(f"{name:20}{recipes.describe(name)}")
        return 0
    written = recipes.copy(arguments.name, arguments.folder or arguments.name)
    config = written[0]
    command = f"ppo-fast train --config {shlex.quote(str(config))} --model DIR --out runs/first"
    print(f"{', '.join(path.name for path in written)} are in {config.parent}; {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ppo-fast train, critic, classic, doctor, memory, recipe, label, compile."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from ppo_fast.common.errors import UserError, plain_warnings, print_error
from ppo_fast.common.launched import process_count, this_rank
from ppo_fast.common.text import nearest
from ppo_fast.common.threads import wait_passively

CONFIGURED = ("train", "critic", "memory")  # commands with every option of PPOConfig, which needs pydantic


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest option when one is unknown."""

    def reject_unknown(self, unknown: list[str]) -> None:
        options = [name for action in self._actions for name in action.option_strings]
        self.error(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], options)}")


def build_parser(commands: Sequence[str] = CONFIGURED) -> tuple[_Parser, _Parser]:
    """Build the parser of all commands.

    Args:
        commands: those of CONFIGURED that get the options of PPOConfig.

    Returns:
        The whole parser, and that of `train`.
    """
    parser = _Parser(prog="ppo-fast", description="PPO for language models.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = subparsers.add_parser(
        "train",
        help="train a model with PPO on prompts and a reward function",
        description="Train a model with PPO on prompts and a reward function.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given comes from the configuration file, or by default
    )
    _add_run_options(train)
    _add_options_of_earlier_runs(train)
    critic = subparsers.add_parser(
        "critic",
        help="fit the critic of a model to recorded or sampled answers, before PPO",
        description="Fit the critic of a model to the Monte-Carlo returns of recorded or sampled answers, and report"
        " the variance of held-out returns that it explains. The folder that it writes is for --critic-model of"
        " ppo-fast train. It has the options of ppo-fast train; --prompts and --reward are for --rollouts sample.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    critic.set_defaults(command_parser=critic)
    _add_run_options(critic)
    _add_critic_options(critic)
    subparsers.add_parser(
        "compile", help="compile the loops of numba ahead of time, before many processes start together"
    )
    subparsers.add_parser("classic", help="train on a Gymnasium environment: ppo-fast classic --help", add_help=False)
    label = subparsers.add_parser("label", help="choose the better of two answers, to train a reward model on")
    label.add_argument("answers", metavar="FILE", help='JSON Lines of {"prompt": text, "answers": [text, text]}')
    label.add_argument("--out", required=True, metavar="FILE", help="JSON Lines of pairs, to which choices are added")
    recipe = subparsers.add_parser("recipe", help="copy a configuration and a few prompts for a common task")
    recipe.add_argument("name", nargs="?", metavar="NAME", help="the recipe; without it all recipes are listed")
    recipe.add_argument("folder", nargs="?", metavar="FOLDER", help="the folder to copy to (default: NAME)")
    memory = subparsers.add_parser(
        "memory",
        help="calculate the peak GPU memory of a run, by phase and part",
        description="Calculate the peak GPU memory of a run, by phase and part. It has all options of the trainer.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _add_memory_options(memory)
    doctor = subparsers.add_parser("doctor", help="report what this machine will run, and check every operation on it")
    form = doctor.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the same as JSON, with a hash of each compiled kernel")
    form.add_argument("--report", action="store_true", help="print a report for an issue, with these hashes")
    if commands:
        from ppo_fast.common.options import add_options
        from ppo_fast.llm.config import PPOConfig

        for name in commands:
            add_options({"train": train, "critic": critic, "memory": memory}[name], PPOConfig)
    return parser, train


def _add_run_options(train: argparse.ArgumentParser) -> None:
    """Add what a run needs besides PPOConfig: model, data, rewards, and the folder of an earlier run."""
    train.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of these options, such as OUT/config.yaml of an earlier run; the command line has"
        " precedence",
    )
    train.add_argument(
        "--model",
        metavar="NAME",
        help="causal language model with its tokenizer: a folder, a .gguf file, or OWNER/NAME[@REVISION] on the Hugging"
        " Face hub (required, no default)",
    )
    train.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON Lines or .parquet file, folder of .parquet files or of save_to_disk of Hugging Face's datasets,"
        " perhaps with :SPLIT, or OWNER/NAME[@REVISION][:CONFIGURATION][:SPLIT] on the hub (required, no default)",
    )
    train.add_argument(
        "--prompt-field",
        metavar="NAME",
        help="field of the prompt, a text, or a list of messages for the chat template (default: prompt)",
    )
    train.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="apply the chat template of the tokenizer to plain prompts, too, as messages of a user (default: no)",
    )
    train.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help='arguments of the chat template, such as {"enable_thinking": false} (default: none)',
    )
    train.add_argument(
        "--eval-prompts",
        metavar="FILE",
        help="held-out prompts to evaluate on, in the format of --prompts (default: none, no evaluation)",
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
        metavar="NAME",
        help="sequence classifier with one output and its tokenizer, a folder or a name on the hub; may be repeated"
        " (default: none)",
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
        metavar="NAME",
        help="reward model or OUT/critic of a run, a folder or a name on the hub, from which the critic starts"
        " (default: the actor)",
    )
    train.add_argument(
        "--pad-token", metavar="TOKEN", help="a token of the vocabulary to pad with (default: the tokenizer's own)"
    )
    train.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        help="run the Python files in the folder of --model (default: no)",
    )


def _add_options_of_earlier_runs(train: argparse.ArgumentParser) -> None:
    earlier = train.add_mutually_exclusive_group()
    earlier.add_argument("--overwrite", action="store_true", default=False, help="replace an earlier run in OUT")
    earlier.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="resume from the newest checkpoint in OUT, or start if there is none; with the same options and data",
    )
    train.add_argument(
        "--allow-changes",
        action="store_true",
        default=False,
        help="with --resume: continue although prompts, rewards or tokenizer have changed since the checkpoint",
    )


def _add_critic_options(critic: argparse.ArgumentParser) -> None:
    critic.add_argument(
        "--rollouts",
        default="sample",
        metavar="FILE",
        help="a file, or a folder of files, that a run of this model with --dump-rollouts wrote (OUT/rollouts); sample:"
        " answers are sampled (default: sample)",
    )
    critic.add_argument(
        "--answers", type=int, default=1024, metavar="INT", help="number of answers to sample (default: 1024)"
    )
    critic.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="FLOAT",
        help="share of the prompts whose answers are held out for the report (default: 0.1)",
    )
    critic.add_argument("--overwrite", action="store_true", default=False, help="replace an earlier critic in OUT")


def _add_memory_options(memory: argparse.ArgumentParser) -> None:
    memory.add_argument(
        "--model",
        metavar="NAME",
        required=True,
        help="a folder, a .gguf file or a name on the hub, of which the configuration is read",
    )
    memory.add_argument(
        "--prompt-tokens", type=int, default=256, metavar="INT", help="longest prompt, in tokens (default: 256)"
    )
    memory.add_argument(
        "--gpu-gib", type=float, default=None, metavar="FLOAT", help="memory of the GPU in GiB (default: enough)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 after bad input, 2 after a bad command line, 130 after Ctrl-C, 143 after SIGTERM.
    """
    wait_passively()
    plain_warnings()
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["classic"]:  # its options need Gymnasium, which other commands do not
        return _classic(given[1:])
    try:
        parser, train_parser = build_parser([name for name in CONFIGURED if name in given[:1]])
    except ModuleNotFoundError as error:
        print_error(f"ppo-fast: error: ppo-fast {given[0]} needs the extra ppo_fast[train]: {error}")
        return 1
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        own = {"train": train_parser, "critic": vars(arguments).get("command_parser")}.get(arguments.command)
        (own or parser).reject_unknown(unknown)
    if arguments.command == "train":
        return _train(arguments, train_parser)
    commands = {"doctor": _doctor, "label": _label, "recipe": _recipe, "memory": _memory, "compile": _compile}
    commands["critic"] = _critic
    try:
        return commands[arguments.command](arguments)
    except UserError as error:
        print_error(f"ppo-fast: error: {error}")
        return 1


def _train(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from ppo_fast.cli.train import resolve, train

    name = "ppo-fast"
    try:
        if (size := process_count()) > 1:
            name = f"ppo-fast: rank {this_rank(size)}"
        status = train(arguments, *resolve(arguments, parser))
    except UserError as error:
        print_error(f"{name}: error: {error}")
        status = 1
    except KeyboardInterrupt:
        print_error(f"{name}: stopped")
        status = 130
    except RuntimeError as error:
        from ppo_fast.llm.distributed import peer_failure

        reason = peer_failure(error)
        if not reason:
            raise
        print_error(f"{name}: error: {reason}")
        status = 1
    from ppo_fast.llm.distributed import shutdown

    shutdown(status)
    return status


def _critic(arguments: argparse.Namespace) -> int:
    from ppo_fast.cli.critic import fit
    from ppo_fast.cli.train import resolve

    try:
        return fit(arguments, *resolve(arguments, arguments.command_parser, required=["model"]))
    except KeyboardInterrupt:
        print_error("ppo-fast: stopped")
        return 130


def _classic(given: list[str]) -> int:
    try:
        from ppo_fast.classic import trainer as classic
    except ImportError as error:
        print_error(f"ppo-fast: error: classic RL needs the extra ppo_fast[classic]: {error}")
        return 1
    parser = _Parser(prog="ppo-fast classic", description="PPO on a Gymnasium environment.", allow_abbrev=False)
    classic.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        parser.reject_unknown(unknown)
    try:
        return classic.main(arguments)
    except UserError as error:
        print_error(f"ppo-fast: error: {error}")
        return 1
    except KeyboardInterrupt:
        print_error("ppo-fast: stopped")
        return 130


def _doctor(arguments: argparse.Namespace) -> int:
    from ppo_fast import doctor

    return doctor.main(as_json=arguments.json, report=arguments.report)


def _label(arguments: argparse.Namespace) -> int:
    print(f"reading {arguments.answers}; importing transformers takes some seconds", flush=True)
    from ppo_fast.llm.preferences.label import label

    label(arguments.answers, arguments.out)
    return 0


def _memory(arguments: argparse.Namespace) -> int:
    from ppo_fast.common.options import options
    from ppo_fast.llm import memory
    from ppo_fast.llm.config import PPOConfig, options_of
    from ppo_fast.llm.hub import find_model
    from ppo_fast.llm.models.loading import load_model_config

    fields = options(PPOConfig)
    config = options_of({name: value for name, value in vars(arguments).items() if name in fields})
    gib = arguments.gpu_gib
    if gib is not None and not 0 < gib < float("inf"):
        raise UserError(f"--gpu-gib must be a number above 0, got {gib}")
    bytes_ = None if gib is None else round(gib * 2**30)
    path = find_model(arguments.model, weights=False).path
    print(memory.table(load_model_config(path), config, arguments.prompt_tokens, bytes_))
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

"""RLHF from end to end: text, supervised start, preferences, reward model, PPO, evaluation.

    python -m ppo_fast.examples.rlhf [--text FILE] [--pairs FILE.jsonl] [--seed N] [--out DIR]

1. Supervised start: a byte-level BPE tokenizer and a small Llama are made from scratch on the text: by default the
   language reference that every CPython carries, so nothing is downloaded.
2. Preferences: what really follows a piece of the text is better than the same words in disorder, or some replaced,
   repetitions, misspelt words, and than what the model writes itself. Or pairs from a file (`ppo-fast label` makes it).
3. Reward model: a classifier on the supervised model's backbone learns the pairs, and is set to mean 0 on real text.
4. PPO against it, with an adaptive KL penalty to the supervised model.
5. Evaluation on held-out prompts before and after: the reward model, and a judge that nothing was trained on, an n-gram
   model of text that no other phase has read.

Each phase leaves a folder in DIR and is not repeated when the command is given again; a phase that was killed starts
anew, PPO resumes from its checkpoint. The result is DIR/report.md, with pictures.
"""

import argparse
import sys

from ppo_fast.common.console import announce_imports, console_of

if __name__ == "__main__":
    announce_imports()  # before the imports that take seconds

from ppo_fast.common.errors import UserError, plain_warnings, print_error
from ppo_fast.examples.rlhf.common import Settings
from ppo_fast.examples.rlhf.phases import run


def main(argv: list[str] | None = None) -> int:
    plain_warnings()
    parser = argparse.ArgumentParser(prog="python -m ppo_fast.examples.rlhf", description=str(__doc__).split("\n")[0])
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to learn from (default: CPython's language reference)"
    )
    parser.add_argument(
        "--pairs", metavar="FILE", help="JSON Lines of prompt, chosen, rejected (default: made from text)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--out", default="runs/rlhf", metavar="DIR", help="folder of the results (default: runs/rlhf)")
    parser.add_argument("--ppo-steps", type=int, default=70, help="PPO steps (default: 70)")
    parser.add_argument("--kl-target", type=float, default=16.0, help="KL per answer to aim at, in nats (default: 16)")
    parser.add_argument(
        "--entropy", type=float, default=0.945, help="share of the supervised model's entropy to keep (default: 0.945)"
    )
    parser.add_argument(
        "--fluency", type=float, default=0.0, help="weight of the reference's mean log-likelihood (default: 0)"
    )
    parser.add_argument(
        "--coherence",
        type=float,
        default=0.5,
        help="weight of few repetitions and words of the prompt (default: 0.5)",
    )
    parser.add_argument(
        "--sweep",
        nargs="*",
        type=float,
        metavar="KL_COEF",
        help="PPO again with each of these fixed weights of the KL penalty, to show over-optimisation (default: none;"
        " without numbers: 0 0.01 0.03 0.1 0.3)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    given = parser.parse_args(argv)
    sweep = (0.0, 0.01, 0.03, 0.1, 0.3) if given.sweep == [] else tuple(given.sweep or ())
    settings = Settings(
        text=given.text,
        pairs=given.pairs,
        seed=given.seed,
        out=given.out,
        ppo_steps=given.ppo_steps,
        kl_target=given.kl_target,
        entropy=given.entropy,
        fluency=given.fluency,
        coherence=given.coherence,
        sweep=sweep,
        device=given.device,
        quiet=given.quiet,
    )
    try:
        run(settings, console_of(quiet=given.quiet))
    except UserError as error:
        print_error(f"rlhf: error: {error}")
        return 1
    except KeyboardInterrupt:
        print_error("rlhf: stopped; the same command continues it")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

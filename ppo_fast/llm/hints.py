"""Hints: what the numbers of a run say about its options, in one sentence each, once per run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ppo_fast.llm.config import PPOConfig

PATIENCE = 3  # steps in a row, after which it is no chance
RECENT = 10  # steps over which a noisy number is averaged
EXPLAINED = 0.05  # explained variance of a critic that is of no use
CLIPPED = 0.3  # share of the tokens of a step; 0.05 to 0.2 is usual
MOVED = 0.1  # approx_kl of a step, in nats per token; up to 0.02 is usual
COLLAPSED, CERTAIN = 0.1, 0.1  # entropy: share of that of the first step, and nats per token
FAR = 1.0  # KL to the reference, in nats per token
GROWN, NOTABLE = 1.5, 0.05  # growth of the KL within a window, and nats per token from which it counts


@dataclass
class Hints:
    """Looks at each step's numbers; a step's hints are those that were not given before."""

    config: PPOConfig
    given: set[str] = field(default_factory=set)
    endless: int = 0  # steps in a row in which no answer ended
    first_entropy: float | None = None
    explained: list[float] = field(default_factory=list)  # by the critic, in steps whose scores differed
    kl_and_score: list[tuple[float, float]] = field(default_factory=list)  # of each step that has both

    def after(self, metrics: Mapping[str, float], scores: Sequence[float]) -> list[str]:
        """Sentences about a step, from its metrics and the scores of its completions."""
        self.endless = self.endless + 1 if metrics.get("ended", 1.0) == 0 else 0
        if self.first_entropy is None:
            self.first_entropy = metrics.get("entropy")
        if "explained_variance" in metrics and not _all_equal(scores):
            self.explained.append(metrics["explained_variance"])
        if "kl" in metrics and "score" in metrics:
            self.kl_and_score.append((metrics["kl"], metrics["score"]))
        found = []
        for rule in RULES:
            text = None if rule.__name__ in self.given else rule(self, metrics, scores)
            if text is not None:
                self.given.add(rule.__name__)
                found.append(f"hint: {text}")
        return found


def _all_equal(scores: Sequence[float]) -> bool:
    return len(scores) > 1 and len(set(scores)) == 1


def _equal_scores(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    if not _all_equal(scores):
        return None
    return (
        f"all {len(scores)} answers of step {metrics['step']:.0f} have the score {scores[0]:.4g}, so there was nothing"
        " to learn from: check that the reward reads the answers right, give partial credit, or take other prompts"
        " (harder ones, if these are solved)"
    )


def _large_step(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    clipped, moved = metrics.get("learn/clip_fraction", 0.0), metrics.get("learn/approx_kl", 0.0)
    if clipped > CLIPPED:  # NaN is not
        found = (
            f"{100 * clipped:.0f} % of the tokens were clipped in step {metrics['step']:.0f}, where 5 to 20 % is usual"
        )
    elif moved > MOVED:
        found = (
            f"step {metrics['step']:.0f} moved the policy by an approx_kl of {moved:.2f} nats per token, where up to"
            " 0.02 is usual"
        )
    else:
        return None
    c = hints.config
    return (
        f"{found}: the steps are too large; lower lr ({c.lr:g}), epochs ({c.epochs}) or minibatches ({c.minibatches}),"
        f" or set target_kl ({'none' if c.target_kl is None else f'{c.target_kl:g}'}), which ends the actor's part of a"
        " step early"
    )


def _endless(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    if not (hints.endless >= PATIENCE or (hints.endless and metrics["step"] == 1)):
        return None
    steps = "the first step" if metrics["step"] == 1 else f"the last {hints.endless} steps"
    return (
        f"no answer of {steps} ended within {hints.config.max_new_tokens} tokens, so all were cut: raise"
        " max_new_tokens, name a stop text (stop), set missing_eos_penalty, or check that the model writes its end"
        " token (a chat model needs its chat template: --chat)"
    )


def _empty(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    if metrics["step"] != 1 or metrics.get("ended", 0.0) < 1 or metrics.get("answer_tokens", 2.0) > 1:
        return None
    return (
        "all answers of the first step are empty (an end token alone): check how the prompts end (a chat model needs"
        " its chat template: --chat)"
    )


def _collapsed(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    first, entropy = hints.first_entropy, metrics.get("entropy")
    if first is None or entropy is None or not (entropy < COLLAPSED * first and entropy < CERTAIN):
        return None
    c = hints.config
    return (
        f"the entropy fell from {first:.2f} to {entropy:.3f} nats per token, so that the answers to a prompt are almost"
        f" always the same: if the score does not rise any more, raise entropy_coef ({c.entropy_coef:g}) or kl_coef"
        f" ({c.kl_coef:g}), set entropy_target, or lower lr ({c.lr:g})"
    )


def _far(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    c, kl = hints.config, metrics.get("kl", 0.0)
    advice = f"raise kl_coef ({c.kl_coef:g}) or lower lr ({c.lr:g})"
    if kl > FAR:  # NaN is not
        return (
            f"the KL to the reference is {kl:.2f} nats per token, so the answers have little left of the start model:"
            f" look at them for a reward that is exploited; {advice}"
        )
    window = max(PATIENCE, min(RECENT, c.total_steps // 5))
    before, now = hints.kl_and_score[-2 * window : -window], hints.kl_and_score[-window:]
    if len(before) < window:
        return None
    (old_kl, old_score), (new_kl, new_score) = ([fmean(x) for x in zip(*part, strict=True)] for part in (before, now))
    if not (new_kl > NOTABLE and new_kl > GROWN * old_kl and new_score <= old_score):
        return None
    return (
        f"the KL to the reference grew from {old_kl:.3f} to {new_kl:.3f} nats per token within {2 * window} steps,"
        f" while the score did not improve ({old_score:.4g} and then {new_score:.4g}): {advice}"
    )


def _critic(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    steps, step = hints.config.total_steps, metrics["step"]
    recent = hints.explained[-max(1, min(RECENT, steps // 6)) :]
    # in the first step it has learned nothing yet
    if 3 * step < steps or step == 1 or not recent or not fmean(recent) < EXPLAINED:
        return None
    return (
        f"after a third of the run (step {step:.0f} of {steps}) the critic explains {fmean(recent):.2f} of the variance"
        f" of the returns: raise critic_lr ({hints.config.critic_lr:g}),"
        " let the critic learn first (critic_warmup_steps), or fit it before the run (ppo-fast critic) and start from"
        " it (critic_model)"
    )


Rule = Callable[[Hints, Mapping[str, float], Sequence[float]], str | None]
RULES: tuple[Rule, ...] = (_equal_scores, _large_step, _endless, _empty, _collapsed, _far, _critic)

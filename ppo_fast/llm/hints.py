"""Hints: what the numbers of a run say about its options, in one sentence each, once per run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ppo_fast.llm.config import PPOConfig

PATIENCE = 3  # steps in a row, after which it is no chance
CRITIC_STEPS = 20
CLIPPED = 0.3  # share of the first step's tokens; 0.05 to 0.2 is usual
FAR = 1.0  # KL to the reference, in nats per token


@dataclass
class Hints:
    """Looks at each step's numbers; a step's hints are those that were not given before."""

    config: PPOConfig
    given: set[str] = field(default_factory=set)
    equal: int = 0  # steps in a row whose scores were all equal
    uncritical: int = 0  # steps since the start that the critic explained nothing of

    def after(self, metrics: Mapping[str, float], scores: Sequence[float]) -> list[str]:
        """Sentences about a step, from its metrics and the scores of its completions."""
        self.equal = self.equal + 1 if len(scores) > 1 and len(set(scores)) == 1 else 0
        if metrics.get("explained_variance", 1.0) <= 0 and self.uncritical == metrics["step"] - 1:
            self.uncritical += 1
        found = []
        for rule in RULES:
            text = None if rule.__name__ in self.given else rule(self, metrics, scores)
            if text is not None:
                self.given.add(rule.__name__)
                found.append(f"hint: {text}")
        return found


def _equal_scores(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    if hints.equal < PATIENCE:
        return None
    return (
        f"all answers of the last {PATIENCE} steps have the score {scores[0]:.4g}, so there is nothing to learn from:"
        " check that the reward reads the answers right, give partial credit, or take other prompts"
    )


def _clipping(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    clipped = metrics.get("learn/clip_fraction", 0.0)
    if metrics["step"] != hints.config.critic_warmup_steps + 1 or not clipped > CLIPPED:
        return None
    c = hints.config
    return (
        f"{100 * clipped:.0f} % of the tokens were clipped in the actor's first step, where 5 to 20 % is usual: the"
        f" steps are too large; lower lr ({c.lr:g}), epochs ({c.epochs}) or minibatches ({c.minibatches})"
    )


def _none_ended(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    if metrics["step"] != 1 or metrics.get("ended", 1.0) > 0:
        return None
    return (
        f"no answer of the first step ended within {hints.config.max_new_tokens} tokens, so all were cut: raise"
        " max_new_tokens, name a stop text (stop), or check that the model writes its end token (a chat model needs its"
        " chat template: --chat)"
    )


def _empty(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    if metrics["step"] != 1 or metrics.get("ended", 0.0) < 1 or metrics.get("answer_tokens", 2.0) > 1:
        return None
    return (
        "all answers of the first step are empty (an end token alone): check how the prompts end (a chat model needs"
        " its chat template: --chat)"
    )


def _far(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    if not metrics.get("kl", 0.0) > FAR:  # NaN is not
        return None
    return (
        f"the KL to the reference is {metrics['kl']:.2f} nats per token, so the answers have little left of the start"
        f" model: look at them for a reward that is exploited; raise kl_coef ({hints.config.kl_coef:g}) or lower lr"
        f" ({hints.config.lr:g})"
    )


def _critic(hints: Hints, metrics: Mapping[str, float], scores: Sequence[float]) -> str | None:
    if hints.uncritical < CRITIC_STEPS or hints.equal:
        return None
    return (
        f"after {CRITIC_STEPS} steps the critic explains nothing of the returns (explained variance below 0): raise"
        f" critic_lr ({hints.config.critic_lr:g}), or let it learn first (critic_warmup_steps)"
    )


Rule = Callable[[Hints, Mapping[str, float], Sequence[float]], str | None]
RULES: tuple[Rule, ...] = (_equal_scores, _clipping, _none_ended, _empty, _far, _critic)

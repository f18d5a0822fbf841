"""Ready reward functions: plain functions f(prompts, completions, **columns) -> one float for each answer.

    from ppo_fast.rewards import numeric, length_band
    rewards = {"right": numeric, "length": length_band}
    PPOTrainer(config, actor, tokenizer, rows, rewards, reward_weights={"right": 1.0, "length": 0.1})

or, on the command line, with options and the names of the data's own columns:

    ppo-fast train ... --reward 'ppo_fast.rewards:numeric(reference=answer)' \\
        --reward 'ppo_fast.rewards:length_band(high=40)' --reward-weight 1 0.1

Each is in [0, 1] unless its docstring says otherwise. `reference` is the column of right answers: one for each
completion, a text, or a list of texts of which the best counts. An answer without one (None) raises
ValueError: a silent 0 would teach the model something wrong.
"""

from ppo_fast.llm.reward.function import Configured, load_reward
from ppo_fast.rewards.dialogue import length_band, no_echo, no_repetition, stays_in_role
from ppo_fast.rewards.fluency import Fluency
from ppo_fast.rewards.form import json_schema, matches
from ppo_fast.rewards.group import group_diversity
from ppo_fast.rewards.labels import label_match, ndcg, span_f1
from ppo_fast.rewards.matching import exact_match, f1
from ppo_fast.rewards.numbers import number_in, numeric
from ppo_fast.rewards.overlap import bleu, chrf, rouge_l
from ppo_fast.rewards.pool import Pool

__all__ = [
    "Configured",
    "Fluency",
    "Pool",
    "bleu",
    "chrf",
    "exact_match",
    "f1",
    "group_diversity",
    "json_schema",
    "label_match",
    "length_band",
    "load_reward",
    "matches",
    "ndcg",
    "no_echo",
    "no_repetition",
    "number_in",
    "numeric",
    "rouge_l",
    "span_f1",
    "stays_in_role",
]

"""Learners and experience of a policy, for tests that have no trainer."""

import torch

from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.experience import Experience, ExperienceMaker
from ppo_fast.llm.learn import Learner
from ppo_fast.llm.models.policy import Policy
from ppo_fast.llm.models.reference import Reference
from ppo_fast.llm.optimizer import Optimizer, Optimizers
from ppo_fast.llm.packing.rollout import Rollout


def learner_of(policy: Policy, config: PPOConfig, reference: Reference = None) -> Learner:
    """A learner in one process, with optimizers as a trainer makes them."""
    optimizers = Optimizers(
        Optimizer(policy.actor, config.lr, config), Optimizer(policy.critic, config.critic_lr, config)
    )
    return Learner(policy, reference, optimizers, config, generator=torch.Generator())


def experience_of(
    policy: Policy, reference: Reference, rollout: Rollout, scores: torch.Tensor, config: PPOConfig
) -> Experience:
    """Experience of the rows in their order."""
    return ExperienceMaker(policy, reference, config).make(rollout, scores)

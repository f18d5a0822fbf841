"""PPO updates with OpenRLHF's own functions, as they are and replaced by ppo_fast's: the same numbers.

    pip install -e . "openrlhf==0.11.*" flash-attn
    python -m ppo_fast.examples.with_openrlhf [--updates N]

A machine on which OpenRLHF can be imported is all it needs, one with a GPU: no Ray cluster, no download. A tiny Llama
of random weights answers once; the reward is the share of even tokens in an answer. Each update is one step of actor
and critic on these answers; the time is that of OpenRLHF's functions and their backward, without the models. In a run
of OpenRLHF `ppo_fast.integrations.openrlhf.patch()` in every process is all that changes.
"""

import argparse
import copy
import sys
import time
from typing import NamedTuple

from ppo_fast.examples.beside import Progress, announce, failed

announce(__name__, "PPO updates with OpenRLHF's own functions, as they are and with ppo_fast in their place")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

INSTALL = 'pip install -e . "openrlhf==0.11.*" flash-attn'
VOCABULARY, PROMPTS, PROMPT, ANSWER, END = 2048, 8, 8, 48, 0


class Answers(NamedTuple):
    """Prompts and answers [B, PROMPT + ANSWER]; mask [B, ANSWER] counts an answer's tokens up to its end."""

    sequences: Tensor
    mask: Tensor
    scores: Tensor  # (B,)


class Update(NamedTuple):
    loss: float
    numbers: Tensor  # advantages, returns, log-probabilities and the gradients by logits and values, in a row
    ms: float


def make_models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Actor and critic."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT + ANSWER,
        initializer_range=0.1,
        eos_token_id=END,
        bos_token_id=None,
    )
    shape.num_labels = 1
    actor: torch.nn.Module = LlamaForCausalLM(shape)
    critic: torch.nn.Module = LlamaForTokenClassification(shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return actor.to(device).eval(), critic.to(device).eval()  # without dropout


@torch.no_grad()
def make_answers(actor: torch.nn.Module) -> Answers:
    """Sample token by token; an answer ends with a token that every 50th sample is, instead of one of 2048."""
    draw = torch.Generator().manual_seed(0)
    sequences = torch.randint(1, VOCABULARY, (PROMPTS, PROMPT), generator=draw).to(next(actor.parameters()).device)
    for _ in range(ANSWER):
        shares = actor(input_ids=sequences).logits[:, -1].float().softmax(-1).cpu()
        token = torch.multinomial(shares, 1, generator=draw)
        ended = torch.rand(PROMPTS, 1, generator=draw) < 0.02
        sequences = torch.cat((sequences, torch.where(ended, END, token).to(sequences.device)), 1)
    answers = sequences[:, PROMPT:]
    mask = (answers == END).cumsum(1) - (answers == END).long() == 0  # up to the first END, which counts
    scores = (mask & (answers % 2 == 0)).sum(1) / mask.sum(1)
    return Answers(sequences, mask, scores)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(answers: Answers, updates: int, progress: Progress | None = None) -> list[Update]:
    """Look OpenRLHF's functions up at the call, so that a patch takes effect."""
    from openrlhf.models import PolicyLoss, ValueLoss
    from openrlhf.models.utils import compute_approx_kl, compute_reward, log_probs_from_logits
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    actor, critic = make_models()
    reference = copy.deepcopy(actor)
    with torch.no_grad():  # as if trained for a while: the KL is not 0
        for weight in reference.parameters():
            weight.mul_(1.02)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-3)
    policy_loss, value_loss = PolicyLoss(clip_eps_high=0.28, dual_clip=3.0), ValueLoss(clip_eps=0.2)
    get_advantages = RemoteExperienceMaker.get_advantages_and_returns  # it reads nothing of its object, which wants Ray
    labels, mask = answers.sequences[:, PROMPT:], answers.mask

    def outputs(model: torch.nn.Module) -> Tensor:
        return model(input_ids=answers.sequences).logits[:, PROMPT - 1 : -1].contiguous()

    with torch.no_grad():
        old_logprobs, old_values = log_probs_from_logits(outputs(actor), labels), outputs(critic).squeeze(-1)
        kl = compute_approx_kl(old_logprobs, log_probs_from_logits(outputs(reference), labels))
    made: list[Update] = []
    for _ in range(updates):
        actor_out, critic_out = outputs(actor), outputs(critic)
        logits, values = (x.detach().requires_grad_() for x in (actor_out, critic_out))
        started = now()
        rewards = compute_reward(answers.scores, 0.05, kl, mask)
        advantages, returns = get_advantages(None, old_values, rewards, mask, 1.0, 0.95)
        logprobs = log_probs_from_logits(logits, labels)
        loss = policy_loss(logprobs, old_logprobs, advantages, mask)[0]
        loss = loss + value_loss(values.squeeze(-1), old_values, returns, mask)
        gradients = torch.autograd.grad(loss, (logits, values))
        ms = 1000 * (now() - started)
        optimizer.zero_grad()
        torch.autograd.backward((actor_out, critic_out), gradients)
        optimizer.step()
        numbers = (advantages, returns, logprobs.detach(), *gradients)
        made.append(Update(loss.item(), torch.cat([x[mask].flatten() for x in numbers]), ms))
        if progress is not None:
            progress.show(progress.done + 1)
    return made


def compare(updates: int) -> list[tuple[Update, Update]]:
    """Each update by OpenRLHF and by ppo_fast, from the same weights and answers."""
    from ppo_fast.integrations import openrlhf as fast

    answers = make_answers(make_models()[0])
    progress = Progress("update", 2 * (updates + 1))
    train(answers, 1, progress)  # the first call of everything takes longer
    theirs = train(answers, updates, progress)
    with fast.patch(quiet=True):
        train(answers, 1, progress)
        ours = train(answers, updates, progress)
    return list(zip(theirs, ours, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_fast.examples.with_openrlhf", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--updates", type=int, default=8, help="PPO updates (default: 8)")
    updates = parser.parse_args(argv).updates
    try:
        import transformers  # noqa: F401

        from ppo_fast.integrations import openrlhf as fast

        with fast.patch():  # prints what it replaces
            pass
    except ImportError as error:
        return failed("with_openrlhf", error, INSTALL)
    rows = compare(updates)
    print("update   loss: OpenRLHF  ppo_fast   largest difference   ms: OpenRLHF  ppo_fast")
    for i, (theirs, ours) in enumerate(rows, 1):
        difference = (theirs.numbers - ours.numbers).abs().max().item()
        print(f"{i:6d}{theirs.loss:17.6f}{ours.loss:10.6f}{difference:21.1e}{theirs.ms:15.1f}{ours.ms:10.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

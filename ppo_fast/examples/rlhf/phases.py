"""The five phases, each from the folders of those before it."""

import copy
import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from ppo_fast.common.checkpoint import UNFINISHED, recover, replace
from ppo_fast.common.console import counted, say
from ppo_fast.common.device import pick_device
from ppo_fast.common.errors import UserError
from ppo_fast.common.folders import claim
from ppo_fast.common.plots import can_draw
from ppo_fast.examples.rlhf import report
from ppo_fast.examples.rlhf.common import Settings, held_out_stretches, load_supervised, rewards_of
from ppo_fast.examples.rlhf.text import ANSWER_TOKENS, KINDS, cut, make_tokenizer, read_text, spoil, stretches
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.generate import generate
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.head import LanguageModel, decoder_of
from ppo_fast.llm.models.reward_model import load_reward_model
from ppo_fast.llm.models.weights import no_loading_bars
from ppo_fast.llm.preferences.reward_model import Pair, accuracy, calibrate, read_pairs, train_reward_model, write_pairs
from ppo_fast.llm.sampler import SamplingParams
from ppo_fast.llm.trainer import PPOTrainer
from ppo_fast.rewards import Fluency
from ppo_fast.rewards.overlap import package


def run(settings: Settings, console: Console) -> report.Report:
    """Run all phases and return the contents of DIR/report.json."""
    begun = time.perf_counter()

    package("sacrebleu", "sacrebleu")  # which the last phase needs, as it does the pictures
    if not can_draw():
        raise UserError("the pictures need matplotlib: pip install matplotlib")
    text = read_text(settings.text)
    given = read_pairs(settings.pairs) if settings.pairs else None  # errors in it come before any training
    out = Path(settings.out)
    _same_settings(out, settings)
    parts = cut(text, settings.seed)
    seconds = {}
    phases: list[tuple[str, Callable[[Path], None]]] = [
        ("supervised", lambda folder: supervised(folder, parts, settings, console)),
        ("reward_model", lambda folder: reward_model(folder, out, parts, given, settings, console)),
    ]
    for name, phase in phases:
        start = time.perf_counter()
        once(out / name, phase, console)
        seconds[name] = time.perf_counter() - start
    start = time.perf_counter()
    ppo(out, "ppo", parts, settings, console)
    seconds["ppo"] = time.perf_counter() - start
    say(console, "comparing before and after PPO on held-out prompts")
    found = report.compare(out, parts, settings)
    for coefficient in settings.sweep:
        ppo(out, f"sweep/{coefficient:g}", parts, settings, console, fixed_kl=coefficient)
    found["seconds"] = {**seconds, "all": time.perf_counter() - begun}
    report.write(out, found, settings)
    report.show(found, console)
    say(console, f"report.md, pictures and the models of all phases are in {out}")
    return found


def _same_settings(out: Path, settings: Settings) -> None:
    """Reject folders that other settings have made."""
    free = {"out", "quiet", "sweep", "device"}
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in free}
    path = out / "settings.json"
    try:
        claim(out, "the rlhf example")
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in values if values[name] != known.get(name)]
            if changed:
                raise UserError(
                    f"{out} was made with {changed[0]} = {known.get(changed[0])}, not {values[changed[0]]}: take"
                    " another --out, or remove it"
                )
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use {out}: {error}") from error


def once(folder: Path, phase: Callable[[Path], None], console: Console) -> None:
    """Run a phase that fills a folder, or leaves the folder as it is if it is there already."""
    recover(folder)
    if folder.exists():
        say(console, f"{folder.name}: there already")
        return
    new = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    with no_loading_bars():
        phase(new)
    replace(new, folder)


def supervised(folder: Path, parts: dict[str, list[str]], settings: Settings, console: Console) -> None:
    """Phase 1: tokenizer and language model, from the text alone."""
    set_seed(settings.seed)
    say(console, "phase 1: a tokenizer and a language model from the text")
    tokenizer = make_tokenizer(parts["supervised"], settings.vocabulary)
    device = pick_device(settings.device)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=11 * settings.width // 4,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = nn.Module.to(LlamaForCausalLM(config), device)
    stream = _stream(tokenizer, parts["supervised"]).to(device)
    steps, rows, width = settings.supervised_steps, 16, 96
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 20 * (step + 1) / steps) * (1 - 0.95 * step / steps)
    )
    with counted(console, "supervised steps", steps) as advance:
        for step in range(1, steps + 1):
            starts = torch.randint(len(stream) - width, (rows, 1), device=device)
            loss = _cross_entropy(model, stream[starts + torch.arange(width + 1, device=device)])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance(step, f"loss {loss.item():.3f}")
    perplexity = math.exp(held_out_loss(model.eval(), _stream(tokenizer, parts["held_out"]).to(device), width))
    say(console, f"held-out perplexity {perplexity:.1f} per token, {len(stream)} tokens of text")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts = [s.prompt for s in stretches(tokenizer, parts["preferences"], settings.eval_prompts, settings.seed + 8)]
    entropy = round(own_entropy(model, tokenizer, prompts, settings), 3)
    found = {
        "held_out_perplexity": perplexity,
        "entropy": entropy,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (folder / "result.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


def _stream(tokenizer: PreTrainedTokenizerFast, passages: list[str]) -> torch.Tensor:
    return torch.tensor([i for ids in tokenizer(passages)["input_ids"] for i in [*ids, tokenizer.eos_token_id]])


def _cross_entropy(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, width: int) -> float:
    """Cross entropy in nats per token, over windows side by side."""
    windows = stream[: len(stream) // (width + 1) * (width + 1)].view(-1, width + 1)
    losses = [_cross_entropy(model, some) * len(some) for some in windows.split(16)]
    return float(torch.stack(losses).sum() / len(windows))


def reward_model(
    folder: Path,
    out: Path,
    parts: dict[str, list[str]],
    given: list[Pair] | None,
    settings: Settings,
    console: Console,
) -> None:
    """Phases 2 and 3: pairs, and the classifier that learns them.

    They are made from text that the supervised model has not read: it knows its own text by heart, and a classifier on
    its backbone would learn to tell what it knows from what it does not.
    """
    set_seed(settings.seed + 1)
    actor, tokenizer = load_supervised(out)
    actor = nn.Module.to(actor, pick_device(settings.device))
    if given is None:
        say(console, "phase 2: pairs of a better and a worse text")
        training = make_pairs(actor, tokenizer, parts["preferences"], settings.pair_count, settings, console)
        held_out = make_pairs(actor, tokenizer, parts["held_out"], settings.held_out_pairs, settings, console)
    else:
        random.Random(settings.seed).shuffle(given)
        count = max(1, len(given) // 10)
        held_out, training = given[:count], given[count:]
        if not training:
            raise UserError(f"{settings.pairs} has {len(given)} pairs: too few to learn from and to test on")
    write_pairs(folder / "pairs.jsonl", training)
    write_pairs(folder / "held_out_pairs.jsonl", held_out)
    config = copy.deepcopy(actor.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).to(actor.device)
    model.base_model.load_state_dict(decoder_of(actor).state_dict())
    nn.init.zeros_(model.score.weight)  # every answer is as good as another at first

    say(console, f"phase 3: a reward model from {len(training)} pairs")
    batch = 32
    with counted(console, "reward model steps", math.ceil(len(training) / batch)) as advance:
        train_reward_model(
            model,
            tokenizer,
            training,
            epochs=1,
            batch_size=batch,
            lr=1e-3,
            seed=settings.seed,
            after_step=lambda step, steps, loss: advance(step, f"loss {loss:.3f}"),
        )
    real = stretches(tokenizer, parts["held_out"], settings.eval_prompts, settings.seed + 2)
    calibrate(model, tokenizer, [s.prompt for s in real], [s.follows for s in real])
    found = accuracy(model, tokenizer, held_out)
    say(
        console,
        "held-out pairs ranked right: " + ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in found.items()),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "result.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


def make_pairs(
    actor: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    passages: list[str],
    count: int,
    settings: Settings,
    console: Console,
) -> list[Pair]:
    """A third of the rejected answers are the model's own, the others spoilt text."""
    real = stretches(tokenizer, passages, count, settings.seed + 3)
    chooser = random.Random(settings.seed + 4)
    own = own_answers(actor, tokenizer, [s.prompt for s in real[::3]], settings, console)
    pairs = []
    for number, stretch in enumerate(real):
        kind = KINDS[number % len(KINDS)] if number % 3 else "own"
        rejected = spoil(stretch, real, kind, chooser) if number % 3 else own[number // 3]
        if rejected != stretch.follows:
            pairs.append(Pair(stretch.prompt, stretch.follows, rejected, kind))
    return pairs


def own_answers(
    actor: LanguageModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], settings: Settings, console: Console
) -> list[str]:
    """The actor's answers at temperature 1."""
    params = SamplingParams(max_new_tokens=ANSWER_TOKENS)
    found: list[str] = []
    with counted(console, "answers of the model's own", len(prompts)) as advance:
        for start in range(0, len(prompts), 256):
            ids = tokenizer(prompts[start : start + 256])["input_ids"]
            answers = generate(actor, tokenizer, ids, params).ids
            found += tokenizer.batch_decode(answers, skip_special_tokens=True)
            advance(len(found))
    return found


def own_entropy(
    actor: LanguageModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], settings: Settings
) -> float:
    """Of the actor's answers at temperature 1, estimated from what it drew: nats per token."""
    params = SamplingParams(max_new_tokens=ANSWER_TOKENS)
    answers = generate(actor, tokenizer, tokenizer(prompts)["input_ids"], params).ids
    means = Fluency(actor, tokenizer, same_tokens=True)(prompts, tokenizer.batch_decode(answers), answers)
    return -sum(mean * len(ids) for mean, ids in zip(means, answers, strict=True)) / sum(map(len, answers))


def ppo(
    out: Path,
    name: str,
    parts: dict[str, list[str]],
    settings: Settings,
    console: Console,
    *,
    fixed_kl: float | None = None,
) -> None:
    """Phase 4, in out/name; resumes from its own checkpoint."""
    if (out / name / "model").exists():
        say(console, f"{name}: there already")
        return
    weight = "an adaptive KL penalty" if fixed_kl is None else f"a KL penalty of weight {fixed_kl:g}"
    say(console, f"phase 4: PPO with {weight}, in {out / name}")
    with no_loading_bars():
        actor, tokenizer = load_supervised(out)
        classifier, _ = load_reward_model(out / "reward_model")
    critic = Critic.from_reward_model(classifier)  # it knows what is good already (Ouyang et al. 2022, appendix C.4)
    rewards, weights = rewards_of(out, parts, settings)
    entropy = json.loads((out / "supervised" / "result.json").read_text(encoding="utf-8"))["entropy"]
    config = PPOConfig(
        dtype="float32",  # autocast costs more than bfloat16 gains in matrices of this width
        total_steps=settings.ppo_steps,
        prompts_per_step=settings.batch,
        max_new_tokens=ANSWER_TOKENS,
        epochs=2,
        minibatches=2,
        lr=6e-4,
        critic_lr=1e-3,
        warmup_ratio=0.05,
        kl_coef=0.035 if fixed_kl is None else fixed_kl,
        kl_controller="adaptive" if fixed_kl is None else "fixed",
        kl_target=settings.kl_target,
        kl_horizon=1500.0,
        entropy_coef=0.003,
        entropy_target=settings.entropy * entropy,  # or a reward that likes few words would get few words
        entropy_step=0.0003,
        value_clip=None,  # scores are spread over several units: with a clip of 0.2 the values would be late
        eval_every=max(1, settings.ppo_steps // 6),
        save_every=10,
        show_samples_every=0,
        seed=settings.seed,
        out=str(out / name),
        device=settings.device,
        quiet=settings.quiet,
    )
    training = parts["supervised"] + parts["preferences"]
    rows = [{"prompt": s.prompt} for s in stretches(tokenizer, training, settings.prompts, settings.seed + 5)]
    held_out = [{"prompt": s.prompt} for s in held_out_stretches(tokenizer, parts, settings)]
    with no_loading_bars():  # without a penalty the trainer would keep no reference, and the KL is to be shown
        reference = load_supervised(out)[0] if fixed_kl == 0 else None
    trainer = PPOTrainer(
        config,
        actor,
        tokenizer,
        rows,
        {**rewards},
        reward_weights=weights,
        critic=critic,
        reference=reference,
        eval_rows=held_out,
    )
    trainer.resume()
    trainer.train()
    if trainer.stopped_by is not None:
        raise KeyboardInterrupt

"""Sampling: the text of an answer is what the model generated, and one function decides where an answer ends."""

import pytest
import torch
from support.tiny import byte_tokenizer, distinct, tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_fast.common.errors import UserError
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.decoding import CompletionText, StopTexts
from ppo_fast.llm.generate import GenerateSampler, generate
from ppo_fast.llm.report.explanation import visible
from ppo_fast.llm.sample import sample_rollout
from ppo_fast.llm.sampler import Completions, SamplingParams
from ppo_fast.llm.trainer import PPOTrainer
from ppo_fast.rewards import Fluency

CPU = torch.device("cpu")
SPECIAL = {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<pad>"}
BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = [*SPECIAL.values(), "\u2581", "\u2581the", "\u2581capital", "\u2581is", "\u2581Paris", "\u2581END", "Paris"]
WORDS += [*"abcdefghijklmnopqrstuvwxyz.", *BYTES]


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As those of T5 and Gemma 1: words begin with U+2581, and the decoder drops the first space."""
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """As that of Llama 2: BPE with one token for each byte of an unknown character."""
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(WORDS)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


KINDS = {"metaspace": metaspace_tokenizer, "llama": llama_tokenizer}


def ids_of(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


class Fixed:
    """A sampler that gives the same answers to every batch."""

    def __init__(self, answers: list[list[int]], ended: bool = True) -> None:
        self.answers = answers
        self.ended = ended

    def sample(self, prompts, params):
        return Completions([list(ids) for ids in self.answers], [self.ended] * len(prompts))


def config(**options) -> PPOConfig:
    small = {"prompts_per_step": 4, "minibatches": 1, "max_new_tokens": 8, "device": "cpu"}
    return PPOConfig(**{**small, **options})


def preferring(model, *favourites: int, never: tuple[int, ...] = ()):
    """The model with logits that make row i choose favourites[i]."""
    forward = model.forward

    def biased(*args, **options):
        out = forward(*args, **options)
        boost = torch.zeros_like(out.logits)
        for row, token in enumerate(favourites):
            boost[row, :, token] = 60.0
        boost[len(favourites) :, :, list(never)] = -60.0
        out.logits = out.logits + boost
        return out

    model.forward = biased
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_answer_are_the_text_that_the_model_wrote(kind):
    tokenizer, prompt = KINDS[kind](), "the capital is"
    answer = [*ids_of("\u2581Paris"), tokenizer.eos_token_id]
    rollout = sample_rollout(Fixed([answer]), tokenizer, [{"prompt": prompt}], config(prompts_per_step=1), CPU)
    whole = tokenizer(prompt)["input_ids"] + answer
    assert rollout.completions == [" Paris"]
    assert prompt + rollout.completions[0] == tokenizer.decode(whole, skip_special_tokens=True)
    assert rollout.raw_completions == [" Paris<end>"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("Paris", "\u2581is"), "Paris is"),  # continues the prompt's last word
        (("\u2581", "\u2581Paris"), "  Paris"),
        ((".", "\u2581the"), ". the"),
        (("\u2581the", "<pad>", "\u2581is"), " the is"),  # a pad token that the model chose itself
    ],
)
def test_spaces_of_an_answer_are_kept(kind, words, text):
    texts = CompletionText(KINDS[kind](), [ids_of("\u2581the", "\u2581capital", "<end>")])
    assert texts.decode([ids_of(*words)]) == [text]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [("\u2581Paris", "\u2581is"), ("Paris",), (".",)])
def test_fluency_reads_the_tokens_of_an_answer_that_the_model_wrote(kind, words):
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    asked = tokenizer("the capital is")["input_ids"]
    (completion,) = CompletionText(tokenizer, [asked]).decode([ids_of(*words)])
    judge = Fluency(tiny_llama(len(WORDS)), tokenizer)
    for prompt in ("the capital is", [{"role": "user", "content": "the capital is"}]):
        found = judge._continuation(prompt, asked, completion)
        assert tokenizer.decode([*asked, *found]) == "the capital is" + completion


def test_an_answer_to_special_tokens_alone_begins_the_text():
    assert CompletionText(metaspace_tokenizer(), [ids_of("<end>")]).decode([ids_of("\u2581Paris")]) == ["Paris"]


def test_characters_of_several_bytes_are_decoded_whole_next_to_a_prompt_that_ends_with_one():
    tokenizer = llama_tokenizer()
    prompt = tokenizer("the \u00e9\U0001f642")["input_ids"]
    answer = [WORDS.index(f"<0x{byte:02X}>") for byte in "\U0001f600".encode()]
    assert CompletionText(tokenizer, [prompt]).decode([answer]) == ["\U0001f600"]
    assert CompletionText(tokenizer, [prompt]).decode([answer[:2]]) == ["\ufffd\ufffd"]  # cut by its length
    in_bytes = byte_tokenizer()
    prompt, answer = in_bytes("\u00e9")["input_ids"], in_bytes("\u00ea!")["input_ids"]
    assert CompletionText(in_bytes, [prompt]).decode([answer]) == ["\u00ea!"]


def test_spaces_before_punctuation_are_kept():
    tokenizer = byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    answer = tokenizer("yes , it is n't .")["input_ids"]
    assert CompletionText(tokenizer, [tokenizer("Is it ?")["input_ids"]]).decode([answer]) == ["yes , it is n't ."]


def test_marks_and_the_end_are_in_the_raw_text_only_and_other_special_tokens_in_both():
    tokenizer = byte_tokenizer()
    marks = ("<think>", "</think>", "<|user|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark) for mark in marks]})
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    first, second = (tokenizer(text)["input_ids"] for text in ("<think>two</think> 2", "3<|user|>"))
    answers = [[*first, tokenizer.eos_token_id], second]
    rows = [{"prompt": "1 + 1?"}, {"prompt": "1 + 2?"}]
    rollout = sample_rollout(Fixed(answers), tokenizer, rows, config(prompts_per_step=2, max_new_tokens=40), CPU)
    assert rollout.completions == ["<think>two</think> 2", "3"]
    assert rollout.raw_completions == ["<think>two</think> 2<end>", "3<|user|>"]  # with the end token, without padding


def test_a_space_is_visible_in_the_first_token_of_an_explained_answer():
    texts = CompletionText(metaspace_tokenizer(), [ids_of("\u2581the")])
    assert [visible(texts, i) for i in ids_of("\u2581Paris", "a")] == ["\u2423Paris", "a"]


def test_the_end_of_a_prompt_is_not_a_part_of_a_stop_text():
    tokenizer = byte_tokenizer()
    (line,) = tokenizer("\n")["input_ids"]
    model = preferring(tiny_llama(len(tokenizer)), line, line)
    prompts = [tokenizer("Q: hi\n")["input_ids"], tokenizer("Q: hello")["input_ids"]]
    found = generate(model, tokenizer, prompts, SamplingParams(stop=("\n\n",), max_new_tokens=6))
    assert found.ids == [[line, line]] * 2
    assert found.ended == [True, True]
    assert [len(row) for row in found.logprobs] == [2, 2]


def test_a_stop_text_that_begins_with_a_space_ends_an_answer_at_its_first_token():
    tokenizer = metaspace_tokenizer()
    model = tiny_llama(len(WORDS))
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    (end,) = ids_of("\u2581END")
    prompt = tokenizer("the capital is")["input_ids"]
    model = preferring(model, end, never=(*ids_of("<end>", "<pad>"), end))
    found = generate(model, tokenizer, [prompt, prompt], SamplingParams(stop=(" END",), max_new_tokens=5))
    assert (found.ids[0], found.ended[0]) == ([end], True)
    assert (len(found.ids[1]), found.ended[1]) == (5, False)


def test_padding_is_no_part_of_any_answer():
    tokenizer = byte_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("see", "the", "a e", "be")]
    torch.manual_seed(1)
    found = GenerateSampler(tiny_llama(len(tokenizer)), tokenizer).sample(
        prompts, SamplingParams(stop=("e", "a", "o", "t", "\u00e9"), max_new_tokens=60)
    )
    assert any(found.ended)
    assert len({len(ids) for ids in found.ids}) > 1
    for ids, ended in zip(found.ids, found.ended, strict=True):
        text = tokenizer.decode(ids)
        assert ended == any(x in text for x in ("e", "a", "o", "t", "\u00e9", "<end>"))
        assert ended or len(ids) == 60


class OlderTokenizer(PreTrainedTokenizerFast):
    """Pads as tokenizers were written before transformers had the argument padding_side of `_pad`."""

    def _pad(self, encoded_inputs, max_length=None, padding_strategy=None, pad_to_multiple_of=None):
        raise AssertionError("the prompts are padded without the tokenizer")


def test_prompts_are_padded_in_the_same_way_for_all_classes_of_tokenizers():
    older, renamed = (byte_tokenizer() for _ in range(2))
    older = OlderTokenizer(tokenizer_object=older.backend_tokenizer, eos_token="<end>", pad_token="<pad>")
    renamed.model_input_names = ["attention_mask", "input_ids"]
    found = []
    for tokenizer in (byte_tokenizer(), older, renamed):
        torch.manual_seed(1)
        prompts = [tokenizer(text)["input_ids"] for text in ("see", "a", "be")]
        found.append(generate(tiny_llama(), tokenizer, prompts, SamplingParams(max_new_tokens=5)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("stop", ["\U0001f642", "ab", "b c", "Question: ", "<pad>"])
def test_the_token_that_completes_a_stop_text_is_the_first_whose_prefix_has_it(stop):
    tokenizer = byte_tokenizer()
    text = "\U0001f643 a b Question:ab c Question: <pad> \U0001f642ab"
    ids = tokenizer(text)["input_ids"]
    stops = StopTexts(CompletionText(tokenizer, [tokenizer("so a")["input_ids"]]), (stop,))
    first = next(n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n]))
    assert next(n for n in range(1, len(ids) + 1) if stops.completed(0, ids, n)) == first


def test_an_empty_stop_text_is_an_error():
    with pytest.raises(UserError, match="a stop text is empty"):
        StopTexts(CompletionText(byte_tokenizer(), [[1]]), ("\n", ""))


def test_a_sampler_gets_its_own_prompts():
    class Appending(Fixed):
        def sample(self, prompts, params):
            for ids in prompts:
                ids.append(0)
            return super().sample(prompts, params)

    tokenizer = byte_tokenizer()
    rollout = sample_rollout(Appending([[5]]), tokenizer, [{"prompt": "ab"}], config(prompts_per_step=1), CPU)
    assert rollout.tokens.tolist() == [[*tokenizer("ab")["input_ids"], 5]]


def test_completions_of_one_prompt_share_its_index():
    options, tokenizer = config(prompts_per_step=2, samples_per_prompt=2), byte_tokenizer()
    rollout = sample_rollout(Fixed([[5], [6], [7], [8]]), tokenizer, [{"prompt": "ab"}, {"prompt": "c"}], options, CPU)
    assert rollout.prompt_index == [0, 0, 1, 1]
    assert rollout.mask.tolist() == [[True]] * 4


def test_a_sampler_gets_the_options_of_sampling_and_a_seed_of_its_own():
    asked = []

    class Noted(Fixed):
        def sample(self, prompts, params):
            asked.append(params)
            return super().sample(prompts, params)

    options, tokenizer = config(prompts_per_step=1, temperature=0.5, top_k=3, stop=("x",)), byte_tokenizer()
    sample_rollout(Noted([[5]]), tokenizer, [{"prompt": "ab"}], options, CPU, seed=11)
    expected = SamplingParams(max_new_tokens=options.max_new_tokens, temperature=0.5, top_k=3, stop=("x",), seed=11)
    assert asked == [expected]


def test_a_sampler_of_generate_without_options_uses_those_of_the_run():
    actor, tokenizer = tiny_llama(258), byte_tokenizer()
    given, fixed = GenerateSampler(actor, tokenizer), GenerateSampler(actor, tokenizer, batch_size=3)
    for sampler, size in ((given, 2), (fixed, 3)):
        options = PPOConfig(prompts_per_step=2, minibatches=1, max_new_tokens=2, sample_batch_size=2, dtype="bfloat16")
        PPOTrainer(options, actor, tokenizer, [{"prompt": "a"}, {"prompt": "b"}], distinct, sampler=sampler)
        assert (sampler.batch_size, sampler.options.dtype) == (size, "bfloat16")

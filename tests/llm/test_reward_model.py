"""Reward models of all families: the score of a batch is each text's own, and truncation keeps the special tokens."""

import pytest
import torch
from support.tiny import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ppo_fast.llm.models.reward_model import RewardModel

POSITIONS = 32
PAD, CLS, SEP = 257, 258, 259  # of `encoder_tokenizer`
VOCABULARY = 264
SIZES = {"vocab_size": VOCABULARY, "num_labels": 1, "initializer_range": 0.3, "max_position_embeddings": POSITIONS}
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", CLS), ("<sep>", SEP)]
    )
    return tokenizer


def decoder_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Its pad token is its end token."""
    tokenizer = byte_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    if chat:
        tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
    return tokenizer


def encoder(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**SIZES, "pad_token_id": PAD}
    if family == "bert":
        return BertForSequenceClassification(BertConfig(**sizes, **LAYERS)).eval()
    if family == "roberta":  # roberta-base has 514 embeddings for 512 positions, and pads with token 1
        sizes |= {"pad_token_id": 1, "max_position_embeddings": POSITIONS + 2}
        return RobertaForSequenceClassification(RobertaConfig(**sizes, **LAYERS)).eval()
    if family == "deberta":
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        return DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, **LAYERS, **relative)).eval()
    if family == "modernbert":
        special = {"cls_token_id": CLS, "sep_token_id": SEP, "bos_token_id": CLS, "eos_token_id": SEP}
        return ModernBertForSequenceClassification(ModernBertConfig(**sizes, **LAYERS, **special)).eval()
    return DistilBertForSequenceClassification(
        DistilBertConfig(**sizes, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
    ).eval()


def decoder(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**SIZES, "pad_token_id": 256, "eos_token_id": 256, "bos_token_id": None}
    if family == "gpt2":
        config = GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4)
        return GPT2ForSequenceClassification(config).eval()
    kinds = {
        "llama": (LlamaConfig, LlamaForSequenceClassification),
        "qwen": (Qwen2Config, Qwen2ForSequenceClassification),
    }
    config_of, model_of = kinds[family]
    return model_of(config_of(**sizes, **LAYERS, num_key_value_heads=2)).eval()


def last_score(model: PreTrainedModel, ids: list[int]) -> float:
    """The score at the last token: without a pad token, a decoder's classifier takes the last one of a single row."""
    pad, model.config.pad_token_id = model.config.pad_token_id, None
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits.item()
    model.config.pad_token_id = pad
    return found


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
def test_a_decoder_reads_its_score_at_the_last_token_also_where_that_is_the_pad_token(family, chat):
    model, tokenizer = decoder(family), decoder_tokenizer(chat=chat)
    judge = RewardModel(model, tokenizer)
    answers = ["a", "abc<end>", "abcd"]  # a text that has the pad token, too
    expected = [last_score(model, judge._ids("p", answer)) for answer in answers]
    assert judge(["p"] * 3, answers) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3
    if chat:
        assert judge._ids("p", "a")[-1] == tokenizer.pad_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_texts_that_use_the_whole_vocabulary_are_scored_one_by_one(monkeypatch):
    model = decoder("llama")
    judge = RewardModel(model, decoder_tokenizer())
    expected = judge(["p"] * 2, ["a", "abc"])
    monkeypatch.setattr(judge, "_padding", lambda ids: None)
    assert judge(["p"] * 2, ["a", "abc"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "modernbert", "distilbert"])
def test_an_encoder_scores_each_text_of_a_batch_as_alone(family):
    judge = RewardModel(encoder(family), encoder_tokenizer())
    answers = ["a", "abcdef", "y" * 60]
    alone = [judge(["p"], [answer])[0] for answer in answers]
    assert judge(["p"] * 3, answers) == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == 3


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "modernbert", "distilbert"])
def test_truncation_keeps_the_special_tokens_and_the_end_of_a_text(family):
    tokenizer = encoder_tokenizer()
    judge = RewardModel(encoder(family), tokenizer)
    ids = judge._ids("p", "x" * 60 + "end")
    assert len(ids) == judge.max_length == POSITIONS
    assert tokenizer.decode(ids) == "<cls>" + "x" * (POSITIONS - 5) + "end<sep>"
    assert judge._ids("p", "x") == [CLS, *tokenizer("px", add_special_tokens=False)["input_ids"], SEP]
    assert tokenizer.truncation_side == "right"
    assert RewardModel(encoder(family), tokenizer, max_length=10_000).max_length == POSITIONS


def test_truncation_of_a_chat_keeps_its_begin_token():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}<end>"
    judge = RewardModel(decoder("llama"), tokenizer, max_length=6)
    assert tokenizer.decode(judge._ids("Why?", "So it is.")) == "<s> is.<end>"


class Quantized(LlamaForSequenceClassification):
    """Keeps something beside its parameters, as HQQ does, which its own `to` moves."""

    def to(self, *args, **kwargs):
        self.moved_to = args
        return super().to(*args, **kwargs)


def test_a_reward_model_is_moved_by_its_own_to():
    model = Quantized(LlamaConfig(**SIZES, **LAYERS, pad_token_id=PAD))
    assert RewardModel(model, byte_tokenizer(), device="cpu").model.moved_to == ("cpu",)


def test_a_compiled_reward_model_gives_the_scores_of_the_model():
    tokenizer, texts = byte_tokenizer(), (["ab", "c"], ["de", "fgh"])
    compiled = torch.compile(decoder("llama"), backend="eager")
    torch.testing.assert_close(
        RewardModel(compiled, tokenizer)(*texts), RewardModel(decoder("llama"), tokenizer)(*texts)
    )

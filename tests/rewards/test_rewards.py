"""Rewards: definitions of papers on examples worked by hand, and unusual answers of models."""

import doctest
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from support.tiny import byte_tokenizer, save_tiny_model, tiny_llama

from ppo_fast import rewards
from ppo_fast.cli.commands import main
from ppo_fast.common.errors import UserError
from ppo_fast.llm.reward.scoring import named_rewards
from ppo_fast.rewards import (
    bleu,
    chrf,
    exact_match,
    f1,
    group_diversity,
    json_schema,
    label_match,
    length_band,
    load_reward,
    matches,
    ndcg,
    no_echo,
    no_repetition,
    number_in,
    numeric,
    rouge_l,
    span_f1,
    stays_in_role,
)

P = [""]  # a prompt that is not used


@pytest.mark.parametrize(
    ("answer", "right", "exact", "shared"),
    [
        ("the Denver Broncos!", "Denver Broncos", 1.0, 1.0),
        ("Denver", "Denver Broncos", 0.0, 2 / 3),
        ("", "Denver", 0.0, 0.0),
        ("", "", 1.0, 1.0),  # SQuAD 2.0: unanswerable
        ("an answer", "", 0.0, 0.0),
        ("$100", "100", 1.0, 1.0),
        ("theatre", "atre", 0.0, 0.0),  # an article is a word, not the beginning of one
        ("Zürich", "Zu\u0308rich", 1.0, 1.0),  # one letter, or a letter and its dots
        ("«Москва»", "москва", 1.0, 1.0),
        ("no no no", "no", 0.0, 0.5),  # a repeated word counts once: 2 * 1 / (3 + 1)
        ("not in the list", ["first", "not in list"], 1.0, 1.0),
    ],
)
def test_question_answering_follows_squad(answer, right, exact, shared):
    assert exact_match(P, [answer], [right]) == [exact]
    assert f1(P, [answer], [right]) == [pytest.approx(shared)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72", 72),
        ("#### 1,234", 1234),
        ("#### -5", -5),
        ("5 or 6?\n####  $10.50 each, 3 times", Fraction(21, 2)),
        ("The answer is 5.", 5),
        ("It costs -$1,234.56.", Fraction(-123456, 100)),
        ("It costs $-3.", -3),
        ("10 - 7 = 3", 3),
        ("10-7", 7),  # no sign: it is between numbers
        ("x = -7", -7),
        ("minus: \u22127", -7),
        ("50%", 50),
        ("12km", 12),
        ("H2O", None),
        ("7 apples and 3 pears", 3),
        (r"$\boxed{42}$ and not 7", 42),
        (r"\boxed{1} then \boxed{x = \frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{-\dfrac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{2\frac12}", Fraction(5, 2)),
        (r"\boxed{12{,}345\text{ km}}", 12345),
        (r"\$12.00", 12),
        ("3/4", Fraction(3, 4)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("½", Fraction(1, 2)),
        ("5/0", None),
        ("6.02 x 10^23", Fraction(602) * 10**21),
        (r"6.02 \times 10^{-2}", Fraction(602, 10000)),
        ("2^{10}", 1024),
        ("1e3", 1000),
        ("1\u202f000\u202f000", 1_000_000),
        ("1,2,3", 3),
        (".5", Fraction(1, 2)),
        ("\u0663\u0664", 34),  # Arabic digits
        ("\uff14\uff12", 42),  # full-width digits
        ("", None),
        ("none", None),
        ("####", None),
        ("10^999999999", None),
        ("0^-1", None),
        ("9" * 5000, None),
    ],
)
def test_a_number_is_read_in_every_notation(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### Step 1: add\n2 + 40 = 42\n#### Step 2: conclude\nThe answer is \\boxed{42}.", 42),
        ("### Solution\n#### 2. Multiply\n6 * 7 = 42\n\nSo the answer is 42.", 42),
        ("#### 1 Add\n2 + 3 = 5\n#### 2 Multiply\n5 * 2 = 10\n#### 10", 10),
        ("2+40=42\n#### 42\n\nQuestion: What is 3+4?\nAnswer: 3+4=7\n#### 7", 42),  # the answer, and another problem
        ("#### 42" + " and the reasoning above confirms it." * 30, 42),
        ("#### The final answer is **42**\nNote that 3 < 4", 42),
        ("#### \\boxed{42}\nin 3 steps", 42),
        ("##### 3\nso 4", 4),
        ("#### 1,23,456", 123_456),
        ("answer ####\n42", 42),
        (r"\boxed{\frac{1.5}{3}}", Fraction(1, 2)),
        (r"\boxed{\frac{3}{-4}}", Fraction(-3, 4)),
        (r"\boxed{-\frac{1}{2}}", Fraction(-1, 2)),
        (r"\boxed{\frac{-3}{-4}}", Fraction(3, 4)),
        (r"\boxed{\dfrac12}", Fraction(1, 2)),
        (r"\boxed{x = - 5}", -5),
        ("x = - 5", -5),
        ("- 5", -5),
        ("First:\n- 5 apples\n- 3 pears", 3),  # bullets
        ("1 000 000", 1_000_000),
        ("Answer: 1 000 000", 1_000_000),
        (r"\boxed{10 000}", 10_000),
        ("in groups of 5 100 came", 100),
        ("1,23,456", 123_456),
        (r"\boxed{12,34,567.5}", Fraction(12345675, 10)),
        (r"\boxed{1.5\times10^3}", 1500),
        (r"\boxed{50\%}", 50),
        (r"\boxed{10^\circ}", 10),
        (r"\boxed{10^{\circ}}", 10),
        (r"\boxed{45\degree}", 45),
        (r"\boxed{\text{(B) } 12}", 12),
        (r"\boxed{5\text{ cm}^2}", 5),
        (r"\boxed{\text{12 km}}", 12),
        (r"\boxed{12\ \mathrm{m/s}}", 12),
        (r"\boxed{AB = 12 \text{ m}}", 12),
        (r"\boxed{30 km/h}", 30),
        (r"\boxed{(-3)}", -3),
        (r"\boxed{\$1{,}000.50}", Fraction(2001, 2)),
        (r"\fbox{7} is the answer to 3", 7),
        (r"$\boxed 9$ not 8", 9),
        (r"\boxed{42", 42),  # truncated
    ],
)
def test_a_number_is_read_from_a_mark_or_a_box_before_the_rest(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize(
    "content",
    [
        *(
            r"3\sqrt2",
            r"3\sqrt{2}",
            r"\sqrt{2}",
            r"2\pi",
            r"\frac{2}{3}\pi",
            r"\frac{2\pi}{3}",
            "(1, 4)",
            "1, 2",
            "3-5",
        ),
        *(
            "3-5",
            r"0.\overline{3}",
            r"5 \pm 1",
            r"\pm 3",
            r"\infty",
            "5_8",
            "2x",
            "2xy",
            "x + 2",
            "3:4",
            "5!",
            "",
            "1/0",
        ),
        *(r"\frac{1}{0}", r"12 \text{ or } 13", r"12 \text{ or } 130", "x > 3", r"\log 5", r"2^{x}", "[0, 1)"),
    ],
)
def test_a_box_that_is_not_wholly_a_number_has_none(content):
    assert number_in(rf"3 + 4 = 7, so it is \boxed{{{content}}}") is None
    assert numeric(P, [rf"\boxed{{{content}}}"], ["3"]) == [0.0]


@pytest.mark.parametrize(
    "text", [r"so it is 3\sqrt{2}.", r"it is 2\pi", r"x = 0.\overline{3}", "r = \u221a2", "2\u03c0"]
)
def test_a_number_that_is_a_part_of_another_is_not_read(text):
    assert number_in(text) is None


def test_a_right_number_is_right_in_any_form_and_a_near_one_within_the_tolerance():
    right = "1,000 * 3 = 3,000\n#### 3,000"
    answers = ["3000", "3000.0 dollars", "$3,000", "\\boxed{3000}", "3001", "", "-3000"]
    assert numeric(P * 7, answers, [right] * 7) == [1, 1, 1, 1, 0, 0, 0]
    assert numeric(P * 2, ["0.3", "0.31"], [0.1 + 0.2] * 2, tolerance=0.005) == [1, 0]
    assert numeric(P, ["0.1"], [0.1]) == [1]  # as written, not as a binary fraction


@pytest.mark.parametrize("function", [exact_match, f1, numeric, rouge_l, bleu, chrf, span_f1, label_match])
@pytest.mark.parametrize("missing", [None, [], [None]])
def test_a_missing_reference_is_no_silent_zero(function, missing):
    with pytest.raises(ValueError, match=r"answer 1 has no reference"):
        function(P * 2, ["7", "7"], ["7", missing])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{\frac{-1}{2}}", Fraction(-1, 2)),
        ("2\u00bd cups", Fraction(5, 2)),  # not 21/2
        ("10\u00b2", 100),  # not 102
        ("5\u00d710\u207b\u00b3", Fraction(5, 1000)),
        (r"\boxed{5\text{ cm}^{2}}", 5),
        ("5 m s^-1", 5),
        ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", Fraction(2469, 2)),  # 1,234.5 in Arabic
    ],
)
def test_a_sign_a_fraction_or_an_exponent_makes_another_number(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize("text", ["1e" + "9" * 5000, "2^{" + "9" * 5000 + "}", "3 x 10^" + "9" * 5000])
def test_an_endless_exponent_in_an_answer_is_no_number(text):
    assert numeric(P, [text], [3]) == [0.0]


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_tolerance_under_which_nothing_is_right_is_rejected(tolerance):
    with pytest.raises(ValueError, match="tolerance must be a finite number, at least 0"):
        numeric(P, ["1"], ["1"], tolerance=tolerance)


@pytest.mark.parametrize("reference", [math.nan, {"text": ["Paris"]}, [["Paris"]], b"Paris"])
def test_what_is_no_reference_is_rejected(reference):
    for function in (exact_match, f1, rouge_l, chrf):
        with pytest.raises(ValueError, match=r"answer 0 (has no reference|must be a text, a number or a list of such)"):
            function(P, ["Paris"], [reference])


@pytest.mark.parametrize("function", [exact_match, bleu, ndcg])
def test_a_column_in_quotation_marks_is_rejected(function):
    with pytest.raises(ValueError, match="got the text 'ab'; the name of a column has no quotation marks"):
        function(P * 2, ["a", "b"], "ab")
    with pytest.raises(ValueError, match="a column has 3 entries for 2 answers"):
        function(P * 2, ["a", "b"], ["a", "b", "c"])


def test_a_reference_without_a_number_is_named():
    with pytest.raises(ValueError, match="the reference 'seven' has no number"):
        numeric(P, ["7"], ["seven"])


def test_rouge_l_is_that_of_rouge_score_and_does_not_lose_other_scripts():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    answer, right = "The police killed the gunman, running away.", "Police kill the running gunmen!"
    assert rouge_l(P, [answer], [right]) == [pytest.approx(scorer.score(right, answer)["rougeL"].fmeasure)]
    assert rouge_l(P * 3, ["мама мыла раму", "", "..."], ["мама мыла окно", "word", "word"]) == [
        pytest.approx(2 / 3),
        0,
        0,
    ]
    assert rouge_l(P, ["a b"], [["x y", "a b"]]) == [1.0]  # the best of several


def test_bleu_and_chrf_are_those_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    answer, rights = "the cat is on the mat", ["there is a cat on the mat", "the cat sits on the mat"]
    expected = sacrebleu.sentence_bleu(answer, rights).score / 100
    assert bleu(P, [answer], [rights]) == [pytest.approx(expected)]
    assert chrf(P, [answer], [rights]) == [pytest.approx(sacrebleu.sentence_chrf(answer, rights).score / 100)]
    assert bleu(P * 2, ["", "Guten Morgen"], ["word", "Guten Morgen"]) == [0.0, 1.0]
    assert bleu(P, ["我有一只猫"], ["我有一只狗"], tokenize="char")[0] > 0.5
    assert chrf(P * 2, ["", "猫"], ["猫", "猫"]) == [0.0, 1.0]


def test_words_that_differ_in_a_vowel_sign_differ_and_composed_letters_equal_decomposed_ones():
    pytest.importorskip("rouge_score", reason="rouge-score is not installed (the extra ppo_fast[rewards])")
    assert rouge_l(P * 2, ["की", "Zu\u0308rich"], ["का", "Zürich"]) == [0.0, 1.0]
    assert rouge_l(P, ["\u2764\ufe0f yes"], ["yes"]) == [1.0]  # an emoji's mark is no word
    assert no_echo(["Zürich"], ["Zu\u0308rich"]) == [0.0]


@pytest.mark.parametrize("name", ["13A", "flores200"])
def test_a_tokenizer_that_is_unknown_or_would_be_downloaded_is_rejected(name):
    with pytest.raises(ValueError, match=f"tokenize must be one of 13a, intl, .*; got '{name}'"):
        bleu(P, ["a"], ["a"], tokenize=name)


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    rewards.overlap._bleu.cache_clear()
    with pytest.raises(UserError, match=r"needs sacrebleu: pip install sacrebleu, or the extra ppo_fast\[rewards\]"):
        bleu(P, ["a"], ["a"])


def test_the_length_band_has_slopes_on_both_sides():
    answers = ["", "a", "a b", "a b c d", "a b c d e", "a " * 8, "a " * 80]
    assert length_band(P * 7, answers, low=2, high=4) == [0, 0.5, 1, 1, 0.75, 0, 0]
    assert length_band(P, ["añ猫"], low=3, high=3, unit="characters") == [1]
    assert length_band(P, ["whatever"], [[1, 2, 3]], low=3, high=3, unit="tokens") == [1]
    assert length_band(P, [""], low=0, high=3) == [1]
    with pytest.raises(ValueError, match="needs completion_ids"):
        length_band(P, ["a"], unit="tokens")
    with pytest.raises(ValueError, match="unit must be one of words, characters, tokens; got 'lines'"):
        length_band(P, ["a"], unit="lines")
    with pytest.raises(ValueError, match="got 5 and 4"):
        length_band(P, ["a"], low=5, high=4)


def test_an_echo_of_the_users_turn_costs_its_share():
    chat = [
        {"role": "user", "content": "what is the capital of France"},
        {"role": "assistant", "content": "Paris is the capital"},
        {"role": "user", "content": "and how many people live there"},
    ]
    answers = ["And how many people live there?", "About two million.", "", "What is the capital of France", "there"]
    assert no_echo([chat] * 5, answers) == [0, 1, 1, 1, 0]
    assert no_echo(["one two three four five"], ["one two three four six"]) == [0.5]
    assert no_echo([[{"role": "system", "content": "be kind"}]], ["be kind"]) == [1]


def test_repetitions_within_an_answer_cost_their_share():
    assert no_repetition(P * 3, ["a b c a b c", "a b", ""]) == [0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("I can help with that.", 1),
        ("", 1),
        ("Sure.\nHuman: and then?", 0),
        ("Sure.\n\n### User:\nmore", 0),
        ("**User:** hello", 0),
        ("Sure.<|im_start|>user", 0),
        ("[INST] more [/INST]", 0),
        ("The user: a person", 1),  # inside a line it is a word
        ("用户\uff1a你好", 1),
        ("Users: many", 1),
    ],
)
def test_an_answer_in_which_another_speaker_begins_gets_0_and_others_1(answer, value):
    assert stays_in_role(P, [answer]) == [value]


def test_an_answer_of_line_breaks_is_read_in_linear_time():
    began = time.monotonic()
    assert stays_in_role(P, ["\n" * 40_000]) == [1]
    assert time.monotonic() - began < 5  # quadratic time would be 50 s


def test_other_speakers_can_be_named():
    assert stays_in_role(P * 2, ["用户\uff1a你好", "Romeo: Ay me"], others=["用户", "Romeo"]) == [0, 0]


def test_only_samples_of_the_same_prompt_reduce_each_others_diversity():
    chat = [{"role": "user", "content": "q"}]
    prompts = ["p", chat, "p", chat, "r", "p"]
    answers = ["a b c", "x y", "a b d", "x y", "a b c", ""]
    assert group_diversity(prompts, answers) == [0.5, 0.0, 0.5, 0.0, 1.0, 1.0]


def test_answers_match_patterns_and_schemas_as_a_whole():
    assert matches(P * 2, [" <a>1\n2</a> ", "x<a></a>"], "<a>.*</a>") == [1, 0]
    assert matches(P * 2, ["1", "1"], ["1", "2"]) == [1, 0]
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    answers = ['{"n": 1}', '```json\n{"n": 1}\n```', '{"n": "1"}', "n = 1", "", "[" * 100_000, "NaN"]
    pytest.importorskip("jsonschema", reason="jsonschema is not installed (the extra ppo_fast[rewards])")
    assert json_schema(P * 7, answers, schema) == [1, 1, 0.5, 0, 0, 0, 0.5]
    assert json_schema(P * 2, ["1", "1"], ['{"type": "integer"}', {"type": "string"}]) == [1, 0.5]
    with pytest.raises(ValueError, match="not a JSON Schema: 'nothing' is not valid"):
        json_schema(P, ["1"], {"type": "nothing"})
    with pytest.raises(ValueError, match="no schema"):
        json_schema(P, ["1"], [None])


def test_a_bad_schema_raises_an_error_at_the_first_call(monkeypatch):
    pytest.importorskip("jsonschema", reason="jsonschema is not installed (the extra ppo_fast[rewards])")
    for schema in ('{"type"', {"type": "nothing"}, "3"):
        with pytest.raises(ValueError, match="not a JSON Schema"):
            json_schema(P, ["no JSON"], schema)
    import urllib.request

    def asked(*_: object, **__: object) -> None:
        pytest.fail("something was fetched")

    monkeypatch.setattr(urllib.request, "urlopen", asked)
    with pytest.raises(Exception, match="Unresolvable: http"):
        json_schema(P, ["1"], {"$ref": "http://localhost:1/schema.json"})


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression: missing"), ([None], "got None")])
def test_a_bad_pattern_is_named(pattern, message):
    with pytest.raises(ValueError, match=message):
        matches(P, ["a"], pattern)


def test_the_choice_a_and_a_label_after_a_colon_are_read():
    choices = ["A", "B", "C"]
    answers = ["A", "The answer is A.", "", "the", "(B)"]
    assert label_match(P * 5, answers, ["A"] * 5, labels=choices) == [1, 1, 0, 0, 0]
    assert label_match(P * 3, ["a.", "", "the"], ["A"] * 3) == [1, 0, 0]
    answers = ["Answer:positive", "negative/positive", "positive\u2014great"]
    assert label_match(P * 3, answers, ["positive"] * 3, labels=["positive", "negative"]) == [1, 0, 1]


@pytest.mark.parametrize("labels", [["C++", "C#"], ["+", "-"], "good", ["good", "Good"]])
def test_labels_that_cannot_be_told_apart_are_rejected(labels):
    with pytest.raises(ValueError, match="labels must be a list of texts that differ in their letters or digits"):
        label_match(P, [labels[0]], [labels[0]], labels=labels)
    with pytest.raises(ValueError, match="others must be a list of names, got the text 'user'"):
        stays_in_role(P, ["u: hi"], others="user")


def test_empty_cells_and_single_texts_of_tables_are_read_as_references():
    assert span_f1(P, ["PER: Ada"], [{"PER": "Ada", "LOC": None}]) == [1.0]
    assert ndcg(P * 2, ["Aliens", "A"], ["Aliens", "Aliens"]) == [1.0, 0.0]
    assert ndcg(P, ["b"], [{"a": None, "b": 1}]) == [1.0]
    for grade in (-1, "3", math.nan, 5000):
        with pytest.raises(ValueError, match="the relevance of 'a' to prompt 0 must be in \\[0, 100\\]"):
            ndcg(P, ["a"], [{"a": grade}])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        ndcg(P, ["a"], [["a"]], k=0)


def test_classes_entities_and_rankings_have_the_scores_worked_by_hand():
    assert label_match(P * 3, ["Positive.", "positive, I think", ""], ["positive"] * 3) == [1, 0, 0]
    labels = ["positive", "negative", "very negative"]
    answers = ["I'd say very negative", "negative or positive", "unpositive", "Very  Negative!"]
    right = ["very negative", "negative", "positive", "very negative"]
    assert label_match(P * 4, answers, right, labels=labels) == [1, 1, 0, 1]
    with pytest.raises(ValueError, match="'neutral' is not among the labels positive, negative"):
        label_match(P, ["x"], ["neutral"], labels=labels[:2])
    entities = {"PER": ["Ada Lovelace"], "LOC": ["London", "Rome"]}
    answers = [
        "PER: Ada  Lovelace\nloc: London\nLOC: Rome",
        "PER: London",
        "",
        "some text",
        "- LOC: London\n- LOC: London",
    ]
    assert span_f1(P * 5, answers, [entities] * 5) == [1.0, 0, 0, 0, pytest.approx(2 / 5)]
    assert span_f1(P * 2, ["", "PER: x"], ["", {}]) == [1, 0]


def test_ndcg_of_a_graded_list_worked_by_hand():
    relevance = {"a": 3, "b": 2, "c": 0}
    ideal = 7 / math.log2(2) + 3 / math.log2(3)
    value = (3 / math.log2(2) + 7 / math.log2(4)) / ideal  # b, x, a
    assert ndcg(P, ["1. B\n2. x\n3. A"], [relevance]) == [pytest.approx(value)]
    assert ndcg(P, ["b\nb\na"], [relevance]) == [pytest.approx(value)]  # a second mention uses a rank and gains nothing
    assert ndcg(P * 3, ["", "x\ny\na", "a"], [["a"]] * 3, k=2) == [0, 0, 1]
    with pytest.raises(ValueError, match="nothing is relevant to prompt 0"):
        ndcg(P, ["a"], [{"a": 0}])


def test_fluency_is_the_mean_log_likelihood_of_the_models_own_forward(tmp_path: Path):
    import torch

    model, tokenizer = tiny_llama(258), byte_tokenizer()
    prompts, answers = ["ab", "a longer prompt"], ["cde", "f"]
    judge = rewards.Fluency(model, tokenizer, batch_size=1)
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        expected.append(logs[-len(answer) :].mean().item())
    assert judge(prompts, answers) == pytest.approx(expected, abs=1e-5)
    both = rewards.Fluency(save_tiny_model(tmp_path), batch_size=8)  # padded in one batch, from a folder
    assert both(prompts, answers) == pytest.approx(expected, abs=1e-5)
    end = rewards.Fluency(model, tokenizer, same_tokens=True)(["ab"], [""], [[256]])
    assert judge(["ab"], [""]) == pytest.approx(end)  # an empty answer is replaced by an end token
    assert math.isfinite(judge(["x" * 1000], ["y" * 300])[0])  # 256 positions
    assert judge([], []) == []
    assert math.isfinite(judge([""], ["y"])[0])  # one token with none before it
    with pytest.raises(UserError, match="needs the model's tokenizer"):
        rewards.Fluency(model)


def test_a_spec_fixes_options_and_renames_columns():
    judge = load_reward("ppo_fast.rewards:numeric(reference=answer, tolerance=0.5)")
    assert judge(P, ["41.6"], answer=["42"], other=[None]) == [1.0]
    with pytest.raises(UserError, match="no column 'answer', which the reward 'numeric' asks for; it has other"):
        judge(P, ["1"], other=[1])
    assert load_reward('ppo_fast.rewards:matches(pattern="a:b(c)")')(P, ["a:bc"]) == [1.0]
    assert load_reward("ppo_fast.rewards:exact_match") is exact_match


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numeric", "must be MODULE:FUNCTION"),
        ("ppo_fast.rewards:nothing", "has no function 'nothing'"),
        ("ppo_fast.rewards:numeric(tolerence=1)", "numeric has no argument 'tolerence'; it has reference, tolerance"),
        ("ppo_fast.rewards:numeric(1)", "arguments must be given by name"),
        ("ppo_fast.rewards:numeric(tolerance=1+x)", "cannot read the arguments"),
        ("ppo_fast.rewards:numeric(tolerance=open('x'))", "cannot read the arguments"),
        ("ppo_fast.rewards:numeric(tolerance=", "must be MODULE:FUNCTION"),
        ("ppo_fast.rewards:numeric(**x)", r"\*\* cannot be used here"),
        ("ppo_fast.rewards:Fluency", "missing a required argument: 'model'"),
        ("ppo_fast.rewards:Fluency(model=folder)", "folder is no literal: a text needs quotation marks"),
        ("nowhere.py:f", "cannot import the reward 'nowhere.py:f': no such file: nowhere.py"),
        ("ppo_fast.rewards:Pool(reward='x', timeout='10', fallback=0)", "a pool needs a timeout > 0, .*, got '10', 0"),
        ("ppo_fast.rewards:Pool(reward='x', timeout=1, fallback=None)", "a finite fallback .*, got 1, None and 2"),
    ],
)
def test_a_wrong_spec_is_rejected_with_the_reason(spec, message):
    with pytest.raises(UserError, match=message):
        load_reward(spec)


def test_an_error_in_a_users_own_file_names_the_file(tmp_path: Path):
    (tmp_path / "mine.py").write_text("class Judge:\n    def __init__(self):\n        raise KeyError('path')\n")
    with pytest.raises(UserError, match=r"mine.py:Judge: KeyError: 'path' \(.*mine.py, line 3\)"):
        load_reward(f"{tmp_path / 'mine.py'}:Judge")
    (tmp_path / "bad.py").write_text("x = undefined\n")
    with pytest.raises(
        UserError, match=r"cannot import the reward .*: NameError: .*'undefined'.* \(.*bad.py, line 1\)"
    ):
        load_reward(f"{tmp_path / 'bad.py'}:f")


def test_a_column_that_the_data_lacks_is_named():
    judge = load_reward("ppo_fast.rewards:numeric(tolerance=0.5)")
    with pytest.raises(
        UserError, match=r"no column 'reference', which the reward 'numeric' asks for; it has answer; to"
    ):
        judge(P, ["1"], answer=["1"])


def test_an_option_with_the_name_of_a_column_is_rejected_unless_it_is_fixed():
    from ppo_fast.llm.reward.function import arguments_of

    with pytest.raises(UserError, match=r"'low' is an option of the reward 'length_band' and a column of the data"):
        arguments_of(length_band, {"low": [1, 2]})
    judge = load_reward("ppo_fast.rewards:length_band(low=2)")
    assert judge(P, ["a"], low=[99]) == [0.5]  # fixed: the column is not used


REWARDS = """
import os, time

def judge(prompts, completions, weight):
    text = completions[0]
    if text == "sleep":
        time.sleep(60)
    if text == "die":
        os._exit(3)
    if text == "exit":
        raise SystemExit(0)
    if text == "odd":
        class Odd(Exception):  # which cannot be pickled
            pass
        raise Odd("one")
    if text == "two":
        return [1.0, 2.0]
    if text == "fail":
        raise KeyError("gone")
    return [float("nan") if text == "nan" else weight[0] * len(text)]
"""


@pytest.fixture
def slow(tmp_path: Path):
    pytest.importorskip("pebble")
    path = tmp_path / "slow_rewards.py"
    path.write_text(REWARDS)
    return f"{path}:judge"


def test_a_pool_counts_what_fails_in_one_line_and_gives_it_the_fallback(slow: str, capsys):
    pool = rewards.Pool(slow, timeout=2.0, fallback=-7.0, workers=2)
    answers = ["ab", "sleep", "fail", "nan", "die", "abc"]
    found = pool([f"p{i}" for i in range(6)], answers, weight=[1, 1, 1, 1, 1, 10], other=[None] * 6)
    assert found == [2, -7, -7, -7, -7, 30]
    assert pool.failed == 4
    assert capsys.readouterr() == (
        "",
        "reward 'judge': 4 of 6 answers have no judgement and get -7; the first: no judgement within 2 s at answer 1"
        " ('sleep') to 'p1'\n",
    )
    assert pool(["p"], ["abcd"], weight=[1]) == [4]  # the pool has recovered
    assert pool.failed == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("fail", "KeyError: 'gone'"),
        ("nan", "nan is not finite"),
        ("die", "Process"),
        ("exit", "SystemExit: 0"),
        ("odd", "Odd: one"),
        ("two", "2 values for 1 answer"),
    ],
)
def test_a_pool_reports_why_an_answer_has_no_judgement(slow: str, capsys, answer, reason):
    pool = rewards.Pool(slow, timeout=30.0, fallback=-7.0, workers=1)
    assert pool(["p"] * 2, [answer, "ab"], weight=[1] * 2) == [-7, 2]
    assert f"1 of 2 answers have no judgement and get -7; the first: {reason}" in capsys.readouterr().err


def test_a_pool_has_the_name_of_its_function(slow: str):
    assert list(named_rewards(rewards.Pool(slow, timeout=1.0, fallback=0.0, workers=1))) == ["judge"]
    options = "ppo_fast.rewards:f1(reference=solution)"
    assert load_reward(options).__name__ == "f1"
    for reward in (options, f1):
        assert rewards.Pool(reward, timeout=1.0, fallback=0.0, workers=1).__name__ == "f1"


def test_a_pool_without_workers_or_without_its_column_raises_a_user_error(tmp_path: Path, slow: str):
    path = tmp_path / "child.py"
    path.write_text(
        "import multiprocessing\n"
        "if multiprocessing.parent_process() is not None:\n"
        "    raise RuntimeError('not here')\n"
        "def judge(prompts, completions):\n"
        "    return [1.0]\n"
    )
    with pytest.raises(UserError, match=r"no worker of the pool for the reward .* could begin"):
        rewards.Pool(f"{path}:judge", timeout=30.0, fallback=0.0, workers=1)(["p"], ["a"])
    with pytest.raises(UserError, match="the data has no column 'weight'"):
        rewards.Pool(slow, timeout=30.0, fallback=0.0, workers=1)(["p"], ["a"])
    named = rewards.Pool("ppo_fast.rewards:f1(reference=gone)", timeout=30.0, fallback=0.0, workers=1)
    with pytest.raises(UserError, match="the data has no column 'gone'"):
        named(["p"], ["a"], here=["a"])


def test_a_run_continues_after_an_answer_without_a_judgement_and_logs_their_number(tmp_path: Path, capsys):
    pytest.importorskip("pebble")
    (tmp_path / "mine.py").write_text(
        "def judge(prompts, completions):\n"
        "    if prompts[0] == 'bad':\n"
        "        raise ValueError('no')\n"
        "    return [1.0]\n"
    )
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "good"}\n{"prompt": "bad"}\n')
    save_tiny_model(tmp_path / "model")
    spec = f'ppo_fast.rewards:Pool(reward="{tmp_path / "mine.py"}:judge", timeout=30, fallback=-1, workers=1)'
    places = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.jsonl"), "--reward", spec]
    sizes = ["--total-steps", "1", "--prompts-per-step", "2", "--minibatches", "1", "--max-new-tokens", "3"]
    other = spec.replace("mine.py", "other.py").replace("judge", "always")
    (tmp_path / "other.py").write_text("def always(prompts, completions): return [0.5]\n")
    assert main(["train", *places, "--reward", other, *sizes, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reward")]
    assert re.fullmatch(
        r"reward 'judge': 1 of 2 answers have no judgement and get -1; the first: ValueError: no at answer \d"
        r" \(.*\) to 'bad'",
        said,
    )
    (row,) = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert row["reward/judge"] == 0.0  # 1 and -1
    assert row["reward_failed/judge"] == 1
    assert row["reward/always"] == 0.5
    assert row["reward_failed/always"] == 0


def test_a_pool_rejects_functions_that_it_cannot_send_and_options_that_it_cannot_use():
    with pytest.raises(UserError, match="cannot be sent to another process"):
        rewards.Pool(lambda prompts, completions: [0.0], timeout=1.0, fallback=0.0)
    for options in ({"timeout": 0}, {"timeout": 1, "fallback": math.nan}, {"timeout": 1, "workers": 0}):
        with pytest.raises(UserError, match="a timeout > 0, a finite fallback and at least one worker"):
            rewards.Pool(exact_match, **{"fallback": 0.0, **options})


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("answer", ["ab", "sleep"])
def test_workers_do_not_outlive_a_killed_trainer(slow: str, tmp_path: Path, answer: str):
    script = tmp_path / "main.py"
    script.write_text(
        "from ppo_fast.rewards import Pool\n"
        "if __name__ == '__main__':\n"
        f"    pool = Pool({slow!r}, timeout=100.0, fallback=0.0, workers=1)\n"
        "    pool(['p'], ['ab'], weight=[1])\n"
        "    import multiprocessing as m\n"
        "    print(*[c.pid for c in m.active_children()], flush=True)\n"
        f"    pool(['p'], [{answer!r}], weight=[1])\n"
        "    import time; time.sleep(100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    pids = [int(x) for x in child.stdout.readline().split()]
    assert pids
    time.sleep(0.5)  # now it sleeps, or its worker does
    child.send_signal(signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker still runs"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3] if Path("/proc").exists() else True


def test_every_public_reward_names_its_source_and_shows_an_example():
    for name in rewards.__all__:
        text = getattr(rewards, name).__doc__ or ""
        assert ">>> " in text, name


@pytest.mark.parametrize("name", sorted(p.stem for p in Path(rewards.__file__).parent.glob("[a-z]*.py")))
def test_examples_in_docstrings_are_true(name):
    pytest.importorskip("rouge_score", reason="rouge-score is not installed (the extra ppo_fast[rewards])")
    pytest.importorskip("sacrebleu")
    pytest.importorskip("jsonschema", reason="jsonschema is not installed (the extra ppo_fast[rewards])")
    result = doctest.testmod(importlib.import_module(f"ppo_fast.rewards.{name}"))
    assert result.failed == 0

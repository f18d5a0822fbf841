"""Form: a regular expression, or a JSON schema."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from ppo_fast.rewards.matching import rows_of
from ppo_fast.rewards.overlap import package


class Validator(Protocol):
    """A JSON Schema, as jsonschema compiles it."""

    def is_valid(self, instance: object) -> bool: ...


def matches(
    prompts: Sequence[object],
    completions: Sequence[str],
    pattern: str | Sequence[str],
    raw_completions: Sequence[str] | None = None,
    *,
    raw: bool = False,
) -> list[float]:
    """Return 1 where an expression matches the whole answer without blanks around it, else 0; "." matches newlines.

    Args:
        prompts: [B], not used.
        completions: [B] answers.
        pattern: one expression for all, or a column of [B].
        raw_completions: [B] answers with their special tokens, which the trainer passes; for raw=True only.
        raw: the pattern is for the raw text, in which the end token and special tokens such as <think> are visible.

    Raises:
        ValueError: a pattern is missing or is no regular expression; or raw=True without raw_completions.

    An expression like (a+)+b can take forever on some answers: run it in a `Pool`.

    >>> matches(["1 + 1?"] * 2, ["<think>two</think> 2", "2"], pattern="<think>.*</think>.*")
    [1.0, 0.0]
    """
    if raw:
        if raw_completions is None:
            raise ValueError("raw=True needs raw_completions")
        completions = raw_completions
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    return [
        float(_compiled(one).fullmatch(completion.strip()) is not None)
        for _, completion, one in rows_of(completions, patterns)
    ]


def _compiled(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise ValueError(f"a pattern must be a text, got {pattern!r:.80}")
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error} ({pattern:.80})") from error


def json_schema(
    prompts: Sequence[object], completions: Sequence[str], schema: str | Mapping[str, object] | Sequence[object]
) -> list[float]:
    """Return 1 where an answer is JSON that its schema allows (by jsonschema), 0.5 where it is other JSON, else 0.

    Args:
        prompts: [B], not used.
        completions: [B] answers, perhaps in a fence of three backticks, and nothing else.
        schema: a JSON Schema as a dict or a text, for all; or a column of [B] of them. A $ref outside of the schema
            itself and JSON Schema's own is not fetched.

    Raises:
        ValueError: the schema is not a JSON Schema. UserError: jsonschema is not installed.

    >>> json_schema(["Name?"] * 3, ['{"name": "Ada"}', '{"nom": "Ada"}', "Ada"], schema={"required": ["name"]})
    [1.0, 0.5, 0.0]
    """
    schemas: Sequence[object] = [schema] * len(completions) if isinstance(schema, str | Mapping) else schema
    return [_score(completion, _validator(_text(one))) for _, completion, one in rows_of(completions, schemas)]


def _text(schema: object) -> str:
    if schema is None:
        raise ValueError("an answer has no schema")
    return schema if isinstance(schema, str) else json.dumps(schema)


def _score(completion: str, validator: Validator) -> float:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)```\s*", completion, re.DOTALL | re.IGNORECASE)
    try:
        found = json.loads(fenced[1] if fenced else completion)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0 if validator.is_valid(found) else 0.5


@functools.lru_cache(maxsize=1024)
def _validator(schema: str) -> Validator:
    jsonschema = package("jsonschema", "jsonschema")
    known = package("jsonschema_specifications", "jsonschema").REGISTRY  # unlike the default it fetches nothing
    try:
        read = json.loads(schema)
        kind = jsonschema.validators.validator_for(read)
        kind.check_schema(read)
    except (ValueError, TypeError, jsonschema.SchemaError) as error:
        raise ValueError(f"not a JSON Schema: {getattr(error, 'message', error)} ({schema:.80})") from error
    return kind(read, registry=known)

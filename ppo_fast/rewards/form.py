"""Form: a regular expression, or a JSON schema."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_fast.rewards.overlap import package


def matches(prompts: Sequence[Any], completions: Sequence[str], pattern: str | Sequence[str]) -> list[float]:
    """1 where a regular expression matches the whole answer, blanks around it aside, else 0; "." matches newlines.

    Args:
        prompts: [B], not looked at.
        completions: [B] answers.
        pattern: one expression for all, or a column of [B].

    An expression like (a+)+b can take for ever on an unlucky answer: run such a one in a `Pool`.

    >>> matches(["1 + 1?"] * 2, ["<think>two</think> 2", "2"], pattern="<think>.*</think>.*")
    [1.0, 0.0]
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    return [
        float(re.fullmatch(one, completion.strip(), re.DOTALL) is not None)
        for one, completion in zip(patterns, completions, strict=True)
    ]


def json_schema(prompts: Sequence[Any], completions: Sequence[str], schema: Any) -> list[float]:
    """1 where an answer is JSON that its schema allows (by jsonschema), 0.5 where it is other JSON, else 0.

    Args:
        prompts: [B], not looked at.
        completions: [B] answers, perhaps in a fence of three backticks, and nothing else.
        schema: a JSON Schema as a dict or a text, for all; or a column of [B] such.

    Raises:
        ValueError: the schema is none. UserError: jsonschema is not installed.

    >>> json_schema(["Name?"] * 3, ['{"name": "Ada"}', '{"nom": "Ada"}', "Ada"], schema={"required": ["name"]})
    [1.0, 0.5, 0.0]
    """
    alone = isinstance(schema, str | Mapping)
    schemas = [schema] * len(completions) if alone else schema
    return [_judged(completion, _text(one)) for completion, one in zip(completions, schemas, strict=True)]


def _text(schema: Any) -> str:
    if schema is None:
        raise ValueError("an answer has no schema")
    return schema if isinstance(schema, str) else json.dumps(schema)


def _judged(completion: str, schema: str) -> float:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)```\s*", completion, re.DOTALL | re.IGNORECASE)
    try:
        found = json.loads(fenced[1] if fenced else completion)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0 if _validator(schema).is_valid(found) else 0.5


@functools.lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    jsonschema = package("jsonschema", "jsonschema")
    try:
        read = json.loads(schema)
        kind = jsonschema.validators.validator_for(read)
        kind.check_schema(read)
    except (ValueError, jsonschema.SchemaError) as error:
        raise ValueError(f"not a JSON Schema: {getattr(error, 'message', error)} ({schema:.80})") from error
    return kind(read)

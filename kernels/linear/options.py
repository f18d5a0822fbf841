"""The options of the LM head, as ppo_fast.ops builds them for linear_logprobs and linear_ppo_loss."""

from typing import NamedTuple

import torch


class HeadOptions(NamedTuple):
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    chunk_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    num_counted: int | None = None
    compute_dtype: torch.dtype | None = None

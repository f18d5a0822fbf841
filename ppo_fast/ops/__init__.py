"""The public operations of ppo_fast: each checks its arguments and calls one backend.

Shared by all: B sequences, T steps, V vocabulary, N tokens, S packed sequences. `mask` is True where a step counts,
and the value at a masked position never reaches a result, not even NaN. Inputs are fp16, bf16, fp32 (the torch backend
also takes fp64) with any strides; arithmetic and results are fp32 (fp64 for fp64), gradients come back in the input's
dtype. `backend` is "auto" (Triton for CUDA tensors, PyTorch elsewhere), "triton" or "torch". No operation waits for
the device, except that linear_logprobs and linear_ppo_loss wait for the count of a mask unless num_counted gives it.

Unusual tensors: a pending negation and efficient zeros are written out first. Under make_fx and FakeTensorMode "auto"
is the torch backend, and "triton" raises an error. torch.jit.trace, transforms of torch.func (vmap, grad, jvp,
functionalize), forward-mode AD, DTensors, and options that require a gradient raise an error.
"""

from ppo_fast.ops.advantages import AdvantageOutput, gae, masked_whiten, rlhf_advantages, shape_rewards
from ppo_fast.ops.linear import LinearLossOutput, linear_logprobs, linear_ppo_loss
from ppo_fast.ops.logprobs import token_logprobs
from ppo_fast.ops.losses import LossOutput, policy_loss, ppo_loss, value_loss

__all__ = [
    "AdvantageOutput",
    "LinearLossOutput",
    "LossOutput",
    "gae",
    "linear_logprobs",
    "linear_ppo_loss",
    "masked_whiten",
    "policy_loss",
    "ppo_loss",
    "rlhf_advantages",
    "shape_rewards",
    "token_logprobs",
    "value_loss",
]

"""token_logprobs: its signature, documentation and checks."""

from torch import Tensor

from ppo_fast.kernels.logprobs import custom_op
from ppo_fast.kernels.logprobs.options import LogprobOptions
from ppo_fast.ops import checks
from ppo_fast.ops.backend import Backend, uses_triton
from ppo_fast.ops.checks import public_operation


@public_operation
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each token under softmax(logits / temperature), and on request the entropy of that softmax.

    With z = logits / temperature: logp = z[token] - logsumexp(z) and H = logsumexp(z) - sum_j p_j z_j, where a term
    with p_j = 0 adds nothing, so that -inf logits (a masked vocabulary) are fine. Both come from one read of the
    logits; the backward pass reads them once more and writes their gradient.

    Args:
        logits: [..., V], any strides.
        tokens: [...], int32 or int64, of any value at masked positions.
        mask: [...], True where a token counts; the others get 0 and a zero gradient.
        temperature: the sampling temperature, greater than 0.
        with_entropy: also return the entropy, in nats; both can be differentiated.
        inplace_backward: write the gradient over the logits' own memory. It saves one [..., V] tensor; the logits are
            lost, and a second backward pass raises.

    Returns:
        logp [...], or (logp, entropy), fp32 (fp64 for fp64 logits), 0 where masked.

    Raises:
        IndexError: a counted token is outside [0, V) (on a CPU; on a GPU its row becomes NaN).

    >>> logits = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 2.0, 3.0]])
    >>> logp, entropy = token_logprobs(logits, torch.tensor([1, 2]), with_entropy=True)
    >>> [round(x, 4) for x in logp.tolist() + entropy.tolist()]
    [-0.6931, -0.4076, 0.6931, 0.8324]
    """
    checks.floating("logits", logits)
    shape = logits.shape
    if not shape or not shape[-1]:
        raise ValueError(f"logits must have shape [..., V] with V > 0, got {tuple(shape)}")
    rows, place = shape[:-1], logits.device
    mask = checks.flag("mask", mask, rows, place, "logits without its last dimension")
    checks.token_ids(tokens, mask, rows, place, "logits without its last dimension", shape[-1])
    checks.temperature(temperature)
    if inplace_backward and checks.may_overlap(logits):
        raise ValueError(
            "token_logprobs: inplace_backward=True needs logits whose elements have addresses of their own, "
            f"got shape {tuple(shape)} with strides {logits.stride()}; pass logits.contiguous()"
        )
    options = LogprobOptions(temperature, with_entropy, inplace_backward)
    return custom_op.token_logprobs(logits, tokens, mask, options, use_triton=uses_triton(backend, logits))

"""reference.kl_estimate on a device, for the loss and for shaped rewards."""

import triton
import triton.language as tl


@triton.jit
def kl_estimate(d, inverse_ratio, estimator):
    """reference.kl_estimate; estimator is an index into reference.KL_ESTIMATORS.

    inverse_ratio is exp(-d) with d clamped, which k3 alone reads. All four cost less than a variant of the kernel for
    each would.
    """
    k3 = inverse_ratio - 1.0 + d
    return tl.where(estimator == 0, d, tl.where(estimator == 1, 0.5 * d * d, tl.where(estimator == 2, k3, tl.abs(d))))

"""Triton's own interpreter (TRITON_INTERPRET=1), which runs the kernels of peers, with tl.fma rounded once.

Without this it rounds product and sum separately, and so hides the residual that a GPU's fused multiply-add keeps.
"""

import numpy as np
from ptx import arithmetic


def round_fma_once() -> None:
    """Replace tl.fma of fp32 in this process."""
    from triton.runtime import interpreter

    two_roundings = interpreter.InterpreterBuilder.create_fma

    def create_fma(builder, x, y, z):  # type: ignore[no-untyped-def]
        if z.data.dtype != np.float32:
            return two_roundings(builder, x, y, z)
        with np.errstate(all="ignore"):
            return interpreter.TensorHandle(arithmetic.fma(x.data, y.data, z.data), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma

"""Triton's interpreter, as far as these tests lean on it, mended: version 3.6 beside numpy 2.4.

Two things of it do not hold: the end of a loop as an array of one, which numpy no longer takes for a number; and a product of
bfloat16, whose bits it multiplies as if they were integers.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Before any kernel runs."""
    patch_tensor, multiply = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return multiply(self, wide(a), wide(b), d, *options)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = dot


def wide(x: Any) -> Any:
    """bfloat16, kept as uint16, as the float32 that it is the upper half of; all else as it is."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    data = (x.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)

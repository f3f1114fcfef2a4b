"""Makes the Triton interpreter's bfloat16 behave like a GPU's: arithmetic on values, rounding to nearest even.

The interpreter of Triton 3.6 to 3.9 keeps bfloat16 as bit patterns, multiplies those patterns in `tl.dot`, and
truncates where it converts. Here every operation raises its bfloat16 operands to float32 and rounds on the way back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle):
        return handle
    return TensorHandle((np.asarray(handle.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(values: np.ndarray) -> TensorHandle:
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def install() -> None:
    """Patch the interpreter's builder; more than once is once."""
    builder = InterpreterBuilder
    if getattr(builder, "_bf16_values", False):
        return
    dot, binary, unary = builder.create_dot, builder.binary_op, builder.unary_op
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any, **options: Any) -> TensorHandle:
        return dot(self, _widen(a), _widen(b), *rest, **options)

    def binary_op(self: Any, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bf16(left):
            return binary(self, left, right, op)
        out = op(_widen(left).data, _widen(right).data)
        return TensorHandle(out, tl.int1) if out.dtype == bool else _narrow(out)

    def unary_op(self: Any, operand: TensorHandle, op: Any) -> TensorHandle:
        return _narrow(op(_widen(operand).data)) if _is_bf16(operand) else unary(self, operand, op)

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        to = target.scalar
        if _is_bf16(source):
            if to == tl.bfloat16:
                return source
            source = _widen(source)
            return source if to == tl.float32 else cast(self, source, target)
        return _narrow(source.data.astype(np.float32)) if to == tl.bfloat16 else cast(self, source, target)

    def create_fp_to_fp(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16 or _is_bf16(source):
            return self.cast_impl(source, target)
        return convert(self, source, target, rounding)

    builder.create_dot = create_dot
    builder.binary_op = binary_op
    builder.unary_op = unary_op
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.get_bf16 = lambda self, value: _narrow(np.array([value], np.float32))
    builder._bf16_values = True

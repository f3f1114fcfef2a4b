"""csrc/cpu: steps between 16-bit floats, as `formats.steps` has them, and the sums of checksums, as `sums` has them.

bfloat16 and float16 on a CPU, contiguous. A call runs on one thread and holds no lock of Python's.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from alignvec import compiled
from alignvec.formats.bits import row_bytes
from alignvec.formats.steps import Counted, Packed, columns_dtype, largest
from alignvec.sums import Sums

torch.library.define(
    "alignvec::cpu_count_steps", "(Tensor base, Tensor aligned, Tensor(a!) counts, Tensor(b!) square) -> ()"
)
torch.library.define(
    "alignvec::cpu_pack_steps",
    "(Tensor base, Tensor aligned, int width, Tensor(a!) fields, Tensor(b!) start, Tensor(c!) columns, Tensor(d!) own, "
    "Tensor(e!) magnitude) -> ()",
)
torch.library.define(
    "alignvec::cpu_unpack_steps",
    "(Tensor base, int width, Tensor fields, Tensor start, Tensor columns, Tensor own, Tensor(a!) aligned, "
    "Tensor(b!) magnitude) -> ()",
)
torch.library.define(
    "alignvec::cpu_sums", "(Tensor values, Tensor(a!) rows, Tensor(b!) columns, Tensor(c!) magnitude) -> ()"
)

DTYPES = (torch.bfloat16, torch.float16)
COUNTS, WORDS = 9, 4096  # csrc/cpu/types.h; a checksum's row has WORDS words of four values


def takes(*tensors: Tensor) -> bool:
    """Whether these are of one 16-bit dtype on a CPU, and csrc/cpu is live and not ruled out."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors) and _live()


@functools.cache
def _live() -> bool:
    return os.environ.get("ALIGNVEC_BACKEND") != "torch" and compiled.reason("cpu") is None


def count(base: Tensor, aligned: Tensor) -> Counted:
    """`formats.steps.count`, compiled."""
    counts, square = torch.zeros(COUNTS, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    torch.ops.alignvec.cpu_count_steps(base.contiguous(), aligned.contiguous(), counts, square)
    return Counted(int(counts[0]), counts[1:], square.item())


def pack(base: Tensor, aligned: Tensor, width: int) -> Packed:
    """`formats.steps.pack`, compiled, of fewer than 2^31 values."""
    rows, cols = base.shape
    fields = torch.empty(rows, row_bytes(cols, width), dtype=torch.uint8)
    start, magnitude = torch.empty(rows + 1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    columns = torch.empty(base.numel(), dtype=columns_dtype(cols))  # room for all, of which little is ever touched
    own = torch.empty(base.numel(), dtype=torch.int16)
    torch.ops.alignvec.cpu_pack_steps(
        base.contiguous(), aligned.contiguous(), width, fields, start, _signed(columns), own, magnitude
    )
    used, count = int(start[-1]), start.diff().to(torch.int64)
    return Packed(fields, count, columns[:used].clone(), own[:used].clone(), int(magnitude) <= largest(base.dtype))


def walk(base: Tensor, width: int, fields: Tensor, start: Tensor, columns: Tensor, own: Tensor, out: Tensor) -> bool:
    """`formats.steps.walk`, compiled."""
    magnitude, (first, last) = torch.empty(1, dtype=torch.int32), start[[0, -1]].tolist()
    side = (start - first, _signed(columns[first:last]).contiguous(), own[first:last].contiguous())
    torch.ops.alignvec.cpu_unpack_steps(base.contiguous(), width, fields.contiguous(), *side, out, magnitude)
    return int(magnitude) <= largest(base.dtype)


def both_sums(values: Tensor) -> tuple[Sums, Sums] | None:
    """`sums.both_sums` of flat values, compiled; None where there is infinity or NaN among them."""
    rows = torch.empty(2, -(-values.numel() // (4 * WORDS)), dtype=torch.int64)
    columns, magnitude = torch.empty(2, WORDS, dtype=torch.int64), torch.empty(1, dtype=torch.int32)
    torch.ops.alignvec.cpu_sums(values.contiguous(), rows, columns, magnitude)
    if int(magnitude) > largest(values.dtype):
        return None
    return Sums(rows[0], columns[0], values.numel()), Sums(rows[1], columns[1], values.numel())


def _signed(columns: Tensor) -> Tensor:
    return columns.view(torch.int16) if columns.dtype == torch.uint16 else columns


compiled.reason("cpu")  # loads it, where it can run

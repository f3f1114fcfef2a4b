"""How deltas are stored: one module a format, each with the same few functions.

A parameter [*, cols] is stored as a matrix [rows, cols]. Parameters of one dimension (norms, biases) and empty ones are
always dense. Parts are row-major, so that a range of rows is a range of bytes; kernels repack them when they attach.

A format's module has OPTIONS (option to default), `encode`, `decode` and `layout`, and where there is something to
refuse `validate` (of option values), `check` (of what the parts hold) and `bound` (of what they can decode to).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import ModuleType

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.formats import dense, integer, lossless, low_rank, sign, sparse
from alignvec.formats.spec import Encoded, Option, Spec, blocks, finite, matrix, span
from alignvec.printable import shown
from alignvec.untrusted import require_memory

__all__ = ["FORMATS", "Encoded", "Spec", "check", "decode", "encode", "joined", "layout", "parse", "squared_error"]

Layout = dict[str, tuple[torch.dtype | tuple[torch.dtype, ...], tuple[int | None, ...]]]
MOST_COLUMNS = 1 << 24  # of an encoded delta: a row is what is decoded at once
LARGEST_OPTION = 2**63
MOST_VALUES = 1 << 36  # of an encoded delta: a few bytes of factors stand for as many as somebody likes

FORMATS: dict[str, ModuleType] = {
    "dense": dense,
    "int8": integer,
    "int4": integer,
    "sign": sign,
    "lossless": lossless,
    "low-rank": low_rank,
    "sparse": sparse,
}


def require(name: str) -> None:
    """AlignvecError when there is no format of that name."""
    _module(name)


def parse(text: str | Spec) -> Spec:
    """The Spec that `int4`, `int4:group=64` or `low-rank:rank=16,dtype=float32` names, with every option filled in.

    Raises AlignvecError for a format, option or value that does not exist.
    """
    if isinstance(text, Spec):
        _validate(text)
        return Spec(text.name, {**_module(text.name).OPTIONS, **text.options})
    name, _, rest = text.strip().partition(":")
    defaults = _module(name).OPTIONS
    options = dict(defaults)
    for item in rest.split(",") if rest else ():
        key, _, value = (piece.strip() for piece in item.partition("="))
        if key not in defaults:
            known = f"it takes {', '.join(defaults)}" if defaults else "it takes none"
            raise AlignvecError(f"format {text!r}: {name} has no option {key!r}, {known}")
        try:
            options[key] = type(defaults[key])(value)
        except ValueError:
            kind = {int: "an integer", float: "a number"}[type(defaults[key])]
            raise AlignvecError(f"format {text!r}: {key} must be {kind}, not {value!r}") from None
    spec = Spec(name, options)
    _validate(spec)
    return spec


def encode(
    spec: str | Spec,
    delta: Tensor,
    base: Tensor | None = None,
    name: str = "",
    *,
    aligned: Tensor | None = None,
) -> Encoded:
    """Store `delta` (any shape, floating) in a format; arithmetic is float32.

    Args:
        spec: which format; a delta of one dimension, and an empty one, is stored dense whatever it says.
        base: the parameter that the delta is added to, same shape; `lossless` needs it.
        name: the parameter's name, for messages and for the seed of `sparse`'s random method.
        aligned: the parameter after alignment. `lossless` stores its bits, also where a rounded delta does not tell
            them (-0.0 for 0.0, or a weight many orders of magnitude below the base's).

    Raises:
        AlignvecError: NaN or infinity in the delta, or values that the format cannot hold.
    """
    spec = parse(spec)
    if not delta.is_floating_point():
        raise AlignvecError(f"delta {name} is {delta.dtype}: only floating-point deltas can be stored")
    if not finite(delta):
        raise AlignvecError(f"delta {name} holds NaN or infinity: the aligned or the base tensor is broken")
    for other in (base, aligned):
        if other is not None and other.shape != delta.shape:
            raise AlignvecError(f"delta {name} has shape {list(delta.shape)}, its base {list(other.shape)}")
    module = FORMATS["dense" if delta.dim() < 2 or not delta.numel() else spec.name]
    if module is not dense and delta.dtype == torch.float64 and not finite(delta.float()):
        raise AlignvecError(f"delta {name} leaves float32's range, which {spec.name} stores: store it dense")
    return module.encode(spec, delta.detach(), base, aligned, name)


def decode(encoded: Encoded, base: Tensor | None = None, rows: slice | None = None) -> Tensor:
    """The delta in float32 (dense: in its own dtype), in the parameter's shape, or those matrix rows as [n, cols].

    `base`: the same parameter, or the same rows of it, which `lossless` needs. Raises AlignvecError without it.
    """
    count, cols = matrix(encoded.shape)
    first, last = span(rows, count)
    if encoded.name != "dense":  # which is decoded as a view
        require_memory(
            4 * (last - first) * cols, f"the values of a {encoded.name} delta of shape {list(encoded.shape)}"
        )
    decoded = _module(encoded.name).decode(encoded, base, rows)
    return decoded.reshape(encoded.shape) if rows is None else decoded


def joined(pieces: Iterable[Encoded], shape: tuple[int, ...], name: str = "") -> Encoded:
    """A parameter of this shape from stretches of its rows, in their order, all in one format that looks at each row
    alone: dense, int8, int4, sign, lossless. A piece may go once the next one is asked for."""
    rows, row = matrix(shape)[0], 0
    parts: dict[str, Tensor] = {}
    side: dict[str, list[Tensor]] = {}  # what lossless lists, of one dimension
    for piece in pieces:
        stop = row + matrix(piece.shape)[0]
        for part, values in piece.parts.items():
            if values.dim() < 2:
                side.setdefault(part, []).append(values)
                continue
            if part not in parts:
                nbytes = rows * values.shape[1] * values.element_size()
                require_memory(nbytes, f"the values of {name} as {piece.name}")
                parts[part] = values.new_empty(rows, values.shape[1])
            parts[part][row:stop] = values
        row, kind, options = stop, piece.name, piece.options
    if kind == "lossless":
        parts |= lossless.joined(side, name)
    return Encoded(kind, shape, options, {"": parts[""].view(shape)} if kind == "dense" else parts)


def layout(name: str, shape: tuple[int, ...], options: Mapping[str, Option]) -> Layout:
    """What a file has to hold: part to dtype (or those allowed) and shape, None for a size that depends on the data.

    Raises AlignvecError for options that no encoded tensor has.
    """
    spec = Spec(name, dict(options))
    _validate(spec)
    if spec.options.keys() != _module(name).OPTIONS.keys():
        raise AlignvecError(f"format {name} needs the options {', '.join(_module(name).OPTIONS)}")
    if name != "dense" and shape and (shape[-1] > MOST_COLUMNS or math.prod(shape) > MOST_VALUES):
        raise AlignvecError(f"a tensor of shape {list(shape)} is too large for {name}: store it dense")
    return _module(name).layout(spec, tuple(shape))


def check(encoded: Encoded) -> None:
    """AlignvecError unless the parts are what an encode could have written: files may be damaged or hostile."""
    if not all(type(size) is int and size >= 0 for size in encoded.shape):
        raise AlignvecError(f"a tensor's shape cannot be {list(encoded.shape)}")
    if encoded.name != "dense" and (len(encoded.shape) < 2 or not math.prod(encoded.shape)):
        raise AlignvecError(f"a tensor of shape {list(encoded.shape)} is stored dense, not as {encoded.name}")
    expected = layout(encoded.name, encoded.shape, encoded.options)
    if encoded.parts.keys() != expected.keys():
        raise AlignvecError(f"{encoded.name} has the parts {sorted(expected)}, not {sorted(encoded.parts)}")
    for key, (dtypes, shape) in expected.items():
        part, label = encoded.parts[key], f"{encoded.name} part {key!r}"
        if part.dtype not in (dtypes if isinstance(dtypes, tuple) else (dtypes,)):
            raise AlignvecError(f"{label} cannot be {part.dtype}")
        if part.dim() != len(shape) or any(
            want not in (None, got) for want, got in zip(shape, part.shape, strict=True)
        ):
            raise AlignvecError(f"{label} has shape {list(part.shape)} where {list(shape)} is needed")
        if part.is_floating_point() and not finite(part):
            raise AlignvecError(f"{label} holds NaN or infinity")
    module = _module(encoded.name)
    if hasattr(module, "check"):
        module.check(encoded)
    # Parts that are finite decode to infinity where a product of them overflows; most are far from that.
    if hasattr(module, "bound") and not module.bound(encoded) <= torch.finfo(torch.float32).max / 2:
        rows, cols = matrix(encoded.shape)
        if not all(finite(module.decode(encoded, None, block)) for block in blocks(rows, cols)):
            raise AlignvecError(f"the product of {' and '.join(expected)} leaves float32's range in {encoded.name}")


def squared_error(encoded: Encoded, delta: Tensor, base: Tensor | None = None) -> float:
    """Sum of (decoded - delta)^2, float64, some rows at a time."""
    rows, cols = matrix(encoded.shape)
    delta, base = delta.reshape(rows, cols), None if base is None else base.reshape(rows, cols)
    total = 0.0
    for part in blocks(rows, cols):
        decoded = decode(encoded, None if base is None else base[part], part)
        error = (decoded.double() - delta[part].double()).view(-1)
        total += float(torch.dot(error, error))
    return total


def _module(name: str) -> ModuleType:
    if name not in FORMATS:
        raise AlignvecError(f"format {shown(name)!r} is not known: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _validate(spec: Spec) -> None:
    """AlignvecError for an option that the format lacks, or a value of the wrong kind or out of range."""
    module = _module(spec.name)
    for key, value in spec.options.items():
        if key not in module.OPTIONS:
            raise AlignvecError(f"format {spec.name} has no option {shown(key)!r}")
        kind = type(module.OPTIONS[key])
        fits = type(value) in ((int, float) if kind is float else (kind,)) and value == value
        if not fits or (type(value) is int and abs(value) >= LARGEST_OPTION):
            raise AlignvecError(f"format {spec.name}: {key} cannot be {shown(repr(value))}")
    if hasattr(module, "validate"):
        module.validate(Spec(spec.name, {**module.OPTIONS, **spec.options}))

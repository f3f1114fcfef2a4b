"""Which base a vector belongs to: checksums per tensor that loading in another dtype does not change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.printable import shown
from alignvec.sums import ROW, Sums, as_float16, sums
from alignvec.untrusted import brief, tensor_shape
from alignvec.wrappers import inner_model, is_adapter, live_names

STEP = 128 * ROW  # values converted at a time: 4 MiB of bfloat16

CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "n_embd",
    "n_layer",
    "n_head",
)


class Checksum:
    """Checksum of a floating tensor given in pieces; how it is cut into pieces does not matter.

    The values, rounded to bfloat16, are laid out as int64 words [rows, 4096] (zero-padded at the end). The sum of every
    row and of every column, modulo 2**64, and the number of values go through SHA-256, of which 16 hex digits are kept.
    Integer sums make it the same on every device, and fast: it finds accidents and mix-ups, not forgeries.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._columns: Tensor | None = None
        self._rest: Tensor | None = None  # fewer than ROW values that wait for their row to fill
        self._count = 0

    def update(self, values: Tensor) -> Checksum:
        """Take the next values, any shape (read in row-major order), any floating dtype, any device."""
        values = values.detach().reshape(-1)
        self._count += values.numel()
        if self._rest is not None:
            missing = ROW - self._rest.numel()
            head = torch.cat([self._rest, values[:missing].to(self._rest)])
            values = values[missing:]
            self._rest = None
            if head.numel() < ROW:
                self._rest = head
                return self
            self._add(sums(head))
        whole = values.numel() - values.numel() % ROW
        for start in range(0, whole, STEP):
            self._add(sums(values[start : min(start + STEP, whole)].to(torch.bfloat16)))
        if whole < values.numel():
            self._rest = values[whole:].to(torch.bfloat16, copy=True)
        return self

    def add(self, piece: Sums) -> Checksum:
        """Take the next values by their sums; all pieces but a tensor's last have to fill their rows."""
        if self._count % ROW:
            raise ValueError("the values before do not fill their row: give the next ones to update")
        self._count += piece.numel
        self._add(piece)
        return self

    def hexdigest(self) -> str:
        """16 hex digits for everything given so far; more may follow."""
        digest = self._hash.copy()
        columns = self._columns
        if self._rest is not None:
            last = sums(self._rest)
            digest.update(last.rows.cpu().numpy().tobytes())
            columns = last.columns if columns is None else columns + last.columns.to(columns.device)
        if columns is not None:
            digest.update(columns.cpu().numpy().tobytes())
        digest.update(self._count.to_bytes(8, "little"))
        return digest.hexdigest()[:16]

    def _add(self, piece: Sums) -> None:
        self._hash.update(piece.rows.cpu().numpy().tobytes())
        columns = piece.columns
        self._columns = columns if self._columns is None else self._columns.to(columns.device) + columns


def checksum(tensor: Tensor) -> str:
    """16 hex digits for the values of a floating tensor rounded to bfloat16, on every device.

    A dtype that holds the values gives the same digits, and so does bfloat16 itself. float16 does not hold small
    values of the others (below 6e-5 it gets coarser): `narrowed` is for those.
    """
    return Checksum().update(tensor).hexdigest()


def narrowed(values: Tensor) -> Tensor:
    """Flat values as a float16 model has them, rounded to bfloat16 for the checksum; float16 values' very bits."""
    return exact(values.reshape(-1), "float16") if values.dtype == torch.float16 else as_float16(values)


def exact(values: Tensor, dtype: str) -> Tensor:
    """Values whose checksum tells every bit that they have in `dtype`, "float16" or "bfloat16".

    A checksum takes bfloat16 values, so float16 ones are given to it as if their bits were bfloat16's.
    """
    return values.detach().to(torch.float16).view(torch.bfloat16) if dtype == "float16" else values


@dataclass(frozen=True)
class TensorIdentity:
    """Shape, dtype (for information: it is not compared) and checksum of one tensor of the base.

    `float16` is the checksum of the values rounded to float16 first, or, of a float16 tensor, that of its bits. Vectors
    saved by early versions have none, or, of a float16 tensor, the first checksum again.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: str
    float16: str | None = field(default=None, compare=False)

    def agrees(self, other: TensorIdentity) -> bool:
        """Whether both have the same values, or one of them the other's rounded to float16."""
        if self.dtype == other.dtype == "float16" and self.knows_bits and other.knows_bits:
            return self.float16 == other.float16
        return (
            self.checksum == other.checksum
            or (other.dtype == "float16" and self.has(other.checksum))
            or (self.dtype == "float16" and other.has(self.checksum))
        )

    def has(self, digits: str) -> bool:
        """Whether a tensor with this checksum has the same values, or those rounded to float16."""
        return digits == self.checksum or (self.dtype != "float16" and digits == self.float16)

    @property
    def knows_bits(self) -> bool:
        """Whether `bits` tells a tensor's bits. Of a float16 tensor of zeros it does in any case."""
        return self.dtype != "float16" or self.float16 not in (None, self.checksum)

    def bits(self, dtype: str) -> str | None:
        """The checksum of `exact` values in this 16-bit dtype; None where it is not known."""
        if dtype == "float16":
            return self.float16 if self.dtype == "float16" else None
        return self.checksum

    @classmethod
    def of(cls, tensor: Tensor) -> TensorIdentity:
        """The identity of a floating tensor on any device."""
        digits = checksum(tensor), checksum(narrowed(tensor))
        return cls(tuple(tensor.shape), dtype_name(tensor.dtype), *digits)


@dataclass(frozen=True)
class BaseIdentity:
    """What identifies a base model: the config keys that fix its architecture, and every floating tensor's checksum."""

    config: dict[str, Any]
    tensors: dict[str, TensorIdentity]

    def differences(
        self, other: BaseIdentity, *, values: bool = True, here: str = "the first", there: str = "the second"
    ) -> list[str]:
        """A line per difference, none when both are the same base; ``values=False`` compares names and shapes only.

        ``here`` and ``there`` are what the lines call this base and the other.
        """
        lines = [
            f"config {key}: {shown(self.config[key])} in {here}, {shown(other.config[key])} in {there}"
            for key in sorted(self.config.keys() & other.config.keys())
            if self.config[key] != other.config[key]
        ]
        for name in [*self.tensors, *(other.tensors.keys() - self.tensors.keys())]:
            mine, theirs = self.tensors.get(name), other.tensors.get(name)
            if theirs is None:
                lines.append(f"{name}: missing in {there}")
            elif mine is None:
                lines.append(f"{name}: missing in {here}")
            elif mine.shape != theirs.shape:
                lines.append(f"{name}: shape {list(mine.shape)} in {here}, {list(theirs.shape)} in {there}")
            elif values and not mine.agrees(theirs):
                lines.append(f"{name}: other values")
        return lines

    def to_json(self) -> dict[str, Any]:
        tensors = {
            name: {"shape": list(tensor.shape), "dtype": tensor.dtype, "checksum": tensor.checksum}
            | ({} if tensor.float16 is None else {"float16": tensor.float16})
            for name, tensor in self.tensors.items()
        }
        return {"config": self.config, "tensors": tensors}

    @classmethod
    def from_json(cls, data: Any) -> BaseIdentity:
        """Raises AlignvecError when ``data`` is not what ``to_json`` gives."""
        try:
            if not isinstance(data["config"], dict):
                raise TypeError("config")
            tensors = {}
            for name, entry in data["tensors"].items():
                dtype, digest, narrow = entry["dtype"], entry["checksum"], entry.get("float16")
                if not all(type(text) is str for text in (dtype, digest, digest if narrow is None else narrow)):
                    raise TypeError(shown(name))
                known = getattr(torch, dtype, None)
                if not isinstance(known, torch.dtype) or not known.is_floating_point:
                    raise ValueError(f"dtype {shown(dtype)} of {shown(name)}")
                tensors[name] = TensorIdentity(tensor_shape(entry["shape"]), dtype, digest, narrow)
            return cls(dict(data["config"]), tensors)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise AlignvecError(f"the base's identity is malformed ({type(error).__name__}: {brief(error)})") from None


def summary(lines: list[str], limit: int = 4, separator: str = "; ") -> str:
    """The first few of many lines in one sentence part."""
    more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    return separator.join(lines[:limit] + more)


def identifying(config: Any) -> dict[str, Any]:
    """The keys of a config (a dict, or transformers' own object) that fix the architecture."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    values = {**values.get("text_config", {}), **values} if isinstance(values.get("text_config"), dict) else values
    return {key: values[key] for key in CONFIG_KEYS if values.get(key) is not None}


def identify(
    model: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], config: Any = None
) -> BaseIdentity:
    """The identity of a live model (tied parameters once) or of named tensors; one pass, tensor by tensor.

    ``config`` is a dict or a transformers config; a model brings its own. Tensors that are not floating are left out,
    and what wraps a model (torch.compile, DDP, a PEFT adapter) is looked through.
    """
    if isinstance(model, nn.Module):
        parameters = dict(model.named_parameters())
        plain = live_names(model, parameters)
        named: Iterable[tuple[str, Tensor]] = [
            (plain[name], value) for name, value in parameters.items() if name in plain and not is_adapter(name)
        ]
        config = getattr(inner_model(model)[1], "config", None) if config is None else config
    else:
        named = model.items() if isinstance(model, Mapping) else model
    tensors = {name: TensorIdentity.of(tensor) for name, tensor in named if tensor.is_floating_point()}
    return BaseIdentity(identifying(config), tensors)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")

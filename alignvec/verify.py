"""Is this model the base that a vector was extracted from?"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.fingerprint import TensorIdentity, checksum, dtype_name, identifying, summary
from alignvec.fit import FLOATING, require_fit
from alignvec.names import LiveNames, Places, checkpoint_layout, locate, parameter_value
from alignvec.unloaded import quantisation
from alignvec.vector import AlignmentVector


def verify_base(model: nn.Module, vectors: Mapping[str, AlignmentVector]) -> None:
    """Compare the model's weights with the base that each vector names, tensor by tensor.

    A tensor of the base that the model has no place for (a multi-token prediction head, a rotary table) says nothing
    about the model, unless the two have other sizes; nor does a buffer that is computed, not loaded. A model loaded as
    float16, which does not hold small bfloat16 or float32 values, is compared by the base's values rounded alike.

    Raises:
        AlignvecError: one sentence for the first vector that edits what the model does not have, or that belongs to
            a different base, naming the tensors that differ.
    """
    names = LiveNames(model)
    live = _Live(model, names)
    for label, vector in vectors.items():
        places = locate(model, names, vector)
        require_fit(model, names, label, vector, places)
        if vector.base is not None:
            _compare(live, label, vector, vector.base.tensors, places)


class _Live:
    """The model's tensors, each read and hashed once for all vectors."""

    def __init__(self, model: nn.Module, names: LiveNames) -> None:
        self.model, self.names = model, names
        self.parameters, self.buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self._checksums: dict[str, str] = {}

    def tensors(self, places: Places) -> dict[str, tuple[str, Tensor]]:
        """The live tensors that a vector's base has a name for: a key for the checksum, and the value."""
        found = {}
        for name, live in places.direct.items():
            found[name] = (live, parameter_value(self.model, live, self.parameters[live]))
        for name, live in places.buffers.items():
            if self._persistent(live):
                found[name] = (live, self.buffers[live])
        if converted := places.converted:
            layout = checkpoint_layout(self.model, self.names, converted)
            found |= {name: (f"{name} stored", layout[name]) for name in converted if name in layout}
        return found

    def checksum(self, key: str, tensor: Tensor) -> str:
        if key not in self._checksums:
            self._checksums[key] = checksum(tensor)
        return self._checksums[key]

    def _persistent(self, live: str) -> bool:
        path, _, leaf = live.rpartition(".")
        return leaf not in self.model.get_submodule(path)._non_persistent_buffers_set


def _compare(
    live: _Live, label: str, vector: AlignmentVector, base: Mapping[str, TensorIdentity], places: Places
) -> None:
    tensors = live.tensors(places)
    root = live.names.root
    quantised = [n for n, (_, tensor) in tensors.items() if tensor.dtype not in FLOATING]
    if quantised:
        method = quantisation(getattr(root, "config", None))
        raise AlignvecError(
            f"{type(root).__name__} is quantised{f' ({method})' if method else ''}, so that it cannot be compared with "
            f"the base of vector {label!r}: {quantised[0]} is {dtype_name(tensors[quantised[0]][1].dtype)}; load the "
            "model unquantised, or attach with transfer=True, since the vector edits none of the quantised weights"
        )
    wrong: list[str] = []
    unknown: list[str] = []
    for name, identity in base.items():
        if name in places.absent or (name in places.buffers and name not in tensors):
            continue
        key, tensor = tensors.get(name, ("", None))
        if tensor is None or tuple(tensor.shape) != tuple(identity.shape):
            wrong.append(name)
        elif live.checksum(key, tensor) not in (identity.checksum, identity.float16):
            narrowed = tensor.dtype == torch.float16 and identity.dtype != "float16" and identity.float16 is None
            (unknown if narrowed else wrong).append(name)
    if unknown and not wrong:
        raise AlignvecError(
            f"vector {label!r} does not say what its base's {base[unknown[0]].dtype} values are in float16, which "
            f"cannot hold them all ({summary(unknown, separator=', ')}); load the model as {base[unknown[0]].dtype}, "
            "extract the vector anew, or attach with transfer=True if this is its base"
        )
    wrong += unknown
    if wrong:
        raise AlignvecError(
            f"vector {label!r} was extracted from a different base: {len(wrong)} of {len(base)} tensors differ "
            f"({summary(wrong, separator=', ')}); {_remedy(live.model)}"
        )
    ignored = [re.compile(pattern) for pattern in getattr(root, "_keys_to_ignore_on_load_unexpected", None) or ()]
    absent = [name for name in places.absent if not any(pattern.search(name) for pattern in ignored)]
    sizes = {} if not absent or vector.base is None else vector.base.config
    here = identifying(getattr(root, "config", None)) if sizes else {}
    for key in sizes.keys() & here.keys() - {"model_type"}:
        if sizes[key] != here[key]:
            raise AlignvecError(
                f"vector {label!r} was extracted from a different base: its {key} is {sizes[key]}, the model's "
                f"{here[key]}, which lacks {summary(absent, separator=', ')}; load that base, or attach with "
                "transfer=True"
            )


def _remedy(model: nn.Module) -> str:
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        return "a PEFT adapter is merged into the model: call unmerge_adapter() first"
    return "load that base, or attach with transfer=True"

"""Is this model the base that a vector was extracted from?"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.fingerprint import TensorIdentity, checksum, identifying, summary
from alignvec.fit import quantised_as, require_fit
from alignvec.heads import own_head
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


class _Tensor(NamedTuple):
    """A live tensor: a key for its checksum, its shape and dtype (it may be on the meta device), and its values."""

    key: str
    like: Tensor
    read: Callable[[], Any]


class _Live:
    """The model's tensors, each read and hashed once for all vectors."""

    def __init__(self, model: nn.Module, names: LiveNames) -> None:
        self.model, self.names = model, names
        self.parameters, self.buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self._checksums: dict[str, str] = {}

    def tensors(self, places: Places) -> dict[str, _Tensor]:
        """The live tensors that a vector's base has a name for."""
        found = {}
        for name, live in places.direct.items():
            parameter = self.parameters[live]
            read = functools.partial(parameter_value, self.model, live, parameter)
            found[name] = _Tensor(live, parameter, read)
        for name, live in places.buffers.items():
            if self._persistent(live):
                found[name] = _Tensor(live, self.buffers[live], functools.partial(self.buffers.get, live))
        if converted := places.converted:
            layout = checkpoint_layout(self.model, self.names, converted)
            for name in converted.keys() & layout.keys():
                found[name] = _Tensor(f"{name} stored", layout[name], functools.partial(layout.get, name))
        return found

    def checksum(self, tensor: _Tensor) -> str:
        if tensor.key not in self._checksums:
            self._checksums[tensor.key] = checksum(tensor.read())
        return self._checksums[tensor.key]

    def _persistent(self, live: str) -> bool:
        path, _, leaf = live.rpartition(".")
        return leaf not in self.model.get_submodule(path)._non_persistent_buffers_set


def _compare(
    live: _Live, label: str, vector: AlignmentVector, base: Mapping[str, TensorIdentity], places: Places
) -> None:
    tensors = live.tensors(places)
    root = live.names.root
    ignored = [re.compile(pattern) for pattern in getattr(root, "_keys_to_ignore_on_load_unexpected", None) or ()]
    absent = [name for name in places.absent if not any(pattern.search(name) for pattern in ignored)]
    method = quantisation(getattr(root, "config", None))
    quantised = [f"{name} is {kind}" for name, t in tensors.items() if (kind := quantised_as(t.like, method))]
    quantised += [f"it does not hold {name} as a weight" for name in absent if method]
    if quantised:
        raise AlignvecError(
            f"{type(root).__name__} is quantised{f' ({method})' if method else ''}, so that it cannot be compared with "
            f"the base of vector {label!r}: {quantised[0]}; load the model unquantised, or attach with transfer=True, "
            "since the vector edits none of the quantised weights"
        )
    wrong: list[str] = []
    unknown: list[str] = []
    for name, identity in base.items():
        if name in places.absent or (name in places.buffers and name not in tensors):
            continue
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.like.shape) != tuple(identity.shape):
            wrong.append(name)
        elif not identity.has(live.checksum(tensor)):
            narrowed = tensor.like.dtype == torch.float16 and identity.dtype != "float16" and identity.float16 is None
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
    if (head := places.head) is not None and not head.bare and not head.follows:
        raise own_head(label, type(root).__name__, head.live, head.embedding)
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

"""Is this model the base that a vector was extracted from?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignvec.conversion import Group
from alignvec.errors import AlignvecError
from alignvec.fingerprint import TensorIdentity, checksum, identifying, summary
from alignvec.fit import quantised_as, require_fit
from alignvec.heads import own_head
from alignvec.names import LiveNames, Places, checkpoint_layout, locate, parameter_value
from alignvec.printable import shown
from alignvec.unloaded import Unloaded, quantisation
from alignvec.vector import AlignmentVector
from alignvec.wrappers import is_persistent


def verify_base(model: nn.Module, vectors: Mapping[str, AlignmentVector]) -> None:
    """Compare the model's weights with the base that each vector names, tensor by tensor.

    A tensor of the base that the model has no place for (a multi-token prediction head, a rotary table) says nothing
    about the model; nor does a buffer that is computed, not loaded. The sizes in the two configurations are compared,
    too. A model loaded as float16, which does not hold small bfloat16 or float32 values, is compared by the base's
    values rounded alike.

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
    """A live tensor as the base has it: its shape and dtype (it may be on the meta device), and its checksum."""

    like: Tensor
    checksum: Callable[[], str | None]


class _Live:
    """The model's tensors, each read and hashed once for all vectors."""

    def __init__(self, model: nn.Module, names: LiveNames) -> None:
        self.model, self.names = model, names
        self.parameters, self.buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self._layout = checkpoint_layout(model, names)
        self._checksums: dict[tuple[str, ...], str] = {}

    def tensors(self, places: Places) -> dict[str, _Tensor]:
        """The live tensors that a vector's base has a name for."""
        found = {}
        for name, live in places.direct.items():
            found[name] = _Tensor(self.parameters[live], functools.partial(self._parameter, live))
        for name, live in places.buffers.items():
            if is_persistent(self.model, live):
                found[name] = _Tensor(self.buffers[live], functools.partial(self._hash, (live,), self.buffers[live]))
        for group in places.groups:
            like = self._layout.like(group, places.made[group.target], places.shapes)
            for name, tensor in like.items():
                found[name] = _Tensor(tensor, functools.partial(self._converted, group, places, name))
        return found

    def _parameter(self, live: str) -> str:
        known = self._checksums.get((live,))
        return known or self._hash((live,), parameter_value(self.model, live, self.parameters[live]))

    def _converted(self, group: Group, places: Places, name: str) -> str | None:
        """The checksum of one of the tensors that a group is stored as; those of the others are kept for later."""
        shape = tuple(places.shapes[name])
        if (name, str(shape)) not in self._checksums:
            for each, value in self._layout.values(group, places.made[group.target], places.shapes).items():
                self._hash((each, str(tuple(value.shape))), value)
        return self._checksums.get((name, str(shape)))

    def _hash(self, key: tuple[str, ...], value: Tensor) -> str:
        if key not in self._checksums:
            self._checksums[key] = checksum(value)
        return self._checksums[key]


def _compare(
    live: _Live, label: str, vector: AlignmentVector, base: Mapping[str, TensorIdentity], places: Places
) -> None:
    tensors = live.tensors(places)
    root = live.names.root
    config = getattr(root, "config", None)
    unloaded = Unloaded(config, root)
    absent = [name for name in places.absent if not unloaded(name, places.shapes[name])]
    method = quantisation(config)
    read = {name: t.like for name, t in tensors.items()}
    read |= {name: live.parameters[live.names.plain[name]] for made in places.made.values() for name in made}
    quantised = [f"{name} is {kind}" for name, tensor in read.items() if (kind := quantised_as(tensor, method))]
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
        elif not identity.has(tensor.checksum() or ""):
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
    _require_sizes(label, vector, config, absent)


def _require_sizes(label: str, vector: AlignmentVector, config: Any, absent: list[str]) -> None:
    """The configuration of the base is the model's, or that of the text model inside of it.

    absent: what the model lacks, which is said where its sizes are others.
    """
    assert vector.base is not None
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    whole, part = identifying(config), identifying(text)
    lacks = f", which lacks {summary(absent, separator=', ')}" if absent else ""
    for key, size in vector.base.config.items():
        if key != "model_type" and key in whole and size not in (whole[key], part.get(key)):
            raise AlignvecError(
                f"vector {label!r} was extracted from a different base: its {key} is {shown(size)}, the model's "
                f"{whole[key]}{lacks}; load that base, or attach with transfer=True"
            )


def _remedy(model: nn.Module) -> str:
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        return "a PEFT adapter is merged into the model: call unmerge_adapter() first"
    return "load that base, or attach with transfer=True"

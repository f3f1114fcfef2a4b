"""From the names in a vector to the parameters of a live model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignvec.base_bits import has_base_bits, unrecorded
from alignvec.conversion import Group, Shapes, StoredLayout, plan
from alignvec.deltas import require_finite
from alignvec.errors import AlignvecError
from alignvec.fit import require_fit
from alignvec.formats import Encoded, decode
from alignvec.formats.lossless import DTYPES
from alignvec.heads import OF_HEADS, UnnamedHead, unnamed_head
from alignvec.vector import AlignmentVector
from alignvec.wrappers import INSIDE, inner_model, live_names, plain_names

Delta = Callable[[], Encoded]


class LiveNames(dict[str, str]):
    """Every name that a parameter goes by (tied weights have several) -> the first of them.

    `root` is the transformers model inside what wraps it, `plain` the parameters by their names in that model, and
    `buffers` its buffers, persistent or not, alike.
    """

    def __init__(self, model: nn.Module) -> None:
        first: dict[int, str] = {}
        super().__init__(
            (name, first.setdefault(id(parameter), name))
            for name, parameter in model.named_parameters(remove_duplicate=False)
        )
        _, self.root = inner_model(model)
        self.plain = {plain: self[name] for name, plain in live_names(model, self).items()}
        self.buffers = {plain: name for name, plain in live_names(model, dict(model.named_buffers())).items()}


def parameter_names(model: nn.Module) -> LiveNames:
    """The model's parameters by all of their names."""
    return LiveNames(model)


def resolve(model: nn.Module, names: Mapping[str, str], name: str) -> str | None:
    """The live name of a checkpoint tensor; None if there is none.

    Wrappers of the live model do not matter, nor whether one of the two was saved without its head: a checkpoint of a
    backbone says `layers.0...` where the full model says `model.layers.0...`, and the reverse.
    """
    places = [names, names.plain] if isinstance(names, LiveNames) else [names]
    root = names.root if isinstance(names, LiveNames) else model
    return _find(places, getattr(root, "base_model_prefix", ""), name)


def _find(places: Iterable[Mapping[str, str]], prefix: str, name: str) -> str | None:
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        for known in places:
            if candidate in known:
                return known[candidate]
    return None


@dataclass(frozen=True)
class Places:
    """Where the tensors that a vector knows are in a live model."""

    direct: dict[str, str]  # name -> the live parameter that it is
    groups: list[Group]  # names that a rule of loading turns into live tensors of another layout
    buffers: dict[str, str]  # name -> the live buffer that it is
    absent: list[str]  # names that the model has nothing for
    shapes: Shapes  # of the stored tensors, by all of these names
    made: dict[str, dict[str, tuple[int, ...]]]  # a group's target -> the parameters it makes; none if it cannot
    head: UnnamedHead | None = None  # a live head that none of the names is of


def known_shapes(vector: AlignmentVector) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that the vector knows: those of its base, or, where it names none, those that it edits."""
    base = {} if vector.base is None else {name: tuple(t.shape) for name, t in vector.base.tensors.items()}
    return base | {name: tuple(info.shape) for name, info in vector.tensors.items()}


def locate(model: nn.Module, names: LiveNames, vector: AlignmentVector) -> Places:
    """Find the place of every tensor that the vector knows.

    Names are looked for as they are, then by the rules that transformers loads checkpoints with, and then, where the
    vector edits nothing but a text model that is part of this one, in its language model. What else is stored beside
    the tensors of a vector that names no base, a checkpoint of this very model says.
    """
    parameters = dict(model.named_parameters())
    known = stored = known_shapes(vector)
    direct = _direct(model, names, known)
    groups: list[Group] = []
    buffers: dict[str, str] = {}
    if len(direct) < len(known) or any(tuple(parameters[live].shape) != known[n] for n, live in direct.items()):
        if vector.base is None:
            stored = checkpoint_layout(model, names).shapes(known) | known
            direct = _direct(model, names, stored)
        for group in plan(names.root, [*names.plain, *names.buffers], stored):
            if group.converter is not None:
                groups.append(group)
            elif group.target in names.plain:
                direct[group.names[0]] = names.plain[group.target]
            else:
                buffers[group.names[0]] = names.buffers[group.target]
        if vector.base is None:
            groups = [group for group in groups if any(name in vector for name in group.names)]
        for name in [name for group in groups for name in group.names]:
            direct.pop(name, None)
        prefix = getattr(names.root, "base_model_prefix", "")
        absent = _unplaced(stored, direct, groups, buffers)
        buffers |= {name: live for name in absent if (live := _find([names.buffers], prefix, name))}
        if any(name in vector and name not in buffers for name in absent):
            direct |= _in_language_model(model, names, vector, known)
    head = None
    if vector.base is not None:
        head = unnamed_head(model, names, stored, direct, lambda name: parameter_value(model, name, parameters[name]))
    made = {group.target: group.shapes(stored, names.root) for group in groups}
    return Places(direct, groups, buffers, _unplaced(stored, direct, groups, buffers), stored, made, head)


def _direct(model: nn.Module, names: LiveNames, stored: Iterable[str]) -> dict[str, str]:
    plain = plain_names(stored)
    return {n: live for n in stored if (live := resolve(model, names, n) or resolve(model, names, plain[n]))}


def _unplaced(
    stored: Iterable[str], direct: Mapping[str, str], groups: Iterable[Group], buffers: Mapping[str, str]
) -> list[str]:
    converted = {name for group in groups for name in group.names}
    return [name for name in stored if name not in direct and name not in buffers and name not in converted]


def _in_language_model(model: nn.Module, names: LiveNames, vector: AlignmentVector, stored: Shapes) -> dict[str, str]:
    """The places of a text model's tensors in the language model that is part of `model`.

    It is believed only where all tensors that the vector edits are there, with their shapes.
    """
    root: Any = names.root
    decoder = root.get_decoder() if hasattr(root, "get_decoder") else None
    path = next((path for path, module in root.named_modules() if path and module is decoder), None)
    if path is None:
        return {}
    path = ".".join(part for part in path.split(".") if part not in INSIDE)
    parameters = dict(model.named_parameters())
    head = getattr(root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None, "weight", None)
    heads = [name for name, parameter in parameters.items() if parameter is head]
    first = {name.partition(".")[0] for name in stored if not name.startswith(OF_HEADS)}
    prefix = f"{first.pop()}." if len(first) == 1 else ""

    def place(name: str) -> str | None:
        if name.startswith(OF_HEADS):
            return heads[0] if heads and name.endswith(".weight") else None
        return names.plain.get(f"{path}.{name.removeprefix(prefix)}")

    found = {name: live for name in stored if (live := place(name)) is not None}
    fits = all(
        name in found and tuple(parameters[found[name]].shape) == tuple(info.shape)
        for name, info in vector.tensors.items()
    )
    return found if fits else {}


def parameter_value(model: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
    """The parameter's value, fetched from where accelerate keeps it if it is offloaded."""
    if parameter.device.type != "meta":
        return parameter.detach()
    path, _, leaf = name.rpartition(".")
    weights = getattr(getattr(model.get_submodule(path), "_hf_hook", None), "weights_map", None)
    if weights is None:
        raise AlignvecError(f"{name} is on the meta device; load the model's weights before attaching")
    value: Tensor = weights[leaf]
    return value


def checkpoint_layout(model: nn.Module, names: LiveNames) -> StoredLayout:
    """The model's parameters as checkpoints of it hold those whose live layout is another (experts)."""
    parameters = dict(model.named_parameters())
    like = {plain: parameters[live] for plain, live in names.plain.items()}

    def value(plain: str) -> Tensor:
        return parameter_value(model, names.plain[plain], like[plain])

    return StoredLayout(names.root, like, value)


def live_deltas(
    model: nn.Module, names: dict[str, str], label: str, vector: AlignmentVector, transfer: bool = False
) -> dict[str, Delta]:
    """The vector's deltas by the live model's parameter names: functions that read one.

    Checkpoints that store weights in another layout than the live model (one tensor per expert on disk, three
    dimensions in memory) are converted by transformers' own rules, which are linear: see `conversion`. What those give
    is dense. A parameter gets a delta only where the vector has one for it, or for a part of it.

    transfer: the model need not be the vector's base; lossless deltas, which are steps from the base's values, are then
    read with the base that is bound to the vector, unless the model has those very values.

    Raises:
        AlignvecError: a delta that does not fit the model (no parameter of that name, a buffer, another shape,
            quantised weights), two that differ for one parameter, and, when a delta is read, a lossless one without
            its base's values.
    """
    known = names if isinstance(names, LiveNames) else LiveNames(model)
    places = locate(model, known, vector)
    require_fit(model, known, label, vector, places)
    parameters = dict(model.named_parameters())

    def read(name: str, live: str) -> Encoded:
        value = functools.partial(parameter_value, model, live, parameters[live])
        return _read(label, vector, name, value, transfer)

    deltas: dict[str, Delta] = {}
    for name in (name for name in vector.names if name in places.direct):
        live = places.direct[name]
        if live in deltas and not _same(deltas[live](), read(name, live)):
            raise AlignvecError(
                f"vector {label!r} has two different deltas for {live}, which the model ties together: attach it to a "
                "model that keeps the two apart (tie_word_embeddings=False)"
            )
        deltas[live] = functools.partial(read, name, live)
    if (head := places.head) is not None and head.follows and head.embedding in vector:
        deltas[head.live] = functools.partial(read, head.embedding, head.live)
    layout = checkpoint_layout(model, known)
    for group in places.groups:
        if any(name in vector for name in group.names):
            edited = functools.partial(_edited, label, vector, group, places, layout, transfer)
            made = functools.partial(_converted, group, known.root, places.shapes, edited)
            deltas |= {known.plain[plain]: functools.partial(made, plain) for plain in places.made[group.target]}
    return deltas


def _read(label: str, vector: AlignmentVector, name: str, value: Callable[[], Tensor], transfer: bool) -> Encoded:
    encoded = vector.encoded(name)
    if encoded.name != "lossless":
        return encoded
    current = value()
    unnamed = vector.base is None and not transfer  # only names and shapes can be checked
    if unnamed or has_base_bits(vector, name, current):
        return encoded
    _require_bound(label, vector, name, transfer)
    return Encoded("dense", encoded.shape, {}, {"": vector[name]})


def _require_bound(label: str, vector: AlignmentVector, name: str, transfer: bool) -> None:
    """AlignvecError for a lossless delta that the model does not have the base's bits of, and the vector neither."""
    if not vector.needs_base:
        return
    dtype = vector.format_of(name).options["dtype"]
    if unrecorded(vector, name):
        raise AlignvecError(
            f"vector {label!r} does not record the bits of its base's values ({name}) that its lossless steps are "
            "from: extract it anew, or give vector.with_base(base, verify=False)"
        )
    if transfer:
        raise AlignvecError(
            f"vector {label!r} is lossless, steps from the values of its own base, which the model does not have "
            f"({name}): give vector.with_base(base), or convert it to another format with its base"
        )
    raise AlignvecError(
        f"vector {label!r} is lossless in {dtype} and the model holds its base's values rounded ({name}): load it as "
        f"{dtype} (--dtype {dtype}), or give vector.with_base(base)"
    )


def _converted(
    group: Group, root: nn.Module, shapes: Shapes, read: Callable[[], Mapping[str, Tensor]], live: str
) -> Encoded:
    """The delta of a live parameter that a rule of loading makes of several stored ones; those unedited are zero."""
    edited = read()
    dtype = functools.reduce(torch.promote_types, (delta.dtype for delta in edited.values()))
    zero = torch.zeros((), dtype=dtype)

    def delta(name: str) -> Tensor:
        return edited[name].to(dtype) if name in edited else zero.expand(shapes[name])

    with torch.no_grad():
        values = group.convert(delta, root)[live]
    return Encoded("dense", tuple(values.shape), {}, {"": values.detach().contiguous()})


def _edited(
    label: str, vector: AlignmentVector, group: Group, places: Places, layout: StoredLayout, transfer: bool
) -> dict[str, Tensor]:
    """The vector's deltas of a group's stored tensors, lossless ones as steps from what the model has for them."""
    names = [name for name in group.names if name in vector]
    lossless = vector.needs_base and any(vector.format_of(name).name == "lossless" for name in names)
    values = layout.values(group, places.made[group.target], places.shapes) if lossless else {}
    found = {}
    for name in names:
        spec = vector.format_of(name)
        if spec.name == "lossless" and vector.needs_base:
            if name not in values or not has_base_bits(vector, name, values[name]):
                _require_bound(label, vector, name, transfer)
            found[name] = decode(vector.encoded(name), values[name].cpu().to(DTYPES[str(spec.options["dtype"])]))
            require_finite(name, found[name])
        else:
            found[name] = vector[name].detach()
    return found


def _same(one: Encoded, other: Encoded) -> bool:
    if one.spec == other.spec:
        return all(torch.equal(part, other.parts[key]) for key, part in one.parts.items())
    return "lossless" not in (one.name, other.name) and torch.equal(decode(one).float(), decode(other).float())

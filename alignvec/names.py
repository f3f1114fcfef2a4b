"""From the names in a vector to the parameters of a live model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.fingerprint import checksum, summary
from alignvec.formats import Encoded, decode
from alignvec.formats.lossless import DTYPES
from alignvec.vector import AlignmentVector

Delta = Callable[[], Encoded]


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Every name that a parameter goes by (tied weights have several) -> the first of them."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def resolve(model: nn.Module, names: dict[str, str], name: str) -> str | None:
    """The live name of a checkpoint tensor, also when one of the two was saved without its head; None if there is none.

    A checkpoint of a backbone says `layers.0...` where the full model says `model.layers.0...`, and the reverse.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in names:
            return names[candidate]
    return None


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


def checkpoint_layout(model: nn.Module) -> Mapping[str, Tensor]:
    """The model's parameters by checkpoint names and shapes, for those whose live layout is another (experts)."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        with torch.no_grad():
            return revert_weight_conversion(model, dict(model.named_parameters()))  # type: ignore[arg-type]
    except (ImportError, AttributeError):
        return {}


def live_deltas(
    model: nn.Module, names: dict[str, str], label: str, vector: AlignmentVector, transfer: bool = False
) -> dict[str, Delta]:
    """The vector's deltas by the live model's parameter names: functions that read one and check that it fits.

    Checkpoints that store weights in another layout than the live model (one tensor per expert on disk, three
    dimensions in memory) are converted by transformers' own loading code: conversions are linear, so they convert
    differences as they convert weights. What it gives is dense.

    transfer: the model need not be the vector's base; lossless deltas, which are steps from the base's values, are then
    read with the base that is bound to the vector, unless the model has those very values.

    Raises:
        AlignvecError: a delta that the model has no parameter for, two that differ for one parameter, and, when a delta
            is read, a shape or dtype that does not fit, or a lossless delta without its base's values.
    """
    found = {name: resolve(model, names, name) for name in vector.names}
    missing = [name for name, live in found.items() if live is None]
    converted: dict[str, Tensor] = {}
    if missing:
        converted = _converted(model, label, vector, missing)
        found = {name: names[name] for name in converted}
    parameters = dict(model.named_parameters())

    def read(name: str, live: str) -> Encoded:
        value = functools.partial(parameter_value, model, live, parameters[live])
        return _read(vector, name, converted.get(name), value, transfer)

    deltas: dict[str, Delta] = {}
    for name, live in found.items():
        assert live is not None
        _check(label, name, converted[name].shape if converted else vector.tensors[name].shape, parameters[live])
        if live in deltas and not _same(deltas[live](), read(name, live)):
            raise AlignvecError(f"vector {label!r} has two different deltas for {live}, which the model ties together")
        deltas[live] = functools.partial(read, name, live)
    return deltas


def _check(label: str, name: str, shape: tuple[int, ...], parameter: nn.Parameter) -> None:
    if tuple(shape) != tuple(parameter.shape):
        raise AlignvecError(
            f"vector {label!r} has shape {list(shape)} for {name}, the model has {list(parameter.shape)}; "
            "extract the vector from checkpoints of this architecture and vocabulary"
        )
    if not parameter.is_floating_point():
        raise AlignvecError(
            f"vector {label!r} edits {name}, which is {parameter.dtype} in the model; only floating-point "
            "parameters can be edited, load the model unquantised"
        )


def _read(
    vector: AlignmentVector, name: str, converted: Tensor | None, value: Callable[[], Tensor], transfer: bool
) -> Encoded:
    if converted is not None:
        return Encoded("dense", tuple(converted.shape), {}, {"": converted})
    encoded = vector.encoded(name)
    if encoded.name == "lossless" and transfer and not _is_base(vector, name, value()):
        return Encoded("dense", encoded.shape, {}, {"": vector[name]})
    return encoded


def _is_base(vector: AlignmentVector, name: str, value: Tensor) -> bool:
    return vector.base is not None and checksum(value) == vector.base.tensors[name].checksum


def _same(one: Encoded, other: Encoded) -> bool:
    if one.spec == other.spec:
        return all(torch.equal(part, other.parts[key]) for key, part in one.parts.items())
    return "lossless" not in (one.name, other.name) and torch.equal(decode(one).float(), decode(other).float())


def _converted(model: nn.Module, label: str, vector: AlignmentVector, missing: list[str]) -> dict[str, Tensor]:
    listed = summary(missing, separator=", ")
    refusal = AlignvecError(f"vector {label!r} edits tensors that {type(model).__name__} does not have: {listed}")
    if vector.base is None or not hasattr(type(model), "from_pretrained"):
        raise refusal
    stored = checkpoint_layout(model) if vector.needs_base else {}

    def delta(name: str) -> Tensor:
        spec = vector.format_of(name)
        if not vector.needs_base or spec.name != "lossless":
            return vector[name]
        return decode(vector.encoded(name), stored[name].detach().cpu().to(DTYPES[str(spec.options["dtype"])]))

    # Tensors that do not differ are zeros, so that a partly edited group of experts converts whole.
    state = {
        name: delta(name) if name in vector else torch.zeros(identity.shape, dtype=torch.float32)
        for name, identity in vector.base.tensors.items()
    }
    try:
        converted = type(model).from_pretrained(  # type: ignore[attr-defined]
            None, config=model.config, state_dict=state, dtype=torch.float32
        )
    except Exception as error:
        raise refusal from error
    live = dict(converted.named_parameters())
    return {name: p.detach() for name, p in live.items() if p.count_nonzero()}

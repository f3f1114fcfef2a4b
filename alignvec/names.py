"""From the names in a vector to the parameters of a live model."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.fingerprint import summary
from alignvec.vector import AlignmentVector

Delta = Callable[[], Tensor]


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


def live_deltas(model: nn.Module, names: dict[str, str], label: str, vector: AlignmentVector) -> dict[str, Delta]:
    """The vector's deltas by the live model's parameter names: functions that read one and check that it fits.

    Checkpoints that store weights in another layout than the live model (one tensor per expert on disk, three
    dimensions in memory) are converted by transformers' own loading code: conversions are linear, so they convert
    differences as they convert weights.

    Raises:
        AlignvecError: a delta that the model has no parameter for, two that differ for one parameter, and, when a delta
            is read, a shape or dtype that does not fit.
    """
    found = {name: resolve(model, names, name) for name in vector.names}
    source: AlignmentVector | dict[str, Tensor] = vector
    missing = [name for name, live in found.items() if live is None]
    if missing:
        source = _converted(model, label, vector, missing)
        found = {name: names[name] for name in source}
    parameters = dict(model.named_parameters())
    deltas: dict[str, Delta] = {}
    for name, live in found.items():
        assert live is not None
        if live in deltas and not torch.equal(deltas[live](), source[name]):
            raise AlignvecError(f"vector {label!r} has two different deltas for {live}, which the model ties together")
        deltas[live] = functools.partial(_read, label, name, source, parameters[live])
    return deltas


def _read(label: str, name: str, source: AlignmentVector | dict[str, Tensor], parameter: nn.Parameter) -> Tensor:
    delta = source[name]
    if delta.shape != parameter.shape:
        raise AlignvecError(
            f"vector {label!r} has shape {list(delta.shape)} for {name}, the model has {list(parameter.shape)}; "
            "extract the vector from checkpoints of this architecture and vocabulary"
        )
    if not delta.is_floating_point() or not parameter.is_floating_point():
        raise AlignvecError(
            f"vector {label!r} edits {name}, which is {parameter.dtype} in the model; only floating-point "
            "parameters can be edited, load the model unquantised"
        )
    return delta


def _converted(model: nn.Module, label: str, vector: AlignmentVector, missing: list[str]) -> dict[str, Tensor]:
    listed = summary(missing, separator=", ")
    refusal = AlignvecError(f"vector {label!r} edits tensors that {type(model).__name__} does not have: {listed}")
    if vector.base is None or not hasattr(type(model), "from_pretrained"):
        raise refusal
    # Tensors that do not differ are zeros, so that a partly edited group of experts converts whole.
    state = {
        name: vector[name] if name in vector else torch.zeros(identity.shape, dtype=torch.float32)
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

"""Whether a live model has a floating-point parameter of the right shape for every delta of a vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.fingerprint import dtype_name, summary
from alignvec.heads import require_known
from alignvec.unloaded import quantisation
from alignvec.wrappers import plain_names

if TYPE_CHECKING:
    from alignvec.names import LiveNames, Places
    from alignvec.vector import AlignmentVector

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LEAVE_OUT = "leave them out of the vector (vector.select)"


def require_fit(model: nn.Module, names: LiveNames, label: str, vector: AlignmentVector, places: Places) -> None:
    """AlignvecError that names what the vector edits and the model does not have, or has in another way."""
    kind, method = type(names.root).__name__, quantisation(getattr(names.root, "config", None))
    by = f" ({method})" if method else ""
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(info.shape) for name, info in vector.tensors.items()}
    if absent := [name for name in places.absent if name in vector]:
        listed = summary(absent, separator=", ")
        if method:
            raise AlignvecError(
                f"vector {label!r} edits tensors that {kind}, which is quantised{by}, does not hold as weights: "
                f"{listed}; load the model unquantised"
            )
        raise AlignvecError(
            f"vector {label!r} edits tensors that {kind} does not have: {listed}; attach it to a model of the "
            f"architecture that it was extracted from, or {LEAVE_OUT}"
        )
    if moved := [name for name in places.buffers if name in vector]:
        raise AlignvecError(
            f"vector {label!r} edits tensors that are buffers of {kind}, not parameters: "
            f"{summary(moved, separator=', ')}; only parameters are mixed: merge the vector into a checkpoint, or "
            f"{LEAVE_OUT}"
        )
    edited = {name: places.direct[name] for name in vector.names if name in places.direct}
    for name, live in edited.items():
        _require_plain(label, name, live, parameters[live], by)
    for name, live in edited.items():
        _require_shape(label, name, shapes[name], parameters[live])
    _require_untied(label, names, vector, places, edited)
    require_known(label, vector.tensors, places.head, kind)
    for group in places.groups:
        own = [name for name in group.names if name in vector]
        if not own:
            continue
        made = places.made[group.target]
        fits = bool(made) and all(plain in names.plain for plain in made)
        for plain in made if fits else ():
            _require_plain(label, own[0], names.plain[plain], parameters[names.plain[plain]], by)
            fits = fits and tuple(parameters[names.plain[plain]].shape) == made[plain]
        if not fits:
            raise AlignvecError(
                f"vector {label!r} edits {summary(own, separator=', ')}, which do not make up "
                f"{group.target} of {kind}; attach it to a model of the architecture and size that it was extracted "
                "from"
            )


def quantised_as(tensor: Tensor, method: str) -> str:
    """What a weight is, where it is no tensor of floating-point numbers: its dtype, or the class that packs it."""
    if tensor.dtype not in FLOATING:
        return dtype_name(tensor.dtype)
    plain = type(tensor) in (Tensor, nn.Parameter) or type(tensor).__name__ == "DTensor"  # a sharded tensor
    return "" if plain or not method else type(tensor).__name__


def _require_plain(label: str, name: str, live: str, parameter: nn.Parameter, by: str) -> None:
    if kind := quantised_as(parameter, by):
        raise AlignvecError(
            f"vector {label!r} edits {name}, which is {kind} in the model: it is quantised{by}, and vectors are mixed "
            "with floating-point weights alone; load the model unquantised"
        )
    if "original_module" in live.split("."):
        raise AlignvecError(
            f"vector {label!r} edits {name}, in whose place the model's PEFT adapter has a trained copy "
            f"(modules_to_save); {LEAVE_OUT}"
        )
    if "." not in live:
        raise AlignvecError(
            f"vector {label!r} edits {name}, which belongs to no module inside of the model; {LEAVE_OUT}"
        )


def _require_shape(label: str, name: str, shape: tuple[int, ...], parameter: nn.Parameter) -> None:
    if shape != tuple(parameter.shape):
        raise AlignvecError(
            f"vector {label!r} has shape {list(shape)} for {name}, the model has {list(parameter.shape)}; "
            "extract the vector from checkpoints of this architecture and vocabulary"
        )


def _require_untied(
    label: str, names: LiveNames, vector: AlignmentVector, places: Places, edited: Mapping[str, str]
) -> None:
    """A delta for one of two tensors that the model ties and the vector's base does not would go to both.

    Identities of bases that tie them have one of the two names alone. An adapter that was read without its base edits
    what it names and nothing else, whatever that is tied to.
    """
    base = {} if vector.base is None else vector.base.tensors
    held = {live: name for name, live in places.direct.items() if name in base and name not in vector}
    if vector.base is None and "adapter" in vector.source:
        ends = tuple(f".{name}" for name in plain_names(edited).values())
        held = {live: name for name, live in names.items() if not f".{name}".endswith(ends)}
    for name, live in edited.items():
        if live in held:
            advice = "" if vector.base is not None else ", or read the adapter with its base (from_peft(adapter, base))"
            raise AlignvecError(
                f"vector {label!r} edits {name} and not {held[live]}, which the model ties together: attach it to a "
                f"model that keeps the two apart (tie_word_embeddings=False){advice}"
            )

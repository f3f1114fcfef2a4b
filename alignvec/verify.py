"""Is this model the base that a vector was extracted from?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alignvec.errors import AlignvecError
from alignvec.fingerprint import checksum, summary
from alignvec.names import parameter_names, resolve
from alignvec.vector import AlignmentVector


def verify_base(model: nn.Module, vectors: Mapping[str, AlignmentVector]) -> None:
    """Compare the model's parameters with the base that each vector names, tensor by tensor.

    Raises:
        AlignvecError: one line per vector that belongs to another base, naming the tensors that differ.
    """
    names = parameter_names(model)
    parameters = dict(model.named_parameters())
    checksums: dict[str, str] = {}
    known = {name for vector in vectors.values() if vector.base is not None for name in vector.base.tensors}
    converted = any(resolve(model, names, name) is None for name in known)
    stored = _checkpoint_layout(model) if converted else {}

    def differs(name: str, shape: tuple[int, ...], expected: str) -> bool:
        live = resolve(model, names, name)
        if live is None and name not in stored:
            return True
        tensor = stored[name] if live is None else parameter_value(model, live, parameters[live])
        if tuple(tensor.shape) != tuple(shape):
            return True
        key = live or name
        if key not in checksums:
            checksums[key] = checksum(tensor)
        return checksums[key] != expected

    for label, vector in vectors.items():
        if vector.base is None:
            continue
        tensors = vector.base.tensors
        wrong = [n for n, t in tensors.items() if differs(n, tuple(t.shape), t.checksum)]
        if wrong:
            listed = summary(wrong, separator=", ")
            raise AlignvecError(
                f"vector {label!r} was extracted from another base: {len(wrong)} of {len(tensors)} tensors differ "
                f"({listed}); load that base, or attach with transfer=True"
            )


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


def _checkpoint_layout(model: nn.Module) -> Mapping[str, Tensor]:
    """The model's parameters by checkpoint names and shapes, for those whose live layout is another (experts)."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        with torch.no_grad():
            return revert_weight_conversion(model, dict(model.named_parameters()))  # type: ignore[arg-type]
    except (ImportError, AttributeError):
        return {}

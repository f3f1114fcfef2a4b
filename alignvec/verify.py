"""Is this model the base that a vector was extracted from?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from alignvec.errors import AlignvecError
from alignvec.fingerprint import checksum, summary
from alignvec.names import checkpoint_layout, parameter_names, parameter_value, resolve
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
    stored = checkpoint_layout(model) if converted else {}

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

"""Is this checkpoint the base that a vector was extracted from? And lossless vectors made readable with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from alignvec.base_bits import steps_from, unrecorded
from alignvec.errors import AlignvecError
from alignvec.fingerprint import (
    BaseIdentity,
    Checksum,
    TensorIdentity,
    dtype_name,
    exact,
    identifying,
    summary,
)
from alignvec.heads import own_head
from alignvec.pairing import EMBEDDINGS, HEADS, tied_to
from alignvec.sources import Source
from alignvec.unloaded import Unloaded, quantisation
from alignvec.vector import AlignmentVector


def require_base(source: Source, label: str, vector: AlignmentVector, *, values: bool = True) -> None:
    """AlignvecError that names the tensors in which ``source`` is not the base of ``vector``.

    ``values=False`` reads nothing and compares names and shapes; a vector that names no base is held to those alone.
    Tensors that the vector's base lacks may be there, but for a head with values of its own, and tensors that no model
    loads may be missing where the vector does not edit them: neither changes what the vector is added to.
    """
    _require_places(source, label, vector)
    if vector.base is None:
        return
    known = vector.base.tensors
    embedding = next((name for name in known if name.endswith(EMBEDDINGS)), None)
    for head in HEADS if embedding is not None else ():
        if head in source.tensors and head not in known and tied_to(source, head) is None:
            raise own_head(label, source.label, head, embedding or "")
    identities, other = {}, []
    for name, info in source.tensors.items():
        if info.dtype.is_floating_point and name in known:
            identities[name] = TensorIdentity(info.shape, dtype_name(info.dtype), "")
            if values and name in known and info.shape == known[name].shape:
                digest = Digest(name, [vector])
                for piece in source.chunks(name):
                    digest.update(piece)
                if not digest.agrees(vector):
                    other.append(name)
    if missing := [name for name in known if name not in source.tensors and name not in vector]:
        unloaded = Unloaded(source.config)
        identities |= {name: known[name] for name in missing if unloaded(name, known[name].shape)}
    if blind := [name for name in other if unrecorded(vector, name)]:
        raise AlignvecError(
            f"vector {label!r} does not record the bits of its base's values ({summary(blind, separator=', ')}) that "
            f"its lossless steps are from, so {source.label} cannot be compared with them: extract it anew"
        )
    here = BaseIdentity(identifying(source.config), identities)
    lines = vector.base.differences(here, values=False, here="the vector's base", there=source.label)
    if lines or other:
        raise AlignvecError(_refusal(source, label, vector.base, lines, [name for name in known if name in other]))


def bind(source: Source, label: str, vector: AlignmentVector, *, transfer: bool) -> AlignmentVector:
    """The vector, readable: where it needs its base, which the caller has yet to compare, ``source`` is that."""
    if not vector.needs_base:
        return vector
    if transfer:
        raise AlignvecError(
            f"vector {label!r} is lossless: steps from the values of its own base, not of {source.label}; "
            "give it with its base, vector.with_base(base), or convert it to another format, for which its base is "
            "needed, too (alignvec convert --base)"
        )
    return vector.with_base(source, verify=False)


class Digest:
    """The checksums of a tensor, given in pieces, that say whether it has the values of vectors' bases."""

    def __init__(self, name: str, vectors: Iterable[AlignmentVector]) -> None:
        self._name = name
        self._values = Checksum()
        self._bits = Checksum() if any(steps_from(vector, name) == "float16" for vector in vectors) else None

    def update(self, piece: Tensor) -> None:
        """Take the next values, of a floating dtype."""
        self._values.update(piece)
        if self._bits is not None:
            self._bits.update(exact(piece, "float16"))

    def agrees(self, vector: AlignmentVector) -> bool:
        """Whether these are the values of the vector's base, or, where no lossless delta is read as steps from their
        bits, those values as float16 has them."""
        assert vector.base is not None
        identity, dtype = vector.base.tensors[self._name], steps_from(vector, self._name)
        if dtype is None:
            return identity.has(self._values.hexdigest())
        digits = self._bits if dtype == "float16" else self._values
        return digits is not None and digits.hexdigest() == identity.bits(dtype)


def knows(vector: AlignmentVector, name: str) -> bool:
    """Whether the vector, or the base that it names, has a tensor of this name."""
    return name in vector or (vector.base is not None and name in vector.base.tensors)


def _require_places(source: Source, label: str, vector: AlignmentVector) -> None:
    """Every delta has a floating tensor of its shape to be added to, or an AlignvecError."""
    missing = []
    for name, info in vector.tensors.items():
        found = source.tensors.get(name)
        if found is None:
            missing.append(name)
        elif not found.dtype.is_floating_point:
            raise AlignvecError(
                f"{source.label} holds {name} as {dtype_name(found.dtype)}: it is quantised, and vector {label!r} is "
                "added to weights before they are: give the base as it was"
            )
        elif found.shape != info.shape:
            raise AlignvecError(
                f"vector {label!r} does not fit {source.label}: {name} is {list(info.shape)}, the base has shape "
                f"{list(found.shape)}"
            )
    if not missing:
        return
    listed = summary(missing, separator=", ")
    if quantisation(source.config):
        raise AlignvecError(
            f"{source.label} is quantised, says its config, and lacks {listed}, which vector {label!r} is added to: "
            "give the base as it was before"
        )
    raise AlignvecError(
        f"vector {label!r} does not fit {source.label}: {len(missing)} of its {len(vector)} tensors have no place "
        f"there ({listed}); {_names(missing, source.tensors)}"
    )


def _refusal(source: Source, label: str, base: BaseIdentity, lines: list[str], names: list[str]) -> str:
    """``lines``: differences of names, shapes and config; ``names``: tensors of other values."""
    differ = f"vector {label!r} was extracted from a different base than {source.label}"
    if lines:
        return f"{differ} ({summary(lines)}): use the one that it was extracted from"
    before = sorted({base.tensors[name].dtype for name in names})
    here = sorted({dtype_name(source.tensors[name].dtype) for name in names})
    rounded = "" if set(before) & set(here) else f", {' and '.join(before)} then and {' and '.join(here)} here"
    return (
        f"{differ}: {len(names)} of {len(base.tensors)} tensors have other values ({summary(names, separator=', ')})"
        f"{rounded}; use that base, or, if this is another training stage of it, transfer=True (--transfer)"
    )


def _names(names: Sequence[str], there: Collection[str]) -> str:
    """How the names that have no place differ from those that are there, and what to do."""
    advice = "extract it from models that name their tensors as this one does"
    first, pieces = names[0], names[0].split(".")
    for name in there:
        prefix = name.removesuffix(first)
        if prefix != name and prefix.endswith(".") and all(prefix + each in there for each in names):
            return f"they lack the prefix {prefix!r}: {advice}"
    for count in range(1, len(pieces)):
        prefix = ".".join(pieces[:count]) + "."
        if all(name.startswith(prefix) and name.removeprefix(prefix) in there for name in names):
            return f"without their prefix {prefix!r} they would: {advice}"
    return f"where the architecture is the same, {advice}"

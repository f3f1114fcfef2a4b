"""A LoRA adapter in, an alignment vector out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from alignvec import formats
from alignvec.errors import AlignvecError
from alignvec.formats import Encoded
from alignvec.peft.base import Base
from alignvec.peft.edits import Edits, read_edits
from alignvec.vector import AlignmentVector


def from_peft(adapter: str | Path | nn.Module, base: str | Path | nn.Module | None = None) -> AlignmentVector:
    """A LoRA adapter as an alignment vector: `base + vector` is what PEFT's `merge_and_unload` gives.

    LoRA of linear layers, Conv1D (GPT-2) and embeddings becomes low-rank, the scale folded into one factor: bfloat16
    where that is exact, else float32. Several adapters on one weight become one product of the sum of their ranks.
    Trained biases, `modules_to_save`, trained tokens and experts' parameters (`target_parameters`) become dense deltas.
    An adapter on an embedding and its tied head (`ensure_weight_tying`) is read as its forward has it, once: PEFT's
    `merge_and_unload` adds it to the shared weight twice.

    Args:
        adapter: the folder of a saved adapter, or a live model with adapters: a `PeftModel`, or a transformers model
            after `add_adapter` or `load_adapter`. Of a live model the active adapters are taken, their sum if there
            are several, with the scales that its layers have at the time.
        base: the model that the adapter belongs to, a checkpoint or a live model; a live model with adapters brings its
            own. Without, the vector names no base, full weights and parameters of experts cannot be read, and layers
            are linear unless the adapter says `fan_in_fan_out`.

    Raises:
        AlignvecError: an adapter of another kind than LoRA, or of a variant that is no sum of a low-rank delta (named);
            adapters that are merged or disabled; tensors that are missing, of a wrong shape, or that PEFT would not
            load; full weights without a base; edits of one of two weights that the base ties together; peft is not
            installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise AlignvecError(f"reading an adapter takes the peft package ({error}): pip install peft") from None
    if isinstance(adapter, nn.Module):
        from alignvec.peft.live import LiveAdapters

        live = LiveAdapters(adapter)
        known, label = live.base() if base is None else Base.open(base), live.label
        edits = read_edits(live.model, known, label)
        edits.whole = live.biases() | edits.whole
        named = True
    else:
        from alignvec.peft.stored import StoredAdapter

        stored = StoredAdapter(adapter)
        known = stored.base() if base is None else stored.checkpoint_layout(Base.open(base))
        label, named = stored.label, base is not None
        model, whole = stored.put_into(known)
        edits = read_edits(model, known, label, stored=True)
        edits.whole = whole | edits.whole
    return _vector(edits, known, label, named)


def _vector(edits: Edits, base: Base, label: str, named: bool) -> AlignmentVector:
    deltas = _tied_once(dict(edits.deltas(base, label)), base, label)
    if not deltas:
        raise AlignvecError(f"adapter {label} changes nothing: all of its deltas are zero")
    if not named:
        return AlignmentVector(deltas, source={"adapter": label})
    return AlignmentVector(base.as_stored(deltas), base.identity(), source={"adapter": label, "base": base.label})


def _tied_once(deltas: Mapping[str, Tensor | Encoded], base: Base, label: str) -> dict[str, Tensor | Encoded]:
    """A tied parameter's delta once, which has to be the same under all its names."""
    once: dict[str, Tensor | Encoded] = {}
    for name, delta in deltas.items():
        for other in base.tied(name):
            if other not in deltas or not torch.allclose(_dense(delta), _dense(deltas[other]), rtol=1e-4, atol=1e-7):
                raise AlignvecError(
                    f"adapter {label} edits {name} apart from {other}, which {base.label} ties to it, where an "
                    "alignment vector edits both: untie the base, or train with ensure_weight_tying"
                )
        if not any(other in once for other in base.tied(name)):
            once[name] = delta
    return once


def _dense(delta: Tensor | Encoded) -> Tensor:
    return formats.decode(delta) if isinstance(delta, Encoded) else delta.float()

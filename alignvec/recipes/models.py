"""Where the shipped models and vectors lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alignvec.errors import AlignvecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELS = Path(__file__).parent / "models"
NAMES = ("base", "medical", "legal", "financial")
BASES = ("qwen3-2m",)  # shipped as a base and its alignment vectors, not as a checkpoint for each domain
SAFETY = "safety"


def model_path(name: str) -> Path:
    """The folder of a shipped checkpoint, tokenizer included where it is a base.

    "base" and its descendants "medical", "legal" and "financial" (Mistral, 3.9 million parameters), or "qwen3-2m", a
    base of another architecture, whose vectors `vector_path` finds. Raises AlignvecError for any other name.
    """
    if name in BASES:
        return MODELS / name / "base"
    if name not in NAMES:
        raise AlignvecError(f"There is no shipped model {name!r}; choose one of {', '.join(NAMES + BASES)}.")
    return MODELS / name


def vector_path(name: str, base: str = "qwen3-2m") -> Path:
    """The folder of the shipped alignment vector "medical", "legal" or "financial" of a base, for `alignvec.attach`.

    "safety" belongs to the Mistral "base" and makes it its safety-tuned descendant.
    Raises AlignvecError for other names; of the checkpoint "base", vectors are extracted from its descendants instead.
    """
    if name == SAFETY:
        return MODELS / name
    if base not in BASES:
        raise AlignvecError(f"There are no shipped vectors of {base!r}; choose one of {', '.join(BASES)}.")
    if name not in NAMES[1:]:
        raise AlignvecError(f"There is no shipped vector {name!r}; choose one of {', '.join((*NAMES[1:], SAFETY))}.")
    return MODELS / base / name


def load_safety() -> PreTrainedModel:
    """The safety-tuned descendant of "base", in bfloat16: the base and its vector "safety" at 1, bit for bit."""
    import torch

    from alignvec.loading import load_model
    from alignvec.vector import AlignmentVector

    base = model_path("base")
    model: PreTrainedModel = load_model(base, dtype=torch.bfloat16).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in AlignmentVector.load(vector_path(SAFETY)).with_base(base).items():
            parameters[name].copy_(parameters[name].float() + delta)
    return model

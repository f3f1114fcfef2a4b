"""Where the shipped models and vectors lie."""

from pathlib import Path

from alignvec.errors import AlignvecError

MODELS = Path(__file__).parent / "models"
NAMES = ("base", "medical", "legal", "financial")
BASES = ("qwen3-2m",)  # shipped as a base and its alignment vectors, not as a checkpoint for each domain


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

    Raises AlignvecError for other names; of the checkpoint "base", vectors are extracted from its descendants instead.
    """
    if base not in BASES:
        raise AlignvecError(f"There are no shipped vectors of {base!r}; choose one of {', '.join(BASES)}.")
    if name not in NAMES[1:]:
        raise AlignvecError(f"There is no shipped vector {name!r}; choose one of {', '.join(NAMES[1:])}.")
    return MODELS / base / name

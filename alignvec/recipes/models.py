"""Where the shipped models lie."""

from pathlib import Path

from alignvec.errors import AlignvecError

MODELS = Path(__file__).parent / "models"
NAMES = ("base", "medical", "legal", "financial")


def model_path(name: str) -> Path:
    """The folder of a shipped checkpoint: "base" (which holds the tokenizer too), "medical", "legal" or "financial"."""
    if name not in NAMES:
        raise AlignvecError(f"There is no shipped model {name!r}; choose one of {', '.join(NAMES)}.")
    return MODELS / name

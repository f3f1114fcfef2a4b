"""How the shipped tiny models are made: data, training, measurement. See `python -m alignvec.recipes.tiny --help`."""

from alignvec.recipes.models import model_path, vector_path

__all__ = ["model_path", "vector_path"]

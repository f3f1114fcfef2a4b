"""Sizes and architectures that the recipe can train."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from alignvec.errors import AlignvecError


@dataclass(frozen=True)
class Shape:
    """A `model_type` of transformers and its sizes.

    `rate` multiplies the base's learning rates and `align_rate` that of preference training: larger models want lower
    ones, smaller models higher ones.
    """

    architecture: str
    sizes: dict[str, Any]
    rate: float = 1.0
    align_rate: float = 1.0


SHAPES = {
    # 3.9 million parameters: four layers, grouped queries (8 heads on 2), SwiGLU, RMSNorm, tied embeddings.
    "mistral-4m": Shape(
        "mistral",
        dict(
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            sliding_window=None,
        ),
    ),
    # 2.4 million, with norms on queries and keys.
    "qwen3-2m": Shape(
        "qwen3",
        dict(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
        ),
        align_rate=4.0,
    ),
    # 55 million, for a GPU.
    "llama-55m": Shape(
        "llama",
        dict(
            hidden_size=640,
            intermediate_size=1760,
            num_hidden_layers=12,
            num_attention_heads=10,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=256,
        ),
        rate=0.3,
    ),
}
DEFAULT = "mistral-4m"


def shape_named(name: str) -> Shape:
    """The shape of that name; AlignvecError for any other."""
    if name not in SHAPES:
        raise AlignvecError(f"There is no shape {name!r}; choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def make_config(tokenizer: PreTrainedTokenizerFast, shape: str = DEFAULT) -> PreTrainedConfig:
    """Configuration for `AutoModelForCausalLM.from_config`, with the tokenizer's vocabulary and tied embeddings."""
    chosen = shape_named(shape)
    return AutoConfig.for_model(
        chosen.architecture,
        vocab_size=len(tokenizer),
        **chosen.sizes,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

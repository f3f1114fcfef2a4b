"""Small models of many families, each beside a tuned copy, which is what coefficient 1 has to give."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn

import alignvec

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def built(config: str, auto: Any = transformers.AutoModelForCausalLM, **options: Any) -> nn.Module:
    """A model with random weights by the name of its configuration, in eval mode."""
    torch.manual_seed(0)
    return auto.from_config(getattr(transformers, config)(**{**SIZES, **options})).eval()


def tuned(model: nn.Module, only: str = "") -> nn.Module:
    """A copy whose parameters, or those with `only` in their names, moved."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if only in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return other


def with_vector(model: nn.Module, only: str = "", **options: Any) -> tuple[nn.Module, nn.Module, alignvec.Alignment]:
    """An untouched copy of the model, the tuned one, and the alignment of the vector between them on the model."""
    base, aligned = copy.deepcopy(model), tuned(model, only)
    return base, aligned, alignvec.attach(model, {"v": alignvec.extract(base, aligned)}, **options)


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth.double()).norm() / truth.double().norm())

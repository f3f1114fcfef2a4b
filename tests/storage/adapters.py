"""Adapters made by the peft package on tiny models, and what they merge to: the truth for vectors read from them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from alignvec import AlignmentVector

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def randomise(model: nn.Module) -> nn.Module:
    """Adds noise to every tensor that an adapter trains."""
    generator = torch.Generator().manual_seed(1)
    words = ("lora_", "modules_to_save", "trainable_tokens_delta")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words) or parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05
    return model


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """A PeftModel on a copy of `model`, every trained tensor random."""
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **options})
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    return randomise(wrapped)


def expected(wrapped: nn.Module) -> dict[str, torch.Tensor]:
    return dict(copy.deepcopy(wrapped).merge_and_unload().named_parameters())


def assert_same(model: nn.Module, vector: AlignmentVector, wrapped: nn.Module) -> None:
    """base + vector is what peft merges, and nothing else changed."""
    merged = expected(wrapped)
    for name, parameter in model.named_parameters():
        total = parameter.double() + vector[name].double() if name in vector else parameter.double()
        torch.testing.assert_close(
            total, merged[name].double(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def saved(wrapped: nn.Module, path: Path) -> Path:
    wrapped.save_pretrained(path)
    return path


def change(folder: Path, **options: Any) -> None:
    """Other options in the configuration of a saved adapter."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))

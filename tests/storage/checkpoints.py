"""Checkpoints small enough to write in a moment, laid out as awkwardly as real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Named like a model's; odd shapes, one scalar, one empty tensor, one integer buffer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (61, 24),
        "model.layers.0.self_attn.q_proj.weight": (24, 24),
        "model.layers.0.self_attn.q_proj.bias": (24,),
        "model.layers.0.input_layernorm.weight": (24,),
        "model.layers.1.mlp.up_proj.weight": (37, 24),
        "model.layers.1.mlp.experts": (3, 5, 7),
        "model.layers.1.scale": (),
        "model.layers.1.empty": (0, 24),
        "model.norm.weight": (24,),
        "lm_head.weight": (61, 24),
    }
    tensors = {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()}
    return tensors | {"model.position_ids": torch.arange(5)}


def aligned(base: Mapping[str, Tensor], size: float = 1e-3, seed: int = 1) -> dict[str, Tensor]:
    """Everything moved a little, but for the norms, which stay, and the integers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.is_floating_point() and "norm" not in name
        else tensor.clone()
        for name, tensor in base.items()
    }


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, **config: object) -> Path:
    """A folder as `save_pretrained` would leave it, tensors dealt out to the shards in turn."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "hidden_size": 24} | config))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = list(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder

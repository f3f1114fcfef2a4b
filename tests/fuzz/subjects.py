"""The whole folders that mutations start from: a tiny base, its aligned descendant, vectors and adapters of the two."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from torch import nn

import alignvec
from tests.storage import adapters

KINDS = ("vector", "adapter", "checkpoint")
FORMATS = {
    "dense": {},
    "sharded": {"max_shard_size": 1500},
    "int8": {"format": "int8:group=32"},
    "int4": {"format": "int4"},
    "sign": {"format": "sign"},
    "sign-groups": {"format": "sign:group=96"},
    "low-rank": {"format": "low-rank:rank=3"},
    "sparse": {"format": "sparse:density=0.3"},
    "lossless": {"format": "lossless"},
    "lossless-narrow": {"format": "lossless:width=2", "max_shard_size": 2000},
    "auto": {"format": "auto:0.4"},
}
ADAPTERS = {
    "attention": {"target_modules": adapters.ATTENTION},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "whole": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
}


def make(folder: Path) -> None:
    """Write ``base``, ``aligned``, and ``vector``, ``adapter`` and ``checkpoint``, each a folder of subjects."""
    model = _model()
    model.save_pretrained(folder / "base")
    (folder / "base" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "b", "chat_template": "{{ x }}"}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter.dtype)
    model.save_pretrained(folder / "aligned")
    (folder / "aligned" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}))
    for name, options in FORMATS.items():
        alignvec.extract(folder / "base", folder / "aligned", output=folder / "vector" / name, **options)  # type: ignore[arg-type]
    _first_schema(folder / "vector" / "dense", folder / "vector" / "schema-1")
    for name, options in ADAPTERS.items():
        adapters.saved(adapters.adapted(load(folder / "base"), **options), folder / "adapter" / name)
    load(folder / "base").save_pretrained(folder / "checkpoint" / "single")
    load(folder / "base").save_pretrained(folder / "checkpoint" / "sharded", max_shard_size="4KB")
    for file in (folder / "base").glob("tokenizer*"):
        for checkpoint in ("single", "sharded"):
            (folder / "checkpoint" / checkpoint / file.name).write_bytes(file.read_bytes())


def load(folder: Path) -> nn.Module:
    """A stored model, in the dtype that it is stored in."""
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model.requires_grad_(False)


def _model() -> nn.Module:
    torch.manual_seed(7)
    sizes = {"vocab_size": 23, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    config = transformers.MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=12)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def _first_schema(dense: Path, target: Path) -> None:
    target.mkdir()
    data = json.loads((dense / "alignment_vector.json").read_text())
    del data["checksum"]  # which no vector of that schema has
    data |= {"schema": 1, "tensors": {name: entry["shape"] for name, entry in data["tensors"].items()}}
    (target / "alignment_vector.json").write_text(json.dumps(data))
    file = "alignment_vector.safetensors"
    (target / file).write_bytes((dense / file).read_bytes())

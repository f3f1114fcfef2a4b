"""The models that the suite runs on, and random vectors for all of their parameters, both made on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from alignvec import AlignmentVector, formats
from alignvec.formats import Encoded, Spec, bits
from alignvec.recipes.models import model_path
from bench.suite.case import Setting

WEIGHT_STD, DELTA_STD = 0.02, 2e-5  # as in a 7B model after preference tuning
LEVELS = {"int8": 73.9, "int4": 4.61}  # standard deviation of codes that are all equally likely
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral-7b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32768,
    ),
    "small": dict(
        hidden_size=2048,
        intermediate_size=7168,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=16384,
    ),
}


def build(setting: Setting) -> nn.Module:
    """The setting's model on its device, in eval mode: random weights in bfloat16, or the shipped base in float32."""
    disable_progress_bar()
    if setting.model == "tiny":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model_path("base"), dtype=torch.float32)
        return loaded.to(setting.device).eval()
    config = transformers.MistralConfig(
        **CONFIGS[setting.model], max_position_embeddings=32768, sliding_window=None, initializer_range=WEIGHT_STD
    )
    torch.manual_seed(0)
    with torch.device(setting.device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def vectors(model: nn.Module, text: str, k: int) -> dict[str, AlignmentVector]:
    """`k` random vectors in a format, "v1" to "v<k>", that edit every parameter of `model`, on its device.

    They name no base: `alignvec.attach(model, vectors(model, "int4", 3))`. Deltas have a standard deviation of 2e-5.
    """
    spec = formats.parse(text)
    device = next(model.parameters()).device
    made = {}
    for number in range(1, k + 1):
        generator = torch.Generator(device).manual_seed(number)
        deltas = {name: _delta(spec, value.detach(), generator) for name, value in model.named_parameters()}
        made[f"v{number}"] = AlignmentVector(deltas, format=text)
    return made


def mixes(count: int, k: int) -> list[dict[str, float]]:
    """`count` mixes of `k` vectors, no two alike and no coefficient 0."""
    return [{f"v{i + 1}": 0.1 + (0.37 * i + row / count) % 0.9 for i in range(k)} for row in range(count)]


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(value.nbytes for value in model.parameters())


def _delta(spec: Spec, value: Tensor, generator: torch.Generator) -> Tensor | Encoded:
    """A random delta of one parameter; those of one dimension are dense. Lossless ones are encoded, others drawn."""
    if value.dim() < 2 or spec.name == "dense":
        return _normal(value.shape, DELTA_STD, value.dtype, generator)
    if spec.name == "lossless":
        base = value.to(torch.bfloat16)
        aligned = base + _normal(value.shape, DELTA_STD, torch.bfloat16, generator)
        return formats.encode(spec, aligned.float() - base.float(), base, aligned=aligned)
    shape, options = tuple(value.shape), dict(spec.options)
    sizes = formats.layout(spec.name, shape, options)
    if spec.name == "sparse":
        mask = torch.rand(shape, generator=generator, device=value.device) < float(options["density"])
        std = DELTA_STD / math.sqrt(float(options["density"]))
        values = _normal((int(mask.sum()),), std, torch.bfloat16, generator)
        return Encoded(spec.name, shape, options, {"bitmap": bits.pack(mask.view(torch.uint8), 1), "values": values})
    std = math.sqrt(DELTA_STD / math.sqrt(float(options["rank"]))) if spec.name == "low-rank" else 0.0
    parts = {}
    for part, (dtype, size) in sizes.items():
        if part == "scales":
            parts[part] = torch.full(size, DELTA_STD / LEVELS.get(spec.name, 1.0), dtype=dtype, device=value.device)
        elif dtype.is_floating_point:
            parts[part] = _normal(size, std, dtype, generator)
        else:
            drawn = torch.empty(size, dtype=torch.uint8, device=value.device).random_(generator=generator)
            parts[part] = drawn.view(dtype)
    return Encoded(spec.name, shape, options, parts)


def _normal(shape: Any, std: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=generator.device).normal_(0, std, generator=generator)

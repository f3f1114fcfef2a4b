"""The models that the suite runs on, and random vectors for all of their parameters, both made on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from alignvec import AlignmentVector, formats
from alignvec.formats import Encoded, Spec
from alignvec.loading import load_config, load_model
from alignvec.recipes.models import model_path
from bench.suite.case import Setting

WEIGHT_STD, DELTA_STD = 0.02, 2e-5  # as in a 7B model after preference tuning
DRAWN = 1 << 20
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


def config(setting: Setting) -> transformers.PreTrainedConfig:
    """The setting's architecture."""
    if setting.model == "tiny":
        return load_config(model_path("base"))
    sizes = CONFIGS[setting.model]
    return transformers.MistralConfig(**sizes, max_position_embeddings=32768, sliding_window=None)


def build(setting: Setting) -> nn.Module:
    """The setting's model on its device, in eval mode: random weights in bfloat16, or the shipped base in float32."""
    disable_progress_bar()
    if setting.model == "tiny":
        loaded = load_model(model_path("base"), dtype=torch.float32)
        return loaded.to(setting.device).eval()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config(setting), dtype=torch.bfloat16)
    model.to_empty(device=setting.device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(setting.device)  # its buffers are computed
    generator = torch.Generator(setting.device).manual_seed(0)
    for value in model.parameters():
        value.data.fill_(1) if value.dim() == 1 else _fill(value.data, WEIGHT_STD, generator)
    return model.eval()


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
    """A random delta of one parameter; those of one dimension are dense."""
    if value.dim() < 2 or spec.name == "dense":
        return _fill(torch.empty_like(value), DELTA_STD, generator)
    if spec.name in ("lossless", "sparse"):
        return _repeated(spec, value, generator)
    shape, options = tuple(value.shape), dict(spec.options)
    parts = {}
    for part, (dtype, size) in formats.layout(spec.name, shape, options).items():
        made = parts[part] = torch.empty(size, dtype=dtype, device=value.device)
        if part == "scales":
            made.fill_(DELTA_STD / LEVELS.get(spec.name, 1.0))
        elif spec.name == "low-rank":
            _fill(made, math.sqrt(DELTA_STD / math.sqrt(float(options["rank"]))), generator)
        else:
            made.view(torch.uint8).random_(generator=generator)
    return Encoded(spec.name, shape, options, parts)


def _repeated(spec: Spec, value: Tensor, generator: torch.Generator) -> Encoded:
    """The encoding of some rows, again and again: as many entries aside, or values kept, as all rows would have."""
    rows = math.gcd(len(value), 256)
    times = len(value) // rows
    base = value[:rows].bfloat16()
    delta, aligned = _fill(torch.empty_like(base), DELTA_STD, generator), None
    if spec.name == "lossless":
        aligned = base + delta
        delta = aligned.float() - base.float()
    some = formats.encode(spec, delta, base, aligned=aligned)
    parts = {part: own.repeat(times, *[1] * (own.dim() - 1)) for part, own in some.parts.items()}
    if "side_start" in parts:
        counts = some.parts["side_start"].diff().repeat(times)
        parts["side_start"] = nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return Encoded(spec.name, tuple(value.shape), some.options, parts)


def _fill(out: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Normal numbers, the first DRAWN of them again and again: on a CPU drawing takes longer than what is timed."""
    flat = out.view(-1)
    flat[:DRAWN].normal_(0, std, generator=generator)
    for start in range(DRAWN, flat.numel(), DRAWN):
        flat[start : start + DRAWN] = flat[: min(DRAWN, flat.numel() - start)]
    return out

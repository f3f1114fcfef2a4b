"""How each architecture of transformers is made tiny: sizes by the option's name, exceptions by model type."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.architectures.overrides import OVERRIDES
from tests.architectures.sizes import SIZES

CAUSAL, SEQ2SEQ, IMAGE = "Causal language models", "Encoder-decoders", "Images and text"

_IMAGE_TEXT = (
    *("llava", "llava_next", "llava_onevision", "vipllava", "internvl", "mistral3", "idefics3", "smolvlm"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "mllama"),
)


@dataclass(frozen=True)
class Architecture:
    """A class of models: the model type of its configuration, the class, and the section of the table it belongs to."""

    model_type: str
    class_name: str
    section: str

    @property
    def name(self) -> str:
        return f"{self.class_name} ({self.model_type})"


def architectures() -> list[Architecture]:
    """All of transformers' causal language models and encoder-decoders, and some that take images and text."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    seq2seq = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    image = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return [
        *(Architecture(kind, name, CAUSAL) for kind, name in causal.items()),
        *(Architecture(kind, name, SEQ2SEQ) for kind, name in seq2seq.items()),
        *(Architecture(kind, image[kind], IMAGE) for kind in _IMAGE_TEXT),
    ]


def options(config_class: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a configuration tiny, those of its parts included; `changes` go before them, by part."""
    accepted = {field.name for field in dataclasses.fields(config_class)}
    result = {name: value for name, value in SIZES.items() if name in accepted and name not in changes}
    if "kv_lora_rank" in accepted:  # latent attention has as many heads of keys as of queries
        result["num_key_value_heads"] = SIZES["num_attention_heads"]
    for key, spec in getattr(config_class, "sub_configs_defaults", {}).items():
        part = dict(changes.get(key, {}))
        own = spec if dataclasses.is_dataclass(spec) else spec.config_class
        kind = part.get("model_type", spec.model_type)
        part_class = own if dataclasses.is_dataclass(own) else CONFIG_MAPPING[kind]
        result[key] = {**options(part_class, part), "model_type": kind}
    return {**changes, **result}


def build(architecture: Architecture) -> PreTrainedModel:
    """A tiny model in float32 and eval mode, with values in every parameter that show in its outputs."""
    torch.manual_seed(0)
    config_class, changes = CONFIG_MAPPING[architecture.model_type], OVERRIDES.get(architecture.model_type, {})
    model_class = getattr(transformers, architecture.class_name)
    parts = getattr(config_class, "sub_configs_defaults", {})
    part = next((key for key in ("text_config", "decoder") if key in parts), None)
    if part is not None and not issubclass(config_class, model_class.config_class):  # the class takes the text's part
        config_class, changes = model_class.config_class, changes.get(part, {})
    config = config_class(**options(config_class, changes))
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            _enliven(parameter, generator)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and "bias" in name:
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def _enliven(parameter: Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() < 2:
        parameter.add_(0.1 * noise)
        return
    spread = float(parameter.std(correction=0))
    if not 1e-6 < spread < 10:
        parameter.copy_(0.2 * noise)
    elif spread < 0.2:
        parameter.mul_(0.2 / spread)


def tuned(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of `base` with noise of a tenth of its own size on every parameter."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.1 * (float(parameter.std(correction=0)) + 0.05)
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def merged(base: PreTrainedModel, other: PreTrainedModel, coefficient: float) -> PreTrainedModel:
    """`base + coefficient (other - base)`, formed in float64 and rounded to the model's dtype."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for own, aligned in zip(model.parameters(), other.parameters(), strict=True):
            own.copy_(own.double() + coefficient * (aligned.double() - own.double()))
    return model

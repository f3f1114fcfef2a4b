"""Small models of many families, their tuned copies, and a model with a vector's deltas added to its parameters."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import nn

from alignvec import AlignmentVector
from alignvec.formats import decode
from alignvec.names import live_deltas, parameter_names
from tests.tuned import SIZES

SMALL = SIZES
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
)

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict] = {
    "Llama": {},
    "GPTNeoX": {},
    "GPT2": {},
    "Gemma": {"tie_word_embeddings": True},
    "Phi3": {"pad_token_id": 0},
    "Mixtral": {"num_local_experts": 12, "num_experts_per_tok": 2},  # experts 10 and 11 come after 9
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **MOE},
    "Qwen3Moe": {"num_experts": 4, **MOE},
    "Glm4Moe": {**MOE, **GROUPS},
    "DeepseekV3": {**MOE, **GROUPS, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                   "v_head_dim": 8},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def new(family: str, **options: object) -> nn.Module:
    """A causal language model with random parameters, in eval mode."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def llava() -> nn.Module:
    """A vision-language model whose language model is the Llama of `new("Llama")`'s size."""
    torch.manual_seed(2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**SMALL),
        image_token_index=95,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def tuned(model: nn.Module, seed: int = 1) -> nn.Module:
    """A copy with every parameter moved."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return other


@torch.no_grad()
def added(model: nn.Module, vector: AlignmentVector, transfer: bool = False) -> dict[str, torch.Tensor]:
    """The parameters of the model with the vector's deltas for it added, in float64, by live names."""
    deltas = live_deltas(model, parameter_names(model), "v", vector, transfer)
    parameters = dict(model.named_parameters())
    assert deltas.keys() <= parameters.keys()
    moved = {name: parameter.double() for name, parameter in parameters.items()}
    for name, delta in deltas.items():
        encoded = delta()
        moved[name] = moved[name] + decode(encoded, parameters[name] if encoded.name == "lossless" else None).double()
    return moved

"""Tiny random models of every architecture that attach is tested on, and random vectors for them."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import nn

from alignvec import AlignmentVector
from alignvec.fingerprint import identify

_COMMON = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

ARCHITECTURES: dict[str, dict] = {
    "Mistral": {},
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma2": {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "Phi3": {},
    "GPT2": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def config(architecture: str, **changes: object) -> transformers.PreTrainedConfig:
    options = {**_COMMON, **ARCHITECTURES[architecture], **changes}
    if architecture == "GPT2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        kept = {k: options[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
        return transformers.GPT2Config(
            **kept, n_positions=128, n_inner=72, **{new: options[old] for old, new in names.items()}
        )
    return getattr(transformers, f"{architecture}Config")(**options)


def tiny(architecture: str = "Mistral", dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
    """A model with random parameters everywhere, biases and norms included, in eval mode."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config(architecture, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4.0)  # logits of order one, so that errors show
    return model


def random_vector(model: nn.Module, seed: int, scale: float = 0.1, base: bool = True) -> AlignmentVector:
    """A delta of `scale` times the parameter's own size on every parameter, tied ones once."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        name: (
            torch.randn(p.shape, generator=generator) * scale * (float(p.detach().float().std(correction=0)) + 0.05)
        ).to(p.device, p.dtype)
        for name, p in model.named_parameters()
    }
    return AlignmentVector(deltas, identify(model) if base else None)


def merged(model: nn.Module, vectors: dict[str, AlignmentVector], mix: dict[str, float]) -> nn.Module:
    """The model with the mix added to its parameters in float64: the truth that attached models are held to."""
    result = copy.deepcopy(model).double()
    parameters = dict(result.named_parameters())
    with torch.no_grad():
        for label, coefficient in mix.items():
            for name in vectors[label].names:
                parameters[name] += coefficient * vectors[label][name].double()
    return result

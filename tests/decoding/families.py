"""Tiny models of many families, whose windows, chunks and position limits are a few tokens long."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn

from tests.tuned import SIZES

_GPT: dict[str, Any] = dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1)
_SMALL: dict[str, Any] = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
_LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16)
_ROUTED |= dict(first_k_dense_replace=1, num_key_value_heads=4)
_LATENT = dict(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=16, head_dim=None)
_LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
_MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
_MIXED = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
_QWEN = dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)
_CHUNKS = dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48, interleave_moe_layer_step=1)
_CHUNKS |= dict(attention_chunk_size=8, no_rope_layers=[1, 0])
_SHARED = dict(sliding_window=6, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=_MIXED["layer_types"] * 2)
_SHARED |= dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=96)


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    own = dict(rope_type=kind, rope_theta=1e4, original_max_position_embeddings=16, **options)
    return {"rope_parameters": own, "max_position_embeddings": 16 if kind == "dynamic" else 128}


_LONG = _rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4) | {
    "sliding_window": None,
    "original_max_position_embeddings": 16,
}
_YARN = dict(factor=4.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.5)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, llama3 rope": ("Llama", _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    "Llama, yarn rope": ("Llama", _rope("yarn", factor=4.0)),
    "Llama, dynamic rope": ("Llama", _rope("dynamic", factor=2.0)),
    "Llama 4, chunks": ("Llama4Text", _CHUNKS),
    "Llama 4, temperature": ("Llama4Text", _CHUNKS | dict(attn_temperature_tuning=True, floor_scale=8, attn_scale=0.5)),
    "Mistral, window": ("Mistral", dict(sliding_window=6)),
    "Ministral, window": ("Ministral", _MIXED),
    "Ministral 3, temperature": ("Ministral3", dict(sliding_window=None, **_rope("yarn", **_YARN))),
    "Mixtral, window": ("Mixtral", dict(sliding_window=6, **_LOCAL_EXPERTS)),
    "Gemma": ("Gemma", {}),
    "Gemma 2": ("Gemma2", _MIXED | dict(query_pre_attn_scalar=8, attn_logit_softcapping=20.0)),
    "Gemma 3": ("Gemma3Text", _MIXED | dict(query_pre_attn_scalar=8)),
    "Gemma 3n": (
        "Gemma3nText",
        _SHARED | dict(activation_sparsity_pattern=None, laurel_rank=4, altup_num_inputs=2),
    ),
    "Gemma 4": ("Gemma4Text", _SHARED | dict(global_head_dim=16)),
    "Qwen 2, window": ("Qwen2", _QWEN),
    "Qwen 3, window": ("Qwen3", _QWEN),
    "Qwen 3 MoE": ("Qwen3Moe", _EXPERTS),
    "Cohere": ("Cohere", {}),
    "Cohere 2": ("Cohere2", _MIXED),
    "GPT-OSS": ("GptOss", _MIXED | _LOCAL_EXPERTS),
    "Phi": ("Phi", {}),
    "Phi 3, window": ("Phi3", dict(sliding_window=6)),
    "Phi 3, longrope": ("Phi3", _LONG),
    "SmolLM 3": ("SmolLM3", dict(no_rope_layers=[1, 0])),
    "Exaone 4": ("Exaone4", _MIXED | dict(sliding_window_pattern=2)),
    "OLMo": ("Olmo", {}),
    "OLMo 3": ("Olmo3", _MIXED),
    "StableLM": ("StableLm", {}),
    "Starcoder 2": ("Starcoder2", dict(sliding_window=6)),
    "Granite": ("Granite", dict(residual_multiplier=0.7, logits_scaling=2.0)),
    "GLM 4 MoE": ("Glm4Moe", _ROUTED | dict(num_key_value_heads=2)),
    "Ernie 4.5": ("Ernie4_5", {}),
    "Helium": ("Helium", {}),
    "ModernBERT decoder": ("ModernBertDecoder", dict(local_attention=12, global_attn_every_n_layers=2)),
    "DeepSeek V2": ("DeepseekV2", _ROUTED | _LATENT | dict(q_lora_rank=None)),
    "DeepSeek V3": ("DeepseekV3", _ROUTED | _LATENT),
    "DeepSeek V3.2": ("DeepseekV32", _ROUTED | _LATENT | dict(index_topk=8, index_head_dim=8, index_n_heads=2)),
    "MPT": ("Mpt", dict(vocab_size=96, d_model=32, n_heads=4, n_layers=2, max_seq_len=128, expansion_ratio=2)),
    "Bloom": ("Bloom", dict(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)),
    "Falcon, alibi": ("Falcon", _SMALL | dict(alibi=True, multi_query=False)),
    "Falcon, rope": ("Falcon", _SMALL | dict(alibi=False, multi_query=True)),
    "GPT-2": ("GPT2", _GPT),
    "GPT-J": ("GPTJ", _GPT | dict(rotary_dim=4)),
    "GPT-Neo, window": (
        "GPTNeo",
        dict(vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, window_size=6, max_position_embeddings=128)
        | dict(attention_types=[[["global", "local"], 1]]),
    ),
    "GPT-NeoX": ("GPTNeoX", {}),
    "GPT-BigCode": ("GPTBigCode", _GPT),
    "OPT": ("OPT", dict(ffn_dim=48, word_embed_proj_dim=32)),
    "XGLM": ("XGLM", dict(vocab_size=96, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)),
    "BERT": ("Bert", dict(is_decoder=True)),
    "RoBERTa": ("Roberta", dict(is_decoder=True)),
    "RoFormer": ("RoFormer", dict(is_decoder=True)),
    "OpenAI GPT": ("OpenAIGPT", _GPT),
    "Qwen 3 Next": ("Qwen3Next", _EXPERTS | _LINEAR | dict(layer_types=["linear_attention", "full_attention"])),
    "Qwen 3.5": ("Qwen3_5Text", _LINEAR | dict(layer_types=["linear_attention", "full_attention"])),
    "MiniMax": ("MiniMax", _LOCAL_EXPERTS | dict(block_size=8, layer_types=["linear_attention", "full_attention"])),
    "Mamba": ("Mamba", dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8)),
    "Jamba": (
        "Jamba",
        dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8),
    ),
    "Bamba": ("Bamba", _MAMBA | dict(attn_layer_indices=[1])),
    "Falcon H1": ("FalconH1", _MAMBA | dict(mamba_d_ssm=64)),
    "LFM 2": ("Lfm2", dict(layer_types=["conv", "full_attention"])),
    "Recurrent Gemma": ("RecurrentGemma", dict(lru_width=32, block_types=["recurrent", "attention"])),
    "RWKV": ("Rwkv", dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)),
}


def built(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the family with random weights, whose greedy texts do not repeat one token."""
    name, changes = FAMILIES[family]
    own = any(key in changes for key in ("d_model", "n_embd", "n_layer", "num_heads", "state_size", "vocab_size"))
    options = changes if own else {key: value for key, value in (SIZES | changes).items() if value is not None}
    if changes.get("sliding_window", 0) is None:
        options["sliding_window"] = None
    if changes.get("q_lora_rank", 0) is None:
        options["q_lora_rank"] = None
    config = getattr(transformers, f"{name}Config")(**options)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                embeds = "embed" in path or "wte" in path or "wpe" in path
                parameter.normal_(0, 1.0 if embeds else 1.5 / parameter.shape[-1] ** 0.5)
            elif "norm" not in path.lower() and "ln" not in path:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def tuned(model: nn.Module) -> nn.Module:
    """A copy whose parameters are a little different everywhere."""
    result = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return result

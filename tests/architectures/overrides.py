"""What an architecture needs beyond the usual sizes, by model type: consistent ones, and layers of all its kinds."""

from __future__ import annotations

from typing import Any

_SIZE = {"vision_config": {"image_size": 32}}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_HYBRID = {"layer_types": ["hybrid_sliding", "hybrid"]}
_CHUNKED = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
_MOE = {"enable_moe_block": True, "moe_intermediate_size": 16, "num_experts": 4, "top_k_experts": 2}
_CONV = {"layer_types": ["conv", "full_attention"]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1}
_MROPE = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
}
_ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN4 = {
    **_LINEAR,
    **{
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    **{"ple_layer_ids": [1], "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 2},
    **{"split_ngram_parts": 2, "heads_per_ngram": 2, "ngram_size": 2},
}
_GEMMA4_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2}
_AUDIO = {"num_filters": 2, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
_SPEECH = {
    "encoder_config": {"hidden_dim": 32, "input_dim": 16, "context_size": 8, "max_pos_emb": 16, "dim_head": 8},
    "projector_config": {"encoder_hidden_size": 32},
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": _SLIDING,
    "bailing_hybrid": _LINEAR,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "blt": {
        "use_cache": False,
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [2, 3],
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere2": _SLIDING,
    "cohere2_moe": _SLIDING,
    "cohere_compass_text": {
        **_SLIDING,
        "rope_parameters": {kind: {**_ROTARY, "mrope_section": [2, 1, 1]} for kind in _SLIDING["layer_types"]},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"],
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    },
    "encoder-decoder": {"decoder": {"add_cross_attention": True}},
    "exaone4": _SLIDING,
    "exaone_moe": _SLIDING,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "flint": {"mlp_only_layers": [0]},
    "fsmt": {"langs": ["en", "de"], "src_vocab_size": 96, "tgt_vocab_size": 96},
    "gemma3": {**_SIZE, "text_config": _SLIDING, "mm_tokens_per_image": 4},
    "gemma3_text": _SLIDING,
    "gemma3n_text": _SLIDING,
    "gemma4": {"text_config": _MOE, "vision_config": {"position_embedding_size": 64}},
    "gemma4_assistant": {"text_config": {**_SLIDING, **_GEMMA4_ASSISTANT}},
    "gemma4_text": _MOE,
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32, "patch_size": 4},
        "audio_config": {"audio_embed_dim": 16},
    },
    "gemma4_unified_assistant": {"text_config": {**_SLIDING, **_GEMMA4_ASSISTANT}},
    "got_ocr2": {"vision_config": {"output_channels": 8, "window_size": 2, "global_attn_indexes": [1]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech": _SPEECH,
    "granite_speech_plus": _SPEECH,
    "granitemoehybrid": {**_LINEAR, **_MAMBA},
    "idefics3": _SIZE,
    "inkling2_text": _HYBRID,
    "inkling_text": _HYBRID,
    "internvl": {"vision_config": {"image_size": [32, 32]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR,
    "kolibri1": _SLIDING,
    "laguna": _SLIDING,
    "led": {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128, "attention_window": 8},
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    "llama4": {"text_config": _CHUNKED},
    "llama4_text": _CHUNKED,
    "llava": _SIZE,
    "llava_next": {**_SIZE, "image_grid_pinpoints": [[32, 32], [32, 64]]},
    "llava_onevision": {**_SIZE, "image_grid_pinpoints": [[32, 32], [32, 64]]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "marian": {"decoder_start_token_id": 1},
    "mellum": _SLIDING,
    "minimax": _LINEAR,
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "ministral": _SLIDING,
    "mistral3": _SIZE,
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {"image_size": 32, "intermediate_layers_indices": [0, 1], "vision_output_dim": 96},
    },
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}}},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "olmo3": _SLIDING,
    "olmo_hybrid": _LINEAR,
    "paligemma": _SIZE,
    "phi4_multimodal": {
        "audio_config": {
            **{"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8},
            **{"left_chunk": 2, "bias_max_distance": 16, "input_size": 16},
        },
        "vision_config": {"crop_size": 16},
    },
    "qwen2_5_vl": {**_MROPE, "vision_config": {"window_size": 32, "fullatt_block_indexes": [1]}},
    "qwen2_vl": _MROPE,
    "qwen3_5": {"text_config": _LINEAR},
    "qwen3_5_moe": {"text_config": _LINEAR},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_asr": {"audio_config": {"downsample_hidden_size": 8, "output_dim": 32, "n_window": 4, "n_window_infer": 8}},
    "qwen3_next": _LINEAR,
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (4, 32),
        "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "is_decoder": True,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 50,
        "shape_vocab_size": 50,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "smolvlm": _SIZE,
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "t5": {"decoder_start_token_id": 1},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _AUDIO, "semantic_tokenizer_encoder_config": _AUDIO},
    "vipllava": {"vision_config": {"image_size": 32}, "vision_feature_layers": [-1, 0]},
    "xlstm": {"chunk_size": 16, "hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "attention_hidden_size": 64},
    "zamba2": _ZAMBA,
    "zaya": {**_HYBRID, "num_experts_per_tok": 1},
}

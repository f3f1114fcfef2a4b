"""The sizes that make a model tiny, by the name of the option: a configuration takes those that it has."""

from __future__ import annotations

from typing import Any

VOCABULARY = 96

_BY_VALUE: list[tuple[Any, str]] = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (
        32,
        """hidden_size d_model n_embd dim_model emb_dim word_embed_proj_dim embedding_size input_embedding_size
        output_embedding_size d_kv_model lru_width attention_hidden_size backbone_hidden_size out_hidden_size
        projection_dim embed_dim projection_hidden_size decoder_hidden_size encoder_hidden_size
        vision_output_dim output_dim multimodal_hidden_size""",
    ),
    (
        48,
        """intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim dff dim_ff d_inner
        feed_forward_size ffn_hidden_size mlp_dim dense_intermediate_size intermediate_size_mlp prompt_mid_dim""",
    ),
    (
        2,
        """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers depth
        num_decoder_layers num_blocks num_key_value_heads num_kv_heads swa_num_key_value_heads
        num_global_key_value_heads encoder_key_value_heads decoder_key_value_heads encoder_num_key_value_heads
        num_local_layers num_experts_per_tok top_k_experts moe_topk moe_k moe_top_k num_experts_per_token
        n_expert_per_token linear_num_key_heads mamba_num_kv_heads index_topk_blocks index_block_size hc_mult
        hc_count num_global_layers num_encoder_hidden_layers temporal_patch_size spatial_merge_size""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        index_n_heads linear_num_heads num_experts n_routed_experts num_local_experts moe_num_experts
        num_experts_total linear_num_value_heads mamba_n_heads mamba_num_heads n_mamba_heads index_topk
        encoder_num_attention_heads linear_conv_kernel_dim rank gated_norm_rank laurel_rank adapter_rank d_rel
        o_lora_rank hc_lowrank short_conv_kernel_size num_buckets""",
    ),
    (
        8,
        """head_dim d_kv attention_head_size qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim
        swa_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim
        mamba_d_head kv_channels dim_head global_head_dim mamba_headdim hidden_size_per_layer_input kv_lora_rank
        q_lora_rank mamba_d_state state_size ssm_state_size mamba_dt_rank time_step_rank num_centroids
        query_pre_attn_scalar rotary_dim router_hidden_size block_multiple_of dim_model_base chunk_size
        mamba_chunk_size block_size patch_size local_attention_window_len patch_size_t""",
    ),
    (
        16,
        """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size
        expert_intermediate_size moe_ffn_hidden_size rel_extent image_size relative_attention_num_buckets
        position_bias_num_buckets num_mel_bins expert_hidden_size""",
    ),
    (
        1,
        """n_group topk_group n_shared_experts num_shared_experts num_nextn_predict_layers first_k_dense_replace
        moe_num_shared_experts decoder_sparse_step interleave_moe_layer_step num_dense_layers n_groups
        mamba_n_groups""",
    ),
    (6, "sliding_window sliding_window_size window_size attention_window_size local_attention attention_chunk_size"),
    (
        128,
        """max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length context_length
        max_target_positions max_source_positions keep_window_size original_max_position_embeddings
        max_inference_chunksize position_bias_max_distance relative_max_distance relative_attention_max_distance""",
    ),
    (0, "num_mtp_layers num_kv_shared_layers mtp_num_hidden_layers pad_token_id"),
    (
        0.0,
        """attention_dropout hidden_dropout dropout embd_pdrop resid_pdrop attn_pdrop hidden_dropout_prob
        classifier_dropout attention_probs_dropout_prob activation_dropout residual_dropout embedding_dropout""",
    ),
    (True, "is_decoder use_cache"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    (91, "vision_start_token_id boi_token_index boi_token_id"),
    (92, "vision_end_token_id eoi_token_index eoi_token_id"),
    (93, "image_token_id image_token_index"),
    (94, "video_token_id video_token_index"),
    (95, "audio_token_id audio_token_index"),
]

SIZES: dict[str, Any] = {name: value for value, names in _BY_VALUE for name in names.split()}

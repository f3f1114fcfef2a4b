"""Values near limits, and what fields of configurations may say that their readers do not expect."""

from __future__ import annotations

from typing import Any

EDGES = [0, 1, 2, 7, 8, 23, 24, 25, 31, 32, 33, 40, 64, 96, 128, 2**16, 2**16 + 1, 2**24, 2**24 + 1, 2**30, 2**31 - 1]
EDGES += [2**31, 2**36, 2**36 + 1, 2**62, 2**63 - 1, 2**63, -1]
TEXTS = ["low-rank", "dense", "sparse", "lossless", "int4", "bfloat16", "float16", "float32", "float64", "dare", "ties"]
FRACTIONS = [0.0, 5e-324, 1e-45, 1.0, 1.0000000000000002, 3.4028235e38, 1e39, -0.0]
CODE = "code_of_a_stranger.py"
LABELS = ["F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "C64", "BOOL", "U8", "I8", "I64", "f32", ""]
LABELS += ["F64", "F32", "F16", "BF16"]
FIELDS: dict[str, dict[str, list[Any]]] = {
    "config.json": {
        "auto_map": [
            {"AutoConfig": "code_of_a_stranger.Config", "AutoModelForCausalLM": "code_of_a_stranger.Model"},
            {"AutoConfig": "a/b--code_of_a_stranger.Config"},
            ["code_of_a_stranger.Config"],
        ],
        "model_type": ["stranger", "mistral", "llama", "gpt2", "rwkv", "", "..", "t5", "clip", "timm_wrapper"],
        "dtype": ["float64", "float8_e4m3fn", "int8", "torch.bfloat16", "__init__", "auto", "nn", {"": "bfloat16"}],
        "torch_dtype": ["float16", "complex64", "os", 7],
        "vocab_size": EDGES,
        "hidden_size": EDGES,
        "num_hidden_layers": EDGES,
        "num_key_value_heads": EDGES,
        "num_attention_heads": EDGES,
        "head_dim": EDGES,
        "tie_word_embeddings": [True, "yes", 1, None, [True]],
        "architectures": [["Stranger"], [], "MistralForCausalLM", [None], ["MistralModel"], ["BertForMaskedLM"]],
        "quantization_config": [{}, {"quant_method": "stranger"}, {"quant_method": "bitsandbytes"}, 7, "gptq", []],
        "text_config": [{"model_type": "stranger"}, {"hidden_size": 2**40}, 7],
        "transformers_version": ["99.0", 5, None],
        "_name_or_path": ["/dev/zero", "../..", 7],
        "attn_implementation": ["stranger/kernel", "flash_attention_2", 7],
        "_attn_implementation": ["stranger/kernel", "eager", 7],
        "layer_types": [["full_attention"] * 3, ["stranger"], 7],
        "rope_parameters": [{"rope_type": "stranger"}, {"rope_type": "yarn"}, {"rope_theta": 0}, 7],
        "id2label": [{"a": "b"}, [1], {"1": None}],
        "num_labels": EDGES,
    },
    "generation_config.json": {
        "eos_token_id": [*EDGES, [1, None], "b", {"a": 1}],
        "pad_token_id": [*EDGES, "b"],
        "max_length": EDGES,
    },
    "tokenizer_config.json": {
        "auto_map": [{"AutoTokenizer": ["code_of_a_stranger.Tokenizer", None]}],
        "tokenizer_class": ["Stranger", "..", 7, "PreTrainedTokenizerFast"],
        "chat_template": ["{% for x in range(10**9) %}{% endfor %}", [{"name": "..", "template": 7}], {"a": 1}, [7]],
        "eos_token": [{"content": 7}, {"__type": "AddedToken"}, 7, []],
        "model_max_length": EDGES,
    },
    "tokenizer.json": {
        "model": [{"vocab": [["a", 1.0]] * 30}, {"vocab": {"a": 22, "b": 23}}, {"vocab": {"a": -1}}, {"vocab": 7}, 7],
        "added_tokens": [[{"id": 2**63, "content": "a"}], [{"id": -1, "content": 7}], [7], {"id": 1}, [{"id": True}]],
    },
    "vocab.json": {"a": EDGES},
    "added_tokens.json": {"a": EDGES},
    "adapter_config.json": {
        "r": [*EDGES, 0.5, "4", None, True],
        "lora_alpha": [*EDGES, 0.5, "4", None, 1e308, -8],
        "peft_type": ["LORA", "LOHA", "IA3", "stranger", 7, None],
        "task_type": ["STRANGER", "SEQ_CLS", None, 7],
        "use_dora": [True, "yes", None, 1],
        "use_rslora": [True, "yes", 1],
        "bias": ["all", "lora_only", "stranger", None, 7],
        "fan_in_fan_out": [True, "yes", None],
        "init_lora_weights": ["pissa", "corda", "stranger", 7, None],
        "target_modules": ["all-linear", ".*", "q_proj", [], ["q_proj", 7], None, 7, {"q_proj": 1}, ["lm_head"]],
        "exclude_modules": ["q_proj", ["v_proj"], 7, ".*"],
        "modules_to_save": [["lm_head"], ["q_proj"], "lm_head", 7, [7], ["model"]],
        "layers_to_transform": [[0], [1], 0, "0", [None], [2**63], -1],
        "layers_pattern": ["layers", ["h"], 7, ""],
        "rank_pattern": [{"q_proj": 0}, {".*": 4}, {"q_proj": 2**63}, {"(": 1}, {"": 1}, [1]],
        "alpha_pattern": [{"q_proj": 0}, {".*": 1e308}, {"q_proj": None}, {"(": 1}, [1]],
        "megatron_config": [{}, {"a": 1}, 7],
        "trainable_token_indices": [[0, 1], {"embed_tokens": [22, 23]}, [2**63], 7, [-1], ["a"]],
        "layer_replication": [[[0, 1], [0, 1]], 7, [[0]]],
        "target_parameters": [["q_proj.weight"], ["self_attn.q_proj.weight"], 7, [""], [7]],
        "base_model_name_or_path": ["/dev/zero", "../..", 7, "a/b/c", ""],
        "revision": ["..", 7],
        "auto_mapping": [{"base_model_class": "Stranger", "parent_library": "code_of_a_stranger"}, 7],
        "loftq_config": [{"a": 1}, 7],
        "eva_config": [{}, 7],
        "corda_config": [{}, 7],
        "arrow_config": [{}, {"a": 1}, 7],
        "runtime_config": [{}, {"ephemeral_gpu_offload": True}, 7],
    },
}
_LABELS: list[Any] = [7, None, ["a"], {"a": 1}, "[/red]\n", "x" * 5000, "../..", True]
SOURCES: dict[str, list[Any]] = {  # what a vector says of where it comes from
    "base": _LABELS,
    "aligned": _LABELS,
    "adapter": _LABELS,
    "tokenizer": [{"vocabulary": 7}, {"a" * 2000: "b"}, {"eos_token": ["[/red]"]}, {"chat template": None}, *_LABELS],
    "selected": [[{"include": 7}], {"include": None}, *_LABELS],
    "inexact_values": [*EDGES, *_LABELS],
    "rounding_error": [*FRACTIONS, *_LABELS],
}
CONFIGS: dict[str, list[Any]] = {  # and of its base's configuration
    "model_type": [["gpt2"], {"a": 1}, 7, None, "gpt2", ""],
    "hidden_size": [*EDGES, *_LABELS],
    "vocab_size": [*EDGES, *_LABELS],
    "num_hidden_layers": [*EDGES, *_LABELS],
    "tie_word_embeddings": [True, "yes", None, [True]],
}

"""Tiny configurations of many architectures, each with the reason it is among the tests."""

DENSE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
}

ARCHITECTURES = {
    "llama untied": DENSE | {"model_type": "llama", "tie_word_embeddings": False},
    "llama tied": DENSE | {"model_type": "llama", "tie_word_embeddings": True},
    "llama with sliding windows": DENSE
    | {
        "model_type": "llama",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "qwen2 (biases)": DENSE | {"model_type": "qwen2"},
    "qwen3 (query and key norms)": DENSE
    | {
        "model_type": "qwen3",
        "max_position_embeddings": 64,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_theta": 1e4,
    },
    "gemma2 (embedding scale, soft caps)": DENSE | {"model_type": "gemma2", "head_dim": 16},
    "gemma3 (local and global attention)": DENSE
    | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "gemma4 (per-layer inputs, shared keys and values, tuples)": {
        "model_type": "gemma4",
        "num_hidden_layers": 5,
        "vocab_size": 128,
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size": 64,
            "num_hidden_layers": 5,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "head_dim": 16,
            "global_head_dim": 32,
            "rms_norm_eps": 1e-6,
            "vocab_size": 128,
            "vocab_size_per_layer_input": 128,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "sliding_window": 8,
            "sliding_window_pattern": 5,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6},
                "sliding_attention": {"rope_theta": 1e4},
            },
        },
    },
    "phi3 (fused projections)": DENSE | {"model_type": "phi3"},
    "cohere2 (parallel block, sliding window)": DENSE
    | {"model_type": "cohere2", "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "gpt2 (learned positions, layer norms, tied)": {
        "model_type": "gpt2",
        "n_ctx": 64,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 128,
    },
    "mixtral (experts)": DENSE | {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe (experts, one dense block)": DENSE
    | {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 48,
        "head_dim": 16,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "norm_topk_prob": True,
    },
    "gpt_oss (attention sinks, experts, sliding window)": DENSE
    | {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3_next (gated delta net, experts)": DENSE
    | {
        "model_type": "qwen3_next",
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 48,
        "head_dim": 16,
        "rope_theta": 1e3,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 64,
    },
    "mamba2 (state space)": {
        "model_type": "mamba2",
        "num_heads": 4,
        "head_dim": 16,
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "state_size": 16,
        "num_hidden_layers": 4,
        "layer_norm_epsilon": 1e-4,
        "conv_kernel": 3,
        "n_groups": 2,
        "use_bias": False,
        "use_conv_bias": False,
        "tie_word_embeddings": True,
        "time_step_limit": (0.01, 10),
        "time_step_rank": "auto",
    },
}


# --- Every model type that mlx-lm has ----------------------------------------------------------------

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
}

EXPERTS = TINY | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "routed_scaling_factor": 1.0,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}

LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

LINEAR_ATTENTION = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
}

MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "mamba_n_groups": 1,
}

SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}


def wrapped(text: dict, text_type: str, **other) -> dict:
    """A multimodal model's configuration: its language model's inside."""
    return {"text_config": text | {"model_type": text_type}, "vocab_size": text["vocab_size"], **other}


GEMMA4_TEXT = TINY | {
    "num_hidden_layers": 5,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 96,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]
    + ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4},
    },
}

GEMMA3N_TEXT = TINY | {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 96,
    "sliding_window": 5,
    "rope_local_base_freq": 1e4,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "altup_coef_clip": 1.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 4,
}

QWEN3_5_TEXT = TINY | LINEAR_ATTENTION | {"num_hidden_layers": 2}

KIMI_LINEAR = (
    EXPERTS
    | LATENT
    | {
        "linear_attn_config": {
            "num_heads": 2,
            "head_dim": 8,
            "short_conv_kernel_size": 3,
            "kda_layers": [1],
            "full_attn_layers": [2, 3],
        },
        "model_max_length": 64,
        "num_experts_per_token": 2,
        "n_group": 1,
    }
)

LFM2 = TINY | {
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_ff_dim": 48,
    "block_multiple_of": 4,
    "block_ffn_dim_multiplier": 1,
    "block_auto_adjust_ff_dim": True,
    "layer_types": ["conv", "full_attention", "conv"],
}

LONGCAT_FLASH = (
    EXPERTS
    | LATENT
    | {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 32,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 1,
        "num_layers": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    }
)

# By name of the module in mlx_lm.models; `model_type` is that name unless the configuration says otherwise.
MODEL_TYPES: dict[str, dict] = {
    "Klear": EXPERTS,
    "afm7": {
        "vocab_size": 96,
        "hidden_dim": 32,
        "num_layers": 4,
        "num_hidden_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "afmoe": EXPERTS | SLIDING | {"num_dense_layers": 1, "n_group": 1},
    "apertus": TINY | {"post_norm": True, "qk_norm": True},
    "baichuan_m1": TINY | {"sliding_window": 5, "sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": EXPERTS | LATENT | {"layer_group_size": 2, "group_norm_size": 1, "num_key_value_heads": 4},
    "bailing_moe": EXPERTS,
    "bailing_moe_linear": EXPERTS | {"layer_group_size": 2, "group_norm_size": 1, "num_key_value_heads": 4},
    "bailing_moe_v3": EXPERTS
    | LATENT
    | {
        "model_type": "bailing_hybrid",
        "architectures": ["BailingMoeV3ForCausalLM"],
        "layer_group_size": 2,
        "moe_shared_expert_intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "head_dim": 32,
    },
    "bitnet": TINY,
    "cohere": TINY | {"use_qk_norm": True},
    "cohere2": TINY | {"sliding_window": 5, "sliding_window_pattern": 2},
    "dbrx": {
        "d_model": 32,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 96,
    },
    "deepseek": EXPERTS,
    "deepseek_v2": EXPERTS | LATENT | {"topk_method": "gready", "rope_scaling": YARN | {"type": "yarn"}},
    "deepseek_v3": EXPERTS | LATENT,
    "deepseek_v32": EXPERTS | LATENT | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4},
    "deepseek_v41": EXPERTS
    | {
        "num_hidden_layers": 6,
        "head_dim": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 4,
        "compress_ratios": (0, 2, 2, 2, 1, 1),
        "kv_source_layer_ids": (1, 4),
        "index_source_layer_ids": (1, 2, 4, 5),
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 3,
        "candidate_source_layer_id": 4,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
    },
    "dots1": EXPERTS,
    "ernie4_5": TINY,
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone": TINY | {"num_layers": 3, "layer_norm_epsilon": 1e-5},
    "exaone4": TINY | {"sliding_window": 5, "sliding_window_pattern": "LLG"},
    "exaone_moe": EXPERTS | SLIDING | {"is_moe_layer": [False, True, True]},
    "falcon_h1": TINY | MAMBA | {"mamba_d_ssm": 32, "num_hidden_layers": 2},
    "gear": TINY
    | {
        "layer_types": ["sliding_attention", "conv_mixer", "full_attention"],
        "sliding_window": 5,
        "rope_local_base_freq": 1e3,
    },
    "gemma": TINY,
    "gemma2": TINY,
    "gemma3": wrapped(TINY | {"sliding_window": 5, "sliding_window_pattern": 2}, "gemma3_text"),
    "gemma3_text": TINY | {"sliding_window": 5, "sliding_window_pattern": 2},
    "gemma3n": wrapped(GEMMA3N_TEXT, "gemma3n_text"),
    "gemma4": wrapped(GEMMA4_TEXT, "gemma4_text"),
    "gemma4_text": GEMMA4_TEXT
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "glm": TINY,
    "glm4": TINY | {"partial_rotary_factor": 0.5},
    "glm4_moe": EXPERTS | {"use_qk_norm": True, "partial_rotary_factor": 0.5},
    "glm4_moe_lite": EXPERTS | LATENT | {"num_key_value_heads": 4, "n_group": 1},
    "glm_moe_dsa": EXPERTS
    | LATENT
    | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "rope_parameters": {"rope_theta": 1e4}},
    "gpt2": {
        "n_ctx": 64,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 96,
    },
    "gpt_bigcode": {
        "n_embd": 32,
        "n_layer": 3,
        "n_inner": 48,
        "n_head": 4,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 96,
    },
    "gpt_neox": TINY | {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": EXPERTS | SLIDING,
    "gptj": {"n_embd": 32, "vocab_size": 96, "n_positions": 64, "n_head": 4, "rotary_dim": 4, "n_layer": 3},
    "granite": TINY
    | {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "granitemoe": EXPERTS
    | {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "granitemoehybrid": EXPERTS
    | MAMBA
    | {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "helium": TINY,
    "hunyuan": EXPERTS
    | {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        "use_cla": True,
        "cla_share_factor": 2,
        "num_hidden_layers": 4,
    },
    "hunyuan_v1_dense": TINY | {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
    "internlm2": TINY,
    "internlm3": TINY,
    "iquestloopcoder": TINY | {"loop_num": 2, "loop_window_size": 5, "num_hidden_layers": 2},
    "jamba": EXPERTS
    | {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 3,
        "mamba_d_state": 4,
        "mamba_expand": 2,
        "num_hidden_layers": 2,
    },
    "kimi_k25": wrapped(EXPERTS | LATENT, "kimi_k2"),
    "kimi_k3": wrapped(
        KIMI_LINEAR
        | {
            "hidden_act": "situ",
            "activation_situ_beta": 4.0,
            "activation_situ_linear_beta": 25.0,
            "linear_attn_config": KIMI_LINEAR["linear_attn_config"]
            | {"gate_lower_bound": -5.0, "use_full_rank_gate": True},
            "mla_use_nope": True,
            "mla_use_output_gate": True,
            "routed_expert_hidden_size": 16,
            "latent_moe_use_norm": True,
            "attn_res_block_size": 2,
            "num_hidden_layers": 4,
        },
        "kimi_linear",
    ),
    "kimi_linear": KIMI_LINEAR,
    "kimi_vl": wrapped(EXPERTS | LATENT, "deepseek_v3"),
    "laguna": EXPERTS
    | SLIDING
    | {
        "moe_router_score_func": "sqrtsoftplus",
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_attention_heads_per_layer": [4, 4, 4],
        "rope_parameters": {
            "full_attention": YARN | {"partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    },
    "lfm2": LFM2,
    "lfm2-vl": wrapped(LFM2, "lfm2"),
    "lfm2_moe": EXPERTS
    | {
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "lille-130m": {
        "block_size": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_embd": 96,
        "vocab_size": 96,
        "rope_theta": 1e4,
        "layer_norm_eps": 1e-5,
    },
    "llama": TINY | SLIDING,
    "llama4": wrapped(
        EXPERTS
        | {
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 32,
            "num_experts_per_tok": 1,
            "use_qk_norm": True,
            "num_hidden_layers": 4,
        },
        "llama4_text",
    ),
    "llama4_text": TINY | {"intermediate_size_mlp": 48, "no_rope_layers": [1, 0, 1], "use_qk_norm": True},
    "longcat_flash": LONGCAT_FLASH,
    "longcat_flash_ngram": LONGCAT_FLASH | {"ngram_vocab_size_ratio": 4, "emb_neighbor_num": 3, "emb_split_num": 2},
    "mamba": TINY
    | {"state_size": 4, "conv_kernel": 3, "use_conv_bias": True, "time_step_rank": 4, "num_hidden_layers": 2},
    "mamba2": TINY
    | {
        "num_heads": 4,
        "intermediate_size": 32,
        "state_size": 8,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 3,
        "n_groups": 2,
        "use_conv_bias": False,
        "time_step_limit": (0.01, 10),
        "time_step_rank": "auto",
    },
    "mellum": EXPERTS
    | SLIDING
    | {"rope_parameters": {kind: {"rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}},
    "mimo": TINY,
    "mimo_v2_flash": EXPERTS
    | {
        "hybrid_layer_pattern": [0, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 5,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 1e4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "v_head_dim": 8,
        "swa_head_dim": 8,
        "swa_v_head_dim": 8,
        "partial_rotary_factor": 0.5,
        "attention_value_scale": 0.707,
    },
    "minicpm": TINY | {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0},
    "minicpm3": TINY
    | LATENT
    | {
        "dim_model_base": 32,
        "scale_depth": 1.4,
        "scale_emb": 2.0,
        "rope_scaling": {
            "original_max_position_embeddings": 32,
            "type": "longrope",
            "long_factor": [1.0, 1.1],
            "short_factor": [1.0, 1.0],
        },
    },
    "minimax": EXPERTS | {"rotary_dim": 4},
    "minimax_m3_vl": wrapped(
        EXPERTS
        | {
            "intermediate_size": 16,
            "dense_intermediate_size": 32,
            "rotary_dim": 4,
            "moe_layer_freq": None,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 4,
            "index_topk_blocks": 2,
        },
        "minimax_m3_vl",
    ),
    "ministral3": TINY
    | SLIDING
    | {"rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}},
    "mistral3": wrapped(TINY, "llama"),
    "mistral4": EXPERTS | LATENT | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
    "mixtral": EXPERTS,
    "muse_glimmer": TINY | SLIDING,
    "muse_spark": wrapped(
        EXPERTS
        | SLIDING
        | {
            "num_shared_experts": 0,
            "post_norm_eps": 1e-8,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
            "layer_rope_theta": [1e4, 0, 1e4],
            "final_logit_softcapping": 20.0,
            "output_multiplier": 1.0,
            "moe_hidden_size": 32,
        },
        "muse_spark_text",
    ),
    "nanbeige": TINY | {"num_loops": 2, "num_hidden_layers": 2},
    "nanochat": TINY | {"num_key_value_heads": 4},
    "nemotron": TINY | {"hidden_act": "relu2", "norm_eps": 1e-5},
    "nemotron-nas": TINY
    | {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
        ]
    },
    "nemotron_h": EXPERTS
    | {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "mamba_proj_bias": False,
        "ssm_state_size": 8,
        "conv_kernel": 3,
        "n_groups": 1,
        "n_group": 1,
        "layer_norm_epsilon": 1e-5,
        "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "*", "-", "E"],
        "num_hidden_layers": 4,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo": {
        "d_model": 32,
        "n_layers": 3,
        "mlp_hidden_size": 96,
        "n_heads": 4,
        "vocab_size": 96,
        "embedding_size": 96,
    },
    "olmo2": TINY,
    "olmo3": TINY | SLIDING,
    "olmo_hybrid": TINY
    | LINEAR_ATTENTION
    | {"linear_allow_neg_eigval": True, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "olmoe": EXPERTS,
    "openelm": {
        "head_dim": 8,
        "num_transformer_layers": 3,
        "model_dim": 32,
        "vocab_size": 96,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4, 4],
        "num_kv_heads": [2, 2, 4],
        "ffn_multipliers": [0.5, 1.0, 1.5],
    },
    "phi": TINY | {"partial_rotary_factor": 0.5},
    "phi3": TINY,
    "phi3small": TINY
    | {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 48,
        "gegelu_limit": 1.0,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 100352,
    },
    "phimoe": EXPERTS,
    "phixtral": {
        "num_vocab": 96,
        "vocab_size": 96,
        "model_dim": 32,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 4,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
    },
    "pixtral": wrapped(TINY, "llama"),
    "plamo": TINY | {"n_shared_head": 2},
    "plamo2": TINY
    | {
        "hidden_size_per_head": 8,
        "mamba_d_state": 8,
        "mamba_d_conv": 3,
        "mamba_num_heads": 4,
        "mamba_step": 2,
        "attention_window_size": 5,
    },
    "plamo3": TINY | {"window_size": 5, "sliding_window_pattern": 2},
    "prism_hadamard_qwen35": wrapped(
        QWEN3_5_TEXT | {"hidden_size": 128, "intermediate_size": 512},
        "qwen3_5_text",
        schema_version=1,
        tensor_namespace="mlx-lm-text",
        quantization={"bits": 2, "group_size": 128, "mode": "affine"},
        modules=[
            {"path": "model.embed_tokens", "block": 0, "embedding": True, "dtype": "float16"},
            {"path": "model.layers.0.mlp.down_proj", "block": 512, "embedding": False, "dtype": "float16"},
        ],
    ),
    "qwen": TINY | {"num_key_value_heads": 4, "kv_channels": 8, "intermediate_size": 96},
    "qwen2": TINY,
    "qwen2_moe": EXPERTS,
    "qwen2_vl": wrapped(TINY, "qwen2"),
    "qwen3": TINY,
    "qwen3_5": wrapped(QWEN3_5_TEXT, "qwen3_5_text"),
    "qwen3_5_moe": wrapped(EXPERTS | QWEN3_5_TEXT, "qwen3_5_moe_text"),
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | LINEAR_ATTENTION | {"num_hidden_layers": 2},
    "qwen3_vl": wrapped(TINY, "qwen3"),
    "qwen3_vl_moe": wrapped(EXPERTS, "qwen3_moe"),
    "recurrent_gemma": TINY
    | {
        "conv1d_width": 3,
        "logits_soft_cap": 30.0,
        "attention_window_size": 5,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": TINY
    | {
        "norm_eps": 1e-5,
        "a_low_rank_dim": 4,
        "v_low_rank_dim": 4,
        "gate_low_rank_dim": 4,
        "decay_low_rank_dim": 4,
    },
    "seed_oss": TINY,
    "smollm3": TINY | {"no_rope_layer_interval": 2},
    "solar_open": EXPERTS | {"partial_rotary_factor": 1.0},
    "spark2_5": TINY
    | SLIDING
    | {"rope_parameters": {kind: {"rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}},
    "stablelm": TINY | {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "starcoder2": TINY,
    "step3p5": EXPERTS
    | SLIDING
    | {
        "num_attention_groups": 2,
        "rope_theta": [1e4, 1e4, 1e4],
        "partial_rotary_factors": [1.0, 0.5, 1.0],
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 16,
        "moe_layers_enum": "1,2",
    },
    "talkie": TINY,
    "telechat3": TINY,
    "youtu_llm": TINY | LATENT | {"num_key_value_heads": 4},
}

# Where LoRA on every layer, mlx-lm's default, cannot be trained in memory either: what is trained instead, and why.
LORA: dict[str, tuple[dict, str]] = {
    "deepseek_v41": (
        {"num_layers": 1, "keys": ["mlp.experts.switch_mlp.gate_proj", "mlp.experts.switch_mlp.down_proj"]},
        "mlx-lm cannot differentiate its router, so LoRA goes behind the last one",
    ),
    "gemma3n": (
        {
            "keys": [
                *(f"self_attn.{name}_proj" for name in "qkvo"),
                *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
                *("laurel.linear_left", "laurel.linear_right", "per_layer_input_gate", "per_layer_projection"),
                "altup.modality_router",
            ]
        },
        "it clips weights of its altup layers in place, which have none with LoRA on them: keys leave those out",
    ),
    "kimi_k3": (
        {
            "keys": [
                *("self_attn.qkv_proj", "self_attn.o_proj", "self_attn.q_b_proj", "mlp.gate_proj"),
                *("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj", "mlp.shared_experts.up_proj"),
            ]
        },
        "it uses weights of its residual projections, which have none with LoRA on them: keys leave those out",
    ),
    "prism_hadamard_qwen35": (
        {
            "keys": [
                *("self_attn.q_proj", "self_attn.o_proj", "linear_attn.in_proj_qkv", "linear_attn.out_proj"),
                *("mlp.gate_proj", "mlp.up_proj"),
            ]
        },
        "its packed layers have no LoRA in mlx-lm: keys name others",
    ),
}

# Gradients that are sums in another order than in memory: by how much they differ at most, relative, and why.
ROUNDED = {
    "kimi_k3": (1e-5, "what all later blocks are handed is used several times by each, and those are summed by block"),
}

# reason -> what slowft's error says
REFUSED = {
    "bitnet": ("mlx-lm has neither LoRA nor a gradient for its layers", "Metal|LoRA"),
    "muse_spark": (
        "blocks are handed a layer of the next block; mlx-lm runs it on Metal only",
        "is handed or returns a RMSNorm",
    ),
    "olmo": (
        "mlx-lm needs the package ai2-olmo, and then fails in its own attention",
        "needs? a package|without a package|fails on placeholder weights",
    ),
}

# Modules of mlx_lm.models that are no models.
HELPERS = {
    "activations": "activation functions",
    "base": "base classes, masks, attention",
    "bitlinear_layers": "bitnet's layers",
    "cache": "key-value caches",
    "gated_delta": "gated delta rule",
    "mla": "multi-latent attention",
    "pipeline": "layers on several machines",
    "rope_utils": "rotary positions",
    "ssm": "state space kernels",
    "switch_layers": "experts",
}

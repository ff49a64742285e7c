"""Tiny models of every architecture in mlx-lm, with random weights, and their runs.

Their arguments are built by the names of the fields: most architectures take what all
share, and the tables below say what one wants otherwise.
"""

import importlib
import pkgutil

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_map

WINDOW = 24
VOCABULARY = 120

SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 1000,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": False,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "num_dense_layers": 1,
    "moe_num_experts": 4,
    # Latent attention.
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    # Windows.
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "window_size": WINDOW,
    "attention_window_size": WINDOW,
    "sliding_window_pattern": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 8,
    "rope_scaling": None,
    # Recurrent layers.
    "conv_kernel": 4,
    "use_conv_bias": True,
    "conv_bias": True,
    "conv_L_cache": 3,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_proj_bias": False,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    # As GPT-2 calls them.
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 4,
    "n_inner": 64,
    "n_ctx": 1000,
    "n_positions": 1000,
}
"""Arguments by name of field, for every architecture that has such a field."""

_DELTA = {
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "gate_lower_bound": -5.0,
}
_YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 500,
    "llama_4_scaling_beta": 0.1,
}
_ROPE_BY_TYPE = {
    "sliding_attention": {"rope_theta": 10000.0},
    "full_attention": {"rope_theta": 100000.0},
}
_SCALED = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
}
_LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "moe_topk": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "num_layers": 2,
}

OWN = {
    "afm7": {"hidden_dim": 64, "num_kv_reuse_layers": 2},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "dbrx": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": _YARN, "topk_method": "gready"},
    "exaone4": {
        "sliding_window_pattern": "LG",
        "rope_scaling": {"rope_type": "default"},
    },
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gear": {
        "layer_types": [
            "conv_mixer",
            "full_attention",
            "conv_mixer",
            "sliding_attention",
        ],
    },
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 4,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
    },
    "glm_moe_dsa": {"scoring_func": "sigmoid", "rope_parameters": _YARN},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "granite": _SCALED,
    "granitemoe": _SCALED,
    "granitemoehybrid": {
        **_SCALED,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_groups": 1,
    },
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        "use_cla": True,
        "cla_share_factor": 2,
    },
    "iquestloopcoder": {"loop_window_size": WINDOW},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k3": {
        "linear_attn_config": _DELTA,
        "activation_situ_beta": 2.0,
        "attn_res_block_size": 2,
    },
    "kimi_linear": {"linear_attn_config": _DELTA, "model_max_length": 1000},
    "lfm2": {
        "block_dim": 64,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2_moe": {"use_expert_bias": True},
    "lille-130m": {"block_size": 1000, "n_kv_heads": 2},
    "llama4": {
        "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
        "rope_scaling": None,
    },
    "llama4_text": {"intermediate_size_mlp": 64, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": {**_LONGCAT, "ngram_vocab_size_ratio": 2},
    "mamba2": {"time_step_limit": (0.001, 100.0), "head_dim": 16, "num_heads": 8},
    "mellum": {"rope_parameters": _ROPE_BY_TYPE},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 16,
        "swa_v_head_dim": 8,
    },
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2},
    "minicpm3": {
        "dim_model_base": 32,
        "scale_depth": 1.4,
        "scale_emb": 2,
        "rope_scaling": {
            "original_max_position_embeddings": 500,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
        },
    },
    "minimax_m3_vl": {
        "dense_intermediate_size": 64,
        "moe_layer_freq": [0, 1, 1, 1],
        "sparse_attention_freq": [0, 1, 1, 1],
        "layer_types": None,
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    "ministral3": {"rope_parameters": _YARN},
    "mistral4": {"rope_parameters": _YARN},
    "muse_spark": {
        "post_norm_eps": 1e-8,
        "rope_parameters": {"rope_theta": 10000.0},
        "layer_rope_theta": [10000.0, 0, 10000.0, 0],
        "final_logit_softcapping": 30.0,
        "output_multiplier": 0.5,
        "moe_hidden_size": 64,
        "num_shared_experts": 0,
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {
                "attention": {"replace_with_linear": True},
                "ffn": {"replace_with_linear": True},
            },
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ]
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"]},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "openelm": {
        "num_transformer_layers": 3,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [2, 4, 4],
        "num_kv_heads": [1, 2, 2],
        "ffn_multipliers": [0.5, 1.0, 1.0],
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 64,
        "gegelu_limit": 20.0,
        # It bans tokens by their numbers.
        "vocab_size": 100352,
    },
    "phixtral": {"num_vocab": VOCABULARY, "model_dim": 64},
    "plamo": {"n_shared_head": 2},
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "hidden_size": 128,
        "num_experts": 0,
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.0.mlp.gate_proj",
                "embedding": False,
                "dtype": "float16",
                "block": 0,
            }
        ],
    },
    "qwen": {"kv_channels": 16},
    "qwen3_5": {"num_experts": 0},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "spark2_5": {"rope_parameters": _ROPE_BY_TYPE},
    "step3p5": {
        "num_attention_groups": 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
    },
}
"""What an architecture wants besides."""

WRAPPED = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "llama4": "llama4",
    "minimax_m3_vl": "minimax_m3_vl",
    "mistral3": "ministral3",
    "muse_spark": "muse_spark",
    "pixtral": "llama",
    "prism_hadamard_qwen35": "prism_hadamard_qwen35",
    "qwen3_vl_moe": "qwen3_moe",
}
"""Whose language model takes the arguments of another architecture, or its own."""

NO_MODELS = (
    "activations",
    "base",
    "bitlinear_layers",
    "cache",
    "gated_delta",
    "mla",
    "pipeline",
    "rope_utils",
    "ssm",
    "switch_layers",
)
"""Modules that models are made of."""

_METAL = "has a kernel in Metal, and none for the CPU"
CANNOT_RUN = {
    "bitnet": _METAL,
    "muse_spark": _METAL,
    "olmo": "imports the package ai2-olmo, and ends the process without it",
}
"""What cannot be built or run here, and why."""

CANNOT_STORE = {
    "deepseek_v41": "LayerCache",
}
"""Whose cache is of a class of its own: its name."""


def names():
    """Return every module of `mlx_lm.models` that is not known to hold no model."""
    found = [info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return [name for name in found if name not in NO_MODELS]


def arguments(name):
    """Return the arguments of one architecture."""
    own = {"model_type": name, **OWN.get(name, {})}
    if name in WRAPPED:
        text = WRAPPED[name]
        own["text_config"] = SHARED | OWN.get(text, {}) | {"model_type": text}
    return SHARED | own


def make_model(name, dtype=mx.float32, **changes):
    """Return a model with random weights, the same every time.

    Arguments may be changed by their names.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(7)
    model = module.Model(module.ModelArgs.from_dict(arguments(name) | changes))

    def vary(array):
        # What begins as zeros or ones would leave whole branches idle.
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        noise = 0.1 * mx.random.normal(array.shape)
        return (array + noise).astype(dtype)

    model.update(tree_map(vary, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()


def feed(model, prompt_cache, tokens, *sizes):
    """Feed tokens, in pieces of these sizes, and return the logits after the last."""
    sizes = sizes or (len(tokens),)
    assert sum(sizes) == len(tokens)
    for size in sizes:
        piece, tokens = tokens[:size], tokens[size:]
        logits = model(mx.array([piece]), cache=prompt_cache)[0, -1]
        mx.eval(logits)
    return logits


def go_on(model, prompt_cache, logits, num_tokens):
    """Generate greedily; return the tokens fed, and the logits after each of them."""
    tokens, seen = [], []
    for _ in range(num_tokens):
        tokens.append(int(mx.argmax(logits)))
        logits = feed(model, prompt_cache, tokens[-1:])
        seen.append(logits)
    return tokens, seen


def bits(arrays):
    """Return the bits of some arrays."""
    return [bytes(memoryview(mx.contiguous(a).view(mx.uint8))) for a in arrays]

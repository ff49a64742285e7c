"""Makers of tiny models of every architecture in mlx-lm, with random weights.

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
    "use_qk_norm": True,
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

OWN = {}
"""What an architecture wants besides."""

WRAPPED = {}
"""Whose language model is that of another module: its name."""

CANNOT = {
    "olmo": "asks for the package ai2-olmo, and ends the process without it",
}
"""What cannot be built, and why."""


def names():
    """Return the modules that define a model, an import that fails included."""
    found = []
    for info in pkgutil.iter_modules(mlx_lm.models.__path__):
        try:
            module = importlib.import_module(f"mlx_lm.models.{info.name}")
        except (ImportError, SystemExit):
            found.append(info.name)
            continue
        if hasattr(module, "Model") and hasattr(module, "ModelArgs"):
            found.append(info.name)
    return found


def arguments(name):
    """Return the arguments of one architecture."""
    own = {"model_type": name, **OWN.get(name, {})}
    if name in WRAPPED:
        own["text_config"] = SHARED | arguments(WRAPPED[name])
    return SHARED | own


def make_model(name, dtype=mx.float32):
    """Return a model with random weights, the same every time."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(7)
    model = module.Model(module.ModelArgs.from_dict(arguments(name)))

    def vary(array):
        # What begins as zeros or ones would leave whole branches idle.
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        noise = 0.1 * mx.random.normal(array.shape)
        return (array + noise).astype(dtype)

    model.update(tree_map(vary, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()

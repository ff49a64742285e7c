"""Windows and recurrent states: restored only where they are right, on real layers."""

import mlx.core as mx
import pytest
from mlx_lm.models import falcon_h1, gemma3_text, llama4_text, mamba2
from mlx_lm.models.cache import make_prompt_cache

import kvstore
from kvstore.folder import create_folder

WINDOW = 24
VOCABULARY = 120


def gemma():
    """Sliding windows of 24 tokens, every third layer whole."""
    return gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text",
            hidden_size=64,
            num_hidden_layers=3,
            intermediate_size=64,
            num_attention_heads=2,
            head_dim=32,
            rms_norm_eps=1e-6,
            vocab_size=VOCABULARY,
            num_key_value_heads=1,
            query_pre_attn_scalar=32,
            sliding_window=WINDOW,
            sliding_window_pattern=3,
        )
    )


def llama4():
    """Chunks of 24 tokens, every fourth layer whole."""
    return llama4_text.Model(
        llama4_text.ModelArgs(
            model_type="llama4_text",
            hidden_size=64,
            num_hidden_layers=4,
            intermediate_size=64,
            intermediate_size_mlp=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            head_dim=32,
            max_position_embeddings=1000,
            attention_bias=False,
            attention_chunk_size=WINDOW,
            rope_theta=10000.0,
        )
    )

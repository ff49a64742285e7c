"""The gate of re-anchoring: keys are moved where a measurement says they can be."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from kit import load_beside

import kvstore
from kvstore.caches.rotation import measure_rotation

architectures = load_beside("architectures")

MOVABLE = [
    "llama", "gemma3_text", "cohere2", "exaone4", "gpt_neox", "gptj", "glm4",
    "minimax", "gpt_oss", "llama4_text", "internlm2",
]  # fmt: skip
REFUSED = {
    "mamba": "layer 0 is a ArraysCache: recurrent states have no positions",
    "qwen3_next": "layer 0 is a ArraysCache: recurrent states have no positions",
    "falcon_h1": "layer 0 is a CacheList: recurrent states have no positions",
    "llama4": "layer 0 is a ChunkedKVCache",
    "gpt2": "values that change with the position",
    "ministral3": "values that change with the position",
    "deepseek_v3": "values that change with the position",
    "hunyuan": "keys that no rotation of the model's own moves",
    "nanochat": "keys that no rotation of the model's own moves",
    "gemma3n": "it cannot be measured",
}
DIMS = architectures.SHARED["head_dim"]


@pytest.fixture(scope="module")
def llama():
    """A model whose keys can be moved."""
    return architectures.make_model("llama")


def compute(model, tokens):
    """Return keys and values of each layer."""
    from mlx_lm.models.cache import make_prompt_cache

    held = make_prompt_cache(model)
    mx.eval(model(mx.array([tokens]), cache=held))
    return [cache.state for cache in held]


@pytest.mark.parametrize("name", MOVABLE)
def test_rotary_models_pass(name):
    """Rotated keys are the computed ones to the last places, in every layer."""
    found = measure_rotation(architectures.make_model(name))
    assert max(layer.key_error for layer in found) < 1e-4
    assert max(layer.value_error for layer in found) < 1e-4


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_others_are_refused_by_name(name):
    """Recurrent layers, learned positions, and what scales by the position."""
    with pytest.raises(kvstore.UnsupportedCacheError, match=REFUSED[name]) as caught:
        measure_rotation(architectures.make_model(name))
    assert caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(architectures.names())))
def test_every_architecture_passes_or_says_why_not(name):
    """Nothing but a refusal comes out of a model that is not understood.

    Of one that passes, the first layer's keys, which depend on nothing but token and
    position, are moved to what the model computes elsewhere.
    """
    if name in architectures.CANNOT_RUN:
        pytest.skip(architectures.CANNOT_RUN[name])
    model = architectures.make_model(name)
    try:
        found = measure_rotation(model)
    except kvstore.UnsupportedCacheError as error:
        assert "cannot be moved to other positions: " in str(error)  # noqa: PT017
    else:
        assert max(layer.key_error for layer in found) < 1e-3
        tail = list(range(40, 50))
        here, there = (compute(model, [5] * n + tail)[0][:2] for n in (4, 9))
        keys, values = here
        moved = found[0].rotate(keys[:, :, 4:14], 5), values[:, :, 4:14]
        for rows, computed in zip(moved, there, strict=True):
            largest = mx.abs(computed).max()
            assert mx.abs(rows - computed[:, :, 9:19]).max() < 1e-3 * largest


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_model_of_few_bits_passes(dtype):
    """Rounding is told from a wrong rotation by what it does to values."""
    found = measure_rotation(architectures.make_model("llama", dtype))
    assert all(layer.module for layer in found)


@pytest.mark.parametrize(
    "wrong",
    [
        nn.RoPE(DIMS, base=10010.0),
        nn.RoPE(DIMS, base=10000.0, scale=0.999),
        nn.RoPE(DIMS, traditional=True),
        nn.RoPE(DIMS // 2),
        nn.RoPE(2 * DIMS),
        nn.Linear(DIMS, DIMS),
    ],
    ids=["base", "scale", "pairs", "few", "many", "none"],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_wrong_rotation_is_refused(wrong, dtype):
    """Another base, scale, pairing or number of dimensions is not near enough."""
    model = architectures.make_model("llama", dtype)
    with pytest.raises(kvstore.UnsupportedCacheError, match="no rotation"):
        measure_rotation(model, modules={"wrong": wrong})
    right = nn.RoPE(DIMS, base=10000.0)
    found = measure_rotation(model, modules={"a wrong one": wrong, "right": right})
    assert {layer.module for layer in found} == {"right"}


class Stretching(nn.Module):
    """It turns more slowly from some position on."""

    def __init__(self):
        """Make both rotations."""
        super().__init__()
        self.near, self.far = nn.RoPE(DIMS), nn.RoPE(DIMS, scale=0.5)

    def __call__(self, x, offset=0):
        """Rotate by one of them."""
        return (self.far if offset >= 900 or offset < -900 else self.near)(
            x, offset=offset
        )


def test_one_layer_that_scales_by_the_position_is_enough():
    """The layer is named; at near positions it looks like the others."""
    model = architectures.make_model("llama")
    model.layers[2].self_attn.rope = Stretching()
    with pytest.raises(kvstore.UnsupportedCacheError, match="layer 2 has keys"):
        measure_rotation(model)


def test_positions_of_three_axes_are_refused():
    """On a text alone they look like one."""
    model = architectures.make_model("llama")
    model.args.rope_scaling = {"type": "default", "mrope_section": [2, 3, 3]}
    with pytest.raises(kvstore.UnsupportedCacheError, match="M-RoPE"):
        measure_rotation(model)


@pytest.mark.parametrize("by", [1, 7, 200, -5])
def test_moved_keys_are_those_of_the_same_tokens_elsewhere(llama, by):
    """In the first layer, where no token has seen another, to the last places."""
    head, tail = [5] * 10, list(range(40, 60))
    (rotation, *_) = measure_rotation(llama)
    moved = [5] * (10 + by) + tail
    keys = compute(llama, head + tail)[0][0][:, :, 10:]
    expected = compute(llama, moved)[0][0][:, :, 10 + by :]
    assert mx.abs(rotation.rotate(keys, by) - expected).max() < 1e-4


def test_the_keys_stay_as_they_were(llama):
    """Some modules of mlx-lm scale what they are given in place."""
    (rotation, *_) = measure_rotation(llama)
    keys = mx.random.normal((1, 2, 9, DIMS))
    before = keys.tolist()
    rotation.rotate(keys, 3)
    assert keys.tolist() == before

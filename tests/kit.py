"""The only door to internals for tests: what a test may use beside the public API.

Import it as ``kit``. A test that reaches for a module of ``kvstore`` which is not
public takes it from here, so that a module that moves is mended in one place.
"""

import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from kvstore.codecs import Codec, Rows, get_codec
from kvstore.codecs.dtypes import MLX_DTYPES, NUMPY_DTYPES
from kvstore.format.block import Part, TensorSpec
from kvstore.models import (
    CacheOptions,
    Callbacks,
    LoadedModel,
    PrefillOptions,
    SamplingOptions,
    Template,
    chat,
    generate,
)
from kvstore.storage.entries import read_entry
from kvstore.storage.files import read_small

__all__ = [
    "FLOATS",
    "MLX_DTYPES",
    "NUMPY_DTYPES",
    "Encoded",
    "Part",
    "Rows",
    "TensorSpec",
    "bits_of",
    "encode_rows",
    "load_beside",
    "normal_rows",
    "open_chat",
    "random_bits",
    "read_entry",
    "read_small",
    "save_prompt",
    "shard_name",
    "stream_generate",
    "to_float64",
]

FLOATS = ("F32", "F16", "BF16")
"""The dtypes that rows of a model have."""


def shard_name(data):
    """Return what a plain shard of these bytes is called."""
    size = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(data[:size]).hexdigest()


def load_beside(name):
    """Import a module of makers that lies in `tests/kvstore`, once."""
    full = f"kvstore_tests_{name}"
    if full not in sys.modules:
        path = Path(__file__).parent / "kvstore" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(full, path)
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def normal_rows(rows, seed=0):
    """Return rows of normal numbers, held as NumPy holds their dtype."""
    x = np.random.default_rng(seed).standard_normal(rows.shape, np.float32)
    if rows.dtype == "BF16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(NUMPY_DTYPES[rows.dtype])


def random_bits(rows, seed=0):
    """Return rows of random bits: NaNs, infinities and denormals are among them."""
    itemsize = np.dtype(NUMPY_DTYPES[rows.dtype]).itemsize
    octets = np.random.default_rng(seed).bytes(int(np.prod(rows.shape)) * itemsize)
    return np.frombuffer(octets, NUMPY_DTYPES[rows.dtype]).reshape(rows.shape)


def to_float64(x, dtype):
    """Return rows as numbers to compute with."""
    if dtype == "BF16":
        x = (np.asarray(x).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return np.asarray(x).astype(np.float64)


def bits_of(array):
    """Return the bytes of an array of NumPy or MLX."""
    if isinstance(array, mx.array):
        array = np.asarray(mx.contiguous(array).view(mx.uint8))
    return np.ascontiguousarray(array).tobytes()


@dataclass
class Encoded:
    """What a codec made of rows, as it lies in a shard."""

    codec: Codec
    rows: Rows
    parts: list[Part]

    @property
    def data(self):
        """The bytes of all parts, one behind the other."""
        return b"".join(data for part in self.parts for data in part.buffers)

    @property
    def tensors(self):
        """What a shard's header says of the parts."""
        found, position = {}, 0
        for part in self.parts:
            end = position + part.nbytes
            found[part.name] = TensorSpec(
                part.dtype, part.shape, position, end, part.raw_nbytes
            )
            position = end
        return found

    def open(self, data=None, tensors=None):
        """Return the named arrays, of other bytes or tensors where they are given."""
        return self.codec.open(
            memoryview(self.data if data is None else data),
            0,
            self.tensors if tensors is None else tensors,
            self.rows,
            PREFIX,
        )

    def decode(self, opened):
        """Return all rows as bits held by NumPy, decoded on the device."""
        decoded = self.codec.array.decode(opened, self.rows)
        assert MLX_DTYPES[self.rows.dtype] == decoded.dtype
        assert self.rows.shape == decoded.shape
        octets = bits_of(decoded)
        held = np.frombuffer(octets, NUMPY_DTYPES[self.rows.dtype])
        return held.reshape(self.rows.shape)

    def decode_into(self, opened, num_tokens=None):
        """Return the first tokens' rows, decoded into a strided buffer, by layer."""
        layers, heads, tokens, dim = self.rows.shape
        tokens = tokens if num_tokens is None else num_tokens
        # A prompt cache has room behind the rows, which stays as it is.
        room = np.full((layers, heads, tokens + 5, dim), 77)
        room = room.astype(NUMPY_DTYPES[self.rows.dtype])
        buffers = [layer[:, :tokens] for layer in room]
        self.codec.array.decode_into(opened, self.rows, buffers)
        assert (room[:, :, tokens:] == 77).all()
        return np.ascontiguousarray(room[:, :, :tokens])


PREFIX = "0.side."


def encode_rows(name, x, rows):
    """Return what the codec of this name makes of rows."""
    codec = get_codec(name)
    return Encoded(codec, rows, codec.encode(x, rows, PREFIX))


# Where a test gives an option of a run by its own name, these tell the object that
# it belongs to.
_HOMES = {
    "max_tokens": ("sampling", "max_tokens"),
    "sampler": ("sampling", "sampler"),
    "logits_processors": ("sampling", "logits_processors"),
    "num_draft_tokens": ("sampling", "num_draft_tokens"),
    "max_kv_size": ("cache", "max_kv_size"),
    "kv_bits": ("cache", "kv_bits"),
    "kv_group_size": ("cache", "kv_group_size"),
    "min_bits": ("cache", "min_bits"),
    "prefill_step_size": ("prefilling", "step_size"),
    "checkpoint_every": ("prefilling", "checkpoint_every"),
    "should_stop": ("callbacks", "should_stop"),
    "load_progress": ("callbacks", "on_load"),
    "prompt_progress_callback": ("callbacks", "on_prefill"),
    "save_progress": ("callbacks", "on_save"),
    "on_saved": ("callbacks", "on_saved"),
}
_CLASSES = {
    "sampling": SamplingOptions,
    "cache": CacheOptions,
    "prefilling": PrefillOptions,
    "callbacks": Callbacks,
}


def _gathered(options):
    """Return options of a run in the objects that take them."""
    fields, others = {}, {}
    for name, value in options.items():
        if name in _HOMES:
            home, field = _HOMES[name]
            fields.setdefault(home, {})[field] = value
        else:
            others[name] = value
    return others | {home: _CLASSES[home](**given) for home, given in fields.items()}


def stream_generate(
    model, tokenizer, prompt, *, fingerprint, draft_model=None, **options
):
    """Generate with a store; options are given by their own names."""
    loaded = LoadedModel(model, tokenizer, fingerprint, draft_model)
    return generate.stream_generate(loaded, prompt, **_gathered(options))


def save_prompt(model, tokens, *, fingerprint, draft_model=None, **options):
    """Save a prompt; options are given by their own names."""
    loaded = LoadedModel(model, None, fingerprint, draft_model)
    return generate.save_prompt(loaded, tokens, **_gathered(options))


def open_chat(
    model, tokenizer, *, fingerprint, draft_model=None, is_plain=False, **options
):
    """Open a chat; options are given by their own names."""
    options["template"] = Template(tokenizer, ignore=is_plain)
    loaded = LoadedModel(model, tokenizer, fingerprint, draft_model)
    return chat.Chat(loaded, **_gathered({"max_tokens": chat.MAX_TOKENS, **options}))

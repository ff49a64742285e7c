"""Prompt-cache files of mlx-lm, of whichever release, to caches of the installed one.

mlx-lm has written four layouts and says in none of them which it is. What a file is,
is told by its metadata and its arrays, and what fits none of them is refused. The file
is hostile input: MLX never reads it, and nothing is allocated before the header has
been held against the model.
"""

from __future__ import annotations

import os
import secrets
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..codecs.base import MLX_DTYPES
from ..errors import FormatError, IntegrityError, KVStoreError, UnsupportedCacheError
from ..format.safetensors import MAX_HEADER_BYTES, parse_header
from ..storage import files
from . import live as caches
from .kinds import known_layout
from .layout import layout_to_json


def check_cache_path(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a path that :func:`write_prompt_cache` could not write to.

    Args:
        path: Where; the name ends in ``.safetensors``.
        overwrite: Replace a file that is there.

    Raises:
        KVStoreError: There is a file, or no folder, or the name has another ending.
    """
    if path.suffix != ".safetensors":
        # mlx-lm tells the format by it.
        raise KVStoreError(
            f"not a name for a safetensors file: `{path}`",
            hint="end it in `.safetensors`",
        )
    if path.exists() and not overwrite:
        raise KVStoreError(
            f"there is a file already: `{path}`", hint="`--overwrite` replaces it"
        )
    if not path.parent.is_dir():
        raise KVStoreError(
            f"no such folder: `{path.parent}`", hint="make it, or choose another"
        )


def write_prompt_cache(
    path: Path, prompt_cache: Sequence[Any], model: str, *, overwrite: bool = False
) -> int:
    """Write the file that ``mlx_lm.generate --prompt-cache-file`` reads.

    It appears whole or not at all, and only its owner can read it.

    Args:
        path: Where; the name ends in ``.safetensors``.
        prompt_cache: mlx-lm's list of per-layer caches.
        model: What mlx-lm is to load the model by.
        overwrite: Replace a file that is there.

    Returns:
        Its size in bytes.

    Raises:
        KVStoreError: There is a file, or the name has another ending.
        OSError: It cannot be written.
    """
    check_cache_path(path, overwrite=overwrite)
    from mlx_lm.models.cache import save_prompt_cache

    metadata = {"model": model, "tokenizer_config": "{}"}
    staged = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.safetensors")
    descriptor = files.create(staged)
    try:
        save_prompt_cache(str(staged), _readable(prompt_cache), metadata)
        files.sync(descriptor)
        nbytes = os.fstat(descriptor).st_size
        files.publish(staged, path)
    finally:
        os.close(descriptor)
        staged.unlink(missing_ok=True)
    return nbytes


def _readable(prompt_cache: Sequence[Any]) -> list[Any]:
    """Return caches of mlx-lm's own classes, with live codes decoded."""
    # mlx-lm finds a class by its name, among its own only.
    return [
        cache.to_kv_cache() if hasattr(cache, "to_kv_cache") else cache
        for cache in prompt_cache
    ]


TO_0_28_0, FROM_0_28_1, IN_0_31, IN_0_32 = (
    "up to 0.28.0", "0.28.1 to 0.30", "0.31", "0.32",
)  # fmt: skip
"""The releases of mlx-lm that share a layout."""
Layouts = frozenset[str]
_BEFORE_0_32: Layouts = frozenset((TO_0_28_0, FROM_0_28_1, IN_0_31))
_FLOATS = ("F32", "F16", "BF16")
_MAX_NESTING = 8
# Behind its arrays, 0.32 keeps these numbers of a cache, in this order.
_NUMBERS = {
    "KVCache": ("offset",),
    "QuantizedKVCache": ("offset", "group_size", "bits"),
    "RotatingKVCache": ("offset", "keep", "max_size", "_idx"),
    "ChunkedKVCache": ("offset", "chunk_size", "start_position"),
}
# The releases before kept these as text in the metadata.
_FIRST, _LATER = frozenset((TO_0_28_0,)), frozenset((FROM_0_28_1, IN_0_31))
_INFOS: tuple[tuple[str, tuple[str, ...], Layouts], ...] = (
    ("KVCache", (), _BEFORE_0_32),
    ("QuantizedKVCache", ("step", "offset", "group_size", "bits"), _FIRST),
    ("QuantizedKVCache", ("offset", "group_size", "bits"), _LATER),
    ("RotatingKVCache", ("keep", "max_size", "step", "offset", "_idx"), _FIRST),
    ("RotatingKVCache", ("keep", "max_size", "offset", "_idx"), _LATER),
    ("ChunkedKVCache", ("chunk_size", "start_position"), _BEFORE_0_32),
    ("ArraysCache", (), _BEFORE_0_32),
    ("MambaCache", (), frozenset((TO_0_28_0, FROM_0_28_1))),
)
_CLASSES = (*dict.fromkeys(name for name, _, _ in _INFOS), "CacheList")


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array of the file, not read yet."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True, slots=True)
class SavedCache:
    """One cache as the file has it."""

    # Its class; ``ArraysCache`` for what was a ``MambaCache``.
    name: str
    # Its arrays, nested as mlx-lm nests them; ``None`` for one without rows.
    arrays: Any
    # Its other attributes, by name.
    numbers: Mapping[str, int]
    # Those in it, where it is a ``CacheList``.
    caches: tuple[SavedCache, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheFile:
    """The header of a file, checked."""

    # Where it is.
    path: Path
    # The releases of mlx-lm that may have written it. Some classes look the same in
    # several.
    layouts: tuple[str, ...]
    # What the file calls the model; ``None`` where it does not.
    model: str | None
    # The caches, one per layer.
    caches: tuple[SavedCache, ...]
    # Where the arrays' bytes begin.
    data_begin: int

    @property
    def num_tokens(self) -> int:
        """How many tokens' rows it holds.

        Raises:
            FormatError: It does not say, or its layers disagree.
        """
        counts = {cache.numbers.get("offset", 0) for cache in _flatten(self.caches)}
        counts.discard(0)
        if len(counts) != 1:
            numbers = " and ".join(map(str, sorted(counts)))
            what = f"its layers hold {numbers} tokens"
            raise _refusal(
                self.path, what if counts else "it does not say how many tokens it has"
            )
        return counts.pop()

    def read(self) -> list[Any]:
        """Return the prompt cache, of the installed mlx-lm's classes.

        Raises:
            FormatError: Its arrays are not what such caches have.
            OSError: It cannot be read.
        """
        num_tokens = self.num_tokens
        try:
            with self.path.open("rb") as file:
                data = _Data(file, self.data_begin)
                prompt_cache = [_build(c, data, num_tokens) for c in self.caches]
            layout = caches.read_layout(prompt_cache, num_tokens)
            known_layout(layout_to_json(layout))  # what we could not read again
        except (ValueError, IntegrityError, UnsupportedCacheError) as error:
            raise _refusal(self.path, str(error)) from error
        return prompt_cache


def open_cache_file(path: Path, like: Sequence[Any]) -> CacheFile:
    """Return what a file's header says, once it fits a model.

    Args:
        path: A file that ``mlx_lm.cache_prompt`` or ``save_prompt_cache`` wrote.
        like: The model's empty prompt cache, from ``make_prompt_cache``.

    Raises:
        FormatError: It is none, is damaged, or has other layers than the model.
        OSError: It cannot be read.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        with path.open("rb") as file:
            tensors, metadata, begin = _read_header(file)
            leaves = {
                name: Tensor(dtype, shape, offset)
                for name, (dtype, shape, offset, _) in tensors.items()
            }
            layouts, saved, model = _recognise(
                leaves, metadata, like, _Data(file, begin)
            )
        _check_layers(saved, like)
    except ValueError as error:
        raise _refusal(path, str(error)) from error
    return CacheFile(path, layouts, model, saved, begin)


def _refusal(path: Path, reason: str) -> FormatError:
    return FormatError(
        f"not a cache file of mlx-lm that fits the model: `{path}`: {reason}",
        hint="`kvstore save` computes the prompt anew",
    )


def _flatten(saved: Sequence[SavedCache]) -> list[SavedCache]:
    found: list[SavedCache] = []
    for cache in saved:
        found += _flatten(cache.caches) if cache.name == "CacheList" else [cache]
    return found


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], Mapping[str, str], int]:
    """Return tensors, metadata, and where the data begin."""
    status = os.fstat(file.fileno())
    prefix = file.read(8) if stat.S_ISREG(status.st_mode) else b""
    if len(prefix) < 8:
        raise ValueError("it is not a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    rest = status.st_size - 8 - length
    if length > MAX_HEADER_BYTES or rest < 0:
        raise ValueError(f"it is not a safetensors file: a header of {length} bytes")
    if rest > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise ValueError(f"{rest} bytes of arrays are more than this machine's memory")
    tensors, metadata = parse_header(file.read(length), rest)
    return tensors, metadata, 8 + length


def _recognise(
    leaves: dict[str, Any],
    metadata: Mapping[str, str],
    like: Sequence[Any],
    data: _Data,
) -> tuple[tuple[str, ...], tuple[SavedCache, ...], str | None]:
    """Return the possible layouts, the caches, and the model's name."""
    groups: dict[str, dict[str, str]] = {"0": {}, "1": {}, "2": {}}
    for key, text in metadata.items():
        head, _, rest = key.partition(".")
        if head not in groups:
            raise ValueError(f"it has metadata of no release of mlx-lm: {key[:40]!r}")
        groups[head][rest] = text
    # 0.32 ends with a list of scalars, which begins with an empty text; the releases
    # before end with the names of the classes.
    if groups["2"].get("0") == "":
        scalars = _nest(groups["2"])[1:]
        states = _nest(_with_scalars(leaves, scalars, data))
        saved = [_of_0_32(*pair) for pair in _zip(_nest(groups["1"]), states)]
        return (IN_0_32,), tuple(saved), groups["0"].get("model")
    names, infos = _nest(groups["2"]), _nest(groups["0"])
    layouts, older = _all_of_older(_zip(names, _nest(leaves), infos), like)
    return layouts, older, groups["1"].get("model")


def _all_of_older(
    triples: Sequence[tuple[Any, ...]], like: Sequence[Any]
) -> tuple[tuple[str, ...], tuple[SavedCache, ...]]:
    """Return the possible layouts and the caches of a file from before 0.32."""
    _check_count(len(triples), like)
    votes: list[Layouts] = [_BEFORE_0_32]
    saved = [
        _of_older(cache, votes, *triple)
        for triple, cache in zip(triples, like, strict=True)
    ]
    possible = frozenset.intersection(*votes)
    if not possible:
        raise ValueError("its layers are laid out as in different releases of mlx-lm")
    ordered = (TO_0_28_0, FROM_0_28_1, IN_0_31)
    return tuple(name for name in ordered if name in possible), tuple(saved)


def _nest(leaves: Mapping[str, Any], nesting: int = _MAX_NESTING) -> Any:
    """Return nested lists from names of dotted numbers, of which none is missing."""
    if set(leaves) == {""}:
        return leaves[""]
    below: dict[str, dict[str, Any]] = {}
    for key, leaf in leaves.items():
        head, _, rest = key.partition(".")
        below.setdefault(head, {})[rest] = leaf
    numbers = [str(i) for i in range(len(below))]
    if not numbers or set(below) != set(numbers) or nesting == 0:
        raise ValueError("its arrays or metadata are not numbered as mlx-lm does")
    return [_nest(below[number], nesting - 1) for number in numbers]


def _zip(names: Any, *others: Any) -> list[tuple[Any, ...]]:
    """Return what belongs together, layer by layer."""
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError("it does not name the classes of its layers")
    for other in others:
        if not isinstance(other, list) or len(other) != len(names):
            raise ValueError(f"it has other arrays than {len(names)} layers have")
    return list(zip(names, *others, strict=True))


def _with_scalars(
    leaves: Mapping[str, Any], scalars: Sequence[Any], data: _Data
) -> dict[str, Any]:
    """Return the leaves, with numbers, texts and ``None`` in the place of arrays."""
    values = dict(leaves)
    for scalar in scalars:
        if not isinstance(scalar, list) or len(scalar) != 2:
            raise ValueError("it lists its scalars as no release of mlx-lm does")
        name, kind = scalar
        if not isinstance(name, str) or not isinstance(values.get(name), Tensor):
            raise ValueError(f"it has no scalar {str(name)[:40]!r}")
        values[name] = data.scalar(leaves[name], kind)
    return values


def _of_0_32(name: str, state: Any) -> SavedCache:
    if name == "CacheList":
        pairs = _lists(state, None)
        inner = [_of_0_32(str(pair[1]), pair[0]) for pair in _pairs(pairs)]
        return SavedCache(name, None, {}, tuple(inner))
    if name == "ArraysCache":
        states, padding, lengths = _lists(state, 3)
        if padding is not None or lengths is not None:
            raise ValueError("it holds a batch")
        return SavedCache(name, _lists(states, None), {})
    if name not in _NUMBERS:
        raise _unknown(name)
    fields = _NUMBERS[name]
    keys, values, *numbers = _lists(state, 2 + len(fields))
    arrays = None if keys is None and values is None else (keys, values)
    return SavedCache(name, arrays, _counts(zip(fields, numbers, strict=True)))


def _of_older(
    like: Any,
    votes: list[Layouts],
    name: str,
    state: Any,
    info: Any,
) -> SavedCache:
    """Return one cache, and add the layouts that it may be in."""
    texts = [] if info == "" else _lists(info, None)
    if name == "CacheList":
        return _list_of_older(state, texts, like, votes)
    for known, fields, layouts in _INFOS:
        if known == name and len(fields) == len(texts):
            votes.append(layouts)
            break
    else:
        if name not in _CLASSES:
            raise _unknown(name)
        raise ValueError(f"a {name} with {len(texts)} numbers is of no release")
    if name in ("ArraysCache", "MambaCache"):
        return SavedCache("ArraysCache", _lists(state, None), {})
    numbers = _counts((f, _to_int(t)) for f, t in zip(fields, texts, strict=True))
    keys, values = _lists(state, 2)
    if name == "KVCache":
        numbers["offset"] = _rows_shape(keys)[2]
    return SavedCache(name, (keys, values), numbers)


def _list_of_older(
    state: Any, texts: list[Any], like: Any, votes: list[Layouts]
) -> SavedCache:
    likes = getattr(like, "caches", ())
    if texts:  # it names the classes
        votes.append(frozenset((IN_0_31,)))
        names, infos = _lists(texts, 2)
        triples = _zip(names, _lists(state, None), infos)
    else:
        votes.append(frozenset((TO_0_28_0, FROM_0_28_1)))
        triples = _cut(_lists(state, None), likes)
    if len(triples) != len(likes):
        raise ValueError(f"a CacheList of {len(triples)} caches, not {len(likes)}")
    inner = [
        _of_older(cache, votes, *triple)
        for triple, cache in zip(triples, likes, strict=True)
    ]
    return SavedCache("CacheList", None, {}, tuple(inner))


def _cut(state: list[Any], likes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return the parts of a list that does not say where one cache's arrays end."""
    triples: list[tuple[Any, ...]] = []
    rest = state
    for cache in likes:
        name = type(cache).__name__
        if name not in ("KVCache", "ArraysCache"):
            raise ValueError(f"it lacks the numbers of a {name} in a CacheList")
        size = 2 if name == "KVCache" else len(cache.cache)
        triples.append((name, rest[:size], ""))
        rest = rest[size:]
    if rest:
        raise ValueError("a CacheList has more arrays than the model's")
    return triples


def _lists(value: Any, length: int | None) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError("a layer has other arrays than its class has")
    return value


def _pairs(values: list[Any]) -> list[list[Any]]:
    return [_lists(value, 2) for value in values]


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"a layer of class {name[:40]!r}, which is none of {', '.join(_CLASSES)}"
    )


def _to_int(text: Any) -> Any:
    is_number = isinstance(text, str) and text.isascii() and text.isdecimal()
    return int(text) if is_number else None


def _counts(pairs: Any) -> dict[str, int]:
    numbers = dict(pairs)
    for name, number in numbers.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise ValueError(f"a layer's `{name}` is not a count")
    return numbers


def _check_count(num_layers: int, like: Sequence[Any]) -> None:
    if num_layers != len(like):
        raise ValueError(f"{num_layers} layers, and the model has {len(like)}")


def _check_layers(saved: Sequence[SavedCache], like: Sequence[Any]) -> None:
    """Refuse layers that the model could not have made."""
    _check_count(len(saved), like)
    for number, (cache, wanted) in enumerate(zip(saved, like, strict=True)):
        name = type(wanted).__name__
        # `--kv-bits` and `--max-kv-size` put others in the place of a KVCache.
        made = ("KVCache", "QuantizedKVCache", "RotatingKVCache")
        if cache.name != name and not (name == "KVCache" and cache.name in made):
            raise ValueError(f"layer {number} is a {cache.name}, the model's a {name}")
        if name == "CacheList":
            _check_layers(cache.caches, wanted.caches)
        if name == "ArraysCache" and len(cache.arrays) != len(wanted.cache):
            raise ValueError(f"layer {number} has {len(cache.arrays)} states")
        for field in ("max_size", "keep", "chunk_size"):
            other = getattr(wanted, field, None)
            if other is not None and cache.numbers.get(field) != other:
                raise ValueError(
                    f"layer {number} has {field} {cache.numbers.get(field)},"
                    f" the model {other}"
                )


class _Data:
    """Reads arrays of an open file."""

    def __init__(self, file: BinaryIO, begin: int) -> None:
        self._file = file
        self._begin = begin

    def read(self, tensor: Tensor) -> mx.array:
        """Return one array.

        Raises:
            ValueError: The file has become shorter.
        """
        if tensor.dtype not in MLX_DTYPES:
            raise ValueError(f"an array of {tensor.dtype}")
        dtype = MLX_DTYPES[tensor.dtype]
        raw = np.dtype(f"u{dtype.size}")
        self._file.seek(self._begin + tensor.begin)
        count = int(np.prod(tensor.shape, dtype=np.int64))
        values = np.fromfile(self._file, raw, count)
        return mx.array(values.reshape(tensor.shape)).view(dtype)

    def scalar(self, tensor: Tensor, kind: Any) -> Any:
        """Return what 0.32 wrote as an array: a number, a text, or ``None``."""
        if kind == "none" and tensor.shape == (0,):
            return None
        if tensor.dtype in ("I32", "I64", "U32"):
            if kind == "scalar" and tensor.shape == ():
                return int(np.asarray(self.read(tensor)).item())
            if kind == "string" and len(tensor.shape) == 1 and tensor.shape[0] < 64:
                codes = np.asarray(self.read(tensor))
                if ((codes >= 0) & (codes < 128)).all():
                    return bytes(codes.tolist()).decode("ascii")
        raise ValueError(f"a scalar of kind {str(kind)[:40]!r} and {tensor.dtype}")


def _rows_shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape of rows of one sequence."""
    if not isinstance(tensor, Tensor) or len(tensor.shape) != 4:
        raise ValueError("an array has other dimensions than keys and values have")
    if tensor.shape[0] != 1 or 0 in tensor.shape[:3]:
        raise ValueError(f"an array of shape {tensor.shape} is no cache of one prompt")
    return tensor.shape


def _float_pair(saved: SavedCache) -> tuple[Tensor, Tensor]:
    """Return keys and values, which agree in all but their last dimension."""
    keys, values = saved.arrays
    if _rows_shape(keys)[:3] != _rows_shape(values)[:3] or keys.shape[3] == 0:
        raise ValueError(f"keys of shape {keys.shape}, values of {values.shape}")
    if keys.dtype not in _FLOATS or values.dtype not in _FLOATS:
        raise ValueError(f"keys of {keys.dtype}, values of {values.dtype}")
    return keys, values


def _build(saved: SavedCache, data: _Data, num_tokens: int) -> Any:
    """Return one cache of the installed mlx-lm's class."""
    if saved.name not in ("CacheList", "ArraysCache"):
        is_empty = saved.arrays is None
        if is_empty != (saved.numbers.get("offset") == 0):
            raise ValueError("a layer has rows and no tokens, or tokens and no rows")
    return _BUILDERS[saved.name](saved, data, num_tokens)


def _build_plain(saved: SavedCache, data: _Data, num_tokens: int) -> Any:
    from mlx_lm.models.cache import KVCache

    cache: Any = KVCache()
    if saved.arrays is not None:
        keys, values = _float_pair(saved)
        rows = _held(saved.numbers["offset"], keys.shape[2])
        cache.keys, cache.values = (data.read(t)[:, :, rows] for t in (keys, values))
        cache.offset = saved.numbers["offset"]
    return cache


def _build_quantized(saved: SavedCache, data: _Data, num_tokens: int) -> Any:
    from mlx_lm.models.cache import QuantizedKVCache

    offset, group_size, bits = (
        saved.numbers[name] for name in ("offset", "group_size", "bits")
    )
    if group_size not in (32, 64, 128) or bits not in (2, 3, 4, 5, 6, 8):
        raise ValueError(f"groups of {group_size} with {bits} bits")
    cache: Any = QuantizedKVCache(group_size, bits)
    if saved.arrays is not None:
        sides = [_lists(side, 3) for side in saved.arrays]
        shapes = {_check_codes(side, group_size, bits) for side in sides}
        if len(shapes) != 1:
            raise ValueError(f"keys and values of shapes {sorted(shapes)}")
        rows = _held(offset, shapes.pop()[1])
        cache.keys, cache.values = (
            [data.read(tensor)[:, :, rows] for tensor in side] for side in sides
        )
        cache.offset = offset
    return cache


def _check_codes(side: list[Any], group_size: int, bits: int) -> tuple[int, ...]:
    """Return heads and rows of codes, scales and biases that belong together."""
    codes, scales, biases = side
    shapes = [_rows_shape(tensor) for tensor in side]
    same = shapes[0][:3] == shapes[1][:3] and shapes[1] == shapes[2]
    # 32 bits of codes in a number, and as many codes as the groups have.
    if not same or shapes[0][3] * 32 != shapes[1][3] * group_size * bits:
        raise ValueError(f"codes, scales and biases of shapes {shapes}")
    if (
        codes.dtype != "U32"
        or scales.dtype not in _FLOATS
        or biases.dtype != scales.dtype
        or 0 in shapes[0]
    ):
        raise ValueError(f"codes of {codes.dtype}, scales of {scales.dtype}")
    return shapes[0][1:3]


def _build_rotating(saved: SavedCache, data: _Data, num_tokens: int) -> Any:
    from mlx_lm.models.cache import RotatingKVCache

    numbers = saved.numbers
    offset, keep = numbers["offset"], numbers["keep"]
    max_size, index = numbers["max_size"], numbers["_idx"]
    if not keep < max_size:
        raise ValueError(f"a window of {max_size} that keeps {keep}")
    cache: Any = RotatingKVCache(max_size, keep)
    if saved.arrays is None:
        return cache
    keys, values = _float_pair(saved)
    num_rows = keys.shape[2]
    # Rows lie in temporal order up to the end, or have wrapped at the index.
    is_whole = offset <= num_rows and index == offset
    is_wrapped = num_rows < offset and max(keep, 1) <= index <= num_rows
    if not is_whole and not (is_wrapped and num_rows >= max_size):
        raise ValueError(f"a window of {num_rows} rows, {offset} tokens, index {index}")
    if is_wrapped and index < num_rows and num_rows != max_size:
        raise ValueError(f"a window of {num_rows} rows that wrapped at {max_size}")
    cache.keys, cache.values = (data.read(t)[:, :, :offset] for t in (keys, values))
    cache.offset, cache._idx = offset, index
    return cache


def _build_chunked(saved: SavedCache, data: _Data, num_tokens: int) -> Any:
    from mlx_lm.models.cache import ChunkedKVCache

    start = saved.numbers["start_position"]
    cache: Any = ChunkedKVCache(saved.numbers["chunk_size"])
    if saved.arrays is None:
        return cache
    keys, values = _float_pair(saved)
    # The releases before 0.32 forget the offset; other layers tell it.
    offset = saved.numbers.get("offset", num_tokens)
    if start >= offset or offset - start < min(offset, saved.numbers["chunk_size"]):
        raise ValueError(f"rows of {offset} tokens from {start} on")
    rows = _held(offset - start, keys.shape[2])
    cache.keys, cache.values = (data.read(t)[:, :, rows] for t in (keys, values))
    cache.offset, cache.start_position = offset, start
    return cache


def _build_states(saved: SavedCache, data: _Data, num_tokens: int) -> Any:
    from mlx_lm.models.cache import ArraysCache

    cache: Any = ArraysCache(len(saved.arrays))
    for number, tensor in enumerate(saved.arrays):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != (1,):
            raise ValueError("a state is not that of one prompt")
        if 0 in tensor.shape:
            raise ValueError(f"a state of shape {tensor.shape}")
        cache[number] = data.read(tensor)
    return cache


def _build_list(saved: SavedCache, data: _Data, num_tokens: int) -> Any:
    from mlx_lm.models.cache import CacheList

    return CacheList(*(_build(cache, data, num_tokens) for cache in saved.caches))


def _held(num_rows: int, there: int) -> slice:
    """Return which rows are held; those behind are somebody's trimmed conversation."""
    if num_rows > there:
        raise ValueError(f"{there} rows for {num_rows} tokens")
    return slice(num_rows)


_BUILDERS: dict[str, Callable[[SavedCache, _Data, int], Any]] = {
    "KVCache": _build_plain,
    "QuantizedKVCache": _build_quantized,
    "RotatingKVCache": _build_rotating,
    "ChunkedKVCache": _build_chunked,
    "ArraysCache": _build_states,
    "CacheList": _build_list,
}

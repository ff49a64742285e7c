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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FormatError, IntegrityError, KVStoreError, UnsupportedCacheError
from ..format.block import EXACT_BITS
from ..format.documents import canonical_json, is_count, strict_json
from ..format.safetensors import MAX_HEADER_BYTES, parse_header
from ..storage import files
from . import live as caches
from .kinds import find_kind, kind_named, known_kinds, known_layout
from .kinds.base import CacheKind
from .kinds.saved import (
    BEFORE_0_32,
    FROM_0_28_1,
    IN_0_31,
    IN_0_32,
    TO_0_28_0,
    FileArrays,
    FileForm,
    Releases,
    SavedCache,
    Tensor,
    as_counts,
    as_list,
)
from .layout import layout_to_json
from .memory import memory_bytes
from .provenance import Provenance

# Where a file that we wrote says what its rows went through; mlx-lm ignores it.
_PROVENANCE = "kvstore_provenance"


def check_cache_path(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a path that :func:`write_prompt_cache` could not write to.

    Raises:
        KVStoreError: There is a file, or no folder, or the name has another ending.
    """
    if path.suffix != ".safetensors":
        # mlx-lm tells the format by it.
        raise KVStoreError(
            f"not a name for a safetensors file: `{path}`",
            hint="end it in `.safetensors`",
        )
    files.check_new(path, overwrite=overwrite)


def write_prompt_cache(
    path: Path, prompt_cache: Sequence[Any], model: str, *, overwrite: bool = False
) -> int:
    """Write the file that ``mlx_lm.generate --prompt-cache-file`` reads.

    It appears whole or not at all, and only its owner can read it. Of lossy rows it
    says that they are, so that they are not taken for exact when they come back.
    Re-anchored rows are in no such file: mlx-lm would take them for the model's own.

    Args:
        path: Where; the name ends in ``.safetensors``.
        prompt_cache: mlx-lm's list of per-layer caches.
        model: What mlx-lm is to load the model by.
        overwrite: Replace a file that is there.

    Returns:
        Its size in bytes.

    Raises:
        KVStoreError: There is a file, or the name has another ending, or rows were
            re-anchored.
        OSError: It cannot be written.
    """
    check_cache_path(path, overwrite=overwrite)
    if caches.read_provenance(prompt_cache).num_moved:
        raise KVStoreError(
            "rows that were computed behind other words go into no file of mlx-lm's,"
            " which could not say so",
            hint="compute the prompt itself, and save that",
        )
    from mlx_lm.models.cache import save_prompt_cache

    readable = _readable(prompt_cache)
    metadata = {"model": model, "tokenizer_config": "{}"}
    provenance = caches.read_provenance(readable)
    if provenance != Provenance():
        metadata[_PROVENANCE] = canonical_json(asdict(provenance)).decode()
    staged = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.safetensors")
    descriptor = files.create(staged)
    try:
        save_prompt_cache(str(staged), readable, metadata)
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


_MAX_NESTING = 8
# The one class that is no kind: it holds other caches.
_LIST = "CacheList"


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
    # What the file says that its rows went through.
    provenance: Provenance

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
                data = FileArrays(file, self.data_begin)
                prompt_cache = [_build(c, data, num_tokens) for c in self.caches]
            layout = caches.read_layout(prompt_cache, num_tokens)
            known_layout(layout_to_json(layout))  # what we could not read again
        except (ValueError, IntegrityError, UnsupportedCacheError) as error:
            raise _refusal(self.path, str(error)) from error
        caches.set_provenance(prompt_cache, self.provenance)
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
            layouts, saved, texts = _recognise(
                leaves, metadata, like, FileArrays(file, begin)
            )
        _check_layers(saved, like)
        provenance = _parse_provenance(texts.get(_PROVENANCE))
    except ValueError as error:
        raise _refusal(path, str(error)) from error
    return CacheFile(path, layouts, texts.get("model"), saved, begin, provenance)


def _parse_provenance(text: str | None) -> Provenance:
    if text is None:
        return Provenance()
    fields = strict_json(text, allow_floats=False)
    if not isinstance(fields, dict) or fields.keys() != asdict(Provenance()).keys():
        raise ValueError(f"its `{_PROVENANCE}` has other fields")
    provenance = Provenance(**fields)
    if not (
        is_count(provenance.coded_tokens)
        and is_count(provenance.bits, EXACT_BITS + 1)
        and is_count(provenance.num_moved)
    ):
        raise ValueError(f"its `{_PROVENANCE}` has values of other kinds")
    return provenance


def _refusal(path: Path, reason: str) -> FormatError:
    return FormatError(
        f"not a cache file of mlx-lm that fits the model: `{path}`: {reason}",
        hint="`kvstore save` computes the prompt anew",
    )


def _flatten(saved: Sequence[SavedCache]) -> list[SavedCache]:
    found: list[SavedCache] = []
    for cache in saved:
        found += _flatten(cache.caches) if cache.name == _LIST else [cache]
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
    if rest > memory_bytes():
        raise ValueError(f"{rest} bytes of arrays are more than this machine's memory")
    tensors, metadata = parse_header(file.read(length), rest)
    return tensors, metadata, 8 + length


def _recognise(
    leaves: dict[str, Any],
    metadata: Mapping[str, str],
    like: Sequence[Any],
    data: FileArrays,
) -> tuple[tuple[str, ...], tuple[SavedCache, ...], Mapping[str, str]]:
    """Return the possible layouts, the caches, and what its writer said of them."""
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
        return (IN_0_32,), tuple(saved), groups["0"]
    names, infos = _nest(groups["2"]), _nest(groups["0"])
    layouts, older = _all_of_older(_zip(names, _nest(leaves), infos), like)
    return layouts, older, groups["1"]


def _all_of_older(
    triples: Sequence[tuple[Any, ...]], like: Sequence[Any]
) -> tuple[tuple[str, ...], tuple[SavedCache, ...]]:
    """Return the possible layouts and the caches of a file from before 0.32."""
    _check_count(len(triples), like)
    votes: list[Releases] = [BEFORE_0_32]
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
    leaves: Mapping[str, Any], scalars: Sequence[Any], data: FileArrays
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
    if name == _LIST:
        pairs = [as_list(pair, 2) for pair in as_list(state)]
        inner = [_of_0_32(str(name), state) for state, name in pairs]
        return SavedCache(name, None, {}, tuple(inner))
    for kind, form in _forms():
        if IN_0_32 in form.releases and _name(kind, form) == name:
            return kind.parse_state(state)
    raise _unknown(name)


def _of_older(
    like: Any,
    votes: list[Releases],
    name: str,
    state: Any,
    info: Any,
) -> SavedCache:
    """Return one cache, and add the releases that may have written it."""
    texts = [] if info == "" else as_list(info)
    if name == _LIST:
        return _list_of_older(state, texts, like, votes)
    named = [pair for pair in _forms() if _name(*pair) == name]
    for kind, form in named:
        releases = form.releases - {IN_0_32}
        if releases and len(form.numbers) == len(texts):
            votes.append(releases)
            numbers = map(_to_int, texts)
            return kind.parse_older(
                state, as_counts(zip(form.numbers, numbers, strict=True))
            )
    if not named:
        raise _unknown(name)
    raise ValueError(f"a {name} with {len(texts)} numbers is of no release")


def _forms() -> Iterator[tuple[CacheKind, FileForm]]:
    return ((kind, form) for kind in known_kinds() for form in kind.forms)


def _name(kind: CacheKind, form: FileForm) -> str:
    return form.old_name or kind.name


def _list_of_older(
    state: Any, texts: list[Any], like: Any, votes: list[Releases]
) -> SavedCache:
    likes = getattr(like, "caches", ())
    if texts:  # it names the classes
        votes.append(frozenset((IN_0_31,)))
        names, infos = as_list(texts, 2)
        triples = _zip(names, as_list(state), infos)
    else:
        votes.append(frozenset((TO_0_28_0, FROM_0_28_1)))
        triples = _cut(as_list(state), likes)
    if len(triples) != len(likes):
        raise ValueError(f"a CacheList of {len(triples)} caches, not {len(likes)}")
    inner = [
        _of_older(cache, votes, *triple)
        for triple, cache in zip(triples, likes, strict=True)
    ]
    return SavedCache(_LIST, None, {}, tuple(inner))


def _cut(state: list[Any], likes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return the parts of a list that does not say where one cache's arrays end."""
    triples: list[tuple[Any, ...]] = []
    rest = state
    for cache in likes:
        kind = find_kind(cache)
        forms = () if kind is None else kind.forms
        # These releases wrote no numbers of the caches in a CacheList.
        is_whole = any(FROM_0_28_1 in f.releases and not f.numbers for f in forms)
        if kind is None or not is_whole:
            name = type(cache).__name__
            raise ValueError(f"it lacks the numbers of a {name} in a CacheList")
        size = kind.num_arrays(cache)
        triples.append((kind.name, rest[:size], ""))
        rest = rest[size:]
    if rest:
        raise ValueError("a CacheList has more arrays than the model's")
    return triples


def _unknown(name: str) -> ValueError:
    names = [*dict.fromkeys(_name(*pair) for pair in _forms()), _LIST]
    return ValueError(
        f"a layer of class {name[:40]!r}, which is none of {', '.join(names)}"
    )


def _to_int(text: Any) -> Any:
    is_number = isinstance(text, str) and text.isascii() and text.isdecimal()
    return int(text) if is_number else None


def _check_count(num_layers: int, like: Sequence[Any]) -> None:
    if num_layers != len(like):
        raise ValueError(f"{num_layers} layers, and the model has {len(like)}")


def _check_layers(saved: Sequence[SavedCache], like: Sequence[Any]) -> None:
    """Refuse layers that the model could not have made."""
    _check_count(len(saved), like)
    for number, (cache, wanted) in enumerate(zip(saved, like, strict=True)):
        name = type(wanted).__name__
        if cache.name == name == _LIST:
            _check_layers(cache.caches, wanted.caches)
            continue
        kind = None if cache.name == _LIST else kind_named(cache.name)
        if kind is None or name not in (kind.name, kind.stands_for):
            raise ValueError(f"layer {number} is a {cache.name}, the model's a {name}")
        mismatch = kind.mismatch(cache, wanted)
        if mismatch is not None:
            raise ValueError(f"layer {number} {mismatch}")


def _build(saved: SavedCache, data: FileArrays, num_tokens: int) -> Any:
    """Return one cache of the installed mlx-lm's class."""
    if saved.name != _LIST:
        return kind_named(saved.name).from_file(saved, data, num_tokens)
    from mlx_lm.models.cache import CacheList

    return CacheList(*(_build(cache, data, num_tokens) for cache in saved.caches))

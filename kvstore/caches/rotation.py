"""Whether a model's keys can be moved to other positions, and how: by measurement.

Rotary positions are relative, so the rows of tokens that have moved may be kept if
their keys are rotated by the distance. Whether that holds of a model, layer by layer,
is not read off its configuration. A short random prompt is computed at several
positions: its values must be the same at all of them, and its keys the rotated ones.
`caches/reanchor.py` moves keys by what is returned here, and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import UnsupportedCacheError
from .live import flatten_caches

Rotate = Callable[[mx.array, int], mx.array]
"""Moves keys of shape ``(1, H, T, D)`` by so many positions."""
_MOVABLE = ("KVCache", "ConcatenateKVCache", "RotatingKVCache")
_NUM_TOKENS = 16
# Small, not a multiple of anything, and as far as a prompt may be.
_POSITIONS = (3, 1009, 32_768)
# What models call the most tokens that they take.
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
# By how much, relative to their size, rounding may change rows on their way through
# all layers, and what one number is rounded to.
_NOISE = {mx.float32: 2e-3, mx.float16: 2e-2, mx.bfloat16: 8e-2}
_ROUNDING = {mx.float32: 2**-22, mx.float16: 2**-10, mx.bfloat16: 2**-7}
# What models and their modules raise of a cache or of rows that they do not expect.
_MODEL_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Angles are computed in float32.
_ANGLE = 2**-22


@dataclass(frozen=True, slots=True)
class LayerRotation:
    """How the keys of one cache are moved, and how well that was measured."""

    rotate: Rotate
    # Name of the model's module that does it; empty where keys have no position.
    module: str
    # Of rotated keys, relative to computed ones: root mean square, at worst.
    key_error: float
    # Of values, which must not depend on the position.
    value_error: float


def measure_rotation(
    model: Any, *, modules: Mapping[str, Any] | None = None
) -> list[LayerRotation]:
    """Return how the keys of each cache of a model are moved.

    Args:
        model: From ``mlx_lm.load``.
        modules: Modules that may rotate keys, by name; by default those of the model.

    Raises:
        UnsupportedCacheError: They cannot be moved; it says which layer, and why.
    """
    from mlx_lm.models.cache import make_prompt_cache

    prompt_cache = make_prompt_cache(model)
    _check_kinds(model, prompt_cache)
    found = modules if modules is not None else dict(_rotary_modules(model))
    near, *far = _positions(model)
    runs = {
        position: _run(model, len(prompt_cache), position) for position in (0, near)
    }
    numbers = range(len(prompt_cache))
    # First a small step: where positions are learned, one far off may lie behind the
    # end of their table, where MLX reads whatever is there.
    for number in numbers:
        _measure(number, runs, found)
    runs |= {position: _run(model, len(prompt_cache), position) for position in far}
    return [_measure(number, runs, found) for number in numbers]


def _check_kinds(model: Any, prompt_cache: Sequence[Any]) -> None:
    """Refuse by name what no measurement is needed for."""
    if _has_key(getattr(model, "args", None), "mrope_section"):
        raise _refused("it has M-RoPE: positions of three axes")
    for number, cache in enumerate(prompt_cache):
        name = type(cache).__name__
        if name not in _MOVABLE:
            inner = ", ".join(type(each).__name__ for each in flatten_caches([cache]))
            what = "recurrent states have no positions" if "Arrays" in inner else inner
            raise _refused(f"layer {number} is a {name}: {what}")


def _has_key(config: Any, key: str) -> bool:
    """Whether a model's arguments, or what is nested in them, have a field."""
    fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    return any(name == key or _has_key(value, key) for name, value in fields.items())


def _rotary_modules(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        if "rope" in kind or "rotary" in kind:
            yield name, module


def _positions(model: Any) -> list[int]:
    """Return where the prompt is computed, beside the beginning."""
    lengths = list(_lengths(getattr(model, "args", None)))
    last = min(lengths, default=4096) - 2 * _NUM_TOKENS
    return sorted({max(1, min(position, last)) for position in _POSITIONS})


def _lengths(config: Any) -> Iterator[int]:
    """Yield the most tokens that a model takes, by its arguments and nested ones."""
    fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    for name, value in fields.items():
        if name in _LENGTHS and isinstance(value, int):
            yield value
        yield from _lengths(value)


class _Probe:
    """A cache that begins at a position, with nothing before it."""

    def __init__(self, position: int) -> None:
        self.offset = position
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Hold the only rows that there will be."""
        self.keys, self.values = keys, values
        self.offset += keys.shape[2]
        return keys, values

    def make_mask(
        self, num_tokens: int, return_array: bool = False, window_size: Any = None
    ) -> Any:
        """Return that each token sees those before it, wherever they begin."""
        if not return_array:
            return "causal"
        return mx.tril(mx.ones((num_tokens, num_tokens), mx.bool_))


_Run = list[tuple[mx.array, mx.array]]
"""Keys and values of each layer."""


def _run(model: Any, num_layers: int, position: int) -> _Run:
    """Compute a random prompt that begins at a position, and nothing before it."""
    probes = [_Probe(position) for _ in range(num_layers)]
    tokens = mx.random.randint(3, 100, (1, _NUM_TOKENS), key=mx.random.key(7))
    try:
        logits = model(tokens, cache=probes)
        mx.eval(logits, [(probe.keys, probe.values) for probe in probes])
    except _MODEL_ERRORS as error:
        raise _refused(f"it cannot be measured: {error}") from error
    rows: _Run = []
    for number, probe in enumerate(probes):
        if probe.keys is None or probe.values is None:
            raise _refused(f"layer {number} keeps no rows of its own")
        rows.append((probe.keys, probe.values))
    return rows


def _measure(
    number: int, runs: Mapping[int, _Run], modules: Mapping[str, Any]
) -> LayerRotation:
    """Return how the keys of one layer move from the first position to each other."""
    keys, values = runs[0][number]
    others = {position: run[number] for position, run in runs.items() if position}
    if keys.dtype not in _NOISE:
        raise _refused(f"layer {number} has keys of {keys.dtype}")
    value_errors = {p: _error(v, values) for p, (_, v) in others.items()}
    worst = max(value_errors.values())
    if not worst <= _NOISE[keys.dtype]:
        raise _refused(
            f"layer {number} has values that change with the position, by"
            f" {worst:.1%}: it is added or learned, or scales what is rotated"
        )
    fits = []
    for name, rotate in _candidates(number, modules):
        errors = {p: _key_error(rotate, keys, k, p) for p, (k, _) in others.items()}
        limits = {p: _limit(keys.dtype, value_errors[p], p) for p in others}
        is_near = all(errors[p] <= limits[p] for p in others)
        found = LayerRotation(rotate, name, max(errors.values()), worst)
        fits.append((found, is_near))
    # Few bits may not tell two apart; the nearer one is the model's own.
    best, is_near = min(fits, key=lambda fit: fit[0].key_error)
    if not is_near:
        raise _refused(
            f"layer {number} has keys that no rotation of the model's own moves: they"
            f" differ by {best.key_error:.1%} at best"
        )
    return best


def _key_error(rotate: Rotate, first: mx.array, other: mx.array, by: int) -> float:
    """Return the error of keys that are moved from the first position, or back."""
    try:
        there, back = rotate(first, by), rotate(other, -by)
        return max(_error(there, other), _error(back, first))
    except _MODEL_ERRORS:
        return math.inf  # a module for something else


def _limit(dtype: mx.Dtype, value_error: float, position: int) -> float:
    """Return how much rotated keys may differ from computed ones.

    Keys went through the same rounding as values did, and angles are rounded too.
    """
    return 2 * value_error + 2 * _ROUNDING[dtype] + _ANGLE * position


def _candidates(
    number: int, modules: Mapping[str, Any]
) -> Iterator[tuple[str, Rotate]]:
    """Yield what may move the keys of a layer; the layer's own modules come first."""
    yield "", lambda keys, by: keys
    seen: set[str] = set()
    mine = f".{number}."
    for name in sorted(modules, key=lambda name: (mine not in f".{name}.", name)):
        module = modules[name]
        spelled = repr((type(module), sorted(map(repr, vars(module).items()))))
        if spelled not in seen:
            seen.add(spelled)
            yield name, _rotation_by(module)


def _rotation_by(module: Any) -> Rotate:
    """Return what moves keys by a module that rotates rows to their positions.

    A module may also scale, which the keys have been through already.
    """

    def rotate(keys: mx.array, by: int) -> mx.array:
        # Each row is a head of one token, so that all move equally far. On CUDA, MLX
        # moves several tokens, or sequences, to the wrong place where it goes back.
        rows = keys.astype(mx.float32).reshape(1, -1, 1, keys.shape[-1])
        moved = module(mx.array(rows), offset=by)
        scale = module(mx.ones((1, 1, 1, keys.shape[-1])), offset=0)
        found: mx.array = (moved / scale).reshape(keys.shape).astype(keys.dtype)
        return found

    return rotate


def _error(found: mx.array, expected: mx.array) -> float:
    """Return the difference over the size of what is expected, root mean square."""
    if found.shape != expected.shape:
        return math.inf
    wanted = expected.astype(mx.float32)
    size = mx.square(wanted).mean()
    difference = mx.square(found.astype(mx.float32) - wanted).mean()
    return float(mx.sqrt(difference / mx.maximum(size, 1e-30)))


def _refused(why: str) -> UnsupportedCacheError:
    return UnsupportedCacheError(
        f"the keys of this model cannot be moved to other positions: {why}",
        hint="only what begins the same is reused",
    )

"""A model's basis, and what codecs do to what it says: by feeding it texts.

A basis is fitted to the rows of many contexts, and to gradients: what the model says
behind each context is drawn from itself, and how its log-probability changes with each
row tells what an error in that row does. Codecs are then measured in a store of their
own, on contexts that the basis has not seen.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..blas import one_thread
from ..caches import live as caches
from ..caches.kinds.base import rows_of
from ..caches.layout import Group, group_layers
from ..caches.snapshot import read_layers
from ..caches.stored import Piece
from ..codecs.fitting import GroupFit, Sample, finish_basis
from ..errors import KVStoreError, UnsupportedCacheError
from ..fingerprint import Fingerprint
from ..format.block import Progress
from ..format.calibration import Calibration, Measured
from ..format.documents import MAX_AMOUNT
from ..ops.calibrate import coverable, keep_basis, start_fit
from ..storage.bases import (
    add_basis,
    read_basis,
    read_basis_bytes,
    read_calibration,
    write_calibration,
)
from ..storage.folder import StoreFolder, create_folder, open_folder
from ..store import Store
from .corpus import Stretches
from .held import HeldSamples, Outline
from .load import LoadedModel
from .probe import compare, log_probabilities
from .session import prefill, usual_step_size

PREFIX = 1024
FOLLOWING = 256
CONTEXT = PREFIX + FOLLOWING
"""Tokens of a context: those whose rows are coded, and those that follow."""
NUM_DRAWN = 3
"""How often what a context is followed by is drawn."""
NUM_LEARNED = 4
"""Contexts that are learned from for each that is measured with."""
_MEASURED = Fingerprint({"weights": "measured"}, "measured")
TURBO = tuple(f"turbo{bits}+zstd" for bits in (8, 6, 5, 4, 3, 2))


@one_thread()
def fit_model(
    model: Any,
    contexts: Stretches,
    label: str,
    progress: Progress,
    held: HeldSamples | None = None,
) -> bytes:
    """Return a basis that is fitted to a model.

    Args:
        model: From ``mlx_lm.load``.
        contexts: Each of ``CONTEXT`` tokens.
        label: What the model is called.
        progress: Called with (contexts read, contexts in all).
        held: Where their samples lie; by default for this run only.

    Raises:
        KVStoreError: The disk has no room for what is learned from.
        UnsupportedCacheError: None of its layers can be coded in a basis.
    """
    held = held or HeldSamples()
    groups = _groups(model, contexts[0][0])
    outlines = [_outline(group) for group in groups]
    fits: list[GroupFit] = []
    for number, tokens in enumerate(contexts):
        held.touch()
        progress(number, len(contexts))
        seeds = [*range(number * NUM_DRAWN, (number + 1) * NUM_DRAWN)]
        compute = partial(_samples, model, groups, tokens, seeds)
        if fits and all(fit.is_full for fit in fits):
            samples = compute()
        else:
            which = {"tokens": tokens, "prefix": PREFIX, "seeds": seeds}
            samples = held.get(which, outlines, compute)
        if not fits:
            pairs = zip(groups, samples, strict=True)
            fits = [start_fit(group, [sample]) for group, sample in pairs]
        for fit, sample in zip(fits, samples, strict=True):
            fit.add(sample)
    progress(len(contexts), len(contexts))
    return finish_basis(
        fits, {"made_from": "gradients", "contexts": len(contexts), "model": label}
    )


def calibrate_model(
    loaded: LoadedModel,
    store: Store,
    contexts: Stretches,
    *,
    measure_only: bool = False,
    bar: Callable[[str], Progress],
) -> Calibration:
    """Fit a basis to a model, measure its codecs, and keep both in a store.

    Args:
        loaded: The model; of a draft model nothing is measured.
        store: Where they are kept.
        contexts: Each of ``CONTEXT`` tokens; every fifth is measured with.
        measure_only: Measure with the basis that there is, or with none.
        bar: Returns the progress callback of what is named.

    Raises:
        KVStoreError: There are too few contexts.
        UnsupportedCacheError: None of the model's layers can be coded in a basis.
    """
    left_out = contexts[NUM_LEARNED :: NUM_LEARNED + 1] or contexts[-1:]
    learned = [tokens for tokens in contexts if tokens not in left_out]
    if not left_out or not (learned or measure_only):
        raise KVStoreError(
            f"the texts are too short: {CONTEXT:,} tokens are needed twice",
            hint="give more with `--text`",
        )
    model, label = loaded.model, loaded.fingerprint.label
    digest = loaded.fingerprint.bare.digest
    folder = open_folder(store.path)
    old = read_calibration(folder, digest)
    basis = old.basis if old else None
    held = _held_samples(folder, digest)
    if not measure_only:
        fitted = fit_model(model, learned, label, bar("fit"), held)
        # Whoever stops now goes on with `measure_only`.
        basis = keep_basis(folder, fitted, loaded.fingerprint.bare).basis
    bases = [read_basis_bytes(folder, basis)] if basis else []
    names = _names(basis, read_basis(folder, basis).steps) if basis else {}
    names |= {codec: [codec] for codec in TURBO}
    measuring = bar("measure")

    def tell(done: int, total: int) -> None:
        held.touch()
        measuring(done, total)

    figures = measure(model, left_out, [*names], bases, tell)
    measured = [replace(one, codec=n) for one in figures for n in names[one.codec]]
    found = Calibration(digest, label, basis, len(left_out), tuple(measured))
    for data in bases:
        add_basis(folder, data)  # measuring took long, and `prune` may have run
    write_calibration(folder, found)
    held.remove()
    return found


def _held_samples(folder: StoreFolder, model: str) -> HeldSamples:
    """Return where samples lie: in the store for a later run, unless it is encrypted.

    They are in the clear. What a model computes depends on the device too, and on how
    MLX and mlx-lm compute it, in the last places.
    """
    if folder.cipher is not None:
        return HeldSamples()
    about = {
        "model": model,
        "device": str(mx.default_device()),
        "step_size": usual_step_size(),
        "versions": [version(name) for name in ("mlx", "mlx-lm")],
    }
    return HeldSamples(folder.staging, about)


def _names(basis: str, steps: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the names of the codecs in a basis, all of one step under their first.

    They are one codec, which is measured once.
    """
    found: dict[int, list[str]] = {}
    for rate, step in steps.items():
        found.setdefault(step, []).append(f"fit{rate}@{basis}+zstd")
    return {names[0]: names for names in found.values()}


def measure(
    model: Any,
    contexts: Stretches,
    codecs: Sequence[str],
    bases: Sequence[bytes],
    progress: Progress,
) -> list[Measured]:
    """Return what codecs do to what a model says next.

    One is left out where the model says NaN behind what it stored.

    Args:
        model: From ``mlx_lm.load``.
        contexts: Each of ``CONTEXT`` tokens.
        codecs: Their names.
        bases: Those that the names name.
        progress: Called with (steps done, steps in all).
    """
    # Of each codec, by context: bits, KL divergence, and how often the choice is same.
    rows: dict[str, list[tuple[float, float, float]]] = {codec: [] for codec in codecs}
    total = len(contexts) * (1 + len(codecs))
    progress(0, total)
    for number, tokens in enumerate(contexts):
        prefix, following = tokens[:PREFIX], tokens[PREFIX:]
        with tempfile.TemporaryDirectory(prefix="kvstore-") as temporary:
            paths = {c: Path(temporary, c.replace("+", "-")) for c in codecs}
            prompt_cache = _read(model, prefix)
            count = _count_numbers(prompt_cache)
            sizes = [_save(paths[c], c, prefix, prompt_cache, bases) for c in codecs]
            exact = log_probabilities(model, prompt_cache, following)
            progress(number * (1 + len(codecs)) + 1, total)
            for done, (codec, nbytes) in enumerate(zip(codecs, sizes, strict=True), 2):
                found = log_probabilities(model, _load(paths[codec]), following)
                kl, same = compare(exact, found)
                rows[codec].append((nbytes * 8 / count, kl.mean(), same.mean()))
                progress(number * (1 + len(codecs)) + done, total)
    each = {codec: np.array(rows[codec]) for codec in codecs}
    return [_sum_up(c, *x.T) for c, x in each.items() if (x <= MAX_AMOUNT).all()]


def _save(
    path: Path,
    codec: str,
    tokens: Sequence[int],
    prompt_cache: Sequence[Any],
    bases: Sequence[bytes],
) -> int:
    """Save a prompt in a new store, and return the bytes of its blocks."""
    made = create_folder(path)
    for basis in bases:
        add_basis(made, basis)
    with Store(path, codec) as store:
        return store.save(tokens, prompt_cache, _MEASURED, name="it").nbytes


def _load(path: Path) -> list[Any]:
    with Store(path, create=False) as store:
        return store.load_entry("it", _MEASURED)[0]


def _sum_up(codec: str, bits: Any, kl: Any, same: Any) -> Measured:
    error = np.std(kl, ddof=1) / len(kl) ** 0.5 if len(kl) > 1 else 0.0
    means = float(bits.mean()), max(0.0, float(kl.mean()))
    return Measured(codec, *means, float(error), float(same.mean()))


def _read(model: Any, tokens: Sequence[int]) -> list[Any]:
    prompt_cache: list[Any] = make_prompt_cache(model)
    step = usual_step_size()
    return prefill(model, tokens, prompt_cache, prefill_step_size=step)


def _count_numbers(prompt_cache: Sequence[Any]) -> int:
    held = caches.hold(prompt_cache)
    return sum(array.size for arrays in held for array, _ in arrays.values())


def _groups(model: Any, token: int) -> list[Group]:
    """Return the layers that can be coded in a basis; the token may be any."""
    prompt_cache = _read(model, [token])
    groups = coverable(group_layers(caches.read_layout(prompt_cache, 1)))
    if not groups or any(caches.is_list(cache) for cache in prompt_cache):
        raise UnsupportedCacheError(
            "none of this model's layers can be coded in a basis",
            hint="`turbo4+zstd` is what its blocks are stored with",
        )
    return groups


def _outline(group: Group) -> Outline:
    layers, heads, tokens, dim = rows_of(group, "k", 0, PREFIX).shape
    return Outline(group.spec("k").dtype, (layers, 2 * heads, tokens, dim), NUM_DRAWN)


def _samples(
    model: Any, groups: Sequence[Group], tokens: Sequence[int], seeds: Sequence[int]
) -> list[Sample]:
    """Return what a context has of each group."""
    prompt_cache, following = _read(model, tokens[:PREFIX]), tokens[PREFIX:]
    layers = [layer for group in groups for layer in group.layers]
    held = caches.hold(prompt_cache)
    drawn = [
        dict(zip(layers, _gradients(model, prompt_cache, layers, following, seed),
                 strict=True))
        for seed in seeds
    ]  # fmt: skip
    found = []
    for group in groups:
        pair = [rows_of(group, side, 0, PREFIX) for side in ("k", "v")]
        halves = [np.stack(read_layers(held, Piece(0, group, r))) for r in pair]
        x = np.concatenate(halves, axis=1)
        gradients = [np.stack([d[layer] for layer in group.layers]) for d in drawn]
        found.append(Sample(0, pair[0].dtype, x, tuple(gradients)))
    return found


class _Joining(KVCache):
    """A cache that joins rows, so that gradients reach them."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.offset = keys, values, keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Put rows behind those that there are."""
        pairs = ((self.keys, keys), (self.values, values))
        self.keys, self.values = (_joined(*pair) for pair in pairs)
        self.offset += keys.shape[2]
        return self.keys, self.values


def _joined(*rows: Any) -> mx.array:
    return mx.concatenate(list(rows), axis=2)


def _gradients(
    model: Any,
    prompt_cache: list[Any],
    layers: Sequence[int],
    following: Sequence[int],
    seed: int,
) -> list[Any]:
    """Return, of each layer, how what is said depends on its rows, ``(2 H, T, D)``.

    That is the gradient of the log-probability of tokens that the model itself draws,
    each behind what was really said.
    """
    rows = [
        tuple(x[..., :PREFIX, :] for x in prompt_cache[layer].keys_and_values())
        for layer in layers
    ]

    def said(rows: list[tuple[mx.array, mx.array]]) -> mx.array:
        used: list[Any] = [
            None if layer in layers else copy.deepcopy(cache)
            for layer, cache in enumerate(prompt_cache)
        ]
        for layer, (keys, values) in zip(layers, rows, strict=True):
            used[layer] = _Joining(keys, values)
        logits = model(mx.array([list(following)]), cache=used)[0].astype(mx.float32)
        drawn = mx.random.categorical(mx.stop_gradient(logits), key=mx.random.key(seed))
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.take_along_axis(logprobs, drawn[:, None], axis=-1).sum()

    found = mx.grad(said)(rows)
    wide = [mx.concatenate(pair, axis=1)[0].astype(mx.float32) for pair in found]
    mx.eval(wide)
    return [np.array(x) for x in wide]

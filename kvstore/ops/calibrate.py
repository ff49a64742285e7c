"""Rows that a store holds without loss, fitted to a basis. Needs no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..blas import one_thread
from ..caches.layout import Group, group_layers, layout_from_json
from ..caches.stored import decode_piece, join_pieces, stored_pieces
from ..codecs.fitting import (
    GroupFit,
    Sample,
    find_rotation,
    finish_basis,
    make_group,
    usual_rotations,
)
from ..errors import KVStoreError
from ..fingerprint import Fingerprint
from ..format.block import Progress, StoredBlock
from ..format.calibration import Calibration
from ..format.chain import is_reanchored, origin_root
from ..format.entry import Entry
from ..storage.bases import add_basis, find_calibration, write_calibration
from ..storage.blocks import BlockStore
from ..storage.folder import StoreFolder
from ..storage.index import Place
from .bases import own_codecs

MAX_BLOCKS = 128
"""Blocks that are learned from; more tell little more."""
_MIN_TOKENS = 2048
_FLOATS = ("F32", "F16", "BF16")


def coverable(groups: Sequence[Group]) -> list[Group]:
    """Return the layers whose keys and values can be coded together."""
    found = []
    for group in groups:
        specs = dict(group.layout.rows)
        keys, values = specs.get("k"), specs.get("v")
        is_plain = keys is not None and keys.kind == "rows" and keys.dtype in _FLOATS
        if group.layout.cache_class == "KVCache" and is_plain and keys == values:
            found.append(group)
    return found


def can_be_calibrated(blocks: BlockStore, fingerprint: Fingerprint) -> bool:
    """Whether a basis would cover stored layers of a model, and none is measured."""
    model = fingerprint.bare.digest
    roots = blocks.index.roots(fingerprint.digest)
    return find_calibration(blocks.folder, model) is None and any(
        coverable(group_layers(layout_from_json(layout))) for _, layout in roots
    )


def start_fit(group: Group, samples: Sequence[Sample]) -> GroupFit:
    """Return what fits some layers, having found how their keys are rotated."""
    spec = group.spec("k")
    some = slice(0, None, max(1, len(group.layers) // 4))
    looked_at = [Sample(s.start, s.dtype, s.x[some]) for s in samples]
    rotation = find_rotation(looked_at, usual_rotations(spec.head_dim))
    basis_group = make_group(group.layers, spec.num_heads, spec.head_dim, rotation)
    return GroupFit(basis_group, rotation)


def calibrate_stored(
    blocks: BlockStore,
    entries: Sequence[Entry],
    fingerprint: str | None,
    progress: Progress,
) -> Calibration:
    """Fit a basis as :func:`fit_stored` does, and note it for the model."""
    data, model = fit_stored(blocks, entries, fingerprint, progress)
    return keep_basis(blocks.folder, data, model.bare)


def keep_basis(folder: StoreFolder, data: bytes, model: Fingerprint) -> Calibration:
    """Put a model's basis into a store; what was measured before stays."""
    old = find_calibration(folder, model.digest)
    found = Calibration(
        model.digest,
        model.label,
        add_basis(folder, data),
        old.num_contexts if old else 0,
        old.measured if old else (),
    )
    write_calibration(folder, found)
    return found


@one_thread()
def fit_stored(
    blocks: BlockStore,
    entries: Sequence[Entry],
    fingerprint: str | None,
    progress: Progress,
) -> tuple[bytes, Fingerprint]:
    """Return a basis that is fitted to what is stored without loss.

    Args:
        blocks: The store's blocks.
        entries: Whose blocks are looked through.
        fingerprint: Digest of the model's fingerprint; the only model's by default.
        progress: Called with (blocks read, blocks to read).

    Raises:
        KVStoreError: There are too few such rows, or several models' of them.
        IntegrityError: A block is missing or damaged.
    """
    chosen, model = _exact_blocks(blocks, entries, fingerprint)
    layout = blocks.origin_at(chosen[0][0]).layout
    groups = coverable(group_layers(layout_from_json(layout)))
    if not groups:
        raise _refused("none of its layers can be coded in a basis")
    waiting: list[list[Sample]] = [[] for _ in groups]
    fits: list[GroupFit] = []
    for done, (place, stored) in enumerate(chosen):
        progress(done, len(chosen))
        for samples, sample in zip(
            waiting, _samples(blocks, place, stored, groups), strict=True
        ):
            samples.append(sample)
        if done == min(4, len(chosen)) - 1:
            fits = [start_fit(*each) for each in zip(groups, waiting, strict=True)]
        for fit, samples in zip(fits, waiting, strict=False):
            for sample in samples:
                fit.add(sample)
            samples.clear()
    progress(len(chosen), len(chosen))
    num_tokens = sum(len(stored.block.tokens) for _, stored in chosen)
    about = {"made_from": "rows", "num_tokens": num_tokens, "model": model.label}
    return finish_basis(fits, about), model


def _exact_blocks(
    blocks: BlockStore, entries: Sequence[Entry], fingerprint: str | None
) -> tuple[list[tuple[Place, StoredBlock]], Fingerprint]:
    """Return blocks of one model that nothing lossy went into, and the model."""
    by_root: dict[str, dict[Place, StoredBlock]] = {}
    models: dict[str, Fingerprint] = {}
    for entry in entries:
        model = Fingerprint(blocks.origin(entry).fingerprint, entry.model)
        is_other = fingerprint not in (None, model.digest)
        if is_other or is_reanchored(model.fields):
            continue
        exact = {place: s for place, s in blocks.chain(entry) if place.is_exact}
        if exact:
            models[entry.root] = model
            by_root.setdefault(entry.root, {}).update(exact)
    if len({model.digest for model in models.values()}) > 1:
        names = ", ".join(sorted({f"`{model.label}`" for model in models.values()}))
        raise KVStoreError(
            f"several models have rows here: {names}", hint="choose with `--model`"
        )
    sizes = {
        root: sum(place.num_tokens for place in found)
        for root, found in by_root.items()
    }
    # One model may have several layouts.
    best = max(sizes, key=sizes.__getitem__, default=None)
    if best is None or sizes[best] < _MIN_TOKENS:
        raise _refused(f"fewer than {_MIN_TOKENS:,} tokens are stored without loss")
    chosen = list(by_root[best].items())
    return chosen[:: max(1, len(chosen) // MAX_BLOCKS)][:MAX_BLOCKS], models[best]


def _samples(
    blocks: BlockStore, place: Place, stored: StoredBlock, groups: Sequence[Group]
) -> Iterator[Sample]:
    """Yield what a block has of each group."""
    root = blocks.origin_at(place)
    own = own_codecs(blocks.folder)
    layers = group_layers(layout_from_json(root.layout))
    ((_, data),) = blocks.read(place.shard, [place], origin_root(root))
    pieces = [
        (codec, piece)
        for codec, piece in stored_pieces(stored, layers, own)
        if piece.group in groups and piece.rows.side in ("k", "v")
    ]
    halves = [decode_piece(codec, piece, stored, data) for codec, piece in pieces]
    arrays = iter(halves)
    for piece in join_pieces([piece for _, piece in pieces]):
        x = np.concatenate([next(arrays), next(arrays)], axis=1)
        yield Sample(piece.rows.start, piece.rows.dtype, x)


def _refused(why: str) -> KVStoreError:
    return KVStoreError(
        f"no basis can be made of what is stored: {why}",
        hint="save prompts with `--codec planes+zstd`, or calibrate with `--model`",
    )

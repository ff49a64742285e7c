"""A prompt cache to blocks in shards, each encoded once, and an entry over them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress

import numpy as np

from ..caches.kinds.turboquant import CODED, codec_of
from ..caches.layer_errors import errors_of, is_measured, known_errors
from ..caches.layout import Group, group_layers
from ..caches.snapshot import Snapshot
from ..caches.stored import CODABLE, Piece, count_extras, join_pieces
from ..codecs import Codec, lossless_twin
from ..codecs.base import Layers, Parts, nbytes
from ..codecs.parallel import NUM_THREADS, map_in_order
from ..errors import FormatError, IntegrityError
from ..format import shard as shards
from ..format.block import (
    EXACT_BITS,
    Block,
    BlockHash,
    EncodedBlock,
    LayerError,
    Part,
    Progress,
    StoredBlock,
)
from ..format.entry import Entry
from ..storage import files
from ..storage.bases import add_basis
from ..storage.blocks import BlockStore
from ..storage.entries import Catalog
from ..storage.index import Place, is_better
from ..storage.shards import StagedShard, open_shard, staged_copy, staged_shard
from .bases import read_named
from .commit import commit, make_room, replaceable

# Of rows that are being encoded.
_MAX_BYTES = 256 * 1024 * 1024
# Of two shards under way. The last block of a shard may go past the shard's limit.
_MAX_STAGED = 3 * shards.MAX_BYTES
# How often blocks that `prune` takes away meanwhile are written again.
_TRIES = 3

MakeRoom = Callable[[int], None]
"""Called with the bytes of a shard that is about to be added."""


def save_entry(
    blocks: BlockStore,
    catalog: Catalog,
    codec: Codec,
    snapshot: Snapshot,
    *,
    name: str | None,
    replace: bool | Entry,
    title: str = "",
    progress: Progress,
    spared: Callable[[], frozenset[BlockHash]] = frozenset,
) -> Entry:
    """Write what the store lacks of a prompt cache, and its entry.

    Args:
        blocks: The store's blocks.
        catalog: Its entries.
        codec: For full blocks; a tail is stored lossless.
        snapshot: What is to be saved.
        name: The entry's name.
        replace: Take the name from any entry, or from this one.
        title: The first words of what is saved, for people.
        progress: Called with (tokens saved, tokens in all).
        spared: Asked, where room has to be made, for blocks that other saves build on.

    Raises:
        EntryExistsError: The name belongs to something else.
    """

    def committed() -> Entry | None:
        # Another process may have taken the name meanwhile.
        old = replaceable(catalog, name, snapshot.chain, replace)
        return commit(
            blocks,
            catalog,
            snapshot.chain,
            old,
            name=name,
            codec=codec.name,
            model=snapshot.model,
            title=title,
        )

    # Asked before the work, so that a wrong name costs none of it, and again under the
    # lock, where it counts.
    replaceable(catalog, name, snapshot.chain, replace)
    for _ in range(_TRIES):
        save_blocks(blocks, codec, snapshot, progress, spared)
        with files.locked(blocks.folder.lock, exclusive=True):
            entry = committed()
        if entry is not None:
            return entry
    # While this holds the lock nothing is freed, by itself neither: the store is over
    # its limit until the next save.
    with files.locked(blocks.folder.lock, exclusive=True):
        _write_missing(
            blocks, _Encoder(blocks, codec, snapshot), lambda _: None, progress
        )
        entry = committed()
    if entry is not None:
        return entry
    raise IntegrityError(
        "blocks vanish from the store while they are saved",
        hint="is something else removing files from it?",
    )


def save_blocks(
    blocks: BlockStore,
    codec: Codec,
    snapshot: Snapshot,
    progress: Progress,
    spared: Callable[[], frozenset[BlockHash]] = frozenset,
) -> None:
    """Write what the store lacks of a prompt cache."""
    _write_missing(
        blocks,
        _Encoder(blocks, codec, snapshot),
        lambda nbytes: make_room(
            blocks, nbytes, lambda: snapshot.chain.hashes | spared()
        ),
        progress,
    )


def copy_blocks(
    base: BlockStore,
    blocks: BlockStore,
    codec: Codec,
    snapshot: Snapshot,
    spared: Callable[[], frozenset[BlockHash]] = frozenset,
) -> None:
    """Copy what another store has of a prompt cache, and this one lacks.

    Bytes are copied as they are, unless the rows at hand are better. So an entry needs
    no store but its own, and nothing is coded anew.

    Args:
        base: The blocks of the other store.
        blocks: The store's own.
        codec: As :func:`save_entry` takes it.
        snapshot: What is to be saved.
        spared: The same.
    """
    # Of these the rows at hand are better: they are encoded, and the base's stay there.
    encoder = _Encoder(base, codec, snapshot)
    better = {block.hash for block in _missing(base, encoder)}
    wanted: dict[str, list[StoredBlock]] = {}
    for block in snapshot.chain.blocks:
        place = base.index.place(block.hash)
        if place and block.hash not in better and not blocks.index.place(block.hash):
            # What is damaged is computed or missed, as if it were not there.
            with suppress(IntegrityError, FormatError):
                wanted.setdefault(place.shard, []).append(base.stored(place))
    token_bytes = sum(g.token_bytes for g in group_layers(snapshot.chain.layout))
    for name, stored in wanted.items():
        with (
            suppress(IntegrityError, FormatError, FileNotFoundError),
            open_shard(base.folder, name) as opened,
            staged_copy(blocks.folder, opened, stored) as staged,
        ):
            for basis in read_named(base.folder, stored).values():
                add_basis(blocks.folder, basis)
            make_room(
                blocks,
                staged.header.nbytes,
                lambda: snapshot.chain.hashes | spared(),
            )
            with blocks.index.transaction():
                blocks.add_new([staged], token_bytes)


def take_rows(
    blocks: BlockStore, codec: Codec, snapshot: Snapshot, wanted: Iterable[Block]
) -> Snapshot:
    """Return a live snapshot with some blocks taken, for another thread to save."""
    return snapshot.take(wanted, _Encoder(blocks, codec, snapshot).codec_of)


def missing_blocks(
    blocks: BlockStore,
    codec: Codec,
    snapshot: Snapshot,
    without: Container[BlockHash] = (),
) -> list[Block]:
    """Return the blocks that the store lacks, or has no copy of as good as these.

    It is not asked for those in ``without``, which count as there. Whether parents lead
    to the others is left to the save, which has more time.
    """
    chain = [block for block in snapshot.blocks if block.hash not in without]
    places = blocks.index.places_unchecked([block.hash for block in chain])
    return _worse(blocks, _Encoder(blocks, codec, snapshot), chain, places)


def _missing(blocks: BlockStore, encoder: _Encoder) -> list[Block]:
    chain = encoder.snapshot.blocks
    return _worse(blocks, encoder, chain, blocks.index.places_of(chain))


def _worse(
    blocks: BlockStore,
    encoder: _Encoder,
    chain: Sequence[Block],
    places: Sequence[Place | None],
) -> list[Block]:
    """Return the blocks that are not stored, or not as good as they would be now."""
    least_bits = encoder.least_bits

    def is_worse(block: Block, place: Place) -> bool:
        if place.bits >= least_bits and encoder.is_coded(block):
            return False  # which saves the look at each of many blocks
        own = encoder.num_extras(block), encoder.bits(block)
        return is_better(own, (place.num_extras, place.bits))

    return [
        block
        for block, place in zip(chain, blocks.held(places), strict=True)
        if place is None or is_worse(block, place)
    ]


def _write_missing(
    blocks: BlockStore, encoder: _Encoder, make_room: MakeRoom, progress: Progress
) -> None:
    """Encode and write every block that the store lacks.

    No lock is held while a codec works. While a shard is synced another is written, and
    the blocks of the next are encoded.
    """
    chain = encoder.snapshot.chain
    progress(0, chain.num_tokens)
    opened: list[ExitStack] = []

    def stage(batch: list[EncodedBlock]) -> tuple[ExitStack, StagedShard]:
        stack = ExitStack()
        opened.append(stack)
        staged = staged_shard(blocks.folder, chain.origin, batch)
        return stack, stack.enter_context(staged)

    try:
        found = batches(encoder.encode(_missing(blocks, encoder)))
        staged = map_in_order(
            stage, found, 2, nbytes=shards.nbytes_of, max_bytes=_MAX_STAGED
        )
        with closing(staged):
            for stack, shard in staged:
                with stack:
                    make_room(shard.header.nbytes)
                    with blocks.index.transaction():
                        blocks.add_new([shard], encoder.token_bytes)
                last = shard.header.blocks[-1].block
                progress(last.start + len(last.tokens), chain.num_tokens)
    finally:
        # Shards that were staged ahead of one that failed go too.
        for stack in opened:
            stack.close()
    blocks.add_root(chain.root, chain.origin)
    progress(chain.num_tokens, chain.num_tokens)


def batches(blocks: Iterable[EncodedBlock]) -> Iterator[list[EncodedBlock]]:
    """Group blocks to shards."""
    batch: list[EncodedBlock] = []
    for encoded in blocks:
        batch.append(encoded)
        if shards.is_full(batch):
            yield batch
            batch = []
    if batch:
        yield batch


class _Encoder:
    """Encodes the blocks of one prompt cache.

    Args:
        blocks: The store that they are for.
        codec: For full blocks; a tail is stored lossless.
        snapshot: The rows.

    Attributes:
        snapshot: The same.
        token_bytes: What one token's rows take in memory.
    """

    def __init__(self, blocks: BlockStore, codec: Codec, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._rows = snapshot.rows
        self._has_only_rows = snapshot.chain.has_only_rows
        self._block_size = blocks.folder.block_size
        groups = group_layers(snapshot.chain.layout)
        self.token_bytes = sum(group.token_bytes for group in groups)
        self._codec = codec_of_rows(codec, groups)
        self._twin = lossless_twin(self._codec)
        # Tokens whose rows are not coded once more.
        self._num_coded = snapshot.rows.provenance.coded_tokens

    def num_extras(self, block: Block) -> int:
        """Return how many rows of windows and states a block brings."""
        if self._has_only_rows:
            return 0
        return count_extras(self._rows.pieces(block))

    def bits(self, block: Block) -> int:
        """Return the fewest bits per number that rows of a block went through."""
        return min(self._rows.provenance.bits, self.codec_of(block).bits)

    @property
    def least_bits(self) -> int:
        """How many bits a stored block must have for none here to be better.

        More than there are, where blocks differ in more than their bits.
        """
        if self._rows.codecs or not self._has_only_rows:
            return EXACT_BITS + 1
        return min(self._rows.provenance.bits, self._codec.bits)

    def codec_of(self, block: Block) -> Codec:
        """Return the codec for one block; no row is ever encoded lossily twice."""
        if (settled := self._rows.codecs.get(block.hash)) is not None:
            return settled  # when its rows were taken
        return self._codec if self.is_coded(block) else self._twin

    def is_coded(self, block: Block) -> bool:
        """Whether the codec given is that of a block; else it is the lossless one."""
        # A tail is cut or written again at the next turn, for which its rows must be
        # exact.
        is_full = len(block.tokens) >= self._block_size
        return is_full and block.start >= self._num_coded

    def encode(self, blocks: Sequence[Block]) -> Iterator[EncodedBlock]:
        """Encode blocks in order, some at a time where there are cores for it."""
        # Read, and let go of, here: MLX's arrays belong to this thread.
        read = (
            (block, list(self._rows.read(block, self.codec_of(block))))
            for block in blocks
        )
        yield from map_in_order(
            lambda item: self._encode_one(*item),
            read,
            NUM_THREADS,
            nbytes=lambda item: sum(nbytes(x) for _, x in item[1]),
            max_bytes=_MAX_BYTES,
        )

    def _encode_one(
        self, block: Block, pieces: Iterable[tuple[Piece, Layers | Parts]]
    ) -> EncodedBlock:
        codec, bits = self.codec_of(block), self.bits(block)
        return encode_block(block, codec, pieces, bits, self.num_extras(block))


def codec_of_rows(codec: Codec, groups: Sequence[Group]) -> Codec:
    """Return a codec, or its lossless twin where layers have no rows to code."""
    names = {name for group in groups for name, _ in group.layout.rows}
    return lossless_twin(codec) if names.isdisjoint(CODABLE) else codec


def encode_block(
    block: Block,
    codec: Codec,
    pieces: Iterable[tuple[Piece, Layers | Parts]],
    bits: int,
    num_extras: int,
) -> EncodedBlock:
    """Return a block that is encoded.

    Args:
        block: The block.
        codec: For keys and values; all else is stored lossless.
        pieces: Its rows, or what a live cache has in their place.
        bits: The fewest per number that they went through, this codec included.
        num_extras: As in :class:`Place`.
    """
    twin = lossless_twin(codec)
    parts: list[Part] = []
    errors: list[LayerError] = []
    for piece, layers in _join(pieces) if codec.is_joint else pieces:
        name = piece.rows.side
        array_codec = codec if name in CODABLE else twin
        if name in CODED and isinstance(layers, Mapping):
            array_codec = Codec(codec_of(piece.group.layout), twin.compressor)
        made = array_codec.encode(layers, piece.rows, f"{piece.number}.{name}.")
        if is_measured(block, codec):
            errors += errors_of(array_codec, piece, layers, made)
        parts += made
    # Windows have moved on and states were elsewhere; only tokens are left.
    parts = parts or [Part("nothing", "U8", (1,), bytes(1))]
    return EncodedBlock(
        block,
        codec.name,
        codec.is_lossless,
        bits,
        tuple(parts),
        num_extras,
        known_errors(errors),
    )


def _join(
    pieces: Iterable[tuple[Piece, Layers | Parts]],
) -> Iterator[tuple[Piece, Layers | Parts]]:
    """Yield keys and values of equal shape as one piece; all else as it is."""
    found = list(pieces)
    arrays = iter([layers for _, layers in found])
    for piece in join_pieces([piece for piece, _ in found]):
        layers = next(arrays)
        if piece.rows.side == "kv":
            values = next(arrays)
            assert isinstance(layers, list)
            assert isinstance(values, list)
            pairs = zip(layers, values, strict=True)
            layers = [np.concatenate(pair) for pair in pairs]
        yield piece, layers

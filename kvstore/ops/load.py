"""Tokens to the longest stored prefix, and its blocks to a prompt cache."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import Literal

import numpy as np

from ..caches import live as caches
from ..caches.fit import Wanted, why_unfit
from ..caches.kinds import holds_codes, known_layout
from ..caches.layout import Layout, group_layers, has_only_rows
from ..caches.provenance import Provenance
from ..caches.restore import Restoring, check_layout, start_restoring
from ..caches.stored import Piece, is_restorable, open_piece, stored_pieces
from ..codecs import Codec
from ..codecs.parallel import map_in_order
from ..errors import CodecError, FormatError, IntegrityError, KVStoreError
from ..format.block import (
    EXACT_BITS,
    Block,
    BlockHash,
    Progress,
    StoredBlock,
)
from ..format.chain import (
    common_run,
    hash_block_tokens,
    hash_root,
    is_reanchored,
    split_tokens,
)
from ..format.entry import Entry
from ..format.spans import Span, last_end
from ..storage.blocks import BlockStore
from ..storage.index import MAX_CHILDREN, Place
from ..storage.shards import OpenShard, reopen_shard, shard_path
from .bases import own_codecs

Reason = Literal[
    "whole",
    "end",
    "divergence",
    "inexact",
    "unit",
    "checkpoint",
    "fingerprint",
    "damaged",
]
"""Why a match ends where it does.

``whole``: all but the last token, which the model must be fed; ``end``: what is
stored ends there; ``divergence``: other tokens follow; ``inexact``: the next block
is of fewer bits than were asked for, or lossy and a part of it is wanted; ``unit``:
more is stored, and ends inside an image or another part that must be fed whole;
``fingerprint``: nothing of this model is stored; ``checkpoint``: more is stored, and
windows or states can be rebuilt no further; ``damaged``: the next block is stored and
cannot be used.
"""


@dataclass(frozen=True, slots=True)
class Match:
    """What the store holds of a prompt."""

    # How many tokens ``load`` would restore.
    num_tokens: int
    # How many the prompt has.
    num_prompt_tokens: int
    # Why it ends there.
    reason: Reason
    # The same as a sentence with its values.
    detail: str


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller wants restored."""

    tokens: Sequence[int]
    # Digest of the model's fingerprint.
    fingerprint: str
    # Take no rows of fewer bits per number: ``EXACT_BITS`` takes exact ones only.
    min_bits: int = 0
    # What each layer's cache must be, or ``None`` for anything.
    wanted: tuple[Wanted, ...] | None = None
    # Parts of the prompt inside which a hit must not end.
    spans: Sequence[Span] = ()
    # Take the codes of a live ``TurboQuantKVCache`` for a ``KVCache``.
    from_codes: bool = False
    # The blocks of these tokens under one root, where they are known.
    blocks: Sequence[Block] = ()


@dataclass(frozen=True, slots=True)
class Hit:
    """Blocks that together hold a prefix."""

    # What they descend from.
    root: BlockHash
    # How the prompt cache is built.
    layout: Layout
    # Where they lie, in order.
    places: tuple[Place, ...]
    # Tokens restored; it may end inside the last block.
    num_tokens: int
    # Why the hit ends there.
    reason: Reason
    # The same as a sentence.
    detail: str
    # What was asked for, or ``None`` for what the layout says.
    wanted: tuple[Wanted, ...] | None = None
    # What most of its tokens were decoded from, once it is restored.
    codec: str | None = None


Child = tuple[int, Place, StoredBlock]
"""How many tokens of a prompt a block shares, and the block."""


def to_match(hit: Hit | str, num_prompt_tokens: int) -> Match:
    """Return what was found, or why nothing was."""
    if isinstance(hit, str):
        return Match(0, num_prompt_tokens, "fingerprint", hit)
    return Match(hit.num_tokens, num_prompt_tokens, hit.reason, hit.detail)


def find_prefix(blocks: BlockStore, request: Request) -> Hit | str:
    """Return the longest stored prefix, or why there is none of this model."""
    return _end_outside_units(partial(_longest, blocks), request)


def _longest(blocks: BlockStore, request: Request) -> Hit | str:
    """Return the longest stored prefix, wherever it ends."""
    found = list(_all(blocks, request))
    hits = [hit for hit in found if isinstance(hit, Hit)]
    if not hits:
        unfit = [why for why in found if isinstance(why, str)]
        return unfit[0] if unfit else _NOTHING
    return max(hits, key=lambda hit: (hit.num_tokens, _is_as_stored(hit)))


def find_prefixes(blocks: BlockStore, request: Request) -> list[Hit]:
    """Return the longest prefix of each layout, wherever it ends."""
    return [hit for hit in _all(blocks, request) if isinstance(hit, Hit)]


def _all(blocks: BlockStore, request: Request) -> Iterator[Hit | str | None]:
    # One root for each way that a prompt cache of this model was built.
    for root, layout in blocks.index.roots(request.fingerprint):
        yield _follow(blocks, request, root, layout)


def entry_hit(
    blocks: BlockStore, entry: Entry, min_bits: int = 0
) -> tuple[Hit, list[int]]:
    """Return all blocks of an entry as a hit, and its tokens.

    Raises:
        IntegrityError: One is missing or damaged.
        KVStoreError: One has fewer bits per number than are wanted.
    """
    chain = blocks.chain(entry)
    for _, stored in chain:
        if stored.bits < min_bits:
            why = _inexact(stored.block.start, stored.bits, min_bits)
            raise KVStoreError(
                f"worse rows than wanted: {why}",
                hint="`kvstore save --exact` computes exact ones",
            )
    origin = blocks.origin(entry)
    if min_bits == EXACT_BITS and is_reanchored(origin.fingerprint):
        raise KVStoreError(
            "worse rows than wanted: they were computed behind other words",
            hint="`kvstore save --exact` computes exact ones",
        )
    layout = known_layout(origin.layout)
    root = BlockHash(bytes.fromhex(entry.root))
    places = tuple(place for place, _ in chain)
    tokens = [token for _, stored in chain for token in stored.block.tokens]
    held = [stored for _, stored in chain]
    if not is_restorable(layout, held, entry.num_tokens):
        raise IntegrityError(
            f"block {entry.tip[:12]} cannot be rebuilt: a state or rows of a window"
            " are missing",
            block=entry.tip,
            hint="save the prompt again",
        )
    return Hit(root, layout, places, entry.num_tokens, "whole", ""), tokens


def restore(
    blocks: BlockStore, hit: Hit, progress: Progress, *, strict: bool = False
) -> tuple[caches.PromptCache, Hit]:
    """Return the prompt cache of a hit, and the hit as far as it was good.

    Args:
        blocks: The store's blocks.
        hit: What to restore.
        progress: Called with (tokens restored, tokens in all).
        strict: Raise on damage, instead of ending before it.

    Raises:
        IntegrityError: Damage, where ``strict``.
        KVStoreError: There is no room for the rows.
    """
    with _room_for(hit.num_tokens):
        return _restore(blocks, hit, progress, strict=strict)


def _restore(
    blocks: BlockStore, hit: Hit, progress: Progress, *, strict: bool
) -> tuple[caches.PromptCache, Hit]:
    try:
        check_layout(hit.layout, hit.num_tokens)  # before anything is allocated
    except IntegrityError as error:
        if strict:
            raise
        return [], replace(hit, num_tokens=0, reason="damaged", detail=str(error))
    restoring = start_restoring(hit.layout, hit.num_tokens)
    done, provenance = 0, Provenance()
    codecs: Counter[str] = Counter()
    decoded = map_in_order(
        _Decoding(hit.num_tokens, restoring),
        _located(blocks, hit, restoring),
        restoring.num_threads,
        nbytes=lambda item: item.nbytes,
        max_bytes=restoring.spare_bytes,
    )
    # Until a header says otherwise: rows that nobody vouches for are not called
    # exact.
    is_moved = True
    failed: Exception | None = None
    try:
        origin = blocks.origin_at(hit.places[0])
        is_moved = is_reanchored(origin.fingerprint)
        with closing(decoded):
            for item, failed in decoded:
                if failed is not None:
                    # Here, on the thread that owns the index, so that what is
                    # damaged leaves it.
                    with blocks.healing(item.shard):
                        raise failed
                stored = item.stored
                codecs[stored.codec] += len(stored.block.tokens)
                done = min(done + len(stored.block.tokens), hit.num_tokens)
                provenance = _add(provenance, stored, done)
                progress(done, hit.num_tokens)
    except (IntegrityError, FormatError, OSError) as error:
        failed = None  # which has this frame, and so the rows
        if strict:
            raise
        # Windows and states were to be rebuilt where the hit ended.
        done = done if has_only_rows(hit.layout) else 0
        hit = replace(hit, num_tokens=done, reason="damaged", detail=str(error))
        if not done:
            return [], hit
    # Which of them were, nobody has written down.
    provenance = replace(provenance, num_moved=done if is_moved else 0)
    restored = restoring.finish(done, provenance)
    hit = replace(hit, codec=max(codecs, key=codecs.__getitem__))
    return caches.convert(restored, _classes(hit)), hit


def _located(blocks: BlockStore, hit: Hit, restoring: Restoring) -> Iterator[_Located]:
    """Yield the blocks of a hit, in order, with where their rows go."""
    own, groups = own_codecs(blocks.folder), group_layers(hit.layout)
    end = 0
    for shard, places in groupby(hit.places, key=lambda place: place.shard):
        header, located = blocks.locate(shard, list(places), hit.root)
        # Once for all of its blocks, by the thread that reads the first.
        opened = cache(partial(reopen_shard, blocks.folder.shards, shard, header))
        for stored in located:
            # A header may lie about where a block stands: the hash is of its parent
            # and tokens.
            if stored.block.start != end:
                name = stored.block.hash.hex()
                raise IntegrityError(f"block {name[:12]} is out of place", block=name)
            end += len(stored.block.tokens)
            with _about(stored):
                pieces = tuple(stored_pieces(stored, groups, own))
            buffers = restoring.buffers(pieces, stored, min(end, hit.num_tokens))
            is_received = restoring.can_receive(pieces)
            yield _Located(shard, opened, stored, pieces, buffers, is_received)


def _follow(
    blocks: BlockStore, request: Request, root: BlockHash, layout_json: object
) -> Hit | str | None:
    """Return the longest prefix under one root, or why its layout does not fit."""
    if hash_root(request.fingerprint, layout_json) != root:
        return None  # a damaged row of the index: it names no root of ours
    try:
        layout = known_layout(layout_json)
    except IntegrityError:
        return None  # of a class that only another release knows
    if why := why_unusable(layout, request):
        return f"what is stored of this model does not fit it: {why}"
    size = blocks.folder.block_size
    split: Iterable[Block] = request.blocks
    if not request.blocks or request.blocks[0].parent != root:
        split = split_tokens(root, request.tokens, size)
    chain = [block for block in split if len(block.tokens) == size]
    held = _held(blocks, request, chain)
    start = Hit(root, layout, held, len(held) * size, "end", "", request.wanted)
    if start.num_tokens == len(request.tokens):
        return _fit(blocks, request, _leave_one(start, size))
    parent = chain[len(held) - 1].hash if held else root
    return _fit(blocks, request, _extend(blocks, request, start, parent))


def _fit(blocks: BlockStore, request: Request, hit: Hit) -> Hit:
    """Return a hit shortened to where every layer can be rebuilt."""
    if has_only_rows(hit.layout) or not hit.places:
        return hit
    try:
        stored = [blocks.stored(place) for place in hit.places]
    except (IntegrityError, FormatError) as error:
        return replace(hit, num_tokens=0, reason="damaged", detail=str(error))
    found = next(
        replace(hit, places=places, num_tokens=stop)
        for stop, places, held in _ends(blocks, request, hit, stored)
        if not held or is_restorable(hit.layout, held, stop)
    )
    if found.num_tokens == hit.num_tokens:
        return found
    detail = f"rows are held to token {hit.num_tokens:,}: {hit.detail}; "
    detail += f"the last checkpoint before is at {found.num_tokens:,}"
    return replace(found, reason="checkpoint", detail=detail)


def _ends(
    blocks: BlockStore, request: Request, hit: Hit, held: Sequence[StoredBlock]
) -> Iterator[tuple[int, tuple[Place, ...], list[StoredBlock]]]:
    """Yield where a hit may end and with which blocks, the whole of it first.

    Also try shorter sibling blocks: an older save may have left a checkpoint there.
    """
    yield hit.num_tokens, hit.places, list(held)
    for number, stored in reversed(list(enumerate(held))):
        start, places = stored.block.start, hit.places[:number]
        rest = request.tokens[start:-1]
        beside = children(blocks, stored.block.parent, rest)
        for run, place, child in sorted(beside, key=_run_of, reverse=True):
            if _can_cut(place, request):
                yield start + run, (*places, place), [*held[:number], child]
        yield start, places, list(held[:number])


def _held(
    blocks: BlockStore, request: Request, chain: Sequence[Block]
) -> tuple[Place, ...]:
    """Return the leading blocks of a chain that are held and may be used."""
    places = blocks.index.longest_prefix([block.hash for block in chain])
    return tuple(takewhile(lambda place: _is_usable(place, request), places))


def _extend(blocks: BlockStore, request: Request, hit: Hit, parent: BlockHash) -> Hit:
    """Go on into the block behind a hit that shares most tokens with the prompt."""
    # One token is left over for the model to be fed.
    rest = request.tokens[hit.num_tokens : -1]
    if not rest:
        return replace(hit, reason="whole", detail=_WHOLE)
    found = children(blocks, parent, rest)
    cut = [child for child in found if _can_cut(child[1], request)]
    if cut:
        run, place, _ = max(cut, key=_run_of)
        places = (*hit.places, place)
        hit = replace(hit, places=places, num_tokens=hit.num_tokens + run)
    return _explain(blocks, request, hit, parent, found)


def children(blocks: BlockStore, parent: BlockHash, rest: Sequence[int]) -> list[Child]:
    """Return the blocks behind ``parent`` that share tokens with ``rest``."""
    places = blocks.index.children(parent, rest[0]) if rest else []
    # The list was cut, and the longest may be missing. A tail that the prompt has
    # whole is found by its hash all the same.
    if len(places) == MAX_CHILDREN:
        places += _whole_tails(blocks, parent, rest)
    return [
        (common_run(stored.block.tokens, rest), place, stored)
        for place in places
        if (stored := _stored(blocks, place)) is not None
    ]


def _whole_tails(
    blocks: BlockStore, parent: BlockHash, rest: Sequence[int]
) -> list[Place]:
    """Return the tails that are wholly a prefix of ``rest``: few are looked up."""
    lengths = range(1, min(len(rest), blocks.folder.block_size - 1) + 1)
    hashes = (hash_block_tokens(parent, rest[:length]) for length in lengths)
    return [place for h in hashes if (place := blocks.index.place(h)) is not None]


def _stored(blocks: BlockStore, place: Place) -> StoredBlock | None:
    """Return a block's row in its shard; ``None`` where that is damaged."""
    try:
        return blocks.stored(place)
    except (IntegrityError, FormatError):
        return None  # the reader has dropped it, or a later release wrote it


def _explain(
    blocks: BlockStore,
    request: Request,
    hit: Hit,
    parent: BlockHash,
    children: Sequence[Child],
) -> Hit:
    """Return the hit with the reason why it ends where it does."""
    at = hit.num_tokens
    if at == len(request.tokens) - 1:
        return replace(hit, reason="whole", detail=_WHOLE)
    if not children:
        if at == 0 and not blocks.index.has_children(parent):
            return replace(hit, detail=_NOTHING)
        if not blocks.index.has_children(parent):
            return replace(hit, detail=f"what is stored ends at token {at:,}")
        detail = f"what is stored goes on otherwise at token {at:,}"
        return replace(hit, reason="divergence", detail=detail)
    run, place, stored = max(children, key=_run_of)
    further = stored.block.start + run
    rest = stored.block.tokens[run:]
    # Of a prompt that is stored to its last token, nothing differs.
    is_other = bool(rest) and further < len(request.tokens) - 1
    where = f"token {further:,} differs"
    if is_other:
        where += f": stored {rest[0]}, given {request.tokens[further]}"
    if further > at:
        if _is_usable(place, request):
            why = f"the block behind token {at:,} is lossy and cannot be cut"
        else:
            why = _inexact(at, place.bits, request.min_bits)
        detail = f"{where}; {why}" if is_other else why
        return replace(hit, reason="inexact", detail=detail)
    if not rest:
        return replace(hit, detail=f"what is stored ends at token {at:,}")
    return replace(hit, reason="divergence", detail=where)


def _end_outside_units(
    find: Callable[[Request], Hit | str], request: Request
) -> Hit | str:
    """Return the longest hit from which the caller can go on."""
    hit = find(request)
    if isinstance(hit, str):
        return hit
    end = last_end(request.tokens, hit.num_tokens, request.spans)
    if end == hit.num_tokens:
        return hit
    # Of a prompt one token is always left over, so that this hit ends there or before.
    shorter = replace(request, tokens=request.tokens[: end + 1], blocks=())
    found = _end_outside_units(find, shorter)
    if isinstance(found, str):
        return found
    detail = (
        f"tokens are held to {hit.num_tokens:,}, which lies inside a part that must be"
        f" fed whole; it starts at {end:,}"
    )
    return replace(found, reason="unit", detail=detail)


@dataclass(frozen=True, slots=True)
class _Located:
    """A block that is to be read, and where its rows go."""

    shard: str
    # Returns the shard, open.
    opened: Callable[[], OpenShard]
    stored: StoredBlock
    pieces: tuple[tuple[Codec, Piece], ...]
    # What its bytes are read into where they are the rows; else none.
    buffers: Sequence[memoryview]
    # Its bytes are sent on as they are, and decoded elsewhere.
    is_received: bool

    @property
    def nbytes(self) -> int:
        """What it takes in memory besides the rows, while it is decoded."""
        if self.buffers or self.is_received:
            return 0
        raw = (spec.raw_nbytes or 0 for spec in self.stored.tensors.values())
        return self.stored.end - self.stored.begin + max(raw)


@contextmanager
def _room_for(num_tokens: int) -> Iterator[None]:
    """Say of rows that memory has no room for, MLX's or a driver's, what they are."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, RuntimeError) and not any(
            word in text for word in ("memory", "allocate")
        ):
            raise
        raise KVStoreError(
            f"there is no room for the rows of {num_tokens:,} tokens: {error}",
            hint="end other programs that use this memory, or load fewer tokens",
        ) from error


class _Decoding:
    """Reads, checks and decodes blocks; each thread has a buffer of its own.

    Args:
        num_tokens: How many tokens' rows there will be.
        out: The prompt cache that is rebuilt.
    """

    def __init__(self, num_tokens: int, out: Restoring) -> None:
        self._num_tokens = num_tokens
        self._out = out
        self._own = threading.local()

    def __call__(self, item: _Located) -> tuple[_Located, Exception | None]:
        """Decode one block; an error of reading is returned.

        The thread that owns the index tells it.
        """
        stored = item.stored
        stop = min(stored.block.start + len(stored.block.tokens), self._num_tokens)
        data = memoryview(b"")
        try:
            read = partial(item.opened().read_into, stored)
            sent = partial(read, at_once=True)
            if self._out.receive(item.pieces, stored, stop, sent):
                return item, None
            data = data if item.buffers else self._buffer(stored)
            read(item.buffers or [data])
        except (IntegrityError, OSError) as error:
            # Their frames would keep all rows until garbage is collected.
            error.__cause__ = error.__context__ = None
            return item, error.with_traceback(None)
        if not item.buffers:
            self._decode(item, data)
        return item, None

    def _buffer(self, stored: StoredBlock) -> memoryview:
        """Return a buffer for a block, which the next one of this thread gets too."""
        # A new one for each block would cost a page fault for every 4 kB.
        size = stored.end - stored.begin
        if size > len(getattr(self._own, "buffer", b"")):
            self._own.buffer = np.empty(size, np.uint8).data
        buffer: memoryview = self._own.buffer[:size]
        return buffer

    def _decode(self, item: _Located, data: memoryview) -> None:
        block = item.stored.block
        whole = block.start + len(block.tokens)
        with _about(item.stored):
            for codec, piece in item.pieces:
                # It is of the block's last position, and the hit ends at another.
                if piece.kind in ("state", "mark") and whole != self._num_tokens:
                    continue
                parts = open_piece(codec, piece, item.stored, data)
                stop = min(whole, self._num_tokens)
                self._out.write(codec, parts, piece.group, piece.rows, stop)


@contextmanager
def _about(stored: StoredBlock) -> Iterator[None]:
    """Say of errors which block they are of."""
    try:
        yield
    except (IntegrityError, CodecError) as error:
        name = stored.block.hash.hex()
        raise IntegrityError(
            f"block {name[:12]} cannot be decoded: {error}", block=name
        ) from error


_NOTHING = "nothing of this model is stored"
_WHOLE = "all but the last token, which the model must be fed"


def _inexact(at: int, bits: int, min_bits: int) -> str:
    """Return why a block of fewer bits than are wanted is not taken."""
    about = f"the block behind token {at:,} is"
    if min_bits == EXACT_BITS:
        return f"{about} not exact"
    return f"{about} of {bits} bits, and at least {min_bits} are wanted"


def _leave_one(hit: Hit, block_size: int) -> Hit:
    """Return a hit on the whole prompt, less the token that must be fed."""
    if hit.places[-1].is_lossless:
        num_tokens = hit.num_tokens - 1
        return replace(hit, num_tokens=num_tokens, reason="whole", detail=_WHOLE)
    return replace(
        hit,
        places=hit.places[:-1],
        num_tokens=hit.num_tokens - block_size,
        reason="inexact",
        detail="the last block is lossy and cannot be cut, and the model must be fed"
        " a token",
    )


def _is_as_stored(hit: Hit) -> bool:
    return not hit.wanted or why_unfit(hit.layout, hit.wanted) is None


def _classes(hit: Hit) -> list[str] | None:
    return [layer.signature[0] for layer in hit.wanted] if hit.wanted else None


def why_unusable(layout: Layout, request: Request) -> str | None:
    """Return why the caches that are wanted cannot be had from a layout, if so."""
    if request.wanted is not None:
        return why_unfit(layout, request.wanted, decoding=request.from_codes)
    if request.from_codes or not holds_codes(layout):
        return None
    # What a run kept in codes is for runs that ask for codes.
    return "layers: stored as codes of a live cache, given none"


def _is_usable(place: Place, request: Request) -> bool:
    return place.bits >= request.min_bits


def _can_cut(place: Place, request: Request) -> bool:
    return place.is_lossless and _is_usable(place, request)


def _run_of(child: Child) -> int:
    return child[0]


def _add(provenance: Provenance, stored: StoredBlock, done: int) -> Provenance:
    """Return a provenance with one more block in it."""
    return Provenance(
        provenance.coded_tokens if stored.is_lossless else done,
        min(provenance.bits, stored.bits),
    )


def read_ahead(blocks: BlockStore, entry: Entry) -> threading.Thread:
    """Start a thread that reads what the index says an entry lies in, first to last."""
    tip = BlockHash(bytes.fromhex(entry.tip))
    shards = dict.fromkeys(place.shard for place, _ in blocks.index.chain(tip))
    paths = [shard_path(blocks.folder.shards, name) for name in reversed(shards)]
    # No process waits at its end for what nobody asks for any more.
    thread = threading.Thread(target=_read, args=(paths,), daemon=True)
    thread.start()
    return thread


def _read(paths: Sequence[Path]) -> None:
    buffer = bytearray(8 << 20)
    for path in paths:
        with suppress(OSError), path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

"""Plain values that the parts of the store hand to each other. No behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NewType

BlockHash = NewType("BlockHash", bytes)
"""SHA-256 of a parent hash and the tokens of one block, 32 bytes."""

Progress = Callable[[int, int], None]
"""Called with (done, total), like mlx-lm's ``prompt_progress_callback``."""

JSON = dict[str, Any]
"""A JSON object."""


@dataclass(frozen=True, slots=True)
class RowSpec:
    """One array of one layer: the row that a token adds to it.

    Attributes:
        num_heads: ``H``, the number of KV heads.
        head_dim: ``D``, the length of one head's row.
        dtype: safetensors name of the element type, such as ``BF16``.
        begin: Position of the first token that has a row.
        end: Position behind the last one that has, or ``None``.
        kind: What it holds; `layers.py` says what each means.
    """

    num_heads: int
    head_dim: int
    dtype: str
    begin: int = 0
    end: int | None = None
    kind: Literal["rows", "window", "state", "mark"] = "rows"


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """How one layer of a prompt cache is built.

    Attributes:
        cache_class: Name of the cache class.
        params: What it was made with, such as bits and group size, by name.
        rows: Its arrays by name; ``k`` and ``v`` are keys and values as they are, and
            only these may be coded.
    """

    cache_class: str
    params: tuple[tuple[str, int], ...]
    rows: tuple[tuple[str, RowSpec], ...]


@dataclass(frozen=True, slots=True)
class ListLayout:
    """A layer that is a ``CacheList``.

    Attributes:
        caches: The layouts of its caches.
    """

    caches: tuple[LayerLayout | ListLayout, ...]


Layout = tuple[LayerLayout | ListLayout, ...]
"""One layout per layer of a prompt cache, in order."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive tokens of a sequence and their place in its chain.

    Attributes:
        hash: Names the block.
        parent: Hash of the block before, or the root hash for the first.
        start: Position of the first token in the sequence.
        tokens: The token ids; fewer than ``block_size`` only in a tail.
    """

    hash: BlockHash
    parent: BlockHash
    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the index says a block lies, and what may be asked of it.

    Attributes:
        hash: The block's hash.
        shard: Name of the shard that holds it.
        num_tokens: How many tokens it has.
        nbytes: Its bytes in the shard.
        is_lossless: Its codec loses nothing.
        is_exact: Lossless, and nothing lossy went into computing it.
        num_extras: How much it holds of windows and states: the rows of all its
            windows, outweighed by a checkpoint. More makes a copy the better one.
    """

    hash: BlockHash
    shard: str
    num_tokens: int
    nbytes: int
    is_lossless: bool
    is_exact: bool
    num_extras: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """What a block hangs from, and what it takes.

    Attributes:
        parent: Hash of the block before, or the root hash.
        num_tokens: How many tokens it has.
        nbytes: Its bytes in the shard, with its share of the header.
    """

    parent: BlockHash
    num_tokens: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A saved prompt cache: a name, or none, that points at its last block.

    Attributes:
        id: 32 hex digits, derived from the name, or from the tip without one.
        name: The name, or ``None``.
        tip: Hash of the last block in hex.
        root: Hash that the first block has as parent, in hex.
        num_tokens: Tokens held.
        nbytes: Bytes of its blocks in the store, shared ones included.
        codec: The codec asked for when it was saved.
        model: What the model was called; advisory.
        made_with: Versions of kvstore, mlx and mlx-lm; advisory.
        created_at: When the name was first saved, Unix seconds.
        updated_at: When it was last saved, Unix seconds.
        pinned: It is never evicted.
    """

    id: str
    name: str | None
    tip: str
    root: str
    num_tokens: int
    nbytes: int
    codec: str
    model: str
    made_with: dict[str, str]
    created_at: float
    updated_at: float
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One named array of an encoded block, on its way into a shard.

    Attributes:
        name: ``<group>.<side>.<part>``, such as ``0.k.codes``.
        dtype: safetensors name of the element type.
        shape: Its shape.
        data: Its bytes, little-endian, row-major.
        raw_nbytes: Bytes before compression, or ``None`` where there was none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview
    raw_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A block and its parts.

    Attributes:
        block: The block.
        codec: Name of the codec that made the parts.
        is_lossless: That codec loses nothing.
        is_exact: Lossless, and nothing lossy went into computing the rows.
        parts: In the order in which they are written.
        num_extras: As in :class:`Place`.
    """

    block: Block
    codec: str
    is_lossless: bool
    is_exact: bool
    parts: tuple[Part, ...]
    num_extras: int = 0


@dataclass(frozen=True, slots=True)
class Origin:
    """What computed the rows of a shard; the same for all of its blocks.

    Attributes:
        fingerprint: The fingerprint's fields.
        layout: JSON value that describes the layers.
        tenant: Keeps apart what must not be shared.
    """

    fingerprint: JSON
    layout: Any
    tenant: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as a shard's header describes it.

    Attributes:
        dtype: safetensors name of the element type.
        shape: Its shape.
        begin: First byte, counted from the start of the data.
        end: One past the last byte.
        raw_nbytes: Bytes before compression, or ``None`` where there was none.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    raw_nbytes: int | None


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block as a shard's header describes it.

    Attributes:
        block: The block.
        codec: Name of the codec of its parts.
        is_lossless: That codec loses nothing.
        is_exact: Lossless, and nothing lossy went into computing the rows.
        num_extras: As in :class:`Place`.
        digest: BLAKE3 of its bytes in hex.
        begin: First byte of its range, counted from the start of the data.
        end: One past the last byte.
        tensors: Its parts by name, in the order of their bytes.
    """

    block: Block
    codec: str
    is_lossless: bool
    is_exact: bool
    num_extras: int
    digest: str
    begin: int
    end: int
    tensors: dict[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        origin: What computed its rows.
        blocks: Its blocks, in the order of their bytes.
        data_begin: Where the data starts in the file.
        nbytes: Size of the whole file.
    """

    origin: Origin
    blocks: tuple[StoredBlock, ...]
    data_begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a restored prompt cache remembers of its rows.

    Attributes:
        coded_tokens: So many leading tokens' rows went through a lossy codec.
        is_exact: Nothing lossy went into any row.
    """

    coded_tokens: int = 0
    is_exact: bool = True


Reason = Literal[
    "whole", "end", "divergence", "inexact", "checkpoint", "fingerprint", "damaged"
]
"""Why a match ends where it does.

``whole``: all but the last token, which the model must be fed; ``end``: what is
stored ends there; ``divergence``: other tokens follow; ``inexact``: the next block
is lossy and exact rows, or a part of it, were asked for; ``fingerprint``: nothing
of this model is stored; ``checkpoint``: more is stored, and windows or states can be
rebuilt no further; ``damaged``: the next block is stored and cannot be used.
"""


@dataclass(frozen=True, slots=True)
class Match:
    """What the store holds of a prompt.

    Attributes:
        num_tokens: How many tokens ``load`` would restore.
        num_prompt_tokens: How many the prompt has.
        reason: Why it ends there.
        detail: The same as a sentence with its values.
    """

    num_tokens: int
    num_prompt_tokens: int
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a prompt leaves what is stored.

    Attributes:
        position: Of the first token that differs.
        start: Position of the first token of ``stored`` and ``given``.
        stored: Stored tokens around it.
        given: The prompt's tokens around it.
        entry: Name or id of an entry that goes on with the stored ones, if one does.
    """

    position: int
    start: int
    stored: tuple[int, ...]
    given: tuple[int, ...]
    entry: str | None


@dataclass(frozen=True, slots=True)
class OtherModel:
    """What another model, or another kind of cache, has stored of a prompt.

    Attributes:
        num_tokens: How many tokens from the start on it has of the prompt.
        difference: The first field that differs, with both values.
        model: What that model was called, or empty.
        entry: Name or id of an entry that holds these tokens, if one does.
    """

    num_tokens: int
    difference: str
    model: str
    entry: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the store holds of a prompt what it holds.

    Attributes:
        match: What ``load`` would restore.
        num_common: So many leading tokens are stored for this model and this kind of
            cache, restorable up to there or not.
        divergence: Where the prompt leaves them, unless they just end.
        entry: Name or id of an entry that has these tokens, if one does.
        other: What has more of the prompt, and cannot be used.
        damage: Which block is damaged or missing, one sentence, or ``None``.
    """

    match: Match
    num_common: int
    divergence: Divergence | None
    entry: str | None
    other: OtherModel | None
    damage: str | None


@dataclass(frozen=True, slots=True)
class Timing:
    """What was observed of computing or restoring rows of a model.

    All are sums over observations, in which older ones weigh less.

    Attributes:
        fingerprint: Digest of the model's fingerprint.
        codec: What was restored from, or ``None`` where rows were computed.
        model: What the model was called last; advisory.
        num: Number of observations.
        tokens: Tokens.
        seconds: Seconds.
        squares: Squares of tokens.
        products: Products of tokens and seconds.
        measured_at: When the last one was made, Unix seconds.
    """

    fingerprint: str
    codec: str | None
    model: str
    num: float
    tokens: float
    seconds: float
    squares: float
    products: float
    measured_at: float


Verdict = Literal["pays", "never", "unknown"]
"""Whether restoring rows is faster than computing them, from some number on."""


@dataclass(frozen=True, slots=True)
class ModelSpeeds:
    """How fast one model's rows are computed, and restored from one codec.

    Attributes:
        fingerprint: Digest of the model's fingerprint.
        model: What the model was called.
        codec: What rows are restored from, or ``None`` where none were so far.
        prefill_tps: Tokens computed in a second, or ``None``.
        load_tps: Tokens restored in a second, or ``None``.
        verdict: Whether restoring pays.
        break_even_tokens: From how many tokens on, where it does.
        measured_at: When the older of both was measured last, Unix seconds.
        is_current: That is less than a day ago; else it decides nothing.
    """

    fingerprint: str
    model: str
    codec: str | None
    prefill_tps: float | None
    load_tps: float | None
    verdict: Verdict
    break_even_tokens: int | None
    measured_at: float
    is_current: bool


FindingKind = Literal[
    "damaged-entry",
    "damaged-shard",
    "damaged-block",
    "missing-shard",
    "missing-block",
    "unindexed-shard",
    "damaged-index",
    "newer-format",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that ``verify`` found wrong.

    Attributes:
        kind: What sort of thing.
        path: The file, relative to the store.
        detail: What is wrong, one sentence.
        entries: Names or ids of entries that cannot be loaded because of it.
    """

    kind: FindingKind
    path: str
    detail: str
    entries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over a store.

    Attributes:
        num_entries: Entries.
        num_blocks: Blocks the index knows.
        num_shards: Shards the index knows.
        num_tokens: Tokens over all entries, shared ones counted each time.
        nbytes: Bytes of all shards.
        entry_bytes: Bytes of all entries' blocks, shared ones counted each time.
        reached_bytes: The same, each block counted once; the rest can be pruned.
        kept_bytes: Those of them that entries with a name, or pinned, have; these are
            never evicted unasked.
        max_bytes: The size limit.
        num_quarantined: Files that could not be read, in quarantine.
        quarantine_bytes: Bytes of these.
        dedup_ratio: ``entry_bytes`` over ``reached_bytes``.
        compression_ratio: What the blocks that entries reach would take as they are in
            memory, over what they take.
        seconds_saved: By how much hits were faster than computing the same rows;
            ``None`` where the speed of that was never measured.
        counters: Sums over the life of the index: ``hits``, ``misses``,
            ``restored_tokens`` (not recomputed), ``missed_tokens``,
            ``written_bytes``, ``read_bytes``, ``raw_bytes`` (what was written,
            before any codec).
        speeds: How fast each model's rows are computed and restored.
    """

    num_entries: int
    num_blocks: int
    num_shards: int
    num_tokens: int
    nbytes: int
    entry_bytes: int
    reached_bytes: int
    kept_bytes: int
    max_bytes: int
    num_quarantined: int
    quarantine_bytes: int
    dedup_ratio: float
    compression_ratio: float
    seconds_saved: float | None
    counters: dict[str, int]
    speeds: tuple[ModelSpeeds, ...]

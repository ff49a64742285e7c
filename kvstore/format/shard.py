"""Shards: immutable safetensors files of encoded blocks. Knows folders, not SQL.

A shard is named by the SHA-256 of its header, which carries a digest of itself, and of
the bytes of each block, so both are checked on every read without reading the rest of
the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from struct import pack
from typing import Any

from ..errors import FormatError
from .block import (
    EXACT_BITS,
    Block,
    BlockHash,
    EncodedBlock,
    LayerError,
    Origin,
    Part,
    ShardHeader,
    StoredBlock,
    TensorSpec,
    describe_parts,
)
from .documents import (
    JSON,
    are_integers,
    blake3_hex,
    canonical_json,
    is_amount,
    is_count,
    strict_json,
)
from .safetensors import MAX_HEADER_BYTES, parse_header

FORMAT = 1
MAX_BLOCKS = 64
MAX_BYTES = 64 * 1024 * 1024
MAX_PARTS = 4096
_MAX_ERRORS = 8192
_NO_DIGEST = "0" * 64
_HEX = re.compile(r"[0-9a-f]{64}")


def as_written(stored: StoredBlock, data: memoryview) -> EncodedBlock:
    """Return a stored block as it was when it was encoded."""
    parts = tuple(
        Part(
            name,
            spec.dtype,
            spec.shape,
            data[spec.begin - stored.begin : spec.end - stored.begin],
            spec.raw_nbytes,
        )
        for name, spec in stored.tensors.items()
    )
    return EncodedBlock(
        stored.block,
        stored.codec,
        stored.is_lossless,
        stored.bits,
        parts,
        stored.num_extras,
        stored.errors,
    )


def nbytes_of(blocks: Sequence[EncodedBlock]) -> int:
    """Return the bytes of all parts of some blocks."""
    return sum(part.nbytes for block in blocks for part in block.parts)


def is_full(blocks: Sequence[EncodedBlock]) -> bool:
    """Whether a shard of these blocks takes no further one like the last."""
    return _is_full([(nbytes_of([block]), len(block.parts)) for block in blocks])


def group_blocks(blocks: Iterable[StoredBlock]) -> Iterator[list[StoredBlock]]:
    """Group stored blocks to shards, as a save of all of them would."""
    group: list[StoredBlock] = []
    for stored in blocks:
        group.append(stored)
        if _is_full([(b.end - b.begin, len(b.tensors)) for b in group]):
            yield group
            group = []
    if group:
        yield group


def _is_full(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether blocks of so many bytes and tensors fill a shard."""
    nbytes = sum(size for size, _ in sizes)
    # One more like the last must still fit into a header.
    parts = sum(count for _, count in sizes) + sizes[-1][1]
    return len(sizes) >= MAX_BLOCKS or nbytes >= MAX_BYTES or parts > MAX_PARTS


def shard_header(origin: Origin, blocks: Sequence[StoredBlock]) -> bytes:
    """Return what stands before the data in a shard of just these blocks.

    That is the header with its length, padded so that the data starts at 8 bytes. The
    blocks may come from several shards.

    Raises:
        ValueError: It would be too large, or a field spells a blank header digest.
    """
    tensors: JSON = {}
    position = 0
    for number, stored in enumerate(blocks):
        for name, spec in stored.tensors.items():
            end = position + spec.end - spec.begin
            tensors[f"{number}.{name}"] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            position = end
    meta = {
        "format": FORMAT,
        "header_digest": _NO_DIGEST,
        "fingerprint": origin.fingerprint,
        "layout": origin.layout,
        "blocks": [_row(stored) for stored in blocks],
    }
    about = {"__metadata__": {"kvstore": canonical_json(meta).decode()}}
    text = json.dumps({**about, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"shard header of {len(text)} bytes is too large")
    # A reader finds the digest by its text, so no field may spell another one.
    if text.count(_digest_field(_NO_DIGEST)) != 1:
        raise ValueError(
            "a field of the fingerprint or layout is a blank header digest"
        )
    return pack("<Q", len(text)) + _seal(text)


def describe_block(encoded: EncodedBlock) -> StoredBlock:
    """Return a block as the header of a shard of its own would describe it."""
    tensors = describe_parts(encoded.parts)
    return StoredBlock(
        encoded.block,
        encoded.codec,
        encoded.is_lossless,
        encoded.bits,
        encoded.num_extras,
        encoded.digest,
        0,
        nbytes_of([encoded]),
        tensors,
        encoded.errors,
    )


def _row(stored: StoredBlock) -> JSON:
    return {
        "hash": stored.block.hash.hex(),
        "parent": stored.block.parent.hex(),
        "start": stored.block.start,
        "tokens": list(stored.block.tokens),
        "codec": stored.codec,
        "lossless": stored.is_lossless,
        "exact": stored.is_exact,
        **({"bits": stored.bits} if 0 < stored.bits < EXACT_BITS else {}),
        "extras": stored.num_extras,
        "digest": stored.digest,
        "raw": {
            name: spec.raw_nbytes
            for name, spec in stored.tensors.items()
            if spec.raw_nbytes is not None
        },
        **({"errors": stored.errors} if stored.errors else {}),
    }


def _digest_field(digest: str) -> bytes:
    """Return the header digest as it stands in the header's escaped JSON."""
    return f'\\"header_digest\\":\\"{digest}\\"'.encode()


def _seal(text: bytes) -> bytes:
    """Put the digest of the header with 64 zeros in its place."""
    digest = blake3_hex(text)
    return text.replace(_digest_field(_NO_DIGEST), _digest_field(digest), 1)


def parse_shard_header(header: bytes, size: int | None) -> ShardHeader:
    """Return what a header says, having checked all of it.

    Args:
        header: Its bytes, without the length in front of it.
        size: Of the whole file; ``None`` where it has not come yet.

    Raises:
        ValueError: Anything is not as it should be.
        FormatError: A newer release wrote it.
    """
    data_begin = 8 + len(header)
    expected = None if size is None else size - data_begin
    tensors, metadata = parse_header(header, expected)
    meta = strict_json(metadata["kvstore"], allow_floats=True)
    digest = _field(meta, "header_digest", str)
    blank = header.replace(_digest_field(digest), _digest_field(_NO_DIGEST))
    if digest != blake3_hex(blank):
        raise ValueError("header does not match its digest")
    form = _field(meta, "format", int)
    if form != FORMAT:
        raise FormatError(
            f"shard has format {form}, this release reads {FORMAT}",
            hint="upgrade mlx-kvstore",
        )
    origin = Origin(
        _field(meta, "fingerprint", dict),
        _field(meta, "layout", list),
    )
    blocks = _parse_blocks(_field(meta, "blocks", list), tensors)
    nbytes = data_begin + max((block.end for block in blocks), default=0)
    return ShardHeader(origin, blocks, data_begin, nbytes)


def _field(value: Any, name: str, kind: type) -> Any:
    if not isinstance(value, dict) or type(value.get(name)) is not kind:
        raise ValueError(f"field {name} is missing or not of type {kind.__name__}")
    return value[name]


def _parse_blocks(rows: list[Any], tensors: JSON) -> tuple[StoredBlock, ...]:
    """Return the block table, every tensor being some block's."""
    if len(rows) > MAX_BLOCKS:
        raise ValueError(f"{len(rows)} blocks, more than {MAX_BLOCKS}")
    owned: dict[str, JSON] = {str(number): {} for number in range(len(rows))}
    # A tensor that no row has would be covered by no digest.
    for name, spec in tensors.items():
        number, _, part = name.partition(".")
        if number not in owned:
            raise ValueError(f"tensor {name} belongs to no block")
        owned[number][part] = spec
    return tuple(
        _parse_block(row, parts)
        for row, parts in zip(rows, owned.values(), strict=True)
    )


def _parse_block(row: JSON, parts: JSON) -> StoredBlock:
    raw = _field(row, "raw", dict)
    if not parts or not set(raw) <= set(parts):
        raise ValueError("a block's tensors do not fit its row")
    if not all(is_count(size) for size in raw.values()):
        raise ValueError("a raw size is not a count")
    specs = {
        name: TensorSpec(dtype, shape, begin, end, raw.get(name))
        for name, (dtype, shape, begin, end) in parts.items()
    }
    placed = list(specs.values())  # in the order of their bytes
    begin, end = placed[0].begin, placed[-1].end
    # One read brings a block, and one digest covers it.
    if sum(spec.end - spec.begin for spec in placed) != end - begin:
        raise ValueError("a block is scattered over the shard")
    extras = _field(row, "extras", int)
    if not is_count(extras):
        raise ValueError("a block's extras are not a count")
    is_lossless, is_exact = _field(row, "lossless", bool), _field(row, "exact", bool)
    if is_exact and not is_lossless:
        raise ValueError("a lossy block calls itself exact")
    bits = EXACT_BITS if is_exact else row.get("bits", 0)
    if not is_count(bits) or (bits == EXACT_BITS) != is_exact:
        raise ValueError("a block's bits are no such number")
    return StoredBlock(
        _parse_chain(row),
        _field(row, "codec", str),
        is_lossless,
        bits,
        extras,
        _field(row, "digest", str),
        begin,
        end,
        specs,
        _parse_errors(row.get("errors", [])),
    )


def _parse_errors(rows: Any) -> tuple[LayerError, ...]:
    """Return errors by layer, or none where they cannot be: they are only advice."""
    if not isinstance(rows, list) or len(rows) > _MAX_ERRORS:
        return ()
    found = [row for row in rows if _is_error(row)]
    errors = tuple(LayerError(*row) for row in found)
    is_ordered = all(left[:2] < right[:2] for left, right in pairwise(errors))
    return errors if is_ordered and len(found) == len(rows) else ()


def _is_error(row: Any) -> bool:
    match row:
        case [layer, "k" | "v", error]:
            return is_count(layer) and is_amount(error)
    return False


def _parse_chain(row: JSON) -> Block:
    names = [_field(row, name, str) for name in ("hash", "parent")]
    if not all(_HEX.fullmatch(name) for name in names):
        raise ValueError("a hash is not 64 hex digits")
    tokens = _field(row, "tokens", list)
    if not are_integers(tokens, -(2**63), 2**63):
        raise ValueError("a token is not a 64-bit integer")
    start = _field(row, "start", int)
    if not tokens or not is_count(start):
        raise ValueError("a block has no tokens or a bad start")
    block, parent = (BlockHash(bytes.fromhex(name)) for name in names)
    return Block(block, parent, start, tuple(tokens))

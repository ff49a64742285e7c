"""A basis: what the `fit` codecs decode with, as the bytes of a safetensors file.

A basis is made once for a model and never changes. It is named by the SHA-256 of its
bytes, and the blocks that were coded with it name it. Knows no NumPy: the tensors are
bytes here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from struct import pack, unpack_from
from typing import Any

from ..errors import FormatError, IntegrityError
from .block import StoredBlock
from .documents import JSON, canonical_json, is_count, strict_json
from .safetensors import ITEM_SIZES, MAX_HEADER_BYTES, parse_header

FORMAT = 1
MAX_BYTES = 256 * 1024 * 1024
_MAX_LAYER = 4096
_NAMES_BASIS = re.compile(r"[^@+]+@([0-9a-f]{64})(?:\+zstd)?")
_MAX_STEP = 256
_FIELDS = {"format", "groups", "steps", "about"}


@dataclass(frozen=True, slots=True)
class BasisGroup:
    """Layers of equal shape that a basis covers."""

    # Their numbers in the model, ascending.
    layers: tuple[int, ...]
    # ``H``, the number of KV heads.
    num_heads: int
    # ``D``, the length of one head's row.
    head_dim: int
    # Keys and values of how many heads are coded together; divides ``H``.
    num_joined: int
    # How many pairs of a key's numbers its position rotates.
    num_pairs: int
    # The pairs are neighbours; else a number's partner is ``num_pairs`` behind it.
    is_traditional: bool

    @property
    def num_parts(self) -> int:
        """``G``: into how many parts, coded one by one, a layer is divided."""
        return self.num_heads // self.num_joined

    @property
    def width(self) -> int:
        """``N``, the numbers of a part: its heads' keys, then their values."""
        return 2 * self.num_joined * self.head_dim

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of every tensor of these layers, by name."""
        parts, width = (len(self.layers), self.num_parts), self.width
        return {
            "frequencies": ("F64", (len(self.layers), self.num_pairs)),
            "matrix": ("F16", (*parts, width, width)),
            "scale": ("F32", parts),
            "mean": ("F32", (*parts, width)),
            "sigma": ("I8", (*parts, width)),
            "features": ("F32", (*parts, 2, 2 * self.num_joined)),
            "importance": ("F32", (*parts, 6 * self.num_joined)),
        }


@dataclass(frozen=True, slots=True)
class BasisFile:
    """A basis as its file holds it."""

    groups: tuple[BasisGroup, ...]
    # Name of a rate, such as ``2`` or ``1.5``, to its step in quarter octaves.
    steps: dict[str, int]
    # How it was made; advisory.
    about: JSON
    # Name to the bytes, little-endian, row-major; ``0.matrix`` is of group 0.
    tensors: Mapping[str, bytes | memoryview]

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of every tensor, in the order of the file."""
        return {
            f"{number}.{name}": spec
            for number, group in enumerate(self.groups)
            for name, spec in group.tensors().items()
        }


def basis_digest(data: bytes | memoryview) -> str:
    """Return the name of a basis: the SHA-256 of its bytes in hex."""
    return hashlib.sha256(data).hexdigest()


def basis_to_bytes(basis: BasisFile) -> bytes:
    """Return a basis as a file; the same basis gives the same bytes.

    Raises:
        ValueError: A tensor has another size than its group says.
    """
    header, position = {}, 0
    for name, (dtype, shape) in basis.specs().items():
        nbytes = prod(shape) * ITEM_SIZES[dtype]
        if len(basis.tensors[name]) != nbytes:
            raise ValueError(f"tensor {name} has not the {nbytes} bytes of its shape")
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    meta = {
        "format": FORMAT,
        "groups": [_group_to_json(group) for group in basis.groups],
        "steps": basis.steps,
        "about": basis.about,
    }
    about = {"__metadata__": {"kvstore_basis": canonical_json(meta).decode()}}
    text = json.dumps({**about, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = (basis.tensors[name] for name in header)
    return b"".join([pack("<Q", len(text)), text, *data])


def parse_basis(data: bytes, digest: str) -> BasisFile:
    """Return a basis, having checked its digest and its form.

    Raises:
        IntegrityError: The bytes are not those of this basis, or are none.
        FormatError: A newer release wrote it.
    """
    if basis_digest(data) != digest:
        raise IntegrityError(f"basis {digest[:12]} does not match its digest")
    try:
        return _parse(data)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"basis {digest[:12]} cannot be read: {error}") from error


def _parse(data: bytes) -> BasisFile:
    if len(data) < 8 or unpack_from("<Q", data)[0] > min(
        MAX_HEADER_BYTES, len(data) - 8
    ):
        raise ValueError("its header is longer than it should be")
    begin = 8 + unpack_from("<Q", data)[0]
    specs, metadata = parse_header(data[8:begin], len(data) - begin)
    meta = strict_json(metadata["kvstore_basis"], allow_floats=True)
    if not is_count(meta["format"]) or meta["format"] != FORMAT:
        raise FormatError(
            f"basis has format {meta['format']}, this release reads {FORMAT}",
            hint="upgrade mlx-kvstore",
        )
    if set(meta) != _FIELDS or type(meta["about"]) is not dict:
        raise ValueError("it has other fields than it should")
    view = memoryview(data)[begin:]
    basis = BasisFile(
        _parse_groups(meta["groups"]),
        _parse_steps(meta["steps"]),
        meta["about"],
        {name: view[first:last] for name, (_, _, first, last) in specs.items()},
    )
    found = [(name, (dtype, shape)) for name, (dtype, shape, _, _) in specs.items()]
    if found != list(basis.specs().items()):
        raise ValueError("its tensors are not those of its groups")
    return basis


def _group_to_json(group: BasisGroup) -> JSON:
    return {
        "layers": list(group.layers),
        "num_heads": group.num_heads,
        "head_dim": group.head_dim,
        "num_joined": group.num_joined,
        "num_pairs": group.num_pairs,
        "is_traditional": group.is_traditional,
    }


def _parse_groups(values: Any) -> tuple[BasisGroup, ...]:
    if type(values) is not list or not values:
        raise ValueError("it covers no layers")
    groups = tuple(map(_parse_group, values))
    layers = [layer for group in groups for layer in group.layers]
    if len(set(layers)) != len(layers):
        raise ValueError("it covers a layer twice")
    return groups


def _parse_group(value: JSON) -> BasisGroup:
    group = BasisGroup(**{**value, "layers": tuple(value["layers"])})
    layers = group.layers
    if not layers or not all(is_count(layer, _MAX_LAYER) for layer in layers):
        raise ValueError("a layer is not a small count")
    if list(layers) != sorted(set(layers)):
        raise ValueError("its layers are not in order")
    sizes = (group.num_heads, group.head_dim)
    if not all(is_count(size, 2**16) and size for size in sizes):
        raise ValueError("a size is not a small count")
    if not is_count(group.num_joined, group.num_heads + 1) or not group.num_joined:
        raise ValueError("it joins more heads than there are, or none")
    if group.num_heads % group.num_joined:
        raise ValueError("it joins a number of heads that does not divide all")
    if not is_count(group.num_pairs, group.head_dim // 2 + 1):
        raise ValueError("it rotates more numbers than a row has")
    if type(group.is_traditional) is not bool:
        raise ValueError("is_traditional is neither true nor false")
    return group


def _parse_steps(value: JSON) -> dict[str, int]:
    if not value or not all(
        type(step) is int and abs(step) <= _MAX_STEP for step in value.values()
    ):
        raise ValueError("a step is not a small integer")
    return dict(value)


def bases_named(blocks: Iterable[StoredBlock]) -> set[str]:
    """Return the digests of the bases that blocks name."""
    return {digest for block in blocks if (digest := basis_of(block.codec))}


def basis_of(codec: str) -> str | None:
    """Return the digest of the basis that a codec's name names, if it names one."""
    match = _NAMES_BASIS.fullmatch(codec)
    return match[1] if match else None

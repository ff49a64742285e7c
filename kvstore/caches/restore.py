"""Blocks back to a prompt cache, in the buffers that its layers will own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant import make_wh_rotation
from turboquant.kernels import gpu

from ..codecs.base import Codec, Rows, Run, map_arrays
from ..codecs.dtypes import MLX_DTYPES, NUMPY_DTYPES
from ..codecs.fit import Fit
from ..codecs.fit_device import is_known
from ..codecs.parallel import NUM_CORES, NUM_THREADS
from ..codecs.turbo import SEED, Turbo
from ..errors import IntegrityError
from ..format.block import StoredBlock
from ..format.chain import BLOCK_SIZE
from .fitted_blocks import FittedBlocks
from .kinds import kind_named
from .kinds.base import capacity
from .kinds.turboquant import CODED, live_blocks
from .layout import (
    Group,
    LayerLayout,
    Layout,
    RowSpec,
    flatten,
    group_layers,
)
from .live import PromptCache, hold, read_layout, set_provenance
from .memory import is_shared, memory_bytes, uninitialised
from .provenance import Provenance
from .stored import Piece

if TYPE_CHECKING:
    from ..codecs.base import Parts

Array = npt.NDArray[np.generic]
Pieces = Sequence[tuple[Codec, Piece]]
Read = Callable[[Sequence[memoryview]], None]
Cut = tuple[int, slice]
"""Where in its buffer a block's rows go, and which of them."""
Segments = list[tuple[int, int, dict[str, Any]]]
"""Of each run its first row, how many it has, and what `gpu.segment` is told."""
# Of stored bytes that are being decoded there may be a twelfth of all rows, so that a
# load takes no more than a tenth above them; but of a short prompt a few blocks.
_SPARE_PART = 12
_MIN_SPARE_BYTES = 32 * 1024 * 1024
# Layers that a GPU is given at a time: giving takes as long as restoring one.
_AT_ONCE = 16
# NumPy cannot write bfloat16.
_BITS = {"BF16": "U16"}


class Restoring(Protocol):
    """A prompt cache being rebuilt, block by block."""

    num_threads: int
    """How many threads may write at the same time, each another block."""
    spare_bytes: int
    """What may lie in memory besides the rows at any time."""

    def buffers(
        self, pieces: Pieces, stored: StoredBlock, stop: int
    ) -> Sequence[memoryview]:
        """Return where the bytes of a block go as they are; none if they are not rows.

        Args:
            pieces: What the block has of each array, and the codec.
            stored: The block.
            stop: The token up to which its rows are wanted.
        """

    def can_receive(self, pieces: Pieces) -> bool:
        """Whether :meth:`receive` takes such a block, if nothing is wrong with it."""

    def receive(
        self, pieces: Pieces, stored: StoredBlock, stop: int, read: Read
    ) -> bool:
        """Have a whole block read to where it is decoded, if it can be; in any thread.

        Args:
            pieces: What the block has of each array, and the codec.
            stored: The block.
            stop: The token up to which its rows are wanted.
            read: Fills buffers of as many bytes as the block has.
        """

    def write(
        self, codec: Codec, parts: Parts, group: Group, rows: Rows, stop: int
    ) -> None:
        """Decode the rows of one array of one block up to token ``stop``."""

    def finish(self, num_tokens: int, provenance: Provenance) -> PromptCache:
        """Return the prompt cache with ``num_tokens`` rows.

        Args:
            num_tokens: Rows that have been written.
            provenance: What they went through.
        """


def start_restoring(layout: Layout, num_tokens: int) -> Restoring:
    """Return what rebuilds a prompt cache fastest on MLX's default device."""
    if is_shared():
        return HostRestoring(layout, num_tokens)
    if gpu.can("restore"):
        return KernelRestoring(layout, num_tokens)
    return DeviceRestoring(layout, num_tokens)


class _Target:
    """Which rows of each array a restored prompt cache needs."""

    def __init__(self, layout: Layout, num_tokens: int) -> None:
        self.layers = flatten(layout)
        self._num_tokens = num_tokens

    def begin(self, layer: LayerLayout, name: str, spec: RowSpec) -> int:
        """Return the position of the first row."""
        if spec.kind != "window":
            return spec.begin
        kind = kind_named(layer.cache_class)
        return max(spec.begin, kind.window_begin(layer, self._num_tokens))

    def num_rows(self, layer: LayerLayout, name: str, spec: RowSpec) -> int:
        """Return how many rows the buffer has, room for the next ones included."""
        if spec.kind == "window":
            return max(0, self._num_tokens - self.begin(layer, name, spec))
        if spec.kind != "rows":
            return 1
        rows = capacity(self._num_tokens)
        return (rows if spec.end is None else min(rows, spec.end)) - spec.begin

    def blank(self, layer: LayerLayout, name: str, spec: RowSpec) -> mx.array:
        """Return a buffer of zeros, which takes no memory before it is evaluated."""
        shape = (1, spec.num_heads, self.num_rows(layer, name, spec), spec.head_dim)
        return mx.zeros(shape, MLX_DTYPES[spec.dtype])

    def allocate(self) -> list[dict[str, mx.array]]:
        """Return buffers for all layers: of rows uninitialised, else zeros.

        bfloat16 as its bits, which NumPy can write.
        """
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        found: list[dict[str, mx.array]] = []
        for number, layer in enumerate(self.layers):
            zeros = {}
            for name, spec in layer.rows:
                if name in CODED:
                    continue
                shape = (
                    1,
                    spec.num_heads,
                    self.num_rows(layer, name, spec),
                    spec.head_dim,
                )
                if spec.kind == "rows":
                    shapes[f"{number}.{name}"] = (
                        shape,
                        _BITS.get(spec.dtype, spec.dtype),
                    )
                elif spec.kind != "mark":
                    dtype = (
                        mx.uint16 if spec.dtype == "BF16" else MLX_DTYPES[spec.dtype]
                    )
                    zeros[name] = mx.zeros(shape, dtype)
            found.append(zeros)
        for name, array in uninitialised(shapes).items():
            layer_number, _, side = name.partition(".")
            found[int(layer_number)][side] = array
        mx.eval(found)
        return found

    def cut(self, group: Group, rows: Rows, stop: int) -> Cut:
        """Return where in its buffer a block's rows go, and which of them."""
        spec = group.spec(rows.side)
        if spec.kind in ("state", "mark"):
            return 0, slice(0, 1)
        begin = self.begin(group.layout, _sides(rows)[0], spec)
        first = max(rows.start, begin)
        last = max(first, min(stop, rows.start + rows.shape[2]))
        return first - begin, slice(first - rows.start, last - rows.start)


def _spare_bytes(nbytes: int) -> int:
    """Return what blocks under way may take beside rows of so many bytes."""
    return max(_MIN_SPARE_BYTES, nbytes // _SPARE_PART)


class HostRestoring:
    """Decodes layer by layer, in NumPy, into the buffers that the caches will own.

    Writing touches no array of MLX, which belong to the thread that made them.

    Args:
        layout: How the prompt cache is built.
        num_tokens: How many tokens' rows there will be.
    """

    num_threads = NUM_THREADS

    def __init__(self, layout: Layout, num_tokens: int) -> None:
        self._layout = layout
        self._target = _Target(layout, num_tokens)
        self._coded = _LiveBlocks()
        self._arrays = self._target.allocate()
        nbytes = sum(a.nbytes for held in self._arrays for a in held.values())
        self.spare_bytes = _spare_bytes(nbytes)
        # MLX shares its memory with NumPy, and nothing has read the arrays yet.
        self._views: list[dict[str, Array]] = [
            {name: np.asarray(array)[0] for name, array in arrays.items()}
            for arrays in self._arrays
        ]
        # Of each layer and side the memory of its heads, once it is asked for.
        self._heads: dict[tuple[int, str], list[memoryview]] = {}

    def buffers(
        self, pieces: Pieces, stored: StoredBlock, stop: int
    ) -> Sequence[memoryview]:
        """Return the buffers' memory, head by head, where a block has all its rows."""
        found: list[memoryview] = []
        # The parts must follow each other without a gap, since one read fills all
        # buffers.
        end = stored.begin
        for codec, piece in pieces:
            rows, group = piece.rows, piece.group
            where, which = self._target.cut(group, rows, stop)
            spec = stored.tensors.get(f"{piece.number}.{rows.side}.rows")
            is_all = piece.kind == "rows" and which == slice(0, rows.shape[2])
            is_all = is_all and rows.side not in CODED
            if codec.name != "raw" or not is_all or spec is None or spec.begin != end:
                return ()
            if (spec.dtype, spec.shape, spec.raw_nbytes) != (
                rows.dtype,
                rows.shape,
                None,
            ):
                return ()
            end = spec.end
            for layer in group.layers:
                heads = self._bytes_of(layer, rows.side)
                row = len(heads[0]) // self._views[layer][rows.side].shape[1]
                place = slice(where * row, (where + which.stop) * row)
                found += [head[place] for head in heads]
        return found if sum(map(len, found)) == end - stored.begin else ()

    def _bytes_of(self, layer: int, side: str) -> list[memoryview]:
        """Return the memory of each head of a buffer."""
        found = self._heads.get((layer, side))
        if found is None:
            view = self._views[layer][side]
            found = [head.reshape(-1).view(np.uint8).data for head in view]
            self._heads[layer, side] = found
        return found

    def can_receive(self, pieces: Pieces) -> bool:
        """No: bytes that are no rows are decoded."""
        return False

    def receive(
        self, pieces: Pieces, stored: StoredBlock, stop: int, read: Read
    ) -> bool:
        """Refuse, too."""
        return False

    def write(
        self, codec: Codec, parts: Parts, group: Group, rows: Rows, stop: int
    ) -> None:
        """Decode into the buffers."""
        if rows.side in CODED:
            self._coded.write(codec, parts, group, rows)
            return
        where, which = self._target.cut(group, rows, stop)
        end = where + which.stop - which.start
        sides = _sides(rows)
        buffers = [
            [self._view(layer, group, side)[:, where:end] for side in sides]
            for layer in group.layers
        ]
        if which.start == 0 and len(sides) == 1:
            codec.array.decode_into(parts, rows, [buffer for (buffer,) in buffers])
            return
        # Of a codec that takes keys and values together.
        into_sides = getattr(codec.array, "decode_sides_into", None)
        if into_sides and which == slice(0, rows.shape[2]) and len(sides) == 2:
            into_sides(parts, rows, [(keys, values) for keys, values in buffers])
            return
        # Rows from the middle of a block, or fewer than all, are decoded aside and cut:
        # a codec fills buffers from its first row on.
        whole = np.empty(rows.shape, buffers[0][0].dtype)
        codec.array.decode_into(parts, rows, list(whole))
        for several, decoded in zip(buffers, whole, strict=True):
            halves = np.split(decoded[:, which], len(sides))
            for buffer, half in zip(several, halves, strict=True):
                buffer[...] = half

    def finish(self, num_tokens: int, provenance: Provenance) -> PromptCache:
        """Hand the buffers over, rows that were not written as zeros."""
        for layer, views in zip(self._target.layers, self._views, strict=True):
            for name, spec in layer.rows:
                if spec.kind == "rows" and name in views:
                    # The buffers were never cleared, and a damaged block may have ended
                    # the load early: without this, attention would read what other data
                    # left in that memory.
                    views[name][:, max(0, num_tokens - spec.begin) :] = 0
        for arrays, views in zip(self._arrays, self._views, strict=True):
            arrays |= {n: mx.array(views[n][None]) for n in views.keys() - arrays}
        # Without the views, a cache is the only owner and grows in place.
        self._views.clear()
        self._heads.clear()
        typed = [
            {
                name: _as_dtype(arrays.pop(name), spec.dtype)
                for name, spec in layer.rows
                if name in arrays
            }
            for layer, arrays in zip(self._target.layers, self._arrays, strict=True)
        ]
        self._coded.move_to(typed, num_tokens)
        return _build(self._layout, typed, num_tokens, provenance)

    def _view(self, layer: int, group: Group, name: str) -> Array:
        """Return a layer's buffer, allocated here for what not every block has."""
        views = self._views[layer]
        if name not in views:
            spec = group.spec(name)
            shape = (spec.num_heads, 1, spec.head_dim)
            views[name] = np.zeros(shape, NUMPY_DTYPES[spec.dtype])
        return views[name]


class KernelRestoring(HostRestoring):
    """Sends what is stored to a GPU, where one kernel a layer and side restores it.

    What the kernels do not know, such as states, is decoded here.

    Args:
        layout: How the prompt cache is built.
        num_tokens: How many tokens' rows there will be.
    """

    num_threads = min(16, NUM_CORES)

    def __init__(self, layout: Layout, num_tokens: int) -> None:
        self._layout = layout
        self._target = _Target(layout, num_tokens)
        self._coded = _LiveBlocks()
        nbytes = sum(g.token_bytes for g in group_layers(layout)) * num_tokens
        # Codes of 4 bits take a little more than a quarter of their rows.
        self._upload = gpu.start_upload(nbytes * 2 // 7)
        self._sent: dict[tuple[int, str], list[tuple[Cut, Segments]]] = {}
        self._fitted = FittedBlocks(self._upload)
        self._heads = {}
        self.spare_bytes = _spare_bytes(nbytes)
        self._arrays = [{} for _ in self._target.layers]
        self._views = [
            {
                name: np.zeros(self._shape(layer, name, spec), NUMPY_DTYPES[spec.dtype])
                for name, spec in layer.rows
                if spec.kind != "mark"
                and name not in CODED
                and not _has_kernel(name, spec)
            }
            for layer in self._target.layers
        ]

    def buffers(
        self, pieces: Pieces, stored: StoredBlock, stop: int
    ) -> Sequence[memoryview]:
        """Return none: what is read is sent on."""
        return ()

    def _shape(
        self, layer: LayerLayout, name: str, spec: RowSpec
    ) -> tuple[int, int, int]:
        return spec.num_heads, self._target.num_rows(layer, name, spec), spec.head_dim

    def can_receive(self, pieces: Pieces) -> bool:
        """Whether the kernels know all of a block as it is stored."""
        return all(
            codec.compressor is None
            and _has_kernel(piece.rows.side, piece.group.spec(piece.rows.side))
            and bool(_runs_of(codec, piece.rows))
            for codec, piece in pieces
        )

    def receive(
        self, pieces: Pieces, stored: StoredBlock, stop: int, read: Read
    ) -> bool:
        """Send the bytes as they are read, where the kernels know all of them."""
        found = [(piece, *_find_parts(codec, piece, stored)) for codec, piece in pieces]
        if not all(runs for _, runs, _ in found):
            return False
        begin = self._upload.receive(stored.end - stored.begin, read)
        if begin is None:
            return False
        for piece, runs, places in found:
            segments = _segments(runs, piece.rows, begin, places)
            self._note(piece.group, piece.rows, piece.rows.side, stop, segments)
        return True

    def write(
        self, codec: Codec, parts: Parts, group: Group, rows: Rows, stop: int
    ) -> None:
        """Send the parts, or what they decode to."""
        if not _has_kernel(rows.side, group.spec(rows.side)):
            super().write(codec, parts, group, rows, stop)
            return
        if isinstance(codec.array, Fit) and is_known(codec.array, rows):
            where, which = self._target.cut(group, rows, stop)
            if which == slice(0, rows.shape[2]):
                sinks = self._fitted.send(codec.array, parts, rows, where)
                for side, (num_rows, at) in zip(_sides(rows), sinks, strict=False):
                    run = [Run(num_rows, 0, ("sinks",))]
                    segments = _segments(run, rows, 0, {"sinks": at})
                    self._note(group, rows, side, stop, segments)
                return
        for side, runs, arrays in _exact_or_known(codec, parts, rows):
            names = [n for r in runs for n in (*r.planes, r.norms, r.mean) if n]
            sent = self._upload.send([arrays[name] for name in names])
            places = dict(zip(names, sent, strict=True))
            segments = _segments(runs, rows, 0, places)
            self._note(group, rows, side, stop, segments)

    def _note(
        self, group: Group, rows: Rows, side: str, stop: int, segments: Segments
    ) -> None:
        """Remember where rows of a block lie on the device."""
        sent = self._sent.setdefault((group.layers[0], side), [])
        sent.append((self._target.cut(group, rows, stop), segments))

    def finish(self, num_tokens: int, provenance: Provenance) -> PromptCache:
        """Have the kernels restore all layers."""
        data = self._upload.data()
        for group in group_layers(self._layout):
            for name, spec in group.layout.rows:
                if _has_kernel(name, spec):
                    self._restore(data, group, name, spec, num_tokens)
        self._fitted.restore(data, self._arrays, num_tokens)
        arrays = [array for held in self._arrays for array in held.values()]
        restored = super().finish(num_tokens, provenance)
        # What was sent can go only when no kernel reads it any more.
        mx.eval(arrays)
        del self._upload, self._fitted
        return restored

    def _restore(
        self, data: mx.array, group: Group, name: str, spec: RowSpec, num_tokens: int
    ) -> None:
        """Restore one array of all layers of a group."""
        heads, capacity, dim = self._shape(group.layout, name, spec)
        # Segment 0 has the rows that nothing was sent of: zeros.
        which = np.zeros(capacity, np.int32)
        table = [gpu.segment(0, (0, 0, 0), 0, [])]
        for (where, wanted), segments in self._sent.get((group.layers[0], name), []):
            for first, num_rows, numbers in segments:
                begin = max(first, wanted.start)
                end = min(first + num_rows, wanted.stop)
                at = where + begin - wanted.start
                which[at : at + max(0, end - begin)] = len(table)
                table.append(gpu.segment(**numbers, skip=begin - first - at))
        if spec.kind == "rows":  # a load that ended early has written more
            which[max(0, num_tokens - spec.begin) :] = 0
        inputs = mx.array(which), mx.array(np.array(table, np.int64))
        has_codes = dim % 8 == 0 and dim <= gpu.MAX_DIM
        # One table serves all layers of a group, whose rows lie alike in each part.
        for number, layer in enumerate(group.layers):
            restored = gpu.restore(
                data,
                *inputs,
                make_wh_rotation(dim, SEED) if has_codes else None,
                layer=number,
                shape=(1, heads, capacity, dim),
                dtype=MLX_DTYPES[spec.dtype],
            )
            self._arrays[layer][name] = restored
            if number % _AT_ONCE == _AT_ONCE - 1:  # the GPU may start
                mx.async_eval([held[name] for held in self._arrays if name in held])


def _has_kernel(name: str, spec: RowSpec) -> bool:
    is_float = spec.dtype in ("F32", "F16", "BF16")
    return spec.kind in ("rows", "window") and is_float and name not in CODED


def _runs_of(codec: Codec, rows: Rows) -> list[Run]:
    """Return the runs of rows; none where the kernels do not know the codec."""
    find_runs = getattr(codec.array, "runs", None)
    runs: list[Run] = find_runs(rows) if find_runs else []
    is_known = rows.shape[3] <= gpu.MAX_DIM or not any(run.bits for run in runs)
    return runs if is_known else []


def _find_parts(
    codec: Codec, piece: Piece, stored: StoredBlock
) -> tuple[list[Run], dict[str, int]]:
    """Return the runs of a piece and where in a block each of its parts is.

    There are no runs where the kernels cannot read the block as it is.
    """
    rows = piece.rows
    places: dict[str, int] = {}
    if codec.compressor or not _has_kernel(rows.side, piece.group.spec(rows.side)):
        return [], places
    for name, (dtype, shape) in codec.array.parts(rows).items():
        spec = stored.tensors.get(f"{piece.number}.{rows.side}.{name}")
        size = np.dtype(NUMPY_DTYPES[dtype]).itemsize
        # Whatever is wrong is told when the block is opened in the usual way.
        if spec is None or (spec.dtype, spec.shape) != (dtype, shape):
            return [], places
        place, nbytes = spec.begin - stored.begin, spec.end - spec.begin
        if spec.raw_nbytes or nbytes != size * math.prod(shape) or place % size:
            return [], places
        places[name] = place
    return _runs_of(codec, rows), places


def _exact_or_known(
    codec: Codec, parts: Parts, rows: Rows
) -> Iterator[tuple[str, list[Run], Parts]]:
    """Yield the runs of each array, decoded where the kernels do not know the codec."""
    sides, runs = _sides(rows), _runs_of(codec, rows)
    if runs:
        yield sides[0], runs, parts
        return
    whole = np.empty(rows.shape, NUMPY_DTYPES[rows.dtype])
    codec.array.decode_into(parts, rows, list(whole))
    for side, half in zip(sides, np.split(whole, len(sides), axis=1), strict=True):
        exact = {"rows": np.ascontiguousarray(half)}
        yield side, [Run(rows.shape[2], 0, ("rows",))], exact


def _segments(
    runs: Sequence[Run], rows: Rows, begin: int, places: Mapping[str, int]
) -> Segments:
    """Return of each run its first row, how many it has, and where they lie."""
    found: Segments = []
    first = 0
    heads = rows.shape[1] // len(_sides(rows))
    for run in runs:
        numbers = {
            # Exact rows are told by how many parts they lie in.
            "bits": run.bits or -len(run.planes),
            "shape": (rows.shape[0], heads, run.num_rows),
            "planes": [begin + places[name] for name in run.planes],
            "norms": begin + places[run.norms] if run.norms else 0,
            "mean": begin + places[run.mean] if run.mean else -1,
        }
        found.append((first, run.num_rows, numbers))
        first += run.num_rows
    return found


class DeviceRestoring:
    """Decodes all layers of a block at once, on MLX's device, and joins the blocks.

    Args:
        layout: How the prompt cache is built.
        num_tokens: How many tokens' rows there will be.
    """

    num_threads = 1
    spare_bytes = 0

    def __init__(self, layout: Layout, num_tokens: int) -> None:
        self._layout = layout
        self._target = _Target(layout, num_tokens)
        self._pieces: list[dict[str, list[mx.array]]] = [
            {n: [] for n, spec in layer.rows if spec.kind != "mark" and n not in CODED}
            for layer in self._target.layers
        ]
        self._coded = _LiveBlocks()

    def buffers(
        self, pieces: Pieces, stored: StoredBlock, stop: int
    ) -> Sequence[memoryview]:
        """Return none: all is decoded on the device."""
        return ()

    def can_receive(self, pieces: Pieces) -> bool:
        """No: all is decoded on the device."""
        return False

    def receive(
        self, pieces: Pieces, stored: StoredBlock, stop: int, read: Read
    ) -> bool:
        """Refuse, too."""
        return False

    def write(
        self, codec: Codec, parts: Parts, group: Group, rows: Rows, stop: int
    ) -> None:
        """Decode on the device, evaluated at once so that the codes can go."""
        if rows.side in CODED:
            self._coded.write(codec, parts, group, rows)
            return
        _, which = self._target.cut(group, rows, stop)
        sides = _sides(rows)
        decoded = codec.array.decode(parts, rows)[:, :, which]
        for side, half in zip(
            sides, mx.split(decoded, len(sides), axis=1), strict=True
        ):
            pieces = [half[i : i + 1] for i in range(len(group.layers))]
            mx.async_eval(pieces)
            for layer, piece in zip(group.layers, pieces, strict=True):
                self._pieces[layer].setdefault(side, []).append(piece)

    def finish(self, num_tokens: int, provenance: Provenance) -> PromptCache:
        """Join the blocks of each layer, with room for the next token."""
        joined = []
        for layer, pieces in zip(self._target.layers, self._pieces, strict=True):
            joined.append(
                {
                    name: self._join(layer, name, spec, pieces.pop(name))
                    for name, spec in layer.rows
                    if name in pieces
                }
            )
            # Layer by layer, so that the pieces of one go before the next is joined.
            mx.eval(joined[-1])
        self._coded.move_to(joined, num_tokens)
        return _build(self._layout, joined, num_tokens, provenance)

    def _join(
        self, layer: LayerLayout, name: str, spec: RowSpec, pieces: list[mx.array]
    ) -> mx.array:
        missing = self._target.num_rows(layer, name, spec)
        missing -= sum(piece.shape[2] for piece in pieces)
        shape = (1, spec.num_heads, missing, spec.head_dim)
        room = [mx.zeros(shape, MLX_DTYPES[spec.dtype])] if missing else []
        return mx.concatenate([*pieces, *room], axis=2)


class _LiveBlocks:
    """Blocks of a live cache of codes: its codes, or rows that were the newest."""

    def __init__(self) -> None:
        self._found: list[tuple[Turbo | None, Array | Parts, Group, Rows]] = []

    def write(self, codec: Codec, parts: Parts, group: Group, rows: Rows) -> None:
        """Keep what a block has of some layers, decoded unless it is their codes."""
        if isinstance(codec.array, Turbo):
            # A live cache keeps codes by blocks of this size, each with a mean of its
            # own.
            if rows.start % BLOCK_SIZE or rows.shape[2] > BLOCK_SIZE:
                raise IntegrityError(f"codes from token {rows.start} are no block's")
            # Copied, since the memory that a block was read into is used again.
            own = map_arrays(np.array, parts)
            self._found.append((codec.array, own, group, rows))
            return
        decoded = np.empty(rows.shape, NUMPY_DTYPES[rows.dtype])
        codec.array.decode_into(parts, rows, list(decoded))
        self._found.append((None, decoded, group, rows))

    def move_to(self, buffers: Sequence[dict[str, Any]], num_tokens: int) -> None:
        """Hand all blocks over to the layers that they are of, in order."""
        # Threads wrote them, which may own no array of MLX's.
        for codec, found, group, rows in sorted(self._found, key=_start):
            if rows.start < num_tokens:
                blocks = live_blocks(codec, found, rows)
                for layer, block in zip(group.layers, blocks, strict=True):
                    buffers[layer].setdefault(rows.side, []).append(block)
        self._found.clear()


def _start(item: tuple[Any, Any, Any, Rows]) -> int:
    return item[3].start


def _sides(rows: Rows) -> tuple[str, ...]:
    """Return the arrays that rows are of."""
    return ("k", "v") if rows.side == "kv" else (rows.side,)


def check_layout(layout: Layout, num_tokens: int) -> None:
    """Refuse a layout that no prompt cache of so many tokens has.

    One is built of buffers that are never filled, and its layout read again.

    Raises:
        IntegrityError: It cannot be built, has another layout, or takes more memory
            than this machine has.
    """
    target = _Target(layout, num_tokens)
    try:
        buffers = [
            {
                name: target.blank(layer, name, spec)
                for name, spec in layer.rows
                if spec.kind != "mark"
            }
            for layer in target.layers
        ]
        nbytes = sum(
            _bits(layer, name, array) * array.size // 8
            for layer, held in zip(target.layers, buffers, strict=True)
            for name, array in held.items()
        )
        if nbytes > memory_bytes():
            raise ValueError(
                f"{num_tokens:,} tokens take {nbytes / 1e9:,.1f} GB, which is more than"
                " this machine's memory"
            )
        built = _build_layers(layout, iter(buffers), num_tokens)
        found = read_layout(built, num_tokens)
    except Exception as error:  # whatever a class, mlx-lm's or another, says to it
        raise IntegrityError(f"its layout is of no prompt cache: {error}") from error
    if found != layout:
        raise IntegrityError("its layout is not that of the prompt cache that it makes")


def _bits(layer: LayerLayout, name: str, array: mx.array) -> int:
    """Return the bits of one number of an array that a restored cache will hold."""
    is_coded = name in CODED
    return dict(layer.params)[f"{name[0]}_bits"] if is_coded else 8 * array.itemsize


def _build(
    layout: Layout,
    buffers: Sequence[dict[str, mx.array]],
    num_tokens: int,
    provenance: Provenance,
) -> PromptCache:
    """Return caches that own these buffers, evaluated on this thread."""
    restored = _build_layers(layout, iter(buffers), num_tokens)
    set_provenance(restored, provenance)
    # An empty layer has no state to evaluate.
    mx.eval([kept for held in hold(restored) for kept in held.values()])
    return restored


def _build_layers(
    layout: Layout,
    buffers: Iterator[dict[str, mx.array]],
    num_tokens: int,
) -> PromptCache:
    from mlx_lm.models.cache import CacheList

    built: PromptCache = []
    for layer in layout:
        if isinstance(layer, tuple):
            built.append(CacheList(*_build_layers(layer, buffers, num_tokens)))
        else:
            kind = kind_named(layer.cache_class)
            built.append(kind.build(layer, next(buffers), num_tokens))
    return built


def _as_dtype(array: mx.array, dtype: str) -> mx.array:
    """Return the bits of ``array`` as the dtype that they are of."""
    return array.view(mx.bfloat16) if dtype == "BF16" else array

"""Small integers in a basis to rows, by the kernels of every instruction set."""

from dataclasses import replace

import numpy as np
import pytest

from turboquant.kernels import native
from turboquant.kernels.long_rows import Bases, Basis, Coefficients, Places, Turns

COMPILED = native.load_all()
every_set = pytest.mark.parametrize("kernels", COMPILED, ids=lambda each: each.name)
ONE_HEAD = {"num_joined": 1, "is_traditional": False}


def as_floats(bits):
    """Return bfloat16 bits as numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@every_set
@pytest.mark.parametrize("most", [3, 127, 4095])
@pytest.mark.parametrize("count", [1, 129, 256])
def test_integers_of_any_size_become_rows(kernels, most, count) -> None:
    """Sums that 32 bits would not hold are right too, of rows of 16 bits."""
    random, width, rows = np.random.default_rng(most), 256, 33
    q = random.integers(-most, most, (count, rows), endpoint=True)
    q[:, 5] = most
    low = [(q >> n) & 1 != 0 for n in range(5)] if most > 127 else []
    planes = np.stack([np.packbits(x, axis=1) for x in low]) if low else None
    holds = (np.arange(width) < count)[None, None]
    found = Coefficients(Places((1, 1, width), [holds]))
    found.add(((q >> len(low)) + 128).astype(np.uint8), planes, 128, 1)
    matrix, mean = random.uniform(0.5, 1, (width, width)), random.random(width)
    basis = Basis(*(x[None].astype(np.float32) for x in (matrix, mean)))
    whole = kernels.round_matrices(basis.matrix, found.places.counts[0])
    scales = np.full((1, 1, rows), 2.0**-3, np.float32)
    none = np.zeros((1, 3, 0, 16), np.float32)
    out, again = (np.zeros((2, rows, 128), np.uint16) for _ in range(2))
    for each, sides in (
        (basis, [out]),
        (replace(basis, whole=whole), [again[:1], again[1:]]),
    ):
        bases = Bases(found.places, [each], **ONE_HEAD)
        kernels.restore_long(found, bases, scales, Turns(none, none), [sides])
    assert (out == again).all()
    expected = q.T @ matrix.T[:count] / 8 + mean
    made = as_floats(out).transpose(1, 0, 2).reshape(rows, width)
    near = 2.0**-8 * np.abs(expected) + 2.0**-13 * np.abs(expected).max()
    assert (np.abs(made - expected) <= near).all()


@every_set
@pytest.mark.parametrize("per_byte", [1, 2, 3])
@pytest.mark.parametrize("num_turns", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_layers_have_their_own_coefficients_and_turns(
    kernels, per_byte, num_turns, dtype
) -> None:
    """Of several layers, each part is multiplied with its matrix and turned."""
    random, shape, rows = np.random.default_rng(per_byte), (3, 2, 32), 21
    streams = [random.random(shape) < 0.4]
    streams.append(~streams[0] & (random.random(shape) < 0.7))
    places = Places(shape, streams)
    found, q = Coefficients(places), np.zeros((*shape, rows), np.float32)
    for holds in streams:
        width = -(-rows // per_byte)
        digits = random.integers(0, 5, (holds.sum(), width, per_byte))
        found.add(
            (digits @ 5 ** np.arange(per_byte)).astype(np.uint8), None, 2, per_byte
        )
        q[holds] = digits.reshape(len(digits), -1)[:, :rows] - 2
    matrix = random.integers(-9, 9, (*shape, 32)).astype(np.float32)
    mean = random.integers(-9, 9, shape).astype(np.float32)
    scales = random.choice(np.array([0.5, 1, 2], np.float32), (*shape[:2], rows))
    angle = random.random((num_turns, 2, 8, 16)).astype(np.float32)
    turns = Turns(np.cos(angle), np.sin(angle))
    layers = [Basis(*each) for each in zip(matrix, mean, strict=True)]
    out = [np.zeros((4, rows, 16), dtype) for _ in range(3)]
    bases = Bases(places, layers, **ONE_HEAD)
    kernels.restore_long(found, bases, scales, turns, [[each] for each in out])
    wide = (matrix @ q).swapaxes(2, 3) * scales[..., None] + mean[:, :, None]
    keys, values = wide[..., :16], wide[..., 16:]
    flat = (
        x.swapaxes(2, 3).reshape(num_turns, 1, 32, 8) for x in (turns.cos, turns.sin)
    )
    cos, sin = (x[:, :, :rows] for x in flat)
    one, two = keys[..., :8], keys[..., 8:]
    keys = np.concatenate([one * cos - two * sin, one * sin + two * cos], axis=-1)
    expected = np.concatenate([keys, values], axis=1)
    made = np.stack(out)
    made = made if dtype is np.float32 else as_floats(made)
    near = 2.0**-20 if dtype is np.float32 else 2.0**-8
    assert np.abs(made - expected).max() <= near * np.abs(expected).max()


def integers(num_rows: int = 5):
    """Return what restores five rows of 16, of which there are so many coefficients."""
    places = Places((1, 1, 32), [np.ones((1, 1, 32), np.bool_)])
    found = Coefficients(places)
    found.add(np.full((32, num_rows), 127, np.uint8), None, 127, 1)
    basis = Basis(np.ones((1, 32, 32), np.float32), np.ones((1, 32), np.float32))
    turns = np.zeros((1, 1, 8, 16), np.float32)
    scales = np.ones((1, 1, 5), np.float32)
    return found, Bases(places, [basis], **ONE_HEAD), scales, Turns(turns, turns)


@every_set
@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 2, 5), (2, 1, 5)])
def test_scales_of_other_rows_are_refused(kernels, shape) -> None:
    """What a kernel would read beyond its end never gets there."""
    found, bases, scales, turns = integers()
    out = np.empty((2, 5, 16), np.float32)
    kernels.restore_long(found, bases, scales, turns, [[out]])
    assert (out == 1).sum() == out[1].size  # the mean; keys are turned to nothing
    with pytest.raises(ValueError, match="of other rows"):
        kernels.restore_long(found, bases, np.ones(shape), turns, [[out]])


@every_set
@pytest.mark.parametrize("name", ["cos", "sin"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 9, 16), (1, 2, 8, 16), (2, 1, 8, 16), (1, 1, 8, 8), (8, 16)]
)
def test_turns_of_other_rows_are_refused(kernels, name, shape) -> None:
    """Cosines and sines are of all rows and of pairs of numbers that there are."""
    found, bases, scales, turns = integers()
    other = replace(turns, **{name: np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match="of other rows"):
        kernels.restore_long(
            found, bases, scales, other, [[np.empty((2, 5, 16), np.float32)]]
        )


@every_set
@pytest.mark.parametrize("shape", [(2, 6, 16), (2, 5, 8), (4, 5, 16)])
def test_rows_of_another_shape_are_not_restored(kernels, shape) -> None:
    """Nothing is written beyond a buffer, and no coefficient read that is not there."""
    two = [np.empty((1, 5, 16), dtype) for dtype in (np.float32, np.uint16)]
    right = [np.empty((2, 5, 16), np.float32)]
    for out in ([[np.empty(shape, "f4")]], [two], [right, right]):
        with pytest.raises(ValueError, match="of other rows"):
            kernels.restore_long(*integers(), out)
    with pytest.raises(ValueError, match="of other rows"):
        kernels.restore_long(*integers(4), [right])


@every_set
def test_streams_of_other_coefficients_are_refused(kernels) -> None:
    """No stream has more or fewer rows of bytes than coefficients, and none lacks."""
    found, bases, *rest = integers()
    packed, low = np.zeros((32, 5), np.uint8), np.zeros((1, 31, 1), np.uint8)
    for rows, planes in ((packed[:31], None), (packed, low)):
        with pytest.raises(ValueError, match="a stream of 32"):
            Coefficients(found.places).add(rows, planes, 127, 1)
    none, other = Coefficients(found.places), integers()[0]
    out = np.empty((2, 5, 16), np.float32)
    for wrong in (none, other):
        with pytest.raises(ValueError, match="of other rows"):
            kernels.restore_long(wrong, bases, *rest, [[out]])


@pytest.mark.parametrize(
    ("matrix", "mean"),
    [((1, 32, 16), (1, 32)), ((1, 32, 32), (1, 16)), ((2, 32, 32), (1, 32))],
)
def test_a_basis_of_another_shape_is_refused(matrix, mean) -> None:
    """Nor are there fewer bases than layers."""
    places = integers()[0].places
    wrong = Basis(np.zeros(matrix, np.float32), np.zeros(mean, np.float32))
    for layers in ([wrong], []):
        with pytest.raises(ValueError, match=r"bas[ie]s"):
            Bases(places, layers, **ONE_HEAD)


@every_set
def test_matrices_rounded_for_others_are_refused(kernels) -> None:
    """A matrix of fewer columns, or of fewer rows, is never read beyond its end."""
    places = integers()[0].places
    basis = Basis(np.ones((1, 32, 32), np.float32), np.ones((1, 32), np.float32))
    few = kernels.round_matrices(basis.matrix, np.array([30], np.int32))
    good = kernels.round_matrices(basis.matrix, np.array([32], np.int32))
    Bases(places, [replace(basis, whole=good)], **ONE_HEAD)
    for whole in (few, replace(good, factors=good.factors[:, :16])):
        with pytest.raises(ValueError, match="for other coefficients"):
            Bases(places, [replace(basis, whole=whole)], **ONE_HEAD)
    for matrix, count in ((basis.matrix, 33), (basis.matrix[:, :, :16], 3)):
        with pytest.raises(ValueError, match="columns"):
            kernels.round_matrices(matrix, np.array([count], np.int32))

"""What a GPU decodes of `fit` is what NumPy decodes, but for rounding."""

import kit
import mlx.core as mx
import numpy as np
import pytest

from kvstore.codecs import find_codec
from kvstore.codecs.base import Rows
from kvstore.codecs.fit import FitFamily
from kvstore.codecs.fit_device import FitOnDevice, is_known
from kvstore.codecs.streams import STREAMS, unpack_integers
from kvstore.format.basis import (
    BasisFile,
    BasisGroup,
    basis_digest,
    basis_to_bytes,
    parse_basis,
)

LAYERS, HEADS, DIM, TOKENS = 3, 2, 32, 30
HELD = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1"}


def make_fit(*, pairs=DIM // 2, is_traditional=False):
    """Return a codec with coefficients of every class, in a random basis."""
    group = BasisGroup((0, 1, 2), HEADS, DIM, 1, pairs, is_traditional)
    random, width = np.random.default_rng(0), group.width
    shape = (LAYERS, group.num_parts)
    turned = np.linalg.qr(random.standard_normal((*shape, width, width)))[0]
    sigma = random.permutation(np.linspace(-12, 34, width).round())
    frequencies = 100.0 ** (-np.arange(pairs) / max(1, pairs))
    arrays = {
        # The last layer turns its keys otherwise.
        "frequencies": np.stack([frequencies, frequencies, frequencies / 3]),
        "matrix": turned,
        "scale": np.full(shape, 0.75),
        "mean": random.standard_normal((*shape, width)),
        "sigma": np.broadcast_to(sigma, (*shape, width)),
        "features": np.broadcast_to([[3.0, 3.0], [1.0, 1.0]], (*shape, 2, 2)),
        "importance": 0.3 * random.standard_normal((*shape, 6)),
    }
    tensors = {
        f"0.{name}": np.ascontiguousarray(arrays[name]).astype(HELD[dtype]).tobytes()
        for name, (dtype, _) in group.tensors().items()
    }
    data = basis_to_bytes(BasisFile((group,), {"2": 0}, {}, tensors))
    family = FitFamily(lambda digest: parse_basis(data, digest))
    return find_codec(f"fit2@{basis_digest(data)}", family).array


def make_block(fit, start, seed):
    """Return a block: what rows it has, its parts, and what NumPy decodes."""
    (layers,) = fit.fitted.layers
    random = np.random.default_rng(seed)
    sizes = 2.0 ** (layers.sigma.astype(np.float32) / 4)
    q = random.standard_normal((TOKENS, *sizes.shape)).astype(np.float32) * sizes
    wide = np.einsum("tlgn,lgmn->lgtm", q, layers.matrix) + layers.mean[:, :, None]
    x = wide.reshape(LAYERS, HEADS, TOKENS, 2, DIM).transpose(0, 3, 1, 2, 4)
    x = x.reshape(LAYERS, 2 * HEADS, TOKENS, DIM).astype(np.float16)
    x[1, 0, 9] = np.inf
    x[1, 3, 20, 2] = np.nan
    rows = Rows("kv", start, x.shape, "F16", (0, 1, 2))
    parts = fit.encode(list(x), rows)
    decoded = np.empty_like(x)
    fit.decode_into(parts, rows, list(decoded))
    return rows, parts, decoded


def sent(on, blocks):
    """Return the bytes of blocks as they are sent."""
    data = np.zeros((len(blocks), on.nbytes), np.uint8)
    for row, (_, parts, _) in zip(data, blocks, strict=True):
        end = 0
        for name in on.names():
            part = parts[name].reshape(-1).view(np.uint8)
            row[end : end + part.size] = part
            end += -(-part.size // 16) * 16
    return mx.array(data)


def joined_turns(on, blocks):
    """Return cosine and sine of all positions of some blocks."""
    each = [on.turns(rows.start + on.num_sinks) for rows, _, _ in blocks]
    return [
        tuple(mx.array(np.concatenate(x, axis=1)) for x in zip(*way, strict=True))
        for way in zip(*each, strict=True)
    ]


def decode(on, layer, blocks):
    """Return one layer's rows as a restored cache has them, ``(2 H, B * T, D)``."""
    exponents = np.concatenate([parts["exponents"] for _, parts, _ in blocks], axis=2)
    pair = on.decode(
        layer,
        sent(on, blocks),
        mx.array(on.matrices()[layer]),
        mx.array(exponents),
        joined_turns(on, blocks),
    )
    found = np.array(mx.concatenate([half[0] for half in pair]))
    exact = on.exact(layer, [parts for _, parts, _ in blocks])
    if exact is not None:
        heads, tokens, rows = exact
        found[heads, tokens], found[heads + HEADS, tokens] = rows[:, 0], rows[:, 1]
    return found


@pytest.mark.parametrize(
    "options", [{}, {"is_traditional": True}, {"pairs": 5}, {"pairs": 0}]
)
@pytest.mark.parametrize("starts", [[0], [TOKENS, 2 * TOKENS, 3 * TOKENS]])
def test_rows_are_those_of_numpy(options, starts):
    """Within rounding, rows that are kept as they are to the bit."""
    fit = make_fit(**options)
    blocks = [make_block(fit, start, start) for start in starts]
    on = FitOnDevice(fit, blocks[0][0], 16)
    for layer in range(LAYERS):
        found = decode(on, layer, blocks)
        wanted = [decoded[layer][:, on.num_sinks :] for _, _, decoded in blocks]
        wanted = np.concatenate(wanted, axis=1)
        is_finite = np.isfinite(wanted)
        assert kit.bits_of(np.where(is_finite, 0, wanted)) == kit.bits_of(
            np.where(is_finite, 0, found)
        )
        one, two = (x[is_finite].astype(np.float64) for x in (wanted, found))
        assert np.abs(one - two).max() <= 2.0**-9 * np.abs(one).max()


def test_integers_are_those_of_numpy():
    """All streams, those with low bits too, to the bit."""
    fit = make_fit()
    block = make_block(fit, TOKENS, 1)
    on = FitOnDevice(fit, block[0], 16)
    assert {place.stream for place in on._places} == set(STREAMS)
    data = sent(on, [block])
    for place in on._places:
        packed = block[1][f"c{place.stream.first}"]
        low = block[1][f"b{place.stream.first}"] if place.stream.low_bits else None
        wanted = unpack_integers(packed, low, place.stream, TOKENS)
        found = [on._unpack(place, layer, data)[0] for layer in range(LAYERS)]
        assert kit.bits_of(wanted) == kit.bits_of(np.array(mx.concatenate(found)))


def test_wide_rows_are_decoded_by_the_host():
    """Products on a GPU may round what they multiply."""
    fit = make_fit()
    rows = Rows("kv", 0, (LAYERS, 2 * HEADS, TOKENS, DIM), "F32", (0, 1, 2))
    assert not is_known(fit, rows)

"""Cosines and sines of positions."""

import numpy as np
import pytest

from kvstore.codecs.rotary import angles

FREQUENCIES = 500_000.0 ** -(np.arange(64) / 64)


@pytest.mark.parametrize("start", [0, 3, 255, 256, 131_000, 1_000_000])
@pytest.mark.parametrize("num_tokens", [0, 1, 260, 700])
def test_angles_are_as_exact_as_float32(start, num_tokens):
    """They are those of the position times the frequency, in more bits, rounded."""
    positions = np.arange(start, start + num_tokens, dtype=np.longdouble)
    angle = positions[:, None] * FREQUENCIES.astype(np.longdouble)
    cos, sin = angles(FREQUENCIES[None], start, num_tokens)
    for made, wanted in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert made.shape == (1, num_tokens, 64)
        error = np.abs(made[0] - wanted)
        assert (error <= np.spacing(np.abs(made[0])) * 0.51 + 2e-10).all()


def test_a_position_has_one_angle_whatever_comes_before_it():
    """No block decodes a token in another way than a block that begins elsewhere."""
    whole = angles(FREQUENCIES[None], 0, 2000)
    for start, num_tokens in ((4, 252), (255, 2), (1000, 1000), (1999, 1)):
        some = angles(FREQUENCIES[None], start, num_tokens)
        for made, wanted in zip(some, whole, strict=True):
            assert np.array_equal(made, wanted[:, start : start + num_tokens])


def test_layers_have_their_own_frequencies():
    """Equal ones are given once, others for each layer."""
    both = np.stack([FREQUENCIES, FREQUENCIES / 3])
    cos, sin = angles(both, 500, 30)
    for number, each in enumerate(both):
        alone = angles(np.stack([each, each]), 500, 30)
        assert len(alone[0]) == 1
        assert np.array_equal(alone[0][0], cos[number])
        assert np.array_equal(alone[1][0], sin[number])

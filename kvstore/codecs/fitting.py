"""Rows of a model to a basis: what `kvstore calibrate` computes.

Keys and values of some heads of a layer get one matrix, in which their coefficients are
uncorrelated and an error of one step in any of them does equal harm. What an error does
is told by gradients of what the model says next. From rows alone, every number of a
head is taken to matter alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..format.basis import BasisFile, BasisGroup, basis_to_bytes
from ..format.documents import JSON
from .base import Array, Codec, Rows
from .fit import NUM_SINKS, Fit, exponents_of
from .fitted import describe, fitted_from_file, joined, log_sizes
from .floats import Floats, widen
from .rotary import angles, rotate

Doubles = npt.NDArray[np.float64]
RATES = (
    "1", "1.125", "1.25", "1.5", "1.625", "1.75", "2", "2.25", "2.5", "2.75", "3", "4",
)  # fmt: skip
"""Bits per number that a step is chosen for. Below 2, nearly every step has a rate."""
MAX_WIDTH = 512
"""Of a part, where a head's key and value are not longer: what a CPU decodes fast."""
VALUE_RATIO = 2.4
"""How much coarser values are than keys where nothing tells; measured."""
_MAX_HELD_BYTES = 2**33
_STEPS = range(-128, 33)
_LEAST = 1e-12
# Of the mean of a metric's diagonal: what few gradients leave open is not neglected.
_RIDGE = 1e-2
# How far scales follow what is predicted; measured.
_POWER = 0.7


@dataclass(frozen=True, slots=True)
class Sample:
    """The keys and values of some tokens, one behind the other."""

    # Position in the sequence of the first token.
    start: int
    # safetensors name of the element type.
    dtype: str
    # Keys, then values, ``(L, 2 H, T, D)``, held as NumPy holds the dtype.
    x: Array
    # Of the log-probability of what the model says next, in float32 or as the bits of
    # bfloat16: one for each time that it was drawn.
    gradients: tuple[Array, ...] = ()

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self.x.nbytes + sum(each.nbytes for each in self.gradients)

    def in_memory(self) -> Sample:
        """Return it without its gradients, and in no file."""
        return replace(self, x=np.array(self.x), gradients=())


@dataclass(frozen=True, slots=True)
class Rotation:
    """How a key's position rotates it, in all of some layers."""

    # Angle per token of each pair, ``(pairs,)``.
    frequencies: Doubles
    is_traditional: bool


NO_ROTATION = Rotation(np.zeros(0), is_traditional=False)


def make_group(
    layers: tuple[int, ...], num_heads: int, head_dim: int, rotation: Rotation
) -> BasisGroup:
    """Return layers of equal shape, divided into parts that are coded one by one."""
    most = max(1, MAX_WIDTH // (2 * head_dim))
    num_joined = max(
        n for n in range(1, num_heads + 1) if num_heads % n == 0 and n <= most
    )
    return BasisGroup(
        layers,
        num_heads,
        head_dim,
        num_joined,
        len(rotation.frequencies),
        rotation.is_traditional,
    )


class GroupFit:
    """Fits layers of equal shape, sample by sample.

    Samples are held as they are given, to learn from all of them how the scale of a row
    is told. Of those for which there is no room only sums are kept.

    Args:
        group: The layers.
        rotation: How positions rotate keys.

    Attributes:
        is_full: Of what is added now, only sums are kept.
    """

    def __init__(self, group: BasisGroup, rotation: Rotation) -> None:
        self.group = group
        self.samples: list[Sample] = []
        self._frequencies = np.tile(rotation.frequencies, (len(group.layers), 1))
        self._held_bytes = 0
        self.is_full = False
        self._num_rows = 0
        parts = (len(group.layers), group.num_parts)
        self._covariance = np.zeros((*parts, group.width, group.width))
        heads = 2 * group.num_joined
        self._metric = np.zeros((*parts, heads, group.head_dim, group.head_dim))

    def add(self, sample: Sample) -> None:
        """Learn from a sample; all have gradients, or none has."""
        if self.is_full:
            self._sum(sample)
            return
        self.samples.append(sample)
        self._held_bytes += sample.nbytes
        if self._held_bytes > _MAX_HELD_BYTES:
            self._begin()

    def finish(self) -> None:
        """Learn from what is held; nothing can be added any more."""
        if not self.is_full:
            self._begin()
        self._covariance /= self._num_rows
        self._metric /= self._num_rows

    @property
    def power(self) -> float:
        """What an error as large as the rows does, on average."""
        matrix = self._wide_metric()
        return float(np.einsum("lgij,lgji->lg", matrix, self._covariance).mean())

    def tensors(self, power: float) -> dict[str, Array]:
        """Return the tensors of these layers, by name.

        Args:
            power: Of all layers: what metrics are divided by.
        """
        matrix, scale = solve(self._covariance, self._wide_metric() / power)
        restored = matrix.astype(np.float64) * scale.astype(np.float64)[..., None, None]
        inverse = np.linalg.inv(restored)
        spread = ((inverse @ self._covariance) * inverse).sum(axis=-1)
        sigma = np.floor(2 * np.log2(np.maximum(spread, _LEAST)))
        return {
            "frequencies": self._frequencies,
            "matrix": matrix,
            "scale": scale,
            "mean": self._mean,
            "sigma": np.clip(sigma, -128, 127),
            "features": self._features,
            "importance": self._importance,
        }

    def _begin(self) -> None:
        """Learn how scales are told, and sum up what was held."""
        self.is_full = True
        means = [self._long(s, s.x).mean(axis=-2) for s in self.samples]
        counts = [s.x.shape[2] - _num_sinks(s) for s in self.samples]
        self._mean = np.average(means, axis=0, weights=counts).astype(np.float32)
        # Values are taken about zero: their size says how much they matter.
        self._mean[..., self.group.width // 2 :] = 0
        sizes = [log_sizes(self._centred(s), self.group) for s in self.samples]
        joined_sizes = np.concatenate(sizes, axis=-2)
        deviation = np.maximum(joined_sizes.std(axis=-2), 1e-3)
        self._features = np.stack([joined_sizes.mean(axis=-2), deviation], axis=-2)
        self._has_gradients = bool(self.samples[0].gradients)
        if self._has_gradients:
            told = describe(joined_sizes, self._features)
            self._importance = self._learned_importance(told)
        else:
            self._importance = self._usual_importance()
            spread = [np.square(self._centred(s)).mean(axis=-2) for s in self.samples]
            self._spread = np.average(spread, axis=0, weights=counts)
        for sample in self.samples:
            self._sum(sample)
        del self.samples[2:]  # the others are needed no more
        self.samples = [s.in_memory() for s in self.samples]

    def _centred(self, sample: Sample) -> Floats:
        return np.asarray(self._long(sample, sample.x) - self._mean[:, :, None])

    def _sum(self, sample: Sample) -> None:
        rows = self._centred(sample)
        told = describe(log_sizes(rows, self.group), self._features)
        scale = np.exp2(exponents_of(told, self._importance) / 2)[..., None]
        rows /= scale
        self._covariance += rows.swapaxes(-1, -2) @ rows
        self._num_rows += rows.shape[-2]
        for gradient in sample.gradients:
            found = self._long(sample, gradient) * scale
            self._metric += self._products(found) / len(sample.gradients)

    def _products(self, gradient: Floats) -> Doubles:
        """Return products of each head's gradients, ``(L, G, 2 h, D, D)``."""
        heads = gradient.reshape(*gradient.shape[:-1], -1, self.group.head_dim)
        heads = np.moveaxis(heads, -2, -3)
        return np.asarray(heads.swapaxes(-1, -2) @ heads, np.float64)

    def _wide_metric(self) -> Doubles:
        """Return what an error does, ``(L, G, N, N)``."""
        group, dim = self.group, self.group.head_dim
        found = np.zeros(self._covariance.shape)
        if not self._has_gradients:
            self._put_usual_metric(found)
            return found
        for head in range(2 * group.num_joined):
            part = slice(head * dim, (head + 1) * dim)
            found[..., part, part] = self._metric[:, :, head]
        ridge = _RIDGE * np.einsum("lgii->lg", found) / group.width
        return np.asarray(found + ridge[..., None, None] * np.eye(group.width))

    def _put_usual_metric(self, found: Doubles) -> None:
        """Write that every number of a head matters alike."""
        heads = self._spread.reshape(
            *self._spread.shape[:2], 2, -1, self.group.head_dim
        )
        size = heads.mean(axis=-1, keepdims=True) * np.ones_like(heads)
        size[:, :, 1] *= VALUE_RATIO**2
        diagonal = 1 / np.maximum(size.reshape(self._spread.shape), _LEAST)
        where = np.arange(self.group.width)
        found[..., where, where] = diagonal

    def _usual_importance(self) -> Floats:
        """Return that rows with large values matter less."""
        joined_heads = self.group.num_joined
        found = np.zeros((*self._mean.shape[:2], 6 * joined_heads), np.float32)
        deviation = self._features[..., 1, joined_heads:]
        values = slice(1 + joined_heads, 1 + 2 * joined_heads)
        found[..., values] = 2 * USUAL_SLOPE * deviation / joined_heads
        return found

    def _learned_importance(self, told: Floats) -> Floats:
        """Return how the scales of rows are told from what they do."""
        for sample in self.samples:
            for gradient in sample.gradients:
                self._metric += self._products(self._long(sample, gradient))
        half = np.linalg.cholesky(np.linalg.inv(self._wide_metric()))
        self._metric[...] = 0
        harm = np.concatenate(
            [self._harm(s, half.astype(np.float32)) for s in self.samples], axis=-1
        )
        harm /= np.maximum(harm.mean(axis=-1, keepdims=True), _LEAST)
        weights = np.empty((*told.shape[:2], told.shape[-1]))
        for where in np.ndindex(*told.shape[:2]):
            weights[where] = regress(told[where], harm[where])
            weights[where][0] -= (told[where] @ weights[where]).mean()
        return np.asarray(-_POWER / np.log(2) * weights, np.float32)

    def _harm(self, sample: Sample, half: Floats) -> Floats:
        """Return what an error in each row does, ``(L, G, T)``."""
        drawn = (self._long(sample, gradient) for gradient in sample.gradients)
        found = [np.square(g @ half).mean(axis=-1) for g in drawn]
        return np.asarray(np.mean(found, axis=0))

    def _long(self, sample: Sample, x: Array) -> Floats:
        """Return the rows behind the sinks, or their gradients, keys turned back."""
        wide = unrotated(sample, x, self._frequencies, self.group)
        return joined(wide, self.group)


USUAL_SLOPE = 0.5
"""How far, in rows alone, errors may grow with the size of values; measured."""


def regress(told: Floats, harm: Floats) -> Doubles:
    """Return weights with which ``exp(told @ weights)`` is nearest to harm.

    A regression of Gamma-distributed numbers: only their ratios count.

    Args:
        told: What is known of each row, ``(T, F)``.
        harm: What an error in it does, ``(T,)``, of mean 1.
    """
    x, weights = told.astype(np.float64), np.zeros(told.shape[-1])
    ridge = 3e-3 * len(x) * np.eye(len(weights))
    ridge[0, 0] = 0
    curvature = np.linalg.inv(x.T @ x + ridge + _LEAST * np.eye(len(weights)))

    def loss(tried: Doubles) -> float:
        said = np.clip(x @ tried, -12, 12)
        return float((harm * np.exp(-said) + said).sum() + tried @ ridge @ tried / 2)

    best, step = loss(weights), 1.0
    for _ in range(60):
        said = np.clip(x @ weights, -12, 12)
        move = curvature @ (x.T @ (harm * np.exp(-said) - 1) - ridge @ weights)
        tried = loss(weights + step * move)
        if tried < best:
            weights, best, step = weights + step * move, tried, min(1.0, 2 * step)
        else:
            step /= 4
            if step < 1e-4:
                break
    return weights


def finish_basis(
    fits: Sequence[GroupFit],
    about: JSON,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> bytes:
    """Return the file of a basis of layers that were fitted.

    Args:
        fits: The layers; each has seen the same samples.
        about: How they came about.
        progress: Called with (rates done, rates in all).
    """
    for fit in fits:
        fit.finish()
    power = float(np.mean([fit.power for fit in fits]))
    groups = tuple(fit.group for fit in fits)
    blank = BasisFile(groups, dict.fromkeys(RATES, 0), about, {})
    tensors = {
        f"{number}.{name}": array
        for number, fit in enumerate(fits)
        for name, array in fit.tensors(power).items()
    }
    raw = {
        name: tensors[name].astype(_HELD[dtype]).tobytes()
        for name, (dtype, _) in blank.specs().items()
    }
    unset = BasisFile(groups, blank.steps, about, raw)
    steps = choose_steps(unset, [fit.samples for fit in fits], progress)
    return basis_to_bytes(BasisFile(groups, steps, about, raw))


_HELD = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1"}


def choose_steps(
    basis: BasisFile,
    samples: Sequence[Sequence[Sample]],
    progress: Callable[[int, int], None],
) -> dict[str, int]:
    """Return, for each rate, the finest step with which samples take no more bits.

    Args:
        basis: Its groups and tensors.
        samples: Some of each group.
        progress: Called with (rates done, rates in all).
    """
    fitted = fitted_from_file(basis)
    sizes: dict[int, float] = {}

    def bits(step: int) -> float:
        if step not in sizes:
            array = Fit("0", "0" * 64, replace(fitted, steps={"0": step}))
            sizes[step] = _measure(Codec(array, array.compressor), basis, samples)
        return sizes[step]

    steps: dict[str, int] = {}
    low = _STEPS[-1]
    for done, rate in enumerate(RATES):  # a higher rate has a finer step
        progress(done, len(RATES))
        high = low
        while low > _STEPS[0] and bits(low) <= float(rate):
            high, low = low, low - 8
        while low < high:
            middle = (low + high) // 2
            if bits(middle) > float(rate):
                low = middle + 1
            else:
                high = middle
        steps[rate] = low
    progress(len(RATES), len(RATES))
    return steps


def _measure(
    codec: Codec, basis: BasisFile, samples: Sequence[Sequence[Sample]]
) -> float:
    """Return the bits per number that samples take, without exact sinks."""
    nbytes = count = 0
    for group, some in zip(basis.groups, samples, strict=True):
        for sample in some:
            for start, x in _blocks(sample):
                layers, heads, tokens, dim = x.shape
                rows = Rows(
                    "kv", start, (layers, heads, tokens, dim), sample.dtype,
                    group.layers,
                )  # fmt: skip
                parts = codec.encode(list(x), rows, "")
                nbytes += sum(p.nbytes for p in parts if p.name != "sinks")
                count += x.size
    return nbytes * 8 / count


def _blocks(sample: Sample) -> Iterator[tuple[int, Array]]:
    """Yield a sample as blocks of a store: position and rows."""
    for begin in range(0, sample.x.shape[2], 256):
        yield sample.start + begin, sample.x[:, :, begin : begin + 256]


def solve(covariance: Doubles, metric: Doubles) -> tuple[Array, Array]:
    """Return matrices, float16 with their scales, that uncorrelate and weigh errors.

    Args:
        covariance: Of rows, ``(L, G, N, N)``.
        metric: What an error does, ``(L, G, N, N)``, positive definite.
    """
    values, vectors = np.linalg.eigh(metric)
    root = np.sqrt(np.maximum(values, _LEAST * values.max(axis=-1, keepdims=True)))
    half = vectors * root[..., None, :] @ vectors.swapaxes(-1, -2)
    back = vectors / root[..., None, :] @ vectors.swapaxes(-1, -2)
    _, turned = np.linalg.eigh(half @ covariance @ half)
    matrix = back @ turned[..., ::-1]
    scale = np.abs(matrix).max(axis=(-1, -2)).astype(np.float32)
    return (matrix / scale[..., None, None]).astype(np.float16), scale


def unrotated(
    sample: Sample, x: Array, frequencies: Doubles, group: BasisGroup
) -> Floats:
    """Return rows behind the sinks, or their gradients, keys turned to position 0.

    Args:
        sample: What they are of.
        x: The rows or gradients, ``(L, 2 H, T, D)``.
        frequencies: ``(L, pairs)``.
        group: The layers.
    """
    sinks = _num_sinks(sample)
    gradients = "BF16" if x.dtype == np.uint16 else "F32"
    dtype = sample.dtype if x is sample.x else gradients
    wide = widen(np.ascontiguousarray(x[:, :, sinks:]), dtype)
    if group.num_pairs:
        cos, sin = angles(frequencies, sample.start + sinks, wide.shape[2])
        keys = wide[:, : group.num_heads]
        keys[...] = rotate(
            keys, cos[:, None], -sin[:, None], is_traditional=group.is_traditional
        )
    return wide


def _num_sinks(sample: Sample) -> int:
    return max(0, min(NUM_SINKS - sample.start, int(sample.x.shape[2])))


def find_rotation(
    samples: Sequence[Sample], candidates: Sequence[Rotation]
) -> Rotation:
    """Return the rotation without which keys are the most alike."""

    def spread(rotation: Rotation) -> float:
        layers, heads, _, dim = samples[0].x.shape
        group = make_group(tuple(range(layers)), heads // 2, dim, rotation)
        frequencies = np.tile(rotation.frequencies, (layers, 1))
        rows = [unrotated(s, s.x, frequencies, group) for s in samples]
        keys = np.concatenate([x[:, : heads // 2] for x in rows], axis=2)
        keys -= keys.mean(axis=2, keepdims=True)
        covariance = keys.swapaxes(-1, -2) @ keys / keys.shape[2]
        values = np.linalg.eigvalsh(covariance)
        floor = 1e-6 * values.max(axis=-1, keepdims=True)
        return float(np.log(np.maximum(values, floor + _LEAST)).mean())

    return min(candidates, key=spread)


def usual_rotations(dim: int, more: Sequence[float] = ()) -> list[Rotation]:
    """Return the rotations that models of this head size have, and none.

    Args:
        dim: ``D``.
        more: Further bases than the usual ones.
    """
    found = [NO_ROTATION]
    for base in dict.fromkeys((*more, 1e4, 1e5, 5e5, 1e6, 5e6, 8e6, 1e7)):
        for turned in dict.fromkeys((dim, dim // 2, dim // 4)):
            frequencies = base ** (-np.arange(0, turned - 1, 2) / turned)
            found += [Rotation(frequencies, is_old) for is_old in (False, True)]
    return found

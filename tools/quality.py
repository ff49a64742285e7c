"""How far a restored prefix moves the next tokens, per codec, beside mlx's own cache.

For each context, the model reads a prefix; the rows go through a codec, in a store,
and come back; then the model reads the tokens that follow, on the exact rows and on
the restored ones. Printed, and written as CSV: bytes per element, KL divergence of the
next-token distributions (mean and 99th percentile, in nats), how often the first choice
is the same, and the change in perplexity.

With `--basis`, a file in `bases/` of a store, its `fit` codecs are measured beside the
others. The texts are then licences, and modules of Python that `kvstore calibrate` does
not learn from; else they are Python's language reference, which it does.

    python tools/quality.py MODEL [--basis F] [--texts F ...] [--codec NAME] [--csv F]
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from kvstore.blas import load_openblas

load_openblas()

import mlx.core as mx  # noqa: E402  (after OpenBLAS)
import numpy as np  # noqa: E402
from mlx_lm.models.cache import KVCache, make_prompt_cache  # noqa: E402

import kvstore  # noqa: E402
from kvstore.format.basis import basis_digest, parse_basis  # noqa: E402
from kvstore.storage.bases import add_basis  # noqa: E402
from kvstore.storage.folder import create_folder  # noqa: E402

CODECS = ("planes+zstd", "turbo4+zstd", "turbo3+zstd", "turbo2+zstd", "turbo5v3+zstd")
AFFINE_BITS = (8, 6, 5, 4, 3, 2)
# None of those that `kvstore.models.corpus` takes.
_MODULES = ("difflib", "plistlib", "zipfile", "optparse", "asyncio.base_events")
_MAX_LETTERS = 20_000


@dataclass(frozen=True)
class Context:
    """A prefix, what follows, and what the model makes of it undisturbed."""

    prefix: list[int]
    following: list[int]
    prompt_cache: list[Any]
    logprobs: np.ndarray


@dataclass(frozen=True)
class Quality:
    """One line of the table."""

    codec: str
    bits_per_element: float
    mean_kl: float
    p99_kl: float
    same_choice: float
    perplexity_ratio: float


def main() -> None:
    """Measure, print and write."""
    options = parse_options()
    from mlx_lm import load

    model, tokenizer = load(options.model)[:2]
    is_usual = options.texts or not options.basis
    texts = read_texts(options.texts) if is_usual else unlearned_texts()
    tokens = [tokenizer.encode(text) for text in texts]
    contexts = [
        make_context(model, part[: options.prefix], part[options.prefix :])
        for part in cut(tokens, options.contexts, options.prefix + options.following)
    ]
    rows = []
    basis = options.basis.read_bytes() if options.basis else None
    for name in options.codec or [*fit_codecs(basis), *CODECS]:
        restore = restore_from_store(name, basis)
        rows.append(measure(model, contexts, name.partition("@")[0], restore))
        print_row(rows[-1])
    for bits in () if options.codec else AFFINE_BITS:
        name = f"mlx affine {bits}"
        rows.append(measure(model, contexts, name, restore_from_affine(bits)))
        print_row(rows[-1])
    if options.csv:
        write_csv(options.csv, rows)
    if options.plot:
        plot(options.plot, rows)


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or repository that mlx-lm loads")
    parser.add_argument("--texts", nargs="+", type=Path, help="texts to read")
    parser.add_argument("--basis", type=Path, help="measure its codecs too")
    parser.add_argument("--codec", action="append", help="only these codecs")
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--following", type=int, default=256)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG; needs matplotlib")
    return parser.parse_args()


def read_texts(paths: Sequence[Path] | None) -> list[str]:
    """Return the texts to read; Python's own language reference by default."""
    if paths:
        return [path.read_text() for path in paths]
    from pydoc_data.topics import topics

    return ["\n\n".join(topics[name] for name in sorted(topics))]


def unlearned_texts() -> list[str]:
    """Return texts that no basis has learned from: licences, and other modules."""
    code = [inspect.getsource(importlib.import_module(name)) for name in _MODULES]
    return [text[:_MAX_LETTERS] for text in (*licences(), *code)]


def licences() -> list[str]:
    """Return the longer licences of installed packages, each once."""
    starts = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            if file.name.upper().startswith(starts):
                text = Path(distribution.locate_file(file)).read_text(errors="replace")
                if len(text) > _MAX_LETTERS // 2:
                    found[" ".join(text.split())[:500]] = text
    return sorted(found.values())


def fit_codecs(basis: bytes | None) -> list[str]:
    """Return the codecs of a basis."""
    if basis is None:
        return []
    digest = basis_digest(basis)
    return [f"fit{rate}@{digest}+zstd" for rate in parse_basis(basis, digest).steps]


def cut(texts: Sequence[list[int]], count: int, length: int) -> list[list[int]]:
    """Return ``count`` stretches of ``length`` tokens, evenly spread over the texts."""
    tokens = [token for text in texts for token in text]
    if len(tokens) < count * length:
        sys.exit(f"error: the texts have {len(tokens)} tokens, not {count * length}")
    step = len(tokens) // count
    return [tokens[i * step : i * step + length] for i in range(count)]


def make_context(model: Any, prefix: list[int], following: list[int]) -> Context:
    """Read a prefix and what follows without any codec."""
    prompt_cache = make_prompt_cache(model)
    mx.eval(model(mx.array([prefix]), cache=prompt_cache))
    logprobs = read_on(model, copy_cache(prompt_cache), following)
    return Context(prefix, following, prompt_cache, logprobs)


def copy_cache(prompt_cache: Sequence[Any]) -> list[Any]:
    """Return caches of their own over the same rows."""
    copies = []
    for cache in prompt_cache:
        copy = KVCache()
        copy.update_and_fetch(*cache.keys_and_values())
        copies.append(copy)
    return copies


def read_on(model: Any, prompt_cache: list[Any], tokens: list[int]) -> np.ndarray:
    """Return log-probabilities of what comes after each of ``tokens``."""
    logits = model(mx.array([tokens]), cache=prompt_cache)[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.asarray(logprobs).astype(np.float64)


def restore_from_store(codec: str, basis: bytes | None = None) -> Any:
    """Return a function that takes a context through a store."""

    def restore(context: Context) -> tuple[list[Any], float]:
        model = kvstore.Fingerprint({"weights": "measured"}, "measured")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store"
            made = create_folder(path)
            if basis is not None:
                add_basis(made, basis)
            with kvstore.Store(path, codec) as store:
                entry = store.save(context.prefix, context.prompt_cache, model)
                prompt_cache, _ = store.load_entry(entry.id, model)
        return prompt_cache, entry.nbytes * 8

    return restore


def restore_from_affine(bits: int) -> Any:
    """Return a function that takes a context through mlx's affine quantization."""

    def restore(context: Context) -> tuple[list[Any], float]:
        restored, stored_bits = [], 0.0
        for cache in context.prompt_cache:
            copy = KVCache()
            sides = []
            for rows in cache.keys_and_values():
                parts = mx.quantize(rows, group_size=64, bits=bits)
                # With float16 scales and biases, as a 16-bit model has them.
                stored_bits += rows.size * (bits + 2 * 16 / 64)
                sides.append(mx.dequantize(*parts, group_size=64, bits=bits))
            copy.update_and_fetch(*sides)
            restored.append(copy)
        return restored, stored_bits

    return restore


def measure(
    model: Any, contexts: Sequence[Context], name: str, restore: Any
) -> Quality:
    """Return one line of the table, over all contexts."""
    divergences, same, changes, bits = [], [], [], []
    for context in contexts:
        prompt_cache, stored_bits = restore(context)
        logprobs = read_on(model, prompt_cache, context.following)
        exact = context.logprobs
        divergences.append((np.exp(exact) * (exact - logprobs)).sum(axis=-1))
        same.append(exact.argmax(axis=-1) == logprobs.argmax(axis=-1))
        changes.append(np.mean(list(losses(context, logprobs))))
        bits.append(stored_bits / num_elements(context))
    everything = np.concatenate(divergences)
    return Quality(
        name,
        float(np.mean(bits)),
        float(everything.mean()),
        float(np.percentile(everything, 99)),
        float(np.concatenate(same).mean()),
        float(np.exp(np.mean(changes))),
    )


def losses(context: Context, logprobs: np.ndarray) -> Iterator[float]:
    """Yield by how much each following token became less likely, in nats."""
    for i, token in enumerate(context.following[1:]):
        yield context.logprobs[i, token] - logprobs[i, token]


def num_elements(context: Context) -> int:
    """Return how many numbers the prefix's rows have."""
    return sum(
        rows.size for cache in context.prompt_cache for rows in cache.keys_and_values()
    )


def print_row(row: Quality) -> None:
    """Print one line."""
    print(
        f"{row.codec:16} {row.bits_per_element:6.2f} bits  KL {row.mean_kl:.5f}"
        f"  p99 {row.p99_kl:.4f}  same {row.same_choice:6.1%}"
        f"  perplexity x{row.perplexity_ratio:.4f}",
        flush=True,
    )


def write_csv(path: Path, rows: Sequence[Quality]) -> None:
    """Write the table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Quality)])
        writer.writerows(astuple(row) for row in rows)


def plot(path: Path, rows: Sequence[Quality]) -> None:
    """Draw divergence over bits, of the store's codecs and of mlx's own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label in ("fit", "turbo", "mlx affine"):
        mine = [row for row in rows if row.codec.startswith(label)]
        lossy = sorted(
            (row.bits_per_element, row.mean_kl) for row in mine if row.mean_kl > 1e-9
        )
        axis.plot([x for x, _ in lossy], [y for _, y in lossy], "o-", label=label)
    axis.set(xlabel="bits per number", ylabel="KL divergence, mean", yscale="log")
    axis.grid(visible=True, alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

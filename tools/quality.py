"""How far a restored prefix moves the next tokens, per codec, beside mlx's own cache.

For each context, the model reads a prefix; the rows go through a codec, in a store,
and come back; then the model reads the tokens that follow, on the exact rows and on
the restored ones. Printed, and written as CSV: bytes per element, KL divergence of the
next-token distributions (mean, its standard error, and 99th percentile, in
nats), how often the first choice is the same, and the change in perplexity.

With `--basis`, a file in `bases/` of a store, its `fit` codecs are measured beside the
others. The texts are then for reports: none that `kvstore calibrate` learns from, nor
any by which something of the codecs was chosen (those were Vim's reference and Node's).
`--kinds` names what to read: `english` (the system's licences and Perl's messages),
`licences` (of Python packages), `code`, `chat`, `json`, or a language that Vim's tutor
is in, such as `de`. Without a basis they are Python's language reference, which
`calibrate` learns from.

Of a model with sliding windows, bits are those of the layers that attend to everything:
the others are stored without loss.

With `--needles`, six digits lie somewhere in each prefix, and are asked for; it counts
how often all of them are the first choice. With `--keys 4` there are four such keys, of
four people, and one is asked for. In `code`, a function returns them, and a call of it
is to be completed.

    python tools/quality.py MODEL [--basis F] [--kinds K ...] [--bf16] [--needles N]
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import inspect
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
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
from kvstore.models.corpus import chat_of, text_start, tools_of  # noqa: E402
from kvstore.models.probe import compare, log_probabilities  # noqa: E402
from kvstore.storage.bases import add_basis  # noqa: E402
from kvstore.storage.folder import create_folder  # noqa: E402

CODECS = ("planes+zstd", "turbo4+zstd", "turbo3+zstd", "turbo2+zstd", "turbo5v3+zstd")
AFFINE_BITS = (8, 6, 5, 4, 3, 2)
# None of those that `kvstore.models.corpus` takes.
_MODULES = ("difflib", "plistlib", "zipfile", "optparse", "asyncio.base_events")
_MAX_LETTERS = 20_000
_TOLD = "\n\nThe secret pass key{0} is {1}. Remember it: {1}.\n\n"
_ASKED = "\n\nWhat is the secret pass key{0}? The secret pass key{0} is "
_TOLD_IN_CODE = "\n\ndef pass_key{0}():\n    return {1}\n\n"
_ASKED_IN_CODE = "\n\nassert pass_key{0}() == "
_OWNERS = ("Amber", "Bruno", "Clara", "Dario", "Elena", "Felix", "Greta", "Hanno")


@dataclass(frozen=True)
class Context:
    """A prefix, what follows, and what the model makes of it undisturbed."""

    prefix: list[int]
    following: list[int]
    prompt_cache: list[Any]
    logprobs: mx.array
    # How many of the last tokens that follow are the answer to a question.
    num_answer: int = 0


@dataclass(frozen=True)
class Quality:
    """One line of the table."""

    kind: str
    codec: str
    bits_per_element: float
    mean_kl: float
    kl_error: float
    p99_kl: float
    same_choice: float
    perplexity_ratio: float
    answered: int
    num_contexts: int


def main() -> None:
    """Measure, print and write."""
    options = parse_options()
    from mlx_lm import load

    model, tokenizer = load(options.model)[:2]
    basis = options.basis.read_bytes() if options.basis else None
    rows = []
    ways = {
        name.partition("@")[0]: restore_from_store(name, basis, is_narrow=options.bf16)
        for name in options.codec or [*fit_codecs(basis), *CODECS]
    }
    for bits in () if options.codec else AFFINE_BITS:
        ways[f"mlx affine {bits}"] = restore_from_affine(bits)
    for kind, contexts in every_context(model, tokenizer, options):
        for row in measure(model, contexts, kind, ways):
            rows.append(row)
            print_row(row)
    if options.csv:
        write_csv(options.csv, rows)
    if options.plot:
        plot(options.plot, [row for row in rows if row.kind == rows[0].kind])


def every_context(
    model: Any, tokenizer: Any, options: argparse.Namespace
) -> Iterator[tuple[str, Iterator[Context]]]:
    """Yield each kind of text, and its contexts."""
    start = text_start(tokenizer)
    length = options.prefix + options.following - len(start)
    kinds = options.kinds or (["english"] if options.basis else ["python"])
    for kind in ["given"] if options.texts else kinds:
        texts = (
            read_texts(options.texts) if options.texts else texts_of(kind, tokenizer)
        )
        tokens = [tokenizer.encode(text)[len(start) :] for text in texts]
        if options.needles:
            filler = [token for text in tokens for token in text]
            hidden = needles(model, tokenizer, filler, options, kind == "code")
            yield f"{kind}, needles", hidden
            continue
        parts = [start + part for part in cut(tokens, options.contexts, length)]
        made = (
            make_context(model, part[: options.prefix], part[options.prefix :])
            for part in parts
        )
        yield kind, made


def needles(
    model: Any,
    tokenizer: Any,
    filler: list[int],
    options: argparse.Namespace,
    is_code: bool,
) -> Iterator[Context]:
    """Yield contexts with six digits somewhere in them, and the question for them."""
    chosen = random.Random(5)
    for number in range(options.needles):
        depth = (number + 0.5) / options.needles
        prefix, question, answer = hide(
            tokenizer, filler, options, depth, chosen, is_code
        )
        yield make_context(model, prefix, question + answer, len(answer))


def hide(
    tokenizer: Any,
    filler: Sequence[int],
    options: argparse.Namespace,
    depth: float,
    chosen: random.Random,
    is_code: bool,
) -> tuple[list[int], list[int], list[int]]:
    """Return a prefix with keys in it, the question for the first, and the answer.

    Args:
        tokenizer: The model's.
        filler: What stands around them.
        options: How many keys, and how long the prefix is.
        depth: Where the first stands, 0 to 1; the others are as far apart as can be.
        chosen: Chooses the keys and what stands around them.
        is_code: Functions return the keys.
    """
    start = text_start(tokenizer)
    told_as, asked = (_TOLD_IN_CODE, _ASKED_IN_CODE) if is_code else (_TOLD, _ASKED)
    of = "_of_" if is_code else " of "
    owners = [f"{of}{name}" for name in _OWNERS[: options.keys]]
    if options.keys == 1:
        owners = [""]
    keys = ["".join(chosen.choices("0123456789", k=6)) for _ in owners]
    told = [told_as.format(owner, key) for owner, key in zip(owners, keys, strict=True)]
    *hidden, question, answer = (
        tokenizer.encode(text)[len(start) :]
        for text in (*told, asked.format(owners[0]), keys[0])
    )
    count = options.prefix - sum(map(len, hidden)) - len(start)
    if len(filler) <= count:
        sys.exit(f"error: the texts have {len(filler)} tokens, not {count}")
    begin = chosen.randrange(len(filler) - count)
    around = list(filler[begin : begin + count])
    places = [int((depth + i / len(hidden)) % 1 * count) for i in range(len(hidden))]
    # The last first, so that those before it stay where they are.
    for place, needle in sorted(zip(places, hidden, strict=True), reverse=True):
        around[place:place] = needle
    return start + around, question, answer


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or repository that mlx-lm loads")
    parser.add_argument("--texts", nargs="+", type=Path, help="texts to read")
    parser.add_argument("--basis", type=Path, help="measure its codecs too")
    parser.add_argument("--codec", action="append", help="only these codecs")
    parser.add_argument("--kinds", nargs="+", help="which texts to read")
    parser.add_argument("--bf16", action="store_true", help="store rows of 16 bits")
    parser.add_argument("--needles", type=int, default=0, metavar="N")
    parser.add_argument(
        "--keys", type=int, default=1, choices=range(1, 9), help="in each of those"
    )
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--following", type=int, default=256)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG; needs matplotlib")
    return parser.parse_args()


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Return the texts of files."""
    return [path.read_text() for path in paths]


def texts_of(kind: str, tokenizer: Any) -> list[str]:
    """Return texts of a kind."""
    if kind == "python":
        from pydoc_data.topics import topics

        return ["\n\n".join(topics[name] for name in sorted(topics))]
    if kind == "english":
        messages = "".join(system_texts("perl/*/pod/perldiag.pod"))
        parts = [messages[begin:] for begin in range(20_000, len(messages), 80_000)]
        texts = *system_texts("common-licenses/*-[0-9]*"), *parts
        return [text[:_MAX_LETTERS] for text in texts]
    if kind == "licences":
        return [text[:_MAX_LETTERS] for text in licences()]
    if kind == "code":
        return [inspect.getsource(importlib.import_module(name)) for name in _MODULES]
    if kind == "chat":
        return [chat_of(tokenizer, _MODULES)]
    if kind == "json":
        return [json.dumps(list(tools_of(_MODULES)), indent=1)]
    return system_texts(f"vim/vim*/tutor/tutor.{kind}.utf-8")


def system_texts(pattern: str) -> list[str]:
    """Return what the system has of such files, each once."""
    found = sorted({path.resolve() for path in Path("/usr/share").glob(pattern)})
    return [path.read_text(errors="replace") for path in found]


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
    if not tokens:
        sys.exit("error: the system has no such texts; give others with `--texts`")
    if len(tokens) < count * length:
        sys.exit(f"error: the texts have {len(tokens)} tokens, not {count * length}")
    step = len(tokens) // count
    return [tokens[i * step : i * step + length] for i in range(count)]


def make_context(
    model: Any, prefix: list[int], following: list[int], num_answer: int = 0
) -> Context:
    """Read a prefix and what follows without any codec."""
    prompt_cache = make_prompt_cache(model)
    model(mx.array([prefix]), cache=prompt_cache)
    mx.eval([cache.state for cache in prompt_cache])
    logprobs = log_probabilities(model, copy_cache(prompt_cache), following)
    return Context(prefix, following, prompt_cache, logprobs, num_answer)


def copy_cache(prompt_cache: Sequence[Any], dtype: Any = None) -> list[Any]:
    """Return caches of their own over the same rows, as a dtype if one is given."""
    copies = copy.deepcopy(list(prompt_cache))
    for cache in copies if dtype else ():
        cache.keys, cache.values = (x.astype(dtype) for x in (cache.keys, cache.values))
    return copies


def is_coded(cache: Any) -> bool:
    """Whether a codec may lose something of a layer: it attends to everything."""
    return type(cache) is KVCache


def restore_from_store(
    codec: str, basis: bytes | None = None, *, is_narrow: bool = False
) -> Any:
    """Return a function that takes a context through a store, as 16 bits or not."""

    def restore(context: Context) -> tuple[list[Any], float]:
        model = kvstore.Fingerprint({"weights": "measured"}, "measured")
        rows = copy_cache(context.prompt_cache, mx.bfloat16 if is_narrow else None)
        windows = [cache for cache in rows if not is_coded(cache)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store"
            made = create_folder(path)
            if basis is not None:
                add_basis(made, basis)
            with kvstore.Store(path, codec) as store:
                entry = store.save(context.prefix, rows, model)
                prompt_cache, _ = store.load_entry(entry.id, model)
                nbytes = entry.nbytes
                if windows:
                    nbytes -= store.save(context.prefix, windows, model).nbytes
        given = context.prompt_cache[0].keys.dtype
        return copy_cache(prompt_cache, given), nbytes * 8

    return restore


def restore_from_affine(bits: int) -> Any:
    """Return a function that takes a context through mlx's affine quantization."""

    def restore(context: Context) -> tuple[list[Any], float]:
        restored, stored_bits = [], 0.0
        for cache in copy_cache(context.prompt_cache):
            sides = cache.keys_and_values() if is_coded(cache) else ()
            decoded = []
            for rows in sides:
                parts = mx.quantize(rows, group_size=64, bits=bits)
                # With float16 scales and biases, as a 16-bit model has them.
                stored_bits += rows.size * (bits + 2 * 16 / 64)
                decoded.append(mx.dequantize(*parts, group_size=64, bits=bits))
            if decoded:
                cache = KVCache()
                cache.update_and_fetch(*decoded)
            restored.append(cache)
        return restored, stored_bits

    return restore


@dataclass
class Tally:
    """What one codec did, context by context."""

    bits: list[float] = field(default_factory=list)
    divergences: list[np.ndarray] = field(default_factory=list)
    same: list[np.ndarray] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    answered: int = 0

    def add(self, context: Context, logprobs: mx.array, bits: float) -> None:
        """Count what a model says on restored rows."""
        divergences, same = compare(context.logprobs, logprobs)
        self.divergences.append(divergences)
        self.same.append(same)
        self.losses.append(mean_loss(context, logprobs))
        self.bits.append(bits / num_elements(context))
        self.answered += is_answered(context, logprobs)

    def summed_up(self, kind: str, name: str) -> Quality:
        """Return one line of the table."""
        each = [found.mean() for found in self.divergences]
        return Quality(
            kind,
            name,
            float(np.mean(self.bits)),
            float(np.mean(each)),
            float(np.std(each, ddof=1) / len(each) ** 0.5) if each[1:] else 0.0,
            float(np.percentile(np.concatenate(self.divergences), 99)),
            float(np.concatenate(self.same).mean()),
            float(np.exp(np.mean(self.losses))),
            self.answered,
            len(each),
        )


def measure(
    model: Any, contexts: Iterable[Context], kind: str, ways: Mapping[str, Any]
) -> list[Quality]:
    """Return the lines of the table, over all contexts, of what restores them."""
    tallies = {name: Tally() for name in ways}
    for number, context in enumerate(contexts, 1):
        for name, restore in ways.items():
            prompt_cache, bits = restore(context)
            logprobs = log_probabilities(model, prompt_cache, context.following)
            tallies[name].add(context, logprobs, bits)
        print(f"{kind}: {number} read", file=sys.stderr, flush=True)
    return [tally.summed_up(kind, name) for name, tally in tallies.items()]


def is_answered(context: Context, logprobs: mx.array) -> bool:
    """Whether all of the answer is the first choice."""
    answer = context.following[-context.num_answer :]
    chosen = logprobs.argmax(axis=-1)[-context.num_answer - 1 : -1]
    return bool(context.num_answer) and chosen.tolist() == answer


def mean_loss(context: Context, logprobs: mx.array) -> float:
    """Return by how much the following tokens became less likely, in nats."""
    tokens = mx.array(context.following[1:])[:, None]
    lost = (context.logprobs - logprobs)[:-1]
    return float(mx.take_along_axis(lost, tokens, axis=-1).mean().item())


def num_elements(context: Context) -> int:
    """Return how many numbers the prefix's rows have, of layers that are coded."""
    coded = filter(is_coded, context.prompt_cache)
    return sum(rows.size for cache in coded for rows in cache.keys_and_values())


def print_row(row: Quality) -> None:
    """Print one line."""
    answered = f"  answered {row.answered} of {row.num_contexts}"
    print(
        f"{row.kind:8} {row.codec:14} {row.bits_per_element:6.2f} bits"
        f"  KL {row.mean_kl:.5f} ±{row.kl_error:.5f}"
        f"  p99 {row.p99_kl:.4f}  same {row.same_choice:6.1%}"
        f"  perplexity x{row.perplexity_ratio:.4f}"
        f"{answered if row.kind.endswith('needles') else ''}",
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

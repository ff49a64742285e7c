"""Measure the first token after a changed head, and what a miss costs.

    python tools/changed_head.py .cache/smollm2

A prompt is saved, and asked for again with another date in its head: its rows are
re-anchored (`Store.load(…, near=)`), the rest is computed, and the first token is
chosen. That is compared with computing all of the prompt. Then a prompt that has
nothing in common with what is stored is looked for, with `near=` and without it, in a
store of some entries. All in turn, in one run, medians: of a first token seconds, of a
miss, which takes so few, seconds of the processor.
"""

import argparse
import importlib
import pydoc
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

HEAD = "You are a coding agent. It is {}. Answer briefly, and never invent files.\n"
DATES = ("Monday, March 9, 2026 at 06:00:31 PM", "Tuesday, March 10, 2026 at 9:17 AM")


def timed(work, *given, clock=time.perf_counter, **named):
    """Return what a call returns, and how long it took."""
    begin = clock()
    found = work(*given, **named)
    return found, clock() - begin


def first_token(model, tokens, cache):
    """Feed tokens to a prompt cache, and return the likeliest token that follows."""
    import mlx.core as mx

    for start in range(0, len(tokens), 2048):  # as mlx-lm does
        logits = model(mx.array([tokens[start : start + 2048]]), cache=cache)
        mx.eval(logits[0, -1], [layer.state for layer in cache])
    return int(logits[0, -1].argmax())


def compute(model, tokens):
    """Return the first token and the prompt cache of a prompt that is computed."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    return first_token(model, tokens, cache), cache


def rows_of_zeros(model, num_tokens):
    """Return a prompt cache as a save takes it, for entries that are looked through."""
    import mlx.core as mx

    _, made = compute(model, [1])
    for layer in made:
        shape = (1, layer.keys.shape[1], num_tokens - 1, layer.keys.shape[3])
        layer.update_and_fetch(*[mx.zeros(shape, layer.keys.dtype)] * 2)
    return made


def measure_hit(model, near, prompts, runs):
    """Print the time to the first token, computed and re-anchored."""
    import kvstore

    fingerprint = kvstore.Fingerprint({"weights": "these"})
    old, new = prompts
    seconds = {"computed": [], "re-anchored": []}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder, kvstore.Store(folder) as store:
            (_, cache), _ = timed(compute, model, old)
            store.save(old, cache, fingerprint)
            _, computed_s = timed(compute, model, new)
            (found, rest), load_s = timed(store.load, new, fingerprint, near=near)
            assert near.count(found) > len(new) // 2
            _, rest_s = timed(first_token, model, rest, found)
            seconds["computed"].append(computed_s)
            seconds["re-anchored"].append(load_s + rest_s)
    middle = {what: statistics.median(took) for what, took in seconds.items()}
    ratio = middle["re-anchored"] / middle["computed"]
    print(
        f"first token of {len(new):,} tokens: {middle['computed']:.3f} s computed,"
        f" {middle['re-anchored']:.3f} s re-anchored: {ratio:.1%} ({runs} runs)"
    )


def measure_miss(model, near, num_tokens, num_entries, runs):
    """Print by how much looking for what is near makes a miss longer."""
    import kvstore

    fingerprint = kvstore.Fingerprint({"weights": "these"})
    rng, rows = random.Random(0), rows_of_zeros(model, num_tokens)

    def prompt():
        return rng.choices(range(1000, 40_000), k=num_tokens)

    with tempfile.TemporaryDirectory() as folder, kvstore.Store(folder) as store:

        def miss(tokens, near):
            load, clock = store.load, time.process_time
            return timed(load, tokens, fingerprint, near=near, clock=clock)[1]

        for _ in range(num_entries):
            store.save(prompt(), rows, fingerprint)
        first_s = miss(prompt(), near)
        prompts = [prompt() for _ in range(runs)]
        pairs = [(miss(tokens, None), miss(tokens, near)) for tokens in prompts]
    plain, other = (statistics.median(took) for took in zip(*pairs, strict=True))
    more = statistics.median(b - a for a, b in pairs)
    print(
        f"a miss among {num_entries} entries: {1000 * plain:.1f} ms, with near="
        f" {1000 * other:.1f} ms: {1000 * more:.1f} ms more ({runs} runs); the first,"
        f" which reads their tokens: {1000 * first_s:.1f} ms"
    )


def main():
    """Measure both."""
    from kvstore.blas import load_openblas

    load_openblas()
    from mlx_lm import load

    import kvstore

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--entries", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    near = kvstore.Reanchoring(model)
    module = importlib.import_module("argparse")
    text = pydoc.plain(pydoc.render_doc(module))
    prompts = [
        tokenizer.encode(HEAD.format(date) + text, add_special_tokens=False)
        for date in DATES
    ]
    prompts = [list(tokens[: args.tokens]) for tokens in prompts]
    measure_hit(model, near, prompts, args.runs)
    measure_miss(model, near, args.tokens, args.entries, 4 * args.runs)


if __name__ == "__main__":
    main()

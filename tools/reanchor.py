"""Measure what re-anchoring costs: how far it moves the next-token distribution.

    python tools/reanchor.py --model .cache/smollm2 --texts 4

Each text is the help of a module of Python behind the head of a chat. The head changes;
the rows of the text are re-anchored, and the next 128 tokens are predicted on them and
on the exact rows. What is printed: the mean over the texts of the mean KL divergence,
its standard error, and how often the first choice is the same.
"""

import argparse
import importlib
import pydoc
import statistics
import time

HEAD = (
    "<|im_start|>system\nYou are a helpful assistant. Current date and time: {date}."
    " Working directory: /home/user/work\n{status}\n"
)
OLD = {"date": "Monday, March 9, 2026 at 06:00:31 PM", "status": "Branch: main"}
STATUS = "Branch: fix-parser\nModified: parser.py, README.md\nUntracked: notes.txt"
MODULES = (
    "statistics", "tarfile", "decimal", "logging", "mailbox", "difflib", "turtle",
    "argparse", "zipfile", "doctest", "configparser", "calendar",
)  # fmt: skip
NUM_NEXT = 128


def changes(text_tokens, encode, num_tokens):
    """Yield name, old prompt and new prompt of each change, with what comes next."""
    text, following = text_tokens[:num_tokens], text_tokens[num_tokens:]
    following = following[:NUM_NEXT]
    old = encode(HEAD.format(**OLD)) + text
    date = OLD | {"date": "Tuesday, November 24, 2026 at 09:17:02 AM"}
    yield "date", old, encode(HEAD.format(**date)) + text, following
    status = OLD | {"status": STATUS}
    yield "git status", old, encode(HEAD.format(**status)) + text, following
    third = num_tokens // 3
    cut = encode(HEAD.format(**OLD)) + text[:third] + text[third + 100 :]
    yield "100 tokens cut", old, cut, following


def measure(model, rotations, old, new, following):
    """Return mean KL, how often the first choice is the same, and both times."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from kvstore.models import reanchor_prompt

    def run(tokens, cache):
        logits = model(mx.array([tokens]), cache=cache)
        mx.eval(logits)
        return logits[0].astype(mx.float32)

    held, exact = make_prompt_cache(model), make_prompt_cache(model)
    run(old, held)
    begin = time.perf_counter()
    run(new[:-1], exact)
    prefill_s = time.perf_counter() - begin
    begin = time.perf_counter()
    found = reanchor_prompt(model, rotations, held, old, new)
    reanchor_s = time.perf_counter() - begin
    fed = [*new[-1:], *following[:-1]]
    right = run(fed, exact)
    near = run([*found.rest, *following[:-1]], found.prompt_cache)[-len(fed) :]
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (right, near))
    kl = (mx.exp(p) * (p - q)).sum(axis=-1).mean().item()
    same = (p.argmax(-1) == q.argmax(-1)).astype(mx.float32).mean().item()
    return kl, same, prefill_s, reanchor_s


def main():
    """Print the table."""
    from kvstore.blas import load_openblas

    load_openblas()
    from mlx_lm import load

    from kvstore.models import measure_rotation

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    rotations = measure_rotation(model)

    def encode(text):
        return list(tokenizer.encode(text, add_special_tokens=False))

    found = {}
    for name in MODULES[: args.texts]:
        text = pydoc.plain(pydoc.render_doc(importlib.import_module(name)))
        tokens = encode(text)
        for change, old, new, following in changes(tokens, encode, args.tokens):
            result = measure(model, rotations, old, new, following)
            found.setdefault(change, []).append(result)
            print(f"{name}: {change}: KL {result[0]:.5f}", flush=True)
    print("| change | texts | KL | ± | same first choice | time, of prefill |")
    print("|---|---|---|---|---|---|")
    for change, results in found.items():
        kls, sames, prefills, times = zip(*results, strict=True)
        spread = statistics.stdev(kls) / len(kls) ** 0.5 if len(kls) > 1 else 0
        print(
            f"| {change} | {len(kls)} | {statistics.mean(kls):.5f} | {spread:.5f}"
            f" | {statistics.mean(sames):.1%} | {sum(times) / sum(prefills):.1%} |"
        )


if __name__ == "__main__":
    main()

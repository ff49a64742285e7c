"""Measure what re-anchoring costs: how far it moves the next-token distribution.

    python tools/reanchor.py --model .cache/smollm2 --texts 8
    python tools/reanchor.py --model .cache/smollm2 --texts 8 --questions

Each text is the help of a module of Python behind the head of an agent's prompt. It is
saved with the head as it was, and `Store.load(…, near=)` loads it for a head that has
changed; the next 128 tokens are predicted on those rows and on the exact ones. What is
printed: the mean over the texts of the mean KL divergence, its standard error, and how
often the first choice is the same. With `--questions`, how many greedy answers about
what stayed, what changed and what is gone begin the same, and have the fact.
"""

import argparse
import importlib
import json
import pydoc
import statistics
import tempfile
import time

START = "<|im_start|>system\nYou are a coding agent. Current date: {date}.\n"
MIDDLE = "Answer briefly. Never invent files.\nThe project's code name is {name}.\n\n"
DATES = (
    "Monday, March 9, 2026 at 06:00:31 PM",
    "Tuesday, November 24, 2026 at 09:17:02 AM",
)
NAMES = ("Blue Heron", "Old Walnut")
STATUS = (
    "Branch: main\nModified: app.py, util.py\nUntracked: notes.txt\n",
    "Branch: export\nModified: parser.py, README.md\nDeleted: old.py\n",
)
MODULES = (
    "statistics", "tarfile", "decimal", "logging", "mailbox", "difflib", "inspect",
    "argparse", "zipfile", "doctest", "configparser", "calendar",
)  # fmt: skip
NUM_NEXT = 128
SECRET = "The password of the archive is Marigold.\n"


def tool(name, description, *parameters):
    """Return a tool as a request has it, as one line of JSON."""
    properties = {p: {"type": "string", "description": f"The {p}"} for p in parameters}
    schema = {"type": "object", "properties": properties}
    function = {"name": name, "description": description, "parameters": schema}
    return json.dumps({"type": "function", "function": function}) + "\n"


TOOLS = (
    tool("read_file", "Read a file of the workspace", "path", "encoding"),
    tool("run_command", "Run a shell command", "command", "directory", "timeout"),
    tool("search", "Search the workspace for a pattern", "pattern", "glob"),
)


def head(*, date=0, status=0, tools=(0, 1, 2), name=0, secret=""):
    """Return the beginning of a prompt."""
    listed = "".join(TOOLS[number] for number in tools)
    start = START.format(date=DATES[date])
    return start + secret + listed + STATUS[status] + MIDDLE.format(name=NAMES[name])


def changes(text, other, begin):
    """Yield name and new prompt of each change of the prompt `head()` + text."""
    for name, new in (
        ("date", head(date=1)),
        ("git status", head(status=1)),
        ("tools in another order", head(tools=(0, 2, 1))),
        ("one tool removed", head(tools=(0, 2))),
    ):
        yield name, begin(new) + text
    first, third = begin(head()), len(text) // 3
    yield "100 tokens cut", first + text[:third] + text[third + 100 :]
    yield "another document in front", first + other[: len(text) // 2] + text


class Saved:
    """A store with the rows of one old prompt."""

    def __init__(self, model, near, old):
        """Compute and save it."""
        import kvstore

        self._near = near
        self._folder = tempfile.TemporaryDirectory()
        self._store = kvstore.Store(self._folder.name, "raw")
        self._model = kvstore.Fingerprint({"weights": "these"})
        held = compute(model, old)
        self._store.save(old, held, self._model)

    def load(self, prompt):
        """Return rows of a prompt, what is left of it, and how many were moved."""
        found, rest = self._store.load(prompt, self._model, near=self._near)
        return found, rest, self._near.count(found)

    def close(self):
        """Remove the store."""
        self._store.close()
        self._folder.cleanup()


def compute(model, tokens):
    """Return the exact prompt cache of some tokens; their logits are not computed."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    mx.eval([layer.state for layer in cache])
    return cache


def feed(model, tokens, cache):
    """Feed tokens; return the logits after each."""
    import mlx.core as mx

    logits = model(mx.array([tokens]), cache=cache)
    mx.eval(logits)
    return logits[0].astype(mx.float32)


def measure(model, saved, new, following):
    """Return KL, how often the first choice is the same, both times, or nothing."""
    import mlx.core as mx

    begin = time.perf_counter()
    near_cache, rest, count = saved.load(new)
    near_s = time.perf_counter() - begin
    if not count:
        return None
    begin = time.perf_counter()
    exact = compute(model, new[:-1])
    prefill_s = time.perf_counter() - begin
    fed = [*new[-1:], *following[:-1]]
    right = feed(model, fed, exact)
    found = feed(model, [*rest, *following[:-1]], near_cache)[-len(fed) :]
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (right, found))
    kl = (mx.exp(p) * (p - q)).sum(axis=-1).mean().item()
    same = (p.argmax(-1) == q.argmax(-1)).astype(mx.float32).mean().item()
    return kl, same, prefill_s, near_s


def ask(model, saved, prompt):
    """Return the greedy answers on exact rows and on re-anchored ones, as tokens."""
    near_cache, rest, count = saved.load(prompt)
    assert count
    answers = []
    for cache, fed in ((compute(model, prompt[:-1]), prompt[-1:]), (near_cache, rest)):
        answer = []
        for _ in range(12):
            fed = [int(feed(model, fed, cache)[-1].argmax())]
            answer += fed
        answers.append(answer)
    return answers


def questions(model, near, texts, begin, encode, decode):
    """Print how many answers begin the same, and which have the fact."""
    end = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}"
    asked = {
        "unchanged": (head(), head(date=1), "code name", NAMES[0].split()[0]),
        "changed": (head(), head(name=1), "code name", NAMES[1].split()[0]),
        "removed": (head(secret=SECRET), head(), "password", "Marigold"),
    }
    starts = {
        "code name": "The project's code name is",
        "password": "The password of the archive is",
    }
    print("| fact | answers | same to the 12th token | has it, exact | re-anchored |")
    print("|---|---|---|---|---|")
    for fact, (old, new, topic, word) in asked.items():
        same, has = [], []
        for text in texts:
            question = end.format(f"What is the {topic}?", starts[topic])
            saved = Saved(model, near, begin(old) + text)
            both = ask(model, saved, begin(new) + text + encode(question))
            saved.close()
            same.append(both[0] == both[1])
            has.append([word in decode(answer) for answer in both])
        exact, moved = (sum(pair) for pair in zip(*has, strict=True))
        print(f"| {fact} | {len(same)} | {sum(same)} | {exact} | {moved} |")


def main():
    """Print the table."""
    from kvstore.blas import load_openblas

    load_openblas()
    from mlx_lm import load

    import kvstore

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--fresh", type=int, default=16)
    parser.add_argument("--questions", action="store_true")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    near = kvstore.Reanchoring(model, num_fresh=args.fresh)

    def encode(text):
        return list(tokenizer.encode(text, add_special_tokens=False))

    def begin(text):
        tokens, first = encode(text), tokenizer.bos_token_id
        return tokens if first in (None, tokens[0]) else [first, *tokens]

    texts = [
        encode(pydoc.plain(pydoc.render_doc(importlib.import_module(name))))
        for name in MODULES[: args.texts]
    ]
    if args.questions:
        cut = [text[: args.tokens] for text in texts]
        questions(model, near, cut, begin, encode, tokenizer.decode)
        return
    found = {}
    for number, tokens in enumerate(texts):
        text, following = tokens[: args.tokens], tokens[args.tokens :][:NUM_NEXT]
        saved = Saved(model, near, begin(head()) + text)
        for change, new in changes(text, texts[number - 1], begin):
            result = measure(model, saved, new, following)
            found.setdefault(change, []).append(result)
            print(f"{MODULES[number]}: {change}: {result}", flush=True)
        saved.close()
    print("| change | texts | KL | ± | same first choice | time, of prefill |")
    print("|---|---|---|---|---|---|")
    for change, results in found.items():
        if None in results:
            print(f"| {change} | {len(results)} | refused | | | |")
            continue
        kls, sames, prefills, times = zip(*results, strict=True)
        spread = statistics.stdev(kls) / len(kls) ** 0.5 if len(kls) > 1 else 0
        print(
            f"| {change} | {len(kls)} | {statistics.mean(kls):.1e} | {spread:.0e}"
            f" | {statistics.mean(sames):.1%} | {sum(times) / sum(prefills):.1%} |"
        )


if __name__ == "__main__":
    main()

"""Other projects' own tests, first as they are and then with ours in place.

They are run from a checkout, which is of the installed release or of the commit that
the recipe in examples/embedding names, on any small model. What passes as it is passes
with ours, but for `REASONS`.

    python tools/peers.py mlx-lm CHECKOUT MODEL
    python tools/peers.py mlx-lm-cache CHECKOUT MODEL
    python tools/peers.py mlx-engine CHECKOUT MODEL

`mlx-lm`: the tests of its server, with `DiskPromptCache` for its cache; they need the
package `requests`. `mlx-lm-cache`: those of its prompt caches, with `TurboQuantKVCache`
for `KVCache`, and heads of 64 numbers where theirs have 4, which no code can have.
`mlx-engine`: those of its `CacheWrapper`, with the recipe installed; they need what
mlx-engine imports.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import sys
import tempfile
import unittest
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from kvstore.blas import load_openblas

load_openblas()
import mlx_lm.models.cache  # noqa: E402
import mlx_lm.server  # noqa: E402
import mlx_lm.utils  # noqa: E402

import kvstore  # noqa: E402
from kvstore.server import DiskPromptCache, ServedModel  # noqa: E402
from turboquant.kv_cache import (  # noqa: E402
    TurboQuantKVCache,
    quantize_prompt_cache,
)

# Tests that ask for what ours does otherwise, or has not, and why.
_LRU = "test_server.TestLRUPromptCache"
_CACHE = "test_prompt_cache.TestPromptCache"
_KEYS = (
    "reads `.keys`, which codes do not have: by it, a batch of mlx-lm's own would take"
    " decoded rows in, and not say that they were coded"
)
_LOAD = "`load_prompt_cache` knows the classes of its own module only"
REASONS = {
    f"{_LRU}.test_lru": "a hit on a whole prompt leaves a token to be fed; with none,"
    " the model has nothing to go on from",
    f"{_LRU}.test_insert_empty_tokens_does_not_self_destruct": "what holds no token"
    " saves nothing, and would take the place of what does",
    f"{_CACHE}.test_cache_copying": _KEYS,
    f"{_CACHE}.test_extend_with_empty_and_nonempty_batch_caches": _KEYS,
    f"{_CACHE}.test_extend_with_empty_batch_cache_preserves_dtype": _KEYS,
    f"{_CACHE}.test_merge_with_empty_caches": _KEYS,
    f"{_CACHE}.test_save_load": _LOAD,
    f"{_CACHE}.test_save_load_cache_list": _LOAD,
    f"{_CACHE}.test_save_load_mixed_cache": _LOAD,
}
RECIPES = Path(__file__).parent.parent / "examples" / "embedding"

Failures = dict[str, str]


def main() -> int:
    """Run the tests twice, and say what differs."""
    suites = {
        "mlx-lm": compare_server,
        "mlx-lm-cache": compare_caches,
        "mlx-engine": compare_mlx_engine,
    }
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suite", choices=suites)
    parser.add_argument("checkout", type=Path, help="a checkout of the project")
    parser.add_argument("model", help="folder of the model that the tests load")
    given = parser.parse_args()
    with ExitStack() as stack:
        stock, ours = suites[given.suite](given.checkout, given.model, stack)
    new = ours.keys() - stock.keys()
    for name in sorted(ours.keys() | stock.keys()):
        why = REASONS.get(name, ours.get(name, "passes with ours only"))
        print(f"{name}: {'as it is, too' if name in stock and name in ours else why}")
    return len(new - REASONS.keys())


def compare_server(
    checkout: Path, model: str, stack: ExitStack
) -> tuple[Failures, Failures]:
    """Run mlx-lm's tests of its server with its class and with ours."""
    loaded = mlx_lm.utils.load(model)
    served = ServedModel(
        kvstore.Fingerprint.from_path(model),
        (mlx_lm.models.cache.make_prompt_cache(loaded[0]),),
    )
    stack.enter_context(mock.patch("mlx_lm.utils.load", return_value=loaded))

    def run_with(cache: type[Any]) -> Failures:
        with mock.patch("mlx_lm.server.LRUPromptCache", cache):
            return run(load_tests(checkout / "tests" / "test_server.py"))

    return run_with(mlx_lm.server.LRUPromptCache), run_with(with_store(served, stack))


def with_store(served: ServedModel, stack: ExitStack) -> type[DiskPromptCache]:
    """Return our class, made with the arguments of mlx-lm's."""

    class Stored(DiskPromptCache):
        def __init__(self, **options: Any) -> None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            store = kvstore.Store(folder, codec="planes+zstd")
            super().__init__(store, lambda _: served, **options)
            stack.callback(self.close)

    return Stored


def compare_caches(
    checkout: Path, model: str, stack: ExitStack
) -> tuple[Failures, Failures]:
    """Run mlx-lm's tests of prompt caches with its `KVCache` and with codes."""
    loaded = mlx_lm.utils.load(model)
    stack.enter_context(mock.patch("mlx_lm.utils.load", return_value=loaded))

    def widen(source: str) -> str:
        return re.sub(r"(\(\d+(?:, \d+)+), 4\)", r"\1, 64)", source)

    path = checkout / "tests" / "test_prompt_cache.py"
    coded = load_tests(path, widen)
    make = mlx_lm.models.cache.make_prompt_cache
    vars(coded).update(
        KVCache=TurboQuantKVCache,
        make_prompt_cache=lambda model: quantize_prompt_cache(make(model), "turbo4"),
    )
    return run(load_tests(path, widen)), run(coded)


def compare_mlx_engine(
    checkout: Path, model: str, stack: ExitStack
) -> tuple[Failures, Failures]:
    """Run mlx-engine's tests of its cache, as they are and with the recipe."""
    sys.path[:0] = [str(checkout), str(RECIPES)]
    shared = importlib.import_module("tests.shared")
    stack.enter_context(mock.patch.object(shared, "model_getter", return_value=model))
    tests = importlib.import_module("tests.test_cache_wrapper")
    stock = run(tests)
    # Its sessions are never closed, so some still write when the folder goes.
    folder = stack.enter_context(
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    )
    importlib.import_module("for_mlx_engine").install(folder)
    return stock, run(tests)


def run(tests: ModuleType) -> Failures:
    """Run the tests of a module; return how those end that fail."""
    suite = unittest.defaultTestLoader.loadTestsFromModule(tests)
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=0).run(suite)
    failed = result.failures + result.errors
    print(f"{result.testsRun - len(failed)} of {result.testsRun} pass")
    return {test.id(): text.strip().splitlines()[-1] for test, text in failed}


def load_tests(path: Path, change: Callable[[str], str] = str) -> ModuleType:
    """Return tests, imported anew."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(compile(change(path.read_text()), path, "exec"), module.__dict__)
    return module


if __name__ == "__main__":
    failed = main()
    sys.stdout.flush()
    # Threads that the tests of others leave behind would end this with an abort.
    os._exit(min(failed, 1))

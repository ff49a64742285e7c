"""mlx-lm's own tests of its server, with `DiskPromptCache` in the place of its cache.

They are run from a checkout of mlx-lm, first with its class and then with ours, on any
small model. What passes with its class passes with ours, but for `ON_PURPOSE`.

    python tools/peers.py CHECKOUT MODEL

The checkout is of the installed release: its source distribution will do. The tests
need the package `requests`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import unittest
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from kvstore.blas import load_openblas

load_openblas()
import mlx_lm.server  # noqa: E402
import mlx_lm.utils  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

import kvstore  # noqa: E402
from kvstore.server import DiskPromptCache, ServedModel  # noqa: E402

# Tests that assert what ours does better, and what that is.
_LRU = "test_server.TestLRUPromptCache"
ON_PURPOSE = {
    f"{_LRU}.test_lru": "on purpose: a hit on a whole prompt leaves a token to be fed;"
    " with none, the model has nothing to go on from",
    f"{_LRU}.test_insert_empty_tokens_does_not_self_destruct": "on purpose: what holds"
    " no token saves nothing, and would take the place of what does",
}


def main() -> int:
    """Run the tests twice, and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of mlx-lm")
    parser.add_argument("model", help="folder of the model that the tests load")
    given = parser.parse_args()
    loaded = mlx_lm.utils.load(given.model)
    served = ServedModel(
        kvstore.Fingerprint.from_path(given.model), (make_prompt_cache(loaded[0]),)
    )
    with ExitStack() as stack:
        stack.enter_context(mock.patch("mlx_lm.utils.load", return_value=loaded))
        stock = run(given.checkout, mlx_lm.server.LRUPromptCache)
        ours = run(given.checkout, with_store(served, stack))
    new = ours.keys() - stock.keys()
    for name in sorted(ours.keys() | stock.keys()):
        why = ON_PURPOSE.get(name, "") if name in new else "with mlx-lm's class too"
        print(f"{name}: {why or ours[name]}")
    return len(new - ON_PURPOSE.keys())


def with_store(served: ServedModel, stack: ExitStack) -> type[DiskPromptCache]:
    """Return our class, made with the arguments of mlx-lm's."""

    class Stored(DiskPromptCache):
        def __init__(self, **options: Any) -> None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            store = kvstore.Store(folder, codec="planes+zstd")
            super().__init__(store, lambda _: served, **options)
            stack.callback(self.close)

    return Stored


def run(checkout: Path, cache: type[Any]) -> dict[str, str]:
    """Run the tests with a class of cache; return how those end that fail."""
    with mock.patch("mlx_lm.server.LRUPromptCache", cache):
        tests = unittest.defaultTestLoader.loadTestsFromModule(load_tests(checkout))
        result = unittest.TextTestRunner(stream=sys.stderr, verbosity=0).run(tests)
    failed = result.failures + result.errors
    passed = result.testsRun - len(failed)
    print(f"{cache.__module__}.{cache.__name__}: {passed} of {result.testsRun} pass")
    return {test.id(): text.strip().splitlines()[-1] for test, text in failed}


def load_tests(checkout: Path) -> ModuleType:
    """Return the tests of mlx-lm's server, imported anew."""
    path = checkout / "tests" / "test_server.py"
    spec = importlib.util.spec_from_file_location("test_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    raise SystemExit(main())

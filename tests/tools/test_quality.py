"""tools/quality.py measures what it says, on a tiny model."""

import argparse
import importlib.util
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "kvstore"))
from architectures import make_model

COUNT = 512


@pytest.fixture(scope="module")
def tool():
    """The script as a module."""
    path = Path(__file__).parent.parent.parent / "tools" / "quality.py"
    spec = importlib.util.spec_from_file_location("quality_tool", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_windows_are_kept_and_not_counted(tool):
    """Of a model that has some, bits and losses are those of its other layers."""
    model, chosen = make_model("gemma3_text"), random.Random(1)
    tokens = chosen.choices(range(100), k=COUNT + 20)
    context = tool.make_context(model, tokens[:COUNT], tokens[COUNT:])
    full = [cache for cache in context.prompt_cache if tool.is_coded(cache)]
    assert 0 < len(full) < len(context.prompt_cache)
    rows = [x for cache in full for x in cache.keys_and_values()]
    assert sum(x.size for x in rows) == tool.num_elements(context)
    names = ("planes+zstd", "turbo4")
    ways = {name: tool.restore_from_store(name) for name in names}
    exact, turbo = tool.measure(model, [context], "some", ways)
    assert (1.0, True) == (exact.same_choice, exact.mean_kl < 1e-6 < turbo.mean_kl)
    # 4 bits, and a norm for each row of 16 numbers.
    assert 6 < turbo.bits_per_element < 8 < exact.bits_per_element < 32


@pytest.mark.parametrize("is_code", [False, True])
@pytest.mark.parametrize("keys", [1, 4])
def test_each_key_stands_once_in_a_prefix(tool, keys, is_code):
    """It has the length that is asked for, and the answer is what the question asks."""

    class Letters:
        def encode(self, text):
            return [1, *text.encode()]

    options = argparse.Namespace(prefix=2000, keys=keys)
    filler = [ord("-")] * 3000
    prefix, question, answer = tool.hide(
        Letters(), filler, options, 0.9, random.Random(2), is_code=is_code
    )
    assert (1, 2000) == (prefix[0], len(prefix))
    text = bytes(prefix[1:]).decode()
    told = [part for part in text.split("\n\n") if "pass" in part]
    assert keys == len(told) == len(set(told))
    asked_for = bytes(question).decode().split("pass")[-1].split("=")[0].split(" is")[0]
    (asked,) = (part for part in told if asked_for.strip() in part)
    assert asked.removesuffix(".").endswith(bytes(answer).decode())

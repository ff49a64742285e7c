"""Every recipe in examples/embedding, on a stand-in of its server."""

import asyncio
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import standins

FOLDER = Path(__file__).parent.parent / "examples" / "embedding"
PROMPT = [n * 7 % 250 for n in range(600)]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that makes a stand-in, installs its recipe, and returns it."""

    def install_(name, codec="planes+zstd"):
        standin = getattr(standins, f"put_{name}")(monkeypatch)
        path = FOLDER / f"for_{name}.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.install(tmp_path / "store", codec)
        return standin

    return install_


def test_mlx_engine_starts_from_disk_one_by_one(install, tiny_model):
    """A new process has the prompt and the reply before; the numbers are the same."""
    make_kit = install("mlx_engine")[0]
    first = make_kit(tiny_model)
    assert first.generate(PROMPT)[0] == 0
    found, says = first.generate([*PROMPT, 3, 4])
    assert found == len(PROMPT)
    first.shutdown()
    again = make_kit(tiny_model)
    assert again.generate([*PROMPT, 3, 4]) == (len(PROMPT) + 1, says)
    again.shutdown()


def test_mlx_engine_holds_codes(install, tiny_model):
    """`kv_bits="turbo3"` reaches the prompt cache, and comes back as codes."""
    make_kit = install("mlx_engine")[0]
    generate = importlib.import_module("mlx_engine.generate")
    params = generate.get_kv_cache_quantization_params
    assert params("turbo3", None, None) == ("turbo3", None, None)
    with pytest.raises(ValueError, match="turbo9"):
        params("turbo9", None, None)
    says = []
    for num_found in (0, len(PROMPT) - 1):
        kit = make_kit(tiny_model, max_kv_size=4096, kv_bits="turbo3")
        found, said = kit.generate(PROMPT)
        says.append(said)
        classes = {type(x).__name__ for x in kit.cache_wrapper._live_cache}
        assert (found, classes) == (num_found, {"TurboQuantKVCache"})
        kit.shutdown()
    assert says[0] == pytest.approx(says[1], abs=0.05)
    # What was coded is not given to whoever did not ask for codes.
    plain = make_kit(tiny_model)
    assert plain.generate(PROMPT)[0] == 0
    plain.shutdown()


def test_mlx_engine_holds_its_own_codes(install, tiny_model):
    """`kv_bits=4` is another prompt cache, which comes back as what it was."""
    make_kit = install("mlx_engine")[0]
    for num_found in (0, len(PROMPT) - 1):
        kit = make_kit(tiny_model, kv_bits=4)
        assert kit.generate(PROMPT)[0] == num_found
        classes = {type(x).__name__ for x in kit.cache_wrapper._live_cache}
        assert classes == {"QuantizedKVCache"}
        kit.shutdown()


def test_mlx_engine_starts_from_disk_in_batches(install, tiny_model):
    """A new process has all but a token, and another image nothing of this one."""
    make_kit = install("mlx_engine")[1]
    image = SimpleNamespace(start=300, end=340, image_hash="ab" * 32)
    other = SimpleNamespace(start=300, end=340, image_hash="cd" * 32)
    first = make_kit(tiny_model)
    assert first.generate(PROMPT, (image,))[0] == 0
    found, says = first.generate([*PROMPT, 3, 4], (image,))
    assert found == len(PROMPT)
    first.shutdown()
    again = make_kit(tiny_model)
    assert again.generate([*PROMPT, 3, 4], (image,)) == (len(PROMPT) + 1, says)
    assert again.generate(PROMPT, (other,))[0] == 300
    again.shutdown()


def test_mlx_openai_server_starts_from_disk(install, tiny_model):
    """A new process, and any thread of it, goes on from what another has computed."""
    make_handler = install("mlx_openai_server")
    first = make_handler(tiny_model)
    assert first.generate(PROMPT)[0] == 0
    found, says = standins.run_on_a_thread(first.generate, [*PROMPT, 3, 4])
    assert found == len(PROMPT)
    first.cleanup()
    again = make_handler(tiny_model)
    assert again.generate([*PROMPT, 3, 4]) == (len(PROMPT) + 1, says)
    again.cleanup()


def test_vllm_mlx_starts_from_disk(install, tiny_model):
    """Its trie is asked first, the disk then, also where a system prompt is held."""
    make_engine = install("vllm_mlx")
    first = make_engine(tiny_model, prefix_trie_cache=True)
    assert first.generate(PROMPT)[0] == 0
    found, says = first.generate([*PROMPT, 3, 4], system=20)
    assert found == len(PROMPT)
    asyncio.run(first.stop())
    again = make_engine(tiny_model, prefix_trie_cache=True)
    assert again.generate([*PROMPT, 3, 4], system=20) == (len(PROMPT) + 1, says)
    asyncio.run(again.stop())

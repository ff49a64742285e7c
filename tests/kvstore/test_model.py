"""Models and prompts are what mlx-lm makes of them."""

import json
import subprocess
import sys

import pytest

from kvstore.caches.mlx_files import write_prompt_cache
from kvstore.errors import KVStoreError
from kvstore.models.load import (
    find_model,
    fingerprint_model,
    load_model,
    load_tokenizer,
)
from kvstore.models.templates import Template


@pytest.fixture(scope="module")
def tokenizer(loaded):
    """The tiny model's tokenizer, with a template in the manner of ChatML."""
    return loaded[1]


def test_a_model_comes_with_its_fingerprint(tiny_model, loaded):
    """The fingerprint is that of the files, and bears the name that was given."""
    model, tokenizer, fingerprint = loaded
    assert fingerprint.label == str(tiny_model)
    assert fingerprint == fingerprint_model(str(tiny_model))
    assert len(model.layers) == 2
    assert tokenizer.has_chat_template


def test_other_weights_are_another_fingerprint(tiny_model, other_model):
    """Two models of one shape and different weights are told apart, and how."""
    tiny, other = (fingerprint_model(str(path)) for path in (tiny_model, other_model))
    assert "weights" in tiny.difference(other)


def test_a_missing_model_is_one_error(monkeypatch):
    """A name that is no folder and no repository is refused with a hint."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(KVStoreError, match="no model `/no/where`") as caught:
        find_model("/no/where")
    assert caught.value.hint


def test_a_file_is_no_model(tiny_model):
    """A file inside the model's folder is refused, not loaded."""
    with pytest.raises(KVStoreError, match="not a model folder"):
        find_model(str(tiny_model / "config.json"))


def test_what_mlx_lm_cannot_load_is_one_error(tiny_model, tmp_path):
    """An unknown model type is an error with what mlx-lm says of it."""
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "none"}))
    with pytest.raises(KVStoreError, match="none not supported"):
        load_model(str(tmp_path))


def test_a_tokenizer_loads_without_weights(tiny_model, tokenizer):
    """What `lookup` loads gives the same tokens as what `generate` loads."""
    alone = load_tokenizer(str(tiny_model))
    assert Template(alone).encode_prompt("hi") == Template(tokenizer).encode_prompt(
        "hi"
    )


def test_a_prompt_is_rendered_as_mlx_lm_does(tokenizer):
    """A closed message invites the reply, after the system's words if there are any."""
    tokens = Template(tokenizer).encode_prompt("hi", "be kind")
    assert tokenizer.decode(tokens) == (
        "<|im_start|>system\nbe kind<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_open_message_is_a_prefix_of_the_closed_one(tokenizer):
    """What `save` computes is what `generate` of the same prompt begins with."""
    begun = Template(tokenizer).encode_prompt("a document", is_open=True)
    whole = Template(tokenizer).encode_prompt("a document")
    assert whole[: len(begun)] == begun
    assert tokenizer.decode(begun).endswith("user\na document")


def test_a_template_may_be_ignored(tokenizer):
    """Plain text is encoded as it is, and a system prompt then has no place."""
    tokens = Template(tokenizer, ignore=True).encode_prompt("hi")
    assert tokenizer.decode(tokens) == "hi"
    with pytest.raises(ValueError, match="needs a chat template"):
        Template(tokenizer, ignore=True).encode_prompt("hi", "be kind")


def test_variables_reach_the_template(tokenizer):
    """The configuration of a chat template overrides what is set otherwise."""
    config = {"add_generation_prompt": False}
    tokens = Template(tokenizer, config).encode_prompt("hi")
    assert tokenizer.decode(tokens).endswith("user\nhi<|im_end|>\n")


def test_a_template_that_refuses_is_one_error(tokenizer, monkeypatch):
    """What a chat template raises is an error with its words."""
    template = "{{ raise_exception('no system here') }}"
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    with pytest.raises(KVStoreError, match="no system here"):
        Template(tokenizer).encode_prompt("hi", "be kind")


def test_a_prompt_goes_on_with_an_open_message(tokenizer):
    """Behind an open message comes more of it, its end, and the reply's begin."""
    begun = Template(tokenizer).encode_prompt("a document", is_open=True)
    added = Template(tokenizer).encode_next("\nand a question", begun)
    assert begun + added == Template(tokenizer).encode_prompt(
        "a document\nand a question"
    )


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_a_prompt_follows_a_reply(tokenizer, end):
    """Behind a reply, closed by the model or cut off, comes a message of the user."""
    begun = Template(tokenizer).encode_prompt("first")
    held = begun + tokenizer.encode(f"reply{end}", add_special_tokens=False)
    added = Template(tokenizer).encode_next("second", held)
    assert tokenizer.decode(held + added) == (
        tokenizer.decode(begun) + "reply<|im_end|>\n"
        "<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("odd", [-5, 2**62])
def test_tokens_without_text_are_no_reply(tokenizer, odd):
    """Those that stand for an image, say, hide no reply and are none."""
    begun = Template(tokenizer).encode_prompt("first", is_open=True)
    assert not Template(tokenizer).has_reply([*begun, odd])
    asked = Template(tokenizer).encode_prompt("first")
    assert Template(tokenizer).has_reply([odd, *asked, odd])


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if quiet %}<think></think>\n{% else %}<think>\n{% endif %}{% endif %}"
)


def test_a_reply_is_known_however_it_began(tokenizer, monkeypatch):
    """Whether a reply began with thinking or without, the next message follows it."""
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", THINKING)
    held = Template(tokenizer, {"quiet": True}).encode_prompt("first")
    held += tokenizer.encode("reply", add_special_tokens=False)
    added = Template(tokenizer).encode_next("second", held)
    assert tokenizer.decode(added) == (
        "<|im_end|>\n<|im_start|>user\nsecond<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_plain_text_goes_on_as_plain_text(tokenizer):
    """Without a template a prompt is appended, with nothing between."""
    held = Template(tokenizer, ignore=True).encode_prompt("one")
    added = Template(tokenizer, ignore=True).encode_next(" two", held)
    assert tokenizer.decode(held + added) == "one two"


@pytest.fixture
def prompt_cache(loaded):
    """A prompt cache of five tokens."""
    from kvstore.models.session import prefill

    return prefill(loaded[0], [1, 2, 3, 4, 5])


def test_mlx_lm_reads_what_is_written(prompt_cache, tmp_path):
    """The file holds the rows, the model's name and a tokenizer's configuration."""
    from mlx_lm.models.cache import load_prompt_cache

    path = tmp_path / "cache.safetensors"
    assert write_prompt_cache(path, prompt_cache, "a/model") == path.stat().st_size
    restored, metadata = load_prompt_cache(str(path), return_metadata=True)
    assert [cache.offset for cache in restored] == [5, 5]
    assert metadata == {"model": "a/model", "tokenizer_config": "{}"}
    keys = [cache[1].keys[:, :, :5] for cache in (restored, prompt_cache)]
    assert (keys[0] == keys[1]).all().item()


def test_live_codes_are_written_decoded(prompt_cache, tmp_path):
    """mlx-lm knows no cache of codes, so it gets the rows that they stand for."""
    from mlx_lm.models.cache import load_prompt_cache

    from turboquant.kv_cache import quantize_prompt_cache

    path = tmp_path / "cache.safetensors"
    coded = quantize_prompt_cache(prompt_cache, "turbo4")
    write_prompt_cache(path, coded, "a/model")
    restored = load_prompt_cache(str(path))
    assert [type(cache).__name__ for cache in restored] == ["KVCache", "KVCache"]
    keys = coded[1].to_kv_cache().keys[:, :, :5]
    assert (restored[1].keys[:, :, :5] == keys).all().item()


def test_brought_code_runs_only_when_trusted(tiny_model, tmp_path):
    """A model that names code of its own is refused by every release of mlx-lm."""
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_file": "x.py"}))
    (tmp_path / "x.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(KVStoreError, match=r"mlx-lm cannot load .*x\.py"):
        load_model(str(tmp_path))


def test_a_cache_file_is_private_and_alone(prompt_cache, tmp_path):
    """Only its owner can read the transcript, and nothing else is left behind."""
    path = tmp_path / "cache.safetensors"
    write_prompt_cache(path, prompt_cache, "m")
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_overwritten_on_demand_only(prompt_cache, tmp_path):
    """What is there stays, unless it is asked for."""
    path = tmp_path / "cache.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(KVStoreError, match="there is a file already"):
        write_prompt_cache(path, prompt_cache, "m")
    assert path.read_bytes() == b"mine"
    write_prompt_cache(path, prompt_cache, "m", overwrite=True)
    assert path.stat().st_size > 1000


def test_a_failed_write_leaves_the_old_file(prompt_cache, tmp_path, monkeypatch):
    """An error in the middle leaves what was there, and no temporary file."""
    path = tmp_path / "cache.safetensors"
    path.write_bytes(b"mine")
    monkeypatch.setattr("kvstore.storage.files.sync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_prompt_cache(path, prompt_cache, "m", overwrite=True)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_cache_file_needs_its_ending(prompt_cache, tmp_path):
    """mlx-lm tells the format by the name, so another ending is refused."""
    with pytest.raises(KVStoreError, match="not a name for a safetensors file"):
        write_prompt_cache(tmp_path / "cache.bin", prompt_cache, "m")


def test_importing_this_module_imports_no_mlx_lm():
    """mlx-lm takes a second, which only the functions that need it spend."""
    program = "import sys, kvstore.models.load; print('mlx_lm' in sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert finished.stdout == "False\n"

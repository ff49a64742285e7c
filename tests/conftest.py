"""Fixtures of all tests: a tiny model that mlx-lm loads, and the command line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nBe brief<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 260,
    "tie_word_embeddings": True,
    "eos_token_id": 257,
}


def pytest_configure():
    """Let signals reach the processes of tests, which `nohup` and `&` have ignored."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    for number, handler in usual.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def write_tokenizer(folder, template):
    """Write a tokenizer of bytes and two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": marks[0],
        "eos_token": marks[1],
        "clean_up_tokenization_spaces": False,
    }
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder, *, seed=0, template=TEMPLATE, **changes):
    """Write a tiny Llama of random weights that mlx-lm loads; return its folder."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    folder.mkdir()
    config = CONFIG | changes
    mx.random.seed(seed)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    # Large enough that the likeliest token depends on the prompt.
    weights = {name: weight * 3 for name, weight in weights.items()}
    # A row of zeros: the likeliest token is never the one that ends a reply.
    embeddings = "model.embed_tokens.weight"
    weights[embeddings][config["eos_token_id"]] = 0
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, template)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a tiny model."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """A folder with other weights of the same shape."""
    return write_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A folder with a smaller model, which guesses now and then what the tiny says."""
    folder = tmp_path_factory.mktemp("models") / "small"
    return write_model(folder, num_hidden_layers=1)


@pytest.fixture(scope="session")
def short_model(tmp_path_factory):
    """A folder with a model that was made for 128 tokens."""
    folder = tmp_path_factory.mktemp("models") / "short"
    return write_model(folder, max_position_embeddings=128)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory):
    """A folder with a model whose rows take 32 kB a token."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    return write_model(folder, num_hidden_layers=4, **heads)


@pytest.fixture(scope="session")
def loaded(tiny_model):
    """Model, tokenizer and fingerprint of the tiny model."""
    from kvstore.models.load import load_model

    return load_model(str(tiny_model))


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """What runs the kernels of a GPU, compiled as C++."""
    import shim

    if shim.COMPILER is None:
        pytest.skip("there is no C++ compiler")
    return shim.make_launch(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def as_gpu(monkeypatch):
    """What has kernels run by a function, as if this machine had a GPU."""
    import mlx.core as mx

    from turboquant.kernels import best_kernels, gpu

    # `make test-numpy` keeps a GPU's kernels out too; the CPU's stay what they are.
    best_kernels()
    monkeypatch.delenv("TURBOQUANT_KERNELS", raising=False)
    monkeypatch.setattr(gpu, "start_upload", lambda _=0: gpu.ArrayUpload())

    def use(launch):
        monkeypatch.setattr(gpu, "_launch", launch)
        monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
        gpu._find_way.cache_clear()

    yield use
    gpu._find_way.cache_clear()


@pytest.fixture
def kvstore_cli(tmp_path):
    """A function that runs `kvstore` as a process on a store of its own."""

    def run(*args, store=tmp_path / "store", **options):
        words = map(str, ("--store", store, *args))
        return subprocess.run(
            [sys.executable, "-m", "kvstore", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | options.pop("env", {}),
            **options,
        )

    return run


@pytest.fixture
def run_cli(tmp_path, capsys):
    """A function that runs `kvstore` in this process: exit code, stdout, stderr."""
    from kvstore.cli import main

    def run(*args, store=tmp_path / "store"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as finished:
            main(["--store", str(store), *map(str, args)])
        return finished.value.code, *capsys.readouterr()

    return run

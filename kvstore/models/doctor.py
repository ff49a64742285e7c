"""What is wrong with a model's folder: can it be read, loaded, and its cache stored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..caches import live as caches
from ..errors import KVStoreError
from ..fingerprint import read_json
from ..format.documents import JSON
from ..format.safetensors import MAX_HEADER_BYTES
from ..ops.upkeep.doctor import Diagnosis
from .context import context_length
from .load import find_model, load_model


def examine_model(
    model: str, adapter_path: str | None = None, *, trust_remote_code: bool = False
) -> Iterator[Diagnosis]:
    """Yield what is found about a model; its weights are not read."""
    try:
        folder = find_model(model)
    except KVStoreError as error:
        yield Diagnosis("model", "bad", str(error), error.hint or "")
        return
    weights = _examine_weights(folder)
    yield weights
    yield _examine_context(folder)
    if weights.state == "good":
        yield _examine_caches(model, adapter_path, trust_remote_code)


def _examine_weights(folder: Path) -> Diagnosis:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        return Diagnosis(
            "weights", "bad", f"no *.safetensors in {folder}",
            "give the folder of a model that mlx-lm loads",
        )  # fmt: skip
    short = [text for path in paths if (text := _describe_damage(path))]
    if short:
        return Diagnosis("weights", "bad", "; ".join(short), "download the model again")
    nbytes = sum(path.stat().st_size for path in paths)
    files = f"{len(paths)} file" + "s" * (len(paths) > 1)
    values: JSON = {"nbytes": nbytes, "num_files": len(paths)}
    detail = f"{nbytes / 1e9:,.2f} GB in {files}, all whole"
    return Diagnosis("weights", "good", detail, values=values)


def _describe_damage(path: Path) -> str | None:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        header.pop("__metadata__", None)
        ends = [value["data_offsets"][1] for value in header.values()]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return f"{path.name} is no safetensors file, or is cut off"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    if size < expected:
        return f"{path.name} is cut off: {size:,} of {expected:,} bytes"
    return None


def _examine_context(folder: Path) -> Diagnosis:
    try:
        length = context_length(read_json(folder / "config.json"))
    except (OSError, KVStoreError, AttributeError) as error:
        return Diagnosis(
            "context", "bad", f"config.json cannot be read: {error}",
            "download the model again",
        )  # fmt: skip
    if length is None:
        return Diagnosis("context", "good", "the configuration names no limit")
    detail = f"made for {length:,} tokens"
    return Diagnosis("context", "good", detail, values={"num_tokens": length})


def _examine_caches(
    model: str, adapter_path: str | None, trust_remote_code: bool
) -> Diagnosis:
    from mlx_lm.models.cache import make_prompt_cache

    try:
        loaded, tokenizer, fingerprint = load_model(
            model, adapter_path, trust_remote_code=trust_remote_code, lazy=True
        )
        empty = list(make_prompt_cache(loaded))
        caches.check_classes(empty)
    except KVStoreError as error:
        return Diagnosis("model", "bad", str(error), error.hint or "")
    kinds = Counter(type(c).__name__ for c in caches.flatten_caches(empty))
    detail = "its cache can be kept: " + ", ".join(
        f"{number} {kind}" for kind, number in kinds.items()
    )
    values: JSON = {"fingerprint": fingerprint.digest, "caches": dict(kinds)}
    if not tokenizer.has_chat_template:
        return Diagnosis(
            "model", "warning", f"{detail}; it has no chat template",
            "prompts are taken as plain text; a chat wants a model tuned for it",
            values,
        )  # fmt: skip
    return Diagnosis("model", "good", detail, values=values)

"""What produced these numbers: weights, configuration, adapter. Knows no tokens.

Identity is by meaning, not by spelling. Weights count by tensor, however they are split
into files. Of a configuration count the fields that the architecture's own arguments in
mlx-lm know, less those that only name things or end a reply.

Not the device, nor the versions of MLX and mlx-lm: those change the last places of
a number, not what it means. Not the tokenizer: blocks are keyed by tokens.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import blake3

from .errors import FingerprintError, KVStoreError
from .format.chain import REANCHORED, digest_fields, is_reanchored, mark_reanchored
from .format.documents import JSON, canonical_json
from .format.safetensors import MAX_HEADER_BYTES, parse_header
from .storage import files

VERSION = 2
# Fields of config.json that no number depends on, whatever computes it.
_ADVISORY = {"_name_or_path", "transformers_version", "use_cache", "name_or_path"}
# Those that mlx-lm's own architectures use for no number either: names of the model and
# of its classes, ids that end a reply, the dtype that the weights have anyway.
_NAMING = _ADVISORY | {
    "architectures", "auto_map", "bos_token_id", "decoder_start_token_id", "dtype",
    "eos_token_id", "eos_token_ids", "license", "pad_token_id", "sep_token_id",
    "torch_dtype",
}  # fmt: skip
# What `mlx_lm.load` reads itself, whether the architecture knows it or not.
_LOADING = {"model_type", "quantization", "quantization_config", "text_config"}
# Fields that say whose rows they are, or how they came about, and not of what model.
_MARKS = {"salt", REANCHORED}
_PIECE_BYTES = 1 << 24
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEMORY_NAME = "kvstore-files.json"
_MAX_REMEMBERED = 4096
_MAX_JSON_BYTES = 16 * 1024 * 1024
_MISSING = object()


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """Names what computed a prompt cache.

    Two fingerprints are equal where the same weights, configuration and adapter
    were used. One made from files never equals one made from a live model.
    """

    # JSON object; ``source``, ``weights``, ``config``, ``adapter``, ….
    fields: JSON
    # What to call the model; advisory, not compared.
    label: str = ""

    def __post_init__(self) -> None:
        """Refuse now what a save, on another thread perhaps, would refuse later."""
        if not isinstance(self.fields, dict):
            kind = type(self.fields).__name__
            raise TypeError(f"a fingerprint has a dict of fields, not a {kind}")

    def __eq__(self, other: object) -> bool:
        """Compare digests: to Python 1, 1.0 and True are equal, and no JSON is."""
        return isinstance(other, Fingerprint) and self.digest == other.digest

    def __hash__(self) -> int:
        """Hash by the digest, since the fields are a dict."""
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the fields, in hex."""
        return digest_fields(self.fields)

    @classmethod
    def from_path(
        cls, path: str | Path, adapter_path: str | Path | None = None
    ) -> Fingerprint:
        """Return the fingerprint of a model folder, without loading its weights.

        Each file is hashed once and remembered by path, size and time of change.

        Args:
            path: Folder with ``config.json`` and safetensors files.
            adapter_path: Folder with ``adapters.safetensors``, if one is used.

        Raises:
            KVStoreError: A folder is not what it should be.
        """
        folder = Path(path)
        memory = _Memory(files.cache_home() / _MEMORY_NAME)
        fields: JSON = {
            "version": VERSION,
            "source": "files",
            "weights": memory.digest_tensors(weight_files(folder)),
            "config": _read_config(folder),
            "code": memory.digest_files(sorted(folder.glob("*.py"))),
            "adapter": _digest_adapter(adapter_path, memory),
        }
        memory.keep()
        return cls(fields, label=str(path))

    @classmethod
    def of(cls, model: Any, label: str = "") -> Fingerprint:
        """Return the fingerprint of a live ``mlx.nn.Module`` from its parameters.

        Reads every parameter: seconds for a large model. An adapter that is part of
        the model is part of its modules, their parameters and plain attributes.
        """
        config = getattr(model, "args", None)  # mlx-lm's are a dataclass
        if is_dataclass(config) and not isinstance(config, type):
            config = asdict(config)
        fields: JSON = {
            "version": VERSION,
            "source": "live",
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "weights": _digest_parameters(model),
            "config": _plain(config),
        }
        return cls(fields, label=label or type(model).__module__)

    def with_salt(self, salt: str) -> Fingerprint:
        """Return a fingerprint whose rows are shared with nobody of another salt.

        Who does not know the salt finds none of the blocks. It is stored in the clear,
        so it keeps apart and does not protect. An empty one is none.
        """
        fields = {name: field for name, field in self.fields.items() if name != "salt"}
        return replace(self, fields={**fields, "salt": salt} if salt else fields)

    @property
    def bare(self) -> Fingerprint:
        """The model's alone: without a salt, or the mark of re-anchored rows."""
        fields = {k: v for k, v in self.fields.items() if k not in _MARKS}
        return replace(self, fields=fields)

    @property
    def reanchored(self) -> Fingerprint:
        """What rows are stored under that were computed behind other tokens."""
        return replace(self, fields=mark_reanchored(self.fields))

    def with_draft(self, draft: Fingerprint) -> Fingerprint:
        """Return the fingerprint of a model and a draft model, whose caches follow."""
        parts = {name: draft.fields.get(name) for name in ("weights", "config", "code")}
        return replace(self, fields={**self.fields, "draft": parts})

    def difference(self, other: Fingerprint) -> str | None:
        """Return the first field that differs, this one's as stored, or ``None``."""
        return _first_difference("", self.fields, other.fields)


def refuse_other(label: str, stored: Fingerprint, given: Fingerprint) -> None:
    """Refuse what another model made.

    Raises:
        FingerprintError: They differ; it names the first field.
    """
    if is_reanchored(stored.fields) and not is_reanchored(given.fields):
        raise FingerprintError(
            f"`{label}` has rows that were computed behind other words: they were"
            " re-anchored",
            hint="compute the prompt itself, or load it with `near=`",
        )
    difference = stored.difference(given)
    if difference:
        raise FingerprintError(
            f"`{label}` was made by another model: {difference}",
            hint="give the model, adapter and draft model that it was saved with",
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model's folder, sorted.

    Raises:
        KVStoreError: It has none.
    """
    found = sorted(folder.glob("model*.safetensors"))
    found = found or sorted(folder.glob("*.safetensors"))
    if not found:
        raise KVStoreError(
            f"no model in this folder: {folder}: it has no safetensors file",
            hint="give the folder that `mlx_lm` loads the model from",
        )
    return found


def read_json(path: Path) -> Any:
    """Return what a file of JSON in a model's folder says.

    Raises:
        KVStoreError: There is none, it is not valid JSON, or larger than any is.
    """
    try:
        return _parse_small(path)
    except FileNotFoundError as error:
        raise KVStoreError(
            f"no such file: {path}",
            hint="give the folder that `mlx_lm` loads the model from",
        ) from error
    except (ValueError, RecursionError) as error:
        raise KVStoreError(f"not valid JSON: {path}: {error}") from error


def _parse_small(path: Path) -> Any:
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{size} bytes are too many")
    return json.loads(path.read_bytes())


def _read_config(folder: Path) -> JSON:
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise KVStoreError(f"not a JSON object: {path}")
    # mlx-lm reads these settings from a file of their own where they are not in there.
    apart = folder / "hf_quant_config.json"
    if "quantization_config" not in config and apart.is_file():
        config = {**config, "quantization_config": read_json(apart)}
    if "model_file" in config:
        # Code that the model brings may use any field.
        plain = {key: _plain(value) for key, value in config.items()}
        return {key: value for key, value in plain.items() if key not in _ADVISORY}
    arguments = _arguments_class(config)
    meaning = _meaning(config, _known_fields(arguments))
    # A name that is left out may have chosen between two.
    chosen = None if arguments is None else str(arguments.__module__)
    return meaning | {"architecture": chosen}


def _meaning(config: Mapping[str, Any], known: frozenset[str] | None) -> JSON:
    """Return the fields that count, those of nested models included.

    ``known`` are those that the architecture knows; ``None`` for all.
    """
    found: JSON = {}
    for key, value in config.items():
        if key in _NAMING or not (known is None or key in known or key in _LOADING):
            continue
        is_part = key.endswith("_config") and key != "quantization_config"
        if is_part and isinstance(value, Mapping):
            found[str(key)] = _meaning(value, None)
        else:
            found[str(key)] = _plain(value)
    return found


def _arguments_class(config: JSON) -> Any:
    """Return the class of mlx-lm that takes a configuration, or ``None``."""
    try:
        # Imported here: mlx-lm and MLX are not needed to list a store.
        from mlx_lm.utils import _get_classes

        return _get_classes(config)[1]
    except (ImportError, KeyError, TypeError, ValueError):
        return None  # mlx-lm knows no such architecture


def _known_fields(arguments: Any) -> frozenset[str] | None:
    """Return the fields that an architecture takes out of a configuration.

    ``None`` where that cannot be told: it is unknown, or reads its configuration in a
    way of its own, which may use any field.
    """
    if arguments is None:
        return None
    from mlx_lm.models.base import BaseModelArgs

    usual = getattr(BaseModelArgs.from_dict, "__func__", None)
    if getattr(arguments.from_dict, "__func__", None) is not usual:
        return None
    return frozenset(inspect.signature(arguments).parameters)


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it; some configurations have infinities."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)


def _digest_adapter(path: str | Path | None, memory: _Memory) -> str | None:
    if path is None:
        return None
    folder = Path(path)
    found = [folder / "adapter_config.json", folder / "adapters.safetensors"]
    for file in found:
        if not file.is_file():
            raise KVStoreError(
                f"no adapter in this folder: {folder}: {file.name} is missing",
                hint="give the folder that `mlx_lm.lora` wrote",
            )
    return memory.digest_files(found)


def _digest_parameters(model: Any) -> str:
    """Return a digest over all parameters, and classes and scalars of all modules."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    digest = blake3.blake3(max_threads=blake3.blake3.AUTO)
    parameters = dict(tree_flatten(model.parameters()))
    for name, array in sorted(parameters.items()):
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        octets = mx.contiguous(array).reshape(-1).view(mx.uint8)
        digest.update(np.asarray(octets).data)
    # Scales and the like: an adapter's strength is no parameter.
    for name, module in sorted(model.named_modules()):
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key != "_training"
        }
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        digest.update(canonical_json([name, kind, _plain(plain)]))
    return str(digest.hexdigest())


def _first_difference(name: str, stored: Any, given: Any) -> str | None:
    """Return the path of the first field that differs, depth first, with values."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in sorted({*stored, *given}):
            found = _first_difference(
                f"{name}.{key}" if name else key,
                stored.get(key, _MISSING),
                given.get(key, _MISSING),
            )
            if found:
                return found
        return None
    if stored == given and type(stored) is type(given):
        return None
    if name == "salt":
        return "salt: another one"  # which nobody is told
    return f"{name}: stored {_show(stored)}, given {_show(given)}"


def _show(value: Any) -> str:
    if value is _MISSING:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:13]}…"


class _Memory:
    """Digests of files that were hashed before, by path, size and times."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._read()
        self._is_changed = False

    def digest_files(self, paths: Iterable[Path]) -> str:
        """Return one digest over names and contents of some files."""
        named = [[path.name, self._digest(path)] for path in paths]
        return hashlib.sha256(canonical_json(named)).hexdigest()

    def digest_tensors(self, paths: Sequence[Path]) -> str:
        """Return one digest over the tensors of some files, however they are split.

        Files that are no plain safetensors count by names and contents.
        """
        keys = [_blob_name(path.resolve()) or _stat_key(path) for path in paths]
        key = "tensors|" + hashlib.sha256(canonical_json(keys)).hexdigest()
        try:
            return self._recall(key, paths, lambda: _digest_tensors(paths))
        except ValueError:
            return self.digest_files(paths)

    def keep(self) -> None:
        """Write down what was hashed, for the next process."""
        if not self._is_changed:
            return
        latest = dict(list(self._known.items())[-_MAX_REMEMBERED:])
        folder = self._path.parent
        try:
            files.make_private_dir(folder)
            files.write_atomic(self._path, canonical_json(latest), folder)
        except OSError:
            return  # a home that cannot be written only costs hashing again

    def _read(self) -> dict[str, str]:
        try:
            known = _parse_small(self._path)
        except (OSError, ValueError, RecursionError):
            return {}  # hashing again is always right
        if not isinstance(known, dict):
            return {}
        return {key: value for key, value in known.items() if isinstance(value, str)}

    def _digest(self, path: Path) -> str:
        real = path.resolve()
        return _blob_name(real) or self._recall(
            _stat_key(real), [real], lambda: _sha256(real)
        )

    def _recall(
        self, key: str, paths: Sequence[Path], digest: Callable[[], str]
    ) -> str:
        """Return a digest, and remember it if all files were left alone before."""
        if key not in self._known:
            are_settled = all(map(_is_settled, paths))
            found = digest()
            if not are_settled:
                return found
            self._known[key] = found
            self._is_changed = True
        return self._known[key]


def _blob_name(real: Path) -> str | None:
    """Return the SHA-256 by which a Hugging Face cache calls a large file."""
    is_blob = real.parent.name == "blobs" and _SHA256.fullmatch(real.name)
    return real.name if is_blob else None


def _stat_key(path: Path) -> str:
    """Return what changes where a file does: path, size and times."""
    real, status = path.resolve(), path.stat()
    return f"{real}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"


def _is_settled(path: Path) -> bool:
    """Whether a file was left alone for two seconds.

    One that changed this very moment may change again, and its time stay the same.
    """
    return time.time() - path.stat().st_mtime >= 2


def _digest_tensors(paths: Iterable[Path]) -> str:
    """Return one digest over the tensors of some safetensors files, by their names."""
    tensors: dict[str, list[Any]] = {}
    for path in paths:
        for name, parts in _read_tensors(path):
            if name in tensors:
                raise ValueError(f"tensor {name} is in two files")
            tensors[name] = parts
    listed = [[name, *tensors[name]] for name in sorted(tensors)]
    return hashlib.sha256(canonical_json(["tensors", listed])).hexdigest()


def _read_tensors(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """Yield name, dtype, shape and digest of the tensors of a safetensors file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"header of {length} bytes")
        tensors, _ = parse_header(file.read(length), size - 8 - length)
        for name, (dtype, shape, begin, end) in tensors.items():
            digest = blake3.blake3(max_threads=blake3.blake3.AUTO)
            for start in range(begin, end, _PIECE_BYTES):
                piece = file.read(min(_PIECE_BYTES, end - start))
                digest.update(piece)
            yield name, [dtype, list(shape), digest.hexdigest()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What produced these numbers: weights, configuration, adapter. Knows no tokens.

Not the device, nor the versions of MLX and mlx-lm: those change the last places of
a number, not what it means. Not the tokenizer: blocks are keyed by tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import blake3

from .errors import FingerprintError, KVStoreError
from .format.chain import digest_fields
from .format.documents import JSON, canonical_json
from .storage import files

VERSION = 1
# Fields of config.json that no number depends on.
_ADVISORY = {"_name_or_path", "transformers_version", "use_cache", "name_or_path"}
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

    Attributes:
        fields: JSON object; ``source``, ``weights``, ``config``, ``adapter``, ….
        label: What to call the model; advisory, not compared.
    """

    fields: JSON
    label: str = ""

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
        memory = _Memory(files.cache_home() / _MEMORY_NAME)
        fields: JSON = {
            "version": VERSION,
            "source": "files",
            **_read_model(Path(path), memory),
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
        config = getattr(model, "args", None)
        fields: JSON = {
            "version": VERSION,
            "source": "live",
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "weights": _digest_parameters(model),
            "config": _plain_config(config),
        }
        return cls(fields, label=label or type(model).__module__)

    def with_draft(self, draft: Fingerprint) -> Fingerprint:
        """Return the fingerprint of a model and a draft model, whose caches follow."""
        parts = {name: draft.fields.get(name) for name in ("weights", "config", "code")}
        return replace(self, fields={**self.fields, "draft": parts})

    def difference(self, other: Fingerprint) -> str | None:
        """Return the first field that differs, with both values, or ``None``.

        Args:
            other: The fingerprint given, where this is the stored one.
        """
        return _first_difference("", self.fields, other.fields)


def refuse_other(label: str, stored: Fingerprint, given: Fingerprint) -> None:
    """Refuse what another model made.

    Args:
        label: What to call the entry.
        stored: Of the model that made it.
        given: Of the model that is wanted.

    Raises:
        FingerprintError: They differ; it names the first field.
    """
    difference = stored.difference(given)
    if difference:
        raise FingerprintError(
            f"`{label}` was made by another model: {difference}",
            hint="give the model, adapter and draft model that it was saved with",
        )


def _read_model(folder: Path, memory: _Memory) -> JSON:
    """Return what the numbers of a model in a folder depend on."""
    return {
        "weights": memory.digest_files(_weight_files(folder)),
        "config": _read_config(folder / "config.json"),
        "code": memory.digest_files(sorted(folder.glob("*.py"))),
    }


def _plain_config(config: Any) -> Any:
    """Return a model's arguments as JSON can hold them; mlx-lm's are a dataclass."""
    if is_dataclass(config) and not isinstance(config, type):
        return _plain(asdict(config))
    return _plain(config)


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that mlx-lm would load weights from."""
    found = sorted(folder.glob("model*.safetensors"))
    found = found or sorted(folder.glob("*.safetensors"))
    if not found:
        raise KVStoreError(
            f"no model in this folder: {folder}: it has no safetensors file",
            hint="give the folder that `mlx_lm` loads the model from",
        )
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()[:_MAX_JSON_BYTES])
    except FileNotFoundError as error:
        raise KVStoreError(
            f"no such file: {path}",
            hint="give the folder that `mlx_lm` loads the model from",
        ) from error
    except (ValueError, RecursionError) as error:
        raise KVStoreError(f"not valid JSON: {path}: {error}") from error


def _read_config(path: Path) -> JSON:
    """Return config.json without the fields that no number depends on."""
    config = _read_json(path)
    if not isinstance(config, dict):
        raise KVStoreError(f"not a JSON object: {path}")
    return {key: _plain(value) for key, value in config.items() if key not in _ADVISORY}


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
    """Return the digest of an adapter's weights and configuration."""
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
    return f"{name}: stored {_show(stored)}, given {_show(given)}"


def _show(value: Any) -> str:
    """Return a value short enough for one line."""
    if value is _MISSING:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:13]}…"


class _Memory:
    """SHA-256 of files that were hashed before, by path, size and times."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._read()
        self._is_changed = False

    def digest_files(self, paths: Iterable[Path]) -> str:
        """Return one digest over names and contents of some files."""
        named = [[path.name, self._digest(path)] for path in paths]
        return hashlib.sha256(canonical_json(named)).hexdigest()

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
            known = json.loads(self._path.read_bytes()[:_MAX_JSON_BYTES])
        except (OSError, ValueError, RecursionError):
            return {}  # hashing again is always right
        if not isinstance(known, dict):
            return {}
        return {key: value for key, value in known.items() if isinstance(value, str)}

    def _digest(self, path: Path) -> str:
        real = path.resolve()
        # In a Hugging Face cache, a large file is called by its SHA-256.
        if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
            return real.name
        status = os.stat(real)
        key = f"{real}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"
        if key not in self._known:
            digest = _sha256(real)
            # A file changed this very moment may change again unnoticed.
            if time.time() - status.st_mtime < 2:
                return digest
            self._known[key] = digest
            self._is_changed = True
        return self._known[key]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

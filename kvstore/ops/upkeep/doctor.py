"""What is wrong with this machine, or with a store's folder. Writes nothing that stays.

Each check gives a :class:`Diagnosis`, and each that is not good says what to do. MLX is
imported by the check of the back end, which comes behind that of the BLAS.
"""

from __future__ import annotations

import os
import platform
import re
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from ...blas import (
    BACK_END_REMEDY,
    OPENBLAS_REMEDY,
    OPENBLAS_VARIABLE,
    is_openblas_needed,
    load_openblas,
    openblas_in_process,
)
from ...errors import KVStoreError, StoreLockedError
from ...format.config import CONFIG
from ...format.documents import JSON
from ...storage import files
from ...storage.disk import file_system_of, measure_disk
from ...storage.folder import StoreFolder, open_folder

State = Literal["good", "warning", "bad"]
_PACKAGES = ("mlx-kvstore", "mlx", "mlx-lm", "numpy", "safetensors", "zstandard")
_MLX_LM = ((0, 31), (0, 33))
"""From the first release that is supported to the first that is not."""
_SLOW_FLOPS = 5e9
_SLOW_SYNC_S = 0.1
_SLOW_BPS = 50e6
_NETWORK = re.compile(r"nfs\d*|cifs|smb\w*|9p|fuse\.sshfs|afs|ceph|lustre|webdav|afpfs")
_IN_MEMORY = {"tmpfs", "ramfs"}
_FULL_BYTES = 500_000_000


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one check found."""

    # What was looked at.
    subject: str
    state: State
    # What it is like, in a sentence.
    detail: str
    # What to do about it; empty where all is well.
    remedy: str = ""
    # The numbers behind the sentence.
    values: JSON = field(default_factory=dict)


def examine_machine() -> Iterator[Diagnosis]:
    """Yield what is found about packages, MLX's back end, and codecs."""
    yield examine_versions()
    blas = examine_blas()
    yield blas
    if blas.state == "bad":
        return  # MLX is not imported then
    back_end = examine_back_end()
    yield back_end
    if back_end.state != "bad":
        yield examine_codecs()


def examine_versions() -> Diagnosis:
    """Return what is installed, and whether kvstore works with it."""
    found = dict(_versions())
    python = platform.python_version()
    detail = f"Python {python}, " + ", ".join(f"{k} {v}" for k, v in found.items())
    values: JSON = {"python": python, "platform": platform.platform(), **found}
    missing = [name for name in _PACKAGES[1:] if name not in found]
    if missing:
        return Diagnosis(
            "versions", "bad", f"{', '.join(missing)} is not installed",
            "`pip install --upgrade mlx-kvstore`", values,
        )  # fmt: skip
    low, high = _MLX_LM
    if not low <= _release(found["mlx-lm"]) < high:
        return Diagnosis(
            "versions", "warning", f"mlx-lm {found['mlx-lm']} was never tried",
            f"`pip install 'mlx-lm>={_dotted(low)},<{_dotted(high)}'`", values,
        )  # fmt: skip
    return Diagnosis("versions", "good", detail, values=values)


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def examine_blas() -> Diagnosis:
    """Return what MLX multiplies matrices with; to be called before MLX is imported."""
    if not is_openblas_needed():
        return Diagnosis("BLAS", "good", "MLX brings its own")
    if os.environ.get(OPENBLAS_VARIABLE) in ("", "0"):
        return Diagnosis(
            "BLAS", "warning",
            f"OpenBLAS is switched off by `{OPENBLAS_VARIABLE}`",
            f"unset `{OPENBLAS_VARIABLE}`",
        )  # fmt: skip
    try:
        library = load_openblas() or openblas_in_process()
    except KVStoreError as error:
        return Diagnosis("BLAS", "bad", str(error), error.hint or "")
    if library is None:
        return Diagnosis(
            "BLAS", "warning",
            "no OpenBLAS: MLX reads prompts about 12 times more slowly on this CPU",
            OPENBLAS_REMEDY,
        )  # fmt: skip
    return Diagnosis("BLAS", "good", f"OpenBLAS: {library}")


def examine_back_end() -> Diagnosis:
    """Return whether MLX works here, on what, and how fast."""
    try:
        import mlx.core as mx

        device = str(mx.default_device())
        flops = _measure_flops()
    except (ImportError, RuntimeError) as error:
        remedy = BACK_END_REMEDY if sys.platform == "linux" else "`pip install mlx`"
        return Diagnosis("back end", "bad", f"MLX does not run: {error}", remedy)
    values: JSON = {"device": device, "flops": round(flops)}
    detail = f"MLX on {device}, {flops / 1e9:,.0f} GFLOP/s"
    if flops < _SLOW_FLOPS:
        remedy = f"look at the line on BLAS, or for other programs at work: {_load()}"
        return Diagnosis("back end", "warning", f"{detail}: slow", remedy, values)
    return Diagnosis("back end", "good", detail, values=values)


def _measure_flops() -> float:
    """Return how many float32 operations a second a product of matrices gets."""
    import mlx.core as mx

    size = 1024
    x = mx.ones((size, size))
    mx.eval(x @ x)
    begin = time.perf_counter()
    product = x @ x
    mx.eval(product)
    seconds = time.perf_counter() - begin
    if product[0, 0].item() != size:
        raise RuntimeError("a product of matrices is wrong")
    return float(2 * size**3 / seconds)


def _load() -> str:
    from ...codecs.parallel import NUM_CORES

    with suppress(OSError):
        return f"the load is {os.getloadavg()[0]:.1f} on {NUM_CORES} cores"
    return "the load is not known"


def examine_codecs() -> Diagnosis:
    """Return whether codecs give what they give everywhere, and give it back."""
    from .selftest import try_codecs

    wrong, kernels = try_codecs()
    values: JSON = {"kernels": kernels, "wrong": wrong}
    if wrong:
        return Diagnosis(
            "codecs", "bad",
            f"wrong results here: {', '.join(wrong)} ({kernels} kernels)",
            "report it, with this output; `TURBOQUANT_KERNELS=numpy` keeps to NumPy",
            values,
        )  # fmt: skip
    detail = f"the reference's results, to the bit ({kernels} kernels)"
    return Diagnosis("codecs", "good", detail, values=values)


def examine_store(path: Path) -> Iterator[Diagnosis]:
    """Yield what is found about a store's folder, or where one would be made.

    Args:
        path: The folder; nothing is made there.
    """
    folder = _open(path)
    if isinstance(folder, Diagnosis):
        yield folder
        if folder.state == "bad":
            return
        place = next(p for p in (path, *path.parents) if p.is_dir())
    else:
        yield _examine_modes(folder)
        place = folder.path
    yield _examine_file_system(place)
    yield _examine_space(place, folder if isinstance(folder, StoreFolder) else None)
    if isinstance(folder, StoreFolder):
        yield _examine_disk(folder.staging)
        yield _examine_lock(folder)
    else:
        yield _examine_disk(place)


def _open(path: Path) -> StoreFolder | Diagnosis:
    """Return the store, or what is found in its place."""
    is_new = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if is_new and not (path / CONFIG).exists():
        detail = f"none yet at {path}: `kvstore save` makes it"
        return Diagnosis("store", "good", detail, values={"path": str(path)})
    try:
        return open_folder(path)
    except KVStoreError as error:
        return Diagnosis("store", "bad", str(error), error.hint or "")
    except OSError as error:
        remedy = "check owner and mode of the folder, or choose another with `--store`"
        return Diagnosis("store", "bad", f"{error.strerror}: {path}", remedy)


def _examine_modes(folder: StoreFolder) -> Diagnosis:
    path = folder.path
    status = path.stat()
    values: JSON = {"path": str(path), "mode": oct(stat.S_IMODE(status.st_mode))}
    if status.st_uid != os.geteuid():
        return Diagnosis(
            "store", "warning", f"{path} belongs to another user",
            "choose a folder of your own with `--store`, or `chown` it", values,
        )  # fmt: skip
    if stat.S_IMODE(status.st_mode) & 0o077:
        return Diagnosis(
            "store", "warning", f"others may read your prompts in {path}",
            f"`chmod 700 {path}`", values,
        )  # fmt: skip
    return Diagnosis("store", "good", f"{path}, for its owner alone", values=values)


def _examine_file_system(path: Path) -> Diagnosis:
    kind = file_system_of(path)
    values: JSON = {"type": kind}
    if kind is None:
        return Diagnosis("file system", "good", "of unknown type", values=values)
    if _NETWORK.fullmatch(kind):
        return Diagnosis(
            "file system", "warning",
            f"{kind}, over a network: locks and syncs may not hold, and it is slow",
            "keep the store on a disk of this machine, with `--store` or"
            " `KVSTORE_DIR`; hand entries over with `kvstore export`", values,
        )  # fmt: skip
    if kind in _IN_MEMORY:
        return Diagnosis(
            "file system", "warning", f"{kind}: all is lost when the machine stops",
            "keep the store on a disk, with `--store` or `KVSTORE_DIR`", values,
        )  # fmt: skip
    return Diagnosis("file system", "good", kind, values=values)


def _examine_space(path: Path, folder: StoreFolder | None) -> Diagnosis:
    disk = os.statvfs(path)
    free = disk.f_bavail * disk.f_frsize
    used = _shard_bytes(folder) if folder else 0
    limit = folder.max_bytes if folder else 0
    values: JSON = {"free_bytes": free, "used_bytes": used, "max_bytes": limit or None}
    detail = f"{_gigabytes(free)} free"
    if folder:
        detail += f"; the store has {_gigabytes(used)} of at most {_gigabytes(limit)}"
    if free < _FULL_BYTES:
        return Diagnosis(
            "free space", "bad", detail,
            "free some space: `kvstore prune --now`, or another disk with `--store`",
            values,
        )  # fmt: skip
    if free < limit - used:
        return Diagnosis(
            "free space", "warning", f"{detail}: the disk is full before the store is",
            f"`kvstore prune --limit {(free + used) // 2 // 10**9 or 1}GB` sets a limit"
            " that fits", values,
        )  # fmt: skip
    return Diagnosis("free space", "good", detail, values=values)


def _shard_bytes(folder: StoreFolder) -> int:
    sizes = (path.stat().st_size for path in folder.shards.glob("*/*"))
    return sum(sizes)


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB"


def _examine_disk(folder: Path) -> Diagnosis:
    try:
        speed = measure_disk(folder)
    except OSError as error:
        return Diagnosis(
            "disk", "bad", f"cannot be written: {error.strerror}: {folder}",
            "check owner, mode and free space, or choose another folder with `--store`",
        )  # fmt: skip
    values: JSON = {**speed}
    detail = (
        f"writes {speed['write_bps'] / 1e6:,.0f} MB/s, reads"
        f" {speed['read_bps'] / 1e6:,.0f} MB/s, a sync takes"
        f" {speed['sync_s'] * 1e3:.1f} ms"
    )
    if speed["sync_s"] > _SLOW_SYNC_S or speed["write_bps"] < _SLOW_BPS:
        return Diagnosis(
            "disk", "warning", f"{detail}: slow",
            "every save waits for a few syncs; keep the store on a faster disk, with"
            " `--store` or `KVSTORE_DIR`", values,
        )  # fmt: skip
    return Diagnosis("disk", "good", detail, values=values)


def _examine_lock(folder: StoreFolder) -> Diagnosis:
    try:
        with files.locked(folder.lock, exclusive=True, timeout_s=1.0):
            return Diagnosis("lock", "good", "can be had")
    except StoreLockedError:
        return Diagnosis(
            "lock", "warning", "another process holds the store's lock",
            "wait for the other kvstore process, or end it",
        )  # fmt: skip
    except OSError as error:
        return Diagnosis(
            "lock", "bad", f"cannot be had: {error.strerror}: {folder.lock}",
            "check owner and mode, or keep the store on a disk of this machine",
        )  # fmt: skip

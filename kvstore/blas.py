"""A fast BLAS under MLX's CPU wheel. Knows the dynamic loader and nothing of kvstore.

MLX's Linux CPU wheel carries the reference BLAS, which multiplies 20 to 30 times more
slowly than OpenBLAS; what is loaded with global symbols before it takes its place.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import KVStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPENBLAS_VARIABLE = "KVSTORE_OPENBLAS"
OPENBLAS_REMEDY = (
    "`apt install libopenblas0-pthread` (Debian, Ubuntu) or `dnf install"
    f" openblas-threads` (Fedora); `{OPENBLAS_VARIABLE}` names one that lies elsewhere"
)
BACK_END_REMEDY = (
    '`pip install "mlx-kvstore[cpu]"`, or `[cuda12]` or `[cuda13]` for an NVIDIA GPU'
)

_searched_in_vain: list[bool] = []


def load_openblas() -> Path | None:
    """Load OpenBLAS, where there is one, before MLX is imported.

    Does nothing unless MLX's CPU wheel is what will run: on a Mac, with the CUDA wheel,
    or once `mlx.core` is imported. The environment variable `KVSTORE_OPENBLAS` names
    the library to load; empty or `0` switches this off.

    Returns:
        The library loaded (a bare name where only the loader knows its folder), or
        `None`: MLX then works with the BLAS it carries.

    Raises:
        KVStoreError: The library named by `KVSTORE_OPENBLAS` cannot be used.
    """
    wanted = os.environ.get(OPENBLAS_VARIABLE)
    is_late = "mlx.core" in sys.modules
    if wanted in ("", "0") or is_late or not is_openblas_needed():
        return None
    if wanted is not None:
        return _load_wanted(wanted)
    found = next((Path(name) for name in _candidates() if _can_load(name)), None)
    if found is None:
        _searched_in_vain.append(True)
    return found


def before_mlx(act: Callable[[], object]) -> None:
    """Have something done once, when MLX is about to be imported.

    Args:
        act: Is called where `import mlx.core` stands; what it raises, that raises.
    """
    sys.meta_path.insert(0, _BeforeMLX(act))


class _BeforeMLX(MetaPathFinder):
    """Is asked for modules before any other finder, and finds none."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname == "mlx.core":
            sys.meta_path.remove(self)
            self._act()


def openblas_in_process() -> Path | None:
    """Return the OpenBLAS that is under MLX, where this process has loaded one."""
    with suppress(OSError):
        maps = Path("/proc/self/maps").read_text(errors="replace")
        # NumPy brings one of another name, which MLX does not use.
        if found := re.search(r"/\S*/libopenblasp?[.-]\S*", maps):
            return Path(found[0])
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Have NumPy's OpenBLAS work in the thread that calls it.

    Its own threads spin while they wait for each other: beside a busy core, what takes
    a tenth of a second takes many. Other threads of the process are held to it too.
    """
    library = _numpy_openblas()
    if library is None:
        yield
        return
    _enter(library)
    try:
        yield
    finally:
        _leave(library)


# How many threads are inside, and how many of its own it had before.
_inside = [0, 0]
_lock = threading.Lock()


def _enter(library: Any) -> None:
    with _lock:
        if not _inside[0]:
            _inside[1] = library.scipy_openblas_get_num_threads64_()
            library.scipy_openblas_set_num_threads64_(1)
        _inside[0] += 1


def _leave(library: Any) -> None:
    with _lock:
        _inside[0] -= 1
        if not _inside[0]:
            library.scipy_openblas_set_num_threads64_(_inside[1])


@lru_cache(maxsize=1)
def _numpy_openblas() -> Any:
    """Return the OpenBLAS that NumPy's wheel carries, or `None`."""
    import ctypes
    from importlib.util import find_spec

    spec = find_spec("numpy")
    folder = Path(spec.origin or "").parents[1] if spec else Path()
    for path in folder.glob("numpy.libs/libscipy_openblas64_*"):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "scipy_openblas_set_num_threads64_"):
            return library
    return None


def is_openblas_missing() -> bool:
    """Whether OpenBLAS was looked for in this process, needed, and not found."""
    return bool(_searched_in_vain)


def is_openblas_needed() -> bool:
    """Whether MLX's CPU wheel is what will run, with the slow BLAS that it carries."""
    if sys.platform != "linux":
        return False
    from importlib import metadata

    # The CUDA wheels and builds from source bring a BLAS of their own.
    try:
        metadata.version("mlx-cpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def _candidates() -> Iterator[str]:
    machine = os.uname().machine
    debian = Path(f"/usr/lib/{machine}-linux-gnu")
    for path in (
        debian / "openblas-pthread/libopenblas.so.0",
        debian / "libopenblas.so.0",
        # Fedora's libopenblas.so.0 has one thread, libopenblasp.so.0 has many.
        Path("/usr/lib64/libopenblasp.so.0"),
        Path("/usr/lib64/libopenblas.so.0"),
        Path("/usr/lib/libopenblas.so.0"),
        Path("/usr/lib/libopenblas.so"),
    ):
        if path.exists():
            yield str(path)
    # Asked last, since it starts a process.
    import ctypes.util

    if found := ctypes.util.find_library("openblas"):
        yield found


def _load_wanted(library: str) -> Path:
    try:
        _load(library)
    except OSError as error:
        raise KVStoreError(
            f"cannot use `{library}` as OpenBLAS: {error}",
            hint=f"correct or unset `{OPENBLAS_VARIABLE}`, or set it to 0",
        ) from error
    return Path(library)


def _can_load(library: str) -> bool:
    try:
        _load(library)
    except OSError:
        return False
    return True


def _load(library: str) -> None:
    import ctypes

    handle = ctypes.CDLL(library)
    if not hasattr(handle, "openblas_get_config"):
        raise OSError("it is another library")
    handle.openblas_get_config.restype = ctypes.c_char_p
    if b"USE64BITINT" in handle.openblas_get_config():
        raise OSError("its integers have 64 bits, those of MLX 32")
    # Only now may it take the place of another.
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)

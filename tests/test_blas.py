"""A library once loaded stays, so every test asks a fresh process."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvstore import blas

ROOT = Path(__file__).parent.parent

LOAD = """
import sys
from kvstore.blas import load_openblas
assert "mlx.core" not in sys.modules
print(load_openblas())
"""

# The verb imports modules in an order of its own.
DOCTOR = """
from kvstore.cli import main
try:
    main(["doctor", "--json"])
except SystemExit:
    pass
"""

BAD_OF_DOCTOR = """
import contextlib, io, json, sys
from kvstore.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(["doctor", "--json", "--store", sys.argv[1]])
findings = json.loads(out.getvalue())["findings"]
print([one["subject"] for one in findings if one["state"] == "bad"])
"""

# Whether the symbols of an OpenBLAS are there for MLX to find.
IS_GLOBAL = """
import ctypes
print(hasattr(ctypes.CDLL(None), "openblas_get_config"))
"""

MATMUL = """
import sys, time
import numpy as np
import mlx.core as mx
a, b = mx.array(np.random.default_rng(0).normal(size=(2, 768, 768)), mx.float32)
mx.eval(a, b)
seconds = []
for _ in range(3):
    start = time.process_time()
    product = a @ b
    mx.eval(product)
    seconds.append(time.process_time() - start)
np.save(sys.argv[1], np.array(product))
print(min(seconds))
"""


def run(code: str, *args: str, openblas: str | None = None) -> str:
    """Run code in a fresh process and return what it prints last."""
    env = {k: v for k, v in os.environ.items() if k != "KVSTORE_OPENBLAS"}
    if openblas is not None:
        env["KVSTORE_OPENBLAS"] = openblas
    command = [sys.executable, "-c", code, *args]
    finished = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=env
    )
    lines = (finished.stdout + finished.stderr).strip().splitlines()
    return lines[-1] if lines else ""


@pytest.fixture(scope="module")
def library() -> str:
    """Return the OpenBLAS of this machine."""
    found = run(LOAD)
    if found == "None":
        pytest.skip("no OpenBLAS here, or MLX does not run on its CPU wheel")
    return found


def test_symbols_are_global(library: str) -> None:
    """Once OpenBLAS is loaded, a library that comes later finds its symbols."""
    assert run(IS_GLOBAL) == "False"
    assert run(LOAD + IS_GLOBAL) == "True"


def test_matmul_is_the_same(library: str, tmp_path: Path) -> None:
    """MLX takes at most half of the processor's time with it, for the same product."""
    seconds = float(run(MATMUL, str(tmp_path / "without.npy")))
    seconds_with = float(run(LOAD + MATMUL, str(tmp_path / "with.npy")))
    expected, actual = np.load(tmp_path / "without.npy"), np.load(tmp_path / "with.npy")
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)
    assert seconds_with < seconds / 2


def test_nothing_after_mlx(library: str) -> None:
    """Once mlx.core is imported, nothing is loaded."""
    late = "import mlx.core\n" + LOAD.replace("assert", "#")
    assert run(late) == "None"
    assert run(late + IS_GLOBAL) == "False"


def test_every_verb_has_it_under_mlx(library: str) -> None:
    """The command puts it under MLX whichever module is the first to import that."""
    late = "import mlx.core\n" + DOCTOR
    assert run(DOCTOR + IS_GLOBAL) == "True"
    assert run(late + IS_GLOBAL) == "False"


def test_variable_names_library(library: str) -> None:
    """KVSTORE_OPENBLAS says which library is loaded."""
    assert run(LOAD, openblas=library) == library


@pytest.mark.parametrize("value", ["", "0"])
def test_variable_switches_off(value: str) -> None:
    """An empty KVSTORE_OPENBLAS, or 0, switches this off."""
    assert run(LOAD, openblas=value) == "None"


def test_missing_library_is_refused(library: str, tmp_path: Path) -> None:
    """A KVSTORE_OPENBLAS that names no library is an error that names it."""
    missing = str(tmp_path / "libopenblas.so")
    message = run(LOAD, openblas=missing)
    assert f"KVStoreError: cannot use `{missing}` as OpenBLAS" in message


def test_doctor_tells_of_a_missing_library(library: str, tmp_path: Path) -> None:
    """It is one bad line among the others, and MLX is left alone."""
    missing = str(tmp_path / "libopenblas.so")
    bad = run(BAD_OF_DOCTOR, str(tmp_path / "store"), openblas=missing)
    assert bad == "['BLAS']"


def test_other_library_is_refused(library: str) -> None:
    """A library that is not OpenBLAS is refused before its symbols are global."""
    other = ctypes.util.find_library("m")
    assert other is not None
    message = run(LOAD, openblas=other)
    assert message.endswith(f"`{other}` as OpenBLAS: it is another library")


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_linux_only(platform: str) -> None:
    """Elsewhere than on Linux, nothing is looked for."""
    code = LOAD.replace("print", f"sys.platform = {platform!r}\nprint")
    assert run(code) == "None"


def test_numpy_works_in_one_thread_while_some_ask_for_it():
    """NumPy's BLAS has one thread until the last is done, and then those it had."""
    library = blas._numpy_openblas()
    if library is None:
        pytest.skip("NumPy brings no OpenBLAS here")
    count = library.scipy_openblas_get_num_threads64_
    library.scipy_openblas_set_num_threads64_(2)
    outer, inner = blas.one_thread(), blas.one_thread()
    with outer:
        with inner:
            assert count() == 1
        assert count() == 1
    assert count() == 2

"""Kernels are compiled where there is a compiler; without one, nothing fails."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from turboquant.kernels import native

ROOT = Path(native.__file__).parents[2]
HOOK = ROOT / "hatch_build.py"

pytestmark = pytest.mark.skipif(not HOOK.exists(), reason="not a checkout")


@pytest.fixture
def hook():
    """Return the module that pyproject.toml names as the build hook."""
    spec = importlib.util.spec_from_file_location("hatch_build", HOOK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_compiled_can_be_loaded(hook, tmp_path) -> None:
    """The library has kernels that run here and agree with NumPy."""
    if hook.find_compiler() is None:
        pytest.skip("no C++ compiler")
    library = tmp_path / hook.LIBRARY

    assert hook.compile_library(library)

    found = native.load_all(library)
    assert found
    assert all(native.agrees(kernels) for kernels in found)
    assert [library] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CXX", "no-such-compiler"), ("CXX", "false"), ("TURBOQUANT_PURE", "1")],
)
def test_no_compiler_is_no_error(
    hook, monkeypatch, tmp_path, capsys, variable, value
) -> None:
    """Without a compiler that works there is no library, and no old one either."""
    monkeypatch.setenv(variable, value)
    library = tmp_path / hook.LIBRARY
    library.write_bytes(b"of other sources")

    assert not hook.compile_library(library)

    assert [] == list(tmp_path.iterdir())
    assert "NumPy does their work" in capsys.readouterr().err


RESTORE = """
import sys
import mlx.core as mx
from mlx_lm.models.cache import KVCache
import kvstore, turboquant
from kvstore.codecs.turbo import kernels_name
assert kvstore.__file__.startswith(sys.argv[1]), kvstore.__file__
cache = KVCache()
cache.update_and_fetch(*mx.random.normal((2, 1, 2, 300, 64)))
model = kvstore.Fingerprint({"weights": "a"}, "a")
for codec in ("turbo4+zstd", "planes+zstd", "raw"):
    with kvstore.Store(sys.argv[2] + codec, codec) as store:
        store.save(list(range(300)), [cache], model, name="x")
        assert store.load_entry("x", model)[0][0].offset == 300
        assert store.verify(read_data=True) == []
print(kernels_name())
"""


@pytest.mark.slow
def test_a_pure_wheel_works(monkeypatch, tmp_path) -> None:
    """Installed without a library, the store saves and loads as with one."""
    monkeypatch.setenv("TURBOQUANT_PURE", "1")
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    wheels, target = tmp_path / "wheels", tmp_path / "installed"
    subprocess.run([*pip, "wheel", *options, "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [n for n in ZipFile(wheel).namelist() if n.endswith(".so")]
    subprocess.run([*pip, "install", *options, "-t", target, wheel], check=True)
    monkeypatch.setenv("PYTHONPATH", str(target))
    done = subprocess.run(
        [sys.executable, "-P", "-c", RESTORE, target, f"{tmp_path}/store-"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == "numpy\n", done.stderr


def test_an_unknown_machine_is_no_error(hook, monkeypatch, tmp_path) -> None:
    """A processor that there are no kernels for gets none."""
    monkeypatch.setattr("platform.machine", lambda: "vax")
    assert not hook.compile_library(tmp_path / hook.LIBRARY)


def test_a_release_says_where_the_project_lives(hook, monkeypatch) -> None:
    """A forge's build names its addresses; any other names none."""
    found: dict[str, dict[str, str]] = {}
    for server, expected in (("https://forge.example", True), ("", False)):
        monkeypatch.setenv("GITHUB_SERVER_URL", server)
        monkeypatch.setenv("GITHUB_REPOSITORY", "team/kvstore")
        hook.ForgeURLs.update(None, found)
        home = found["urls"].get("Homepage") == "https://forge.example/team/kvstore"
        assert home == expected

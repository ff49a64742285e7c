"""Kernels are compiled where there is a compiler; without one, nothing fails."""

import importlib.util
from pathlib import Path

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

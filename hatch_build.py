"""Compiles the kernels of `turboquant.kernels` into a wheel, where there is a compiler.

The library has no Python ABI, so one wheel of a platform serves every Python. Where it
cannot be compiled, the wheel is pure and NumPy does the work. For a checkout that is
not installed, `python hatch_build.py` compiles it in place.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # run by hand, where nothing is built with hatchling
    BuildHookInterface = MetadataHookInterface = object

KERNELS = Path(__file__).parent / "turboquant/kernels"
LIBRARY = "_native.so"
FLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -Wno-psabi"
    # Codes depend on the rounding of every product: it must not be contracted.
    " -ffp-contract=off -fno-math-errno"
)
# Name, floats in a vector, and flags of each instruction set of a machine.
_AVX512 = (
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mf16c -mprefer-vector-width=512"
)
_X86 = [
    ("sse2", 4, ""),
    ("avx2", 8, "-mavx2 -mf16c"),
    ("avx512", 16, _AVX512),
    ("avx512vnni", 16, f"{_AVX512} -mavx512vnni"),
]
_ARM = [("neon", 4, "")]
SETS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}


class CustomBuildHook(BuildHookInterface):
    """Adds the library to a wheel, or compiles it in place for an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name the platform in the wheel's tag."""
        if self.target_name != "wheel":
            return
        if version == "editable":
            compile_library(KERNELS / LIBRARY)
            return
        # Not in the checkout, from where it would get into a pure wheel.
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name, LIBRARY)
        if not compile_library(library):
            return
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"
        build_data["force_include"][str(library)] = f"turboquant/kernels/{LIBRARY}"

    def finalize(
        self, version: str, build_data: dict[str, Any], artifact_path: str
    ) -> None:
        """Remove what was compiled, once it is in the wheel."""
        if self.target_name == "wheel" and version != "editable":
            self._folder.cleanup()


class ForgeURLs(MetadataHookInterface):
    """The project's addresses, from what a forge tells its builds of itself."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the addresses, where they are known."""
        server, name = map(os.environ.get, ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY"))
        if not (server and name):
            metadata["urls"] = {}
            return
        home = f"{server}/{name}"
        metadata["urls"] = {
            "Homepage": home,
            "Documentation": f"{home}/tree/main/docs",
            "Issues": f"{home}/issues",
            "Changelog": f"{home}/blob/main/CHANGELOG.md",
        }


def compile_library(library: Path) -> bool:
    """Compile the kernels for this machine; return whether there is a library now."""
    library.unlink(missing_ok=True)
    compiler = find_compiler()
    sets = SETS.get(platform.machine())
    if compiler is None or sets is None or os.environ.get("TURBOQUANT_PURE"):
        return _without("no C++ compiler, or none is wanted")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, LIBRARY)
        try:
            _compile(compiler, sets, Path(folder), built)
        except (OSError, subprocess.CalledProcessError) as error:
            return _without(str(error))
        # Whole or not at all: another process may be loading the file.
        staged = library.with_suffix(f".{os.getpid()}")
        shutil.copyfile(built, staged)
        staged.replace(library)
    return True


def find_compiler() -> list[str] | None:
    """Return the command that compiles C++, or ``None``."""
    wanted = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    return wanted if shutil.which(wanted[0]) else None


def _compile(
    compiler: list[str], sets: list[tuple[str, int, str]], folder: Path, library: Path
) -> None:
    objects = []
    for name, width, flags in sets:
        objects.append(folder / f"{name}.o")
        defines = [f"-DISA={name}", f"-DVW={width}", *shlex.split(flags)]
        source = KERNELS / "kernel.cpp"
        _run([*compiler, *FLAGS, *defines, "-c", source, "-o", objects[-1]])
    dispatch = KERNELS / "dispatch.cpp"
    _run([*compiler, *FLAGS, "-shared", dispatch, *objects, "-o", library])


def _run(command: list[str | Path]) -> None:
    subprocess.run([str(part) for part in command], check=True)


def _without(reason: str) -> bool:
    print(f"kernels are not compiled, NumPy does their work: {reason}", file=sys.stderr)
    return False


if __name__ == "__main__":
    sys.exit(not compile_library(KERNELS / LIBRARY))

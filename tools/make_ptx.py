"""Make the PTX of the GPU kernels anew; needs NVIDIA's run-time compiler and no GPU.

    pip install nvidia-cuda-nvrtc-cu12==12.1.105
    python tools/make_ptx.py

PTX of that release runs on every driver of CUDA 12 and later. The first line of each
member of the archive is the digest of the source that it was made of.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from turboquant.kernels import gpu  # noqa: E402

OPTIONS = [b"--gpu-architecture=compute_70", b"--fmad=false", b"--ftz=false"]
# What a zip file says of the time at which a member was made; always the same.
EPOCH = (1980, 1, 1, 0, 0, 0)


def main() -> None:
    """Compile every kernel and write the archive."""
    nvrtc = load_nvrtc()
    with zipfile.ZipFile(
        gpu.PTX, "w", zipfile.ZIP_DEFLATED, compresslevel=9
    ) as archive:
        for name, registers in gpu.variants():
            source = gpu.source(name, registers).encode()
            ptx = compile_source(nvrtc, source)
            digest = hashlib.sha256(source).hexdigest()
            member = zipfile.ZipInfo(f"{gpu.entry(name, registers)}.ptx", EPOCH)
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, f"// {digest}\n".encode() + ptx)
            print(f"{member.filename}: {len(ptx):,} bytes")
    print(f"{gpu.PTX}: {gpu.PTX.stat().st_size:,} bytes")


def load_nvrtc() -> ctypes.CDLL:
    """Return the compiler, of NVIDIA's wheel or of the system."""
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("cuda_nvrtc/lib/libnvrtc.so.12")):
            return ctypes.CDLL(str(path))
    return ctypes.CDLL("libnvrtc.so.12")


def compile_source(nvrtc: ctypes.CDLL, source: bytes) -> bytes:
    """Return the PTX of a source.

    Raises:
        RuntimeError: It cannot be compiled.
    """
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"a.cu", 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    if nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options):
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx.value


if __name__ == "__main__":
    main()

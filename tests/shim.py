"""The kernels of a GPU as C++, which runs on any machine with a compiler.

Their text is compiled with `shim.h`, in which a SIMD group is 32 fibers.
"""

import ctypes
import subprocess
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

import hatch_build
from turboquant.kernels import gpu

COMPILER = hatch_build.find_compiler()
_SHIM = Path(__file__).with_suffix(".h").read_text()
_FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w"]


def make_launch(folder, edit=lambda text: text):
    """Return what runs kernels in the place of `gpu._launch`.

    Args:
        folder: Where they are compiled, each when it is first run.
        edit: Changes their text.
    """

    @cache
    def library(name, registers):
        text = edit(gpu.source(name, registers, _SHIM, "static void"))
        path = Path(folder, f"{name}{registers}.cpp")
        path.write_text(text + _runner(name, registers))
        command = [*COMPILER, *_FLAGS, str(path), "-o", str(path.with_suffix(".so"))]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(path.with_suffix(".so")))

    def launch(way, name, registers, inputs, numbers, outputs, threads, times=1):
        arrays = [np.array(x.reshape(-1).view(mx.uint8)) for x in inputs]
        for shape, dtype in outputs:  # full of something else
            arrays.append(np.full(int(np.prod(shape)) * dtype.size, 7, np.uint8))
        pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
        counts = (ctypes.c_int * len(numbers))(*numbers)
        if library(name, registers).run(pointers, counts, threads, times):
            raise RuntimeError("lanes part ways")
        return [
            mx.array(array).view(dtype).reshape(shape)
            for array, (shape, dtype) in zip(
                arrays[len(inputs) :], outputs, strict=True
            )
        ]

    return launch


def _runner(name, registers):
    """Return the function that runs each thread of a kernel once."""
    kernel = gpu._KERNELS[name]
    types = [f"const {gpu._POINTERS.get(n, 'uchar')}*" for n in kernel.inputs]
    types += ["uchar*"] * len(kernel.outputs)
    values = [f"({kind})p[{i}]" for i, kind in enumerate(types)]
    values += [f"n[{i}]" for i in range(len(kernel.numbers))]
    return f"""
static void** p;
static int* n;
static void one() {{ {gpu.entry(name, registers)}({", ".join(values)}); }}
extern "C" int run(void** pointers, int* numbers, uint threads, uint times) {{
  p = pointers;
  n = numbers;
  for (shim::second = 0; shim::second < times; shim::second++)
    for (uint at = 0; at < threads; at += 32)
      if (shim::run_group(at, one)) return 1;
  return 0;
}}
"""

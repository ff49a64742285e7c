"""The dtypes that rows are stored in, by their safetensors names."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

NUMPY_DTYPES: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "U8": np.uint8,
    "U32": np.uint32,
    "I32": np.int32,
    "I64": np.int64,
}
"""How each stored dtype is held in NumPy."""
MLX_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U8": mx.uint8,
    "U32": mx.uint32,
    "I32": mx.int32,
    "I64": mx.int64,
}
"""The same in MLX."""

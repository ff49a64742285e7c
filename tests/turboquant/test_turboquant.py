import subprocess
import sys

import pytest

import turboquant


def test_every_exported_name_exists() -> None:
    """Each name in `__all__` is there, once, in order."""
    assert sorted(set(turboquant.__all__)) == turboquant.__all__
    assert all(hasattr(turboquant, name) for name in turboquant.__all__)


def test_import_is_light() -> None:
    """Importing the package and its kernels brings in neither mlx-lm nor kvstore."""
    program = (
        "import sys, turboquant, turboquant.kernels;"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    imported = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()

    assert "turboquant" in imported
    assert not {"mlx_lm", "kvstore", "transformers"} & set(imported)


def test_the_live_cache_is_a_public_name() -> None:
    """The live cache is found in the package, and an unknown name is not."""
    from turboquant import TurboQuantKVCache, parse_kv_bits, quantize_prompt_cache

    assert (4, 4) == parse_kv_bits("turbo4")
    assert "TurboQuantKVCache" == TurboQuantKVCache.__name__
    assert callable(quantize_prompt_cache)
    with pytest.raises(AttributeError, match="TurboQuantCache"):
        turboquant.TurboQuantCache  # noqa: B018

import subprocess
import sys

import turboquant


def test_every_exported_name_exists() -> None:
    """Each name in `__all__` is there, once, in order."""
    assert sorted(set(turboquant.__all__)) == turboquant.__all__
    assert all(hasattr(turboquant, name) for name in turboquant.__all__)


def test_import_is_light() -> None:
    """Importing the package and its kernels brings in neither mlx-lm nor kvstore."""
    program = (
        "import sys, turboquant, turboquant.kernels.numpy, turboquant.reference;"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    imported = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()

    assert "turboquant" in imported
    assert not {"mlx_lm", "kvstore", "transformers"} & set(imported)

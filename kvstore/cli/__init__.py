"""The command ``kvstore``; ``commands`` has its verbs, the rest is what they share.

Nothing here imports mlx-lm before a verb that runs a model is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from ..blas import before_mlx
from .failures import run
from .main import cli, load_fast_blas


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, by default with the process's arguments, and exit."""
    before_mlx(load_fast_blas)
    sys.exit(run(cli, args))


__all__ = ["cli", "main"]

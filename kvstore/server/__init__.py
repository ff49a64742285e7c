"""mlx-lm's server, and any other, with a store behind its prompt cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .disk import ServedModel
    from .prompt_cache import DiskPromptCache

__all__ = ["DiskPromptCache", "ServedModel"]


def __getattr__(name: str) -> object:
    """Return a public name; mlx-lm is imported when one is first asked for."""
    if name in __all__:
        from . import disk, prompt_cache

        return getattr(prompt_cache if hasattr(prompt_cache, name) else disk, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Run a model with a store around it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .chat import Chat
    from .generate import continue_entry, save_prompt, stream_generate
    from .load import LoadedModel, load_models
    from .session import (
        CacheOptions,
        Callbacks,
        LiveCache,
        PrefillOptions,
        SamplingOptions,
    )
    from .templates import Template

__all__ = [
    "CacheOptions",
    "Callbacks",
    "Chat",
    "LiveCache",
    "LoadedModel",
    "PrefillOptions",
    "SamplingOptions",
    "Template",
    "continue_entry",
    "load_models",
    "save_prompt",
    "stream_generate",
]

_HOMES = {
    "chat": ("Chat",),
    "generate": ("continue_entry", "save_prompt", "stream_generate"),
    "load": ("LoadedModel", "load_models"),
    "session": (
        "CacheOptions",
        "Callbacks",
        "LiveCache",
        "PrefillOptions",
        "SamplingOptions",
    ),
    "templates": ("Template",),
}


def __getattr__(name: str) -> object:
    """Return a public name; mlx-lm is imported when one that needs it is asked for."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

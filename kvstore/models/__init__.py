"""Run a model with a store around it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .chat import Chat as Chat
    from .generate import continue_entry as continue_entry
    from .generate import save_prompt as save_prompt
    from .generate import stream_generate as stream_generate
    from .load import LoadedModel as LoadedModel
    from .load import load_models as load_models
    from .session import CacheOptions as CacheOptions
    from .session import Callbacks as Callbacks
    from .session import LiveCache as LiveCache
    from .session import PrefillOptions as PrefillOptions
    from .session import SamplingOptions as SamplingOptions
    from .templates import Template as Template

_HOMES = {
    "Chat": "chat",
    "continue_entry": "generate",
    "save_prompt": "generate",
    "stream_generate": "generate",
    "LoadedModel": "load",
    "load_models": "load",
    "CacheOptions": "session",
    "Callbacks": "session",
    "LiveCache": "session",
    "PrefillOptions": "session",
    "SamplingOptions": "session",
    "Template": "templates",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Return a public name; mlx-lm is imported when one that needs it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

"""Whether a model can keep its rows in codes: it is fed three tokens to find out.

mlx-lm's attention cannot use codes everywhere, and says so only when it meets them,
which may be after the whole prompt: latent attention, attention sinks and capped scores
take no quantized rows, and a head's width may be no multiple of the group size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..caches.live import quantize
from ..errors import UnsupportedCacheError

# Codes that attention never meets, since each step decodes them.
_USUAL = "turbo4"


def check_codes(model: Any, bits: int | str | None, group_size: int) -> None:
    """Refuse codes that a model cannot run with.

    Args:
        model: From ``mlx_lm.load``.
        bits: TurboQuant's name of its codes, or a number of bits of mlx-lm's.
        group_size: Numbers that share a scale, in mlx-lm's codes.

    Raises:
        UnsupportedCacheError: It says why, and which codes the model can run with.
    """
    if bits is None:
        return
    why = why_not(model, lambda empty: quantize(empty, bits, group_size))
    if why is None:
        return
    works = why_not(model, lambda empty: quantize(empty, _USUAL, group_size)) is None
    raise refused(bits, why, f"`{_USUAL}` works with it" if works else "leave it out")


def refused(bits: int | str, why: str, hint: str) -> UnsupportedCacheError:
    """Return the error of a model that cannot run with codes."""
    return UnsupportedCacheError(
        f"`--kv-bits {bits}` does not fit the model, which cannot keep its rows so:"
        f" {why}",
        hint=hint,
    )


def why_not(model: Any, coded: Callable[[list[Any]], list[Any]]) -> str | None:
    """Return why a model fails with codes, or ``None`` where it does not.

    ``coded`` returns a prompt cache of codes in the place of an empty one.
    """
    from mlx_lm.models.cache import make_prompt_cache

    try:
        prompt_cache = coded(list(make_prompt_cache(model)))
        # As a prompt is read, and as a reply is drawn.
        for tokens in ([0, 0], [0]):
            mx.eval(model(mx.array([tokens]), cache=prompt_cache))
    except (AttributeError, LookupError, TypeError):  # what it says is for developers
        return "its attention takes no quantized rows"
    except (ValueError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    return None

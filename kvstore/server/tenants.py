"""Clients of one server that are kept apart, and what its operator shares with all.

mlx-lm's server gives its prompt cache tokens, and not the client that they come from.
So a list of tokens knows its tenant, and what has none is neither looked up nor kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from email.message import Message
from typing import TYPE_CHECKING, SupportsIndex, overload

import blake3

if TYPE_CHECKING:
    from ..store import Store

_CONTEXT = "kvstore 1 tenant of a server"


def shared_tokens(store: Store, names: Iterable[str]) -> list[list[int]]:
    """Return the tokens of entries that an operator shares with all clients.

    Raises:
        EntryNotFoundError: There is no such entry.
        IntegrityError: One is damaged.
    """
    chains = map(store.chain, names)
    return [[token for _, s in chain for token in s.block.tokens] for chain in chains]


def find_tenant(headers: Message, name: str) -> str:
    """Return the tenant of a request: a digest, since an API key is a secret.

    Raises:
        ValueError: It is missing, empty, or there twice, as where a proxy adds its own
            to a client's.
    """
    values = headers.get_all(name, [])
    if len(values) != 1 or not values[0].strip():
        raise ValueError(f"the header {name} must be there once: it says who asks")
    key = blake3.blake3(values[0].strip().encode(), derive_key_context=_CONTEXT)
    return key.hexdigest()


class OwnedTokens(list[int]):
    """Tokens of one tenant; so is each slice of them."""

    def __init__(self, tokens: Iterable[int], tenant: str) -> None:
        super().__init__(tokens)
        self.tenant = tenant

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> OwnedTokens: ...
    def __getitem__(self, index: SupportsIndex | slice) -> int | OwnedTokens:
        if isinstance(index, slice):
            return OwnedTokens(super().__getitem__(index), self.tenant)
        return super().__getitem__(index)


def own(tokens: list[int], tenant: str | None) -> list[int]:
    """Return tokens that know their tenant, where there is one."""
    return tokens if tenant is None else OwnedTokens(tokens, tenant)


def tenant_of(tokens: Sequence[int]) -> str | None:
    """Return whose tokens these are, or ``None`` where nobody says."""
    return tokens.tenant if isinstance(tokens, OwnedTokens) else None

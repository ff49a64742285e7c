"""Clients of one server that are kept apart, and what its operator shares with all.

mlx-lm's server gives its prompt cache tokens, and not the client that they come from.
So a list of tokens knows its tenant, and what has none is neither looked up nor kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from email.message import Message
from typing import Any, SupportsIndex, overload

import blake3

from ..format.chain import common_run
from ..format.spans import Span
from ..store import Store
from .disk import ServedModel
from .prompt_cache import DiskPromptCache, Lookup
from .replay import Sampled

log = logging.getLogger("kvstore")
_CONTEXT = "kvstore 1 tenant of a server"


@dataclass(frozen=True, slots=True)
class Tenancy:
    """How a server tells its clients apart, and what it shares with all of them."""

    # The header of a request that names its tenant.
    header: str
    # Tokens of entries that the operator has saved.
    shared: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, store: Store, header: str, names: Iterable[str]) -> Tenancy:
        """Return the tenancy with these entries shared.

        Raises:
            EntryNotFoundError: There is no such entry.
            IntegrityError: One is damaged.
        """
        chains = map(store.chain, names)
        shared = (
            tuple(token for _, stored in chain for token in stored.block.tokens)
            for chain in chains
        )
        return cls(header, tuple(shared))

    def num_shared(self, tokens: Sequence[int]) -> int:
        """Return how many leading tokens of a prompt are shared with all."""
        return max((common_run(tokens, shared) for shared in self.shared), default=0)


def find_tenant(headers: Message, name: str) -> str:
    """Return the tenant of a request: a digest, since an API key is a secret.

    Args:
        headers: Those of the request.
        name: The header that names the tenant.

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


class TenantPromptCache(DiskPromptCache):
    """A prompt cache in which each tenant finds its own prompts only.

    The tenant is a salt of the fingerprint, on disk and in memory. Beside its own, a
    tenant finds what the operator has named, which no client can add to.

    Args:
        store: As :class:`DiskPromptCache` takes it.
        describe: The same.
        tenancy: Who is told apart, and what is shared.
        options: As :class:`DiskPromptCache` takes them.
    """

    def __init__(
        self,
        store: Store,
        describe: Callable[[Any], ServedModel],
        tenancy: Tenancy,
        **options: Any,
    ) -> None:
        def describe_for(key: tuple[Any, str]) -> ServedModel:
            served = describe(key[0])
            salted = served.fingerprint.with_salt(key[1])
            # Re-anchored rows of the operator's may come from what is not shared.
            near = served.near if key[1] else None
            return replace(served, fingerprint=salted, near=near)

        super().__init__(store, describe_for, **options)
        self._tenancy = tenancy

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep a prompt cache for the tenant whose tokens these are."""
        tenant = _known(tokens)
        if tenant is not None:
            key = (model, tenant)
            super().insert_cache(key, tokens, prompt_cache, cache_type=cache_type)

    def keep_prefill(
        self, model: Any, tokens: list[int], prompt_cache: list[Any]
    ) -> None:
        """Have a prefill written for the tenant whose tokens these are."""
        tenant = _known(tokens)
        if tenant is not None:
            super().keep_prefill((model, tenant), tokens, prompt_cache)

    def sampled(self, model: Any, tokens: Sequence[int]) -> Sampled | None:
        """Return the latest conversations of the tenant whose tokens these are."""
        tenant = _known(tokens)
        return None if tenant is None else super().sampled((model, tenant), tokens)

    def _fetch(
        self, model: Any, tokens: list[int], spans: Sequence[Span]
    ) -> tuple[list[Any] | None, list[int], Lookup]:
        tenant = _known(tokens)
        if tenant is None:
            return None, tokens, Lookup(len(tokens), 0, 0, "nobody knows whose it is")
        held, rest, lookup = super()._fetch((model, tenant), tokens, spans)
        stop = self._tenancy.num_shared(tokens)
        if stop <= len(tokens) - len(rest):
            return held, rest, lookup
        # Only what the operator shares; other entries of no tenant stay hidden.
        named, after = tokens[: stop + 1], tokens[stop + 1 :]
        common, left, found = super()._fetch((model, ""), named, spans)
        if common is None or len(left) + len(after) >= len(rest):
            return held, rest, lookup
        return common, left + after, replace(found, num_prompt_tokens=len(tokens))

    def _id(self, tokens: Sequence[int]) -> int:
        return hash((tenant_of(tokens), *tokens))


def _known(tokens: Sequence[int]) -> str | None:
    tenant = tenant_of(tokens)
    if tenant is None:
        log.warning("kvstore: tokens of an unknown tenant are left alone")
    return tenant

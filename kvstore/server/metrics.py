"""Counters of a server, in the words of Prometheus."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ..store import Store
from .prompt_cache import Lookup
from .watch import Served


class Metrics:
    """What was served since the start; any thread may call it."""

    def __init__(self) -> None:
        # Of its own: a server that embeds this one may count in the usual registry.
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "kvstore_requests",
            "Requests by their status",
            ["status"],
            registry=registry,
        )
        self._prompt = Counter(
            "kvstore_prompt_tokens",
            "Tokens of prompts by where their rows came from",
            ["source"],
            registry=registry,
        )
        self._generated = Counter(
            "kvstore_generated_tokens", "Tokens generated", registry=registry
        )
        self._first = Histogram(
            "kvstore_first_token_seconds",
            "From request to first token",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250),
            registry=registry,
        )
        self._bytes = Gauge("kvstore_store_bytes", "Bytes on disk", registry=registry)
        self._limit = Gauge(
            "kvstore_store_limit_bytes", "Size limit of the store", registry=registry
        )
        self._entries = Gauge("kvstore_entries", "Entries", registry=registry)

    def note(self, served: Served, lookup: Lookup | None) -> None:
        """Count a request that has ended."""
        status = "gone" if served.given_up else str(served.status)
        self._requests.labels(status).inc()
        self._generated.inc(served.num_generated)
        if lookup is not None:
            for source, num_tokens in lookup.sums().items():
                self._prompt.labels(source.removesuffix("_tokens")).inc(num_tokens)
        if served.first_token_s is not None:
            self._first.observe(served.first_token_s)

    def count(self, store: Store) -> tuple[bytes, str]:
        """Return all of it, with sums over a store, and its content type."""
        stats = store.stats()
        self._bytes.set(stats.nbytes)
        self._limit.set(stats.max_bytes)
        self._entries.set(stats.num_entries)
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

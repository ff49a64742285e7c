"""What others have stored: a remote behind a server's memory and disk.

Its requests run on threads of their own. A prompt waits for them for a while and no
longer; what comes later is on the disk for the next one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..caches.fit import wanted_of
from ..errors import EntryNotFoundError, KVStoreError, RemoteError
from ..format.entry import Entry, entry_id
from ..ops.speeds import Speeds, add, observe
from ..remote.catalog import find_prefixes, read_new
from ..remote.client import Client, Limits
from ..remote.layout import EntryKey, RemoteEntry, derived
from ..storage.index import Timing
from ..storage.keys import known_keys
from ..store import Store
from .writer import give_way

log = logging.getLogger("kvstore")
TIMEOUT_S = 5.0
"""How long a prompt waits for a remote."""
# For so long what was found out holds: which entries there are, that an entry is no
# use, and that the remote is slow or down.
_PAUSE_S = 60.0
# Entries that wait to be pushed.
_MAX_WAITING = 1000


class RemoteTier:
    """A remote that keeps no prompt waiting for long.

    One that was slow, or failed, is left alone for a minute.

    Args:
        store: Whose remote it is.
        name: The remote's name; the only one by default.
        timeout_s: How long a prompt waits for it.
        is_pushing: Put into it what is saved.

    Raises:
        KVStoreError: The store has no such remote.
    """

    def __init__(
        self,
        store: Store,
        name: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        is_pushing: bool = False,
    ) -> None:
        # What fails is tried again with the next prompt, or entry; and what a prompt
        # no longer waits for may take its time, but holds up the end of a server.
        limits = Limits(30.0, 10.0, timeout_s, 1, timeout_s, tries=1)
        self._client: Client = store.remotes.client(name, limits)
        self._open_store = store.reopen
        self._timeout_s = timeout_s
        self._asked_again_at = 0.0
        # No thread pulls: it may live on for a moment.
        self._is_idle = threading.Event()
        self._is_idle.set()
        # By the model's digest: its entries there, and since when they are known.
        self._known: dict[str, dict[EntryKey, RemoteEntry | None]] = {}
        self._known_at: dict[str, float] = {}
        self._signers: dict[str, str] = {}
        self._pulls: dict[str, Timing] = {}
        # When an entry, by its last block, was pulled or refused.
        self._tried_at: dict[str, float] = {}
        self._waiting: dict[str, None] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        self._pushing: threading.Thread | None = None
        if is_pushing:
            self._pushing = threading.Thread(
                target=self._push_all, name="kvstore-push", daemon=True
            )
            self._pushing.start()

    def bring(
        self,
        fingerprint: str,
        tokens: Sequence[int],
        least: int,
        *,
        like: Sequence[Any],
        min_bits: int,
        prefill: Timing | None,
    ) -> str | None:
        """Have what the remote has of a prompt brought into the store.

        Args:
            fingerprint: Digest of the model's.
            tokens: The prompt.
            least: How many of its tokens an entry must have.
            like: The model's empty prompt cache.
            min_bits: Fewest bits per number that its rows must have.
            prefill: What is known of computing rows.

        Returns:
            What was done, in words; ``None`` where nothing was.
        """
        now = time.monotonic()
        is_busy = not self._is_idle.is_set()
        if now < self._asked_again_at or is_busy or self._is_closing:
            return None
        for wanted in wanted_of(like):
            if wanted.find_shapes:
                wanted.find_shapes()  # here, since it may ask the model
        said: list[str] = []

        def pull() -> None:
            try:
                with self._open_store() as store:
                    found = self._find(fingerprint, tokens, least)
                    if found is not None:
                        speeds = Speeds(prefill, self._pulls.get(fingerprint))
                        said.append(self._pull(store, found, like, min_bits, speeds))
            except (KVStoreError, OSError) as error:
                if isinstance(error, RemoteError):
                    self._asked_again_at = time.monotonic() + _PAUSE_S
                log.warning("kvstore: not pulled: %s", error)
            except Exception:
                log.exception("kvstore: not pulled")
            finally:
                self._is_idle.set()

        self._is_idle.clear()
        threading.Thread(target=pull, name="kvstore-pull", daemon=True).start()
        if self._is_idle.wait(self._timeout_s):
            return said[0] if said else None
        self._asked_again_at = time.monotonic() + _PAUSE_S
        words = f"takes longer than {self._timeout_s:g} s"
        log.warning("kvstore: remote `%s` %s", self._client.remote.name, words)
        return f"remote {words}"

    def offer(self, entry: Entry) -> None:
        """Have an entry pushed soon, where pushing was asked for."""
        if self._pushing is None:
            return
        with self._changed:
            self._waiting[entry.id] = None
            if len(self._waiting) > _MAX_WAITING:
                del self._waiting[next(iter(self._waiting))]
            self._changed.notify_all()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was offered is pushed or given up; say whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """End what goes on; what was not pushed is on the disk, and logged."""
        if self._pushing is not None:
            self.flush(timeout_s)
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            if self._waiting:
                log.warning("kvstore: not pushed: %d entries", len(self._waiting))

    def _find(
        self, digest: str, tokens: Sequence[int], least: int
    ) -> RemoteEntry | None:
        """Return the remote's longest part of a prompt that is worth trying."""
        now, known = time.monotonic(), self._known.setdefault(digest, {})
        if now >= self._known_at.get(digest, 0.0):
            if (signers := known_keys()) != self._signers:
                self._signers = signers
                self._known.clear()  # who was refused may be trusted now
                known = self._known.setdefault(digest, {})
            read_new(self._client, digest, known)
            # Where a list takes long, few are read: else a fleet reads nothing else.
            took = time.monotonic() - now
            self._known_at[digest] = now + max(_PAUSE_S, 20 * took)
        for found in find_prefixes(known.values(), tokens):
            tried_at = self._tried_at.get(found.entry.tip)
            is_new = tried_at is None or now > tried_at + _PAUSE_S
            if found.entry.num_tokens >= least and is_new:
                return found
        return None

    def _pull(
        self,
        store: Store,
        found: RemoteEntry,
        like: Sequence[Any],
        min_bits: int,
        speeds: Speeds,
    ) -> str:
        """Bring an entry into the store, if that takes less time than computing it."""
        num_tokens, digest = found.entry.num_tokens, found.fingerprint
        if not speeds.pays(num_tokens):
            return (
                f"remote declined: {num_tokens} tokens come in"
                f" {speeds.load_s(num_tokens):.3f} s, are computed in"
                f" {speeds.prefill_s(num_tokens):.3f} s"
            )
        begin = time.monotonic()
        self._tried_at[found.entry.tip] = begin
        # Without a name, it is in nobody's way and goes when it is not used.
        entry = replace(found.entry, id=entry_id(None, found.entry.tip), name=None)
        nameless = derived(found, entry=entry)
        store.remotes.pull(nameless, self._client, like=like, min_bits=min_bits)
        seconds = time.monotonic() - begin
        new = observe(digest, "remote", num_tokens, seconds=seconds, at=time.time())
        if new is not None:
            self._pulls[digest] = add(self._pulls.get(digest), new)
        return f"{num_tokens} pulled in {seconds:.3f} s"

    def _push_all(self) -> None:
        give_way()
        with self._open_store() as store:
            while (ref := self._next()) is not None:
                is_done = True
                try:
                    done = store.remotes.push(ref, self._client)
                    log.info("kvstore: pushed %d bytes", done.sent_bytes)
                except EntryNotFoundError:
                    pass  # what continues it has taken its place
                except (KVStoreError, OSError) as error:
                    log.warning("kvstore: not pushed: %s", error)
                    is_done = not getattr(error, "may_pass", False)
                except Exception:
                    log.exception("kvstore: not pushed")
                with self._changed:
                    if is_done:
                        self._waiting.pop(ref, None)
                        self._changed.notify_all()
                    else:
                        self._changed.wait_for(lambda: self._is_closing, _PAUSE_S)

    def _next(self) -> str | None:
        """Return the id of the next entry, which still waits; ``None`` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            return None if self._is_closing else next(iter(self._waiting))

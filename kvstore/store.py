"""The store: the one conductor of hashing, prompt caches, codecs, shards and index."""

from __future__ import annotations

import html
import logging
import os
import time
from collections.abc import (
    Callable,
    Container,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TypeVar

from .errors import ArgumentError, EntryNotFoundError, KVStoreError
from .fingerprint import Fingerprint, refuse_other
from .format.block import (
    EXACT_BITS,
    BlockHash,
    Origin,
    Progress,
    StoredBlock,
    ignore_progress,
)
from .format.chain import as_tokens, pack_tokens
from .format.entry import Entry, check_name
from .format.known import KnownBlocks
from .format.spans import Span, last_end
from .ops.speeds import Speeds
from .ops.stats import Stats, sum_up
from .ops.usage import LoadNotes
from .storage.blocks import BlockStore
from .storage.borrowed import open_borrowed
from .storage.entries import Catalog
from .storage.folder import (
    configured,
    create_folder,
    default_path,
    open_folder,
    remake_folder,
)
from .storage.index import Place, Score, Timing

if TYPE_CHECKING:
    from .caches.reanchor import Reanchoring
    from .caches.snapshot import Chain, Root, Snapshot
    from .codecs import Codec
    from .format.bundle import BundleReader
    from .format.calibration import Calibration
    from .format.config import StoreConfig
    from .format.probe import Probe
    from .ops.explain import Explanation
    from .ops.load import Hit, Match, Request
    from .ops.quality import Loss
    from .ops.upkeep.check import Finding
    from .ops.upkeep.prune import PrunePlan
    from .ops.upkeep.purge import Traces
    from .remote.exchange import Remotes

T = TypeVar("T")
log = logging.getLogger("kvstore")
# How often what another process takes away meanwhile is looked for again.
_TRIES = 3
# How many entries a notebook shows.
_SHOWN = 20


class Store:
    """A folder of prompt caches.

    Use it from one thread, as a context manager or with :meth:`close`. Several
    processes may have the same store open.

    A ``ref`` is the name of an entry, its id or the start of that. Where there is no
    such entry, the error is an :class:`EntryNotFoundError`; where a part of it is
    missing or damaged, an :class:`IntegrityError`.

    Args:
        path: The folder; ``$KVSTORE_DIR`` or ``~/.cache/kvstore`` by default.
        codec: What full blocks are saved with: a codec, or a quality, which is the
            smallest codec that was measured to meet it: ``exact``, ``high``,
            ``balanced`` (the default) or ``small``. Where :meth:`calibrate` or
            ``kvstore calibrate`` has measured nothing of the model, these are
            ``planes+zstd``, ``turbo6+zstd``, ``turbo4+zstd`` and ``turbo4+zstd``.
        create: Make the store where there is none.
        base: The folder of a store that is only read: what it has is found too, behind
            what this one has. What an entry needs of it is copied when it is saved.
        on_load: Called after each :meth:`load` with what was restored and the seconds
            that it took; a miss says why it is one.
        on_evict: Called with each entry that was evicted, once it is gone: by a save at
            the size limit, or a plan of :meth:`plan_prune`. Neither may raise.
        limits: What entries of some models may take, in bytes, by what the model is
            called. Beyond it, those go that are worth least, before all others.

    Raises:
        StoreNotFoundError: There is no store, or the folder is something else.
        KVStoreError: The base has blocks of another size.
        CodecError: No such codec.
        FormatError: A newer release made the store.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        codec: str | None = None,
        *,
        create: bool = True,
        base: str | Path | None = None,
        on_load: Callable[[Match, float], None] | None = None,
        on_evict: Callable[[Entry], None] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        for given in (path, base):
            _check_path(given)
        self._on_load, self._on_evict = on_load, on_evict
        self._codec_name = codec or "balanced"
        if codec is not None:
            from .ops.bases import check_codec

            check_codec(codec)  # before a folder is made
        if base is not None:
            open_folder(Path(base), is_borrowed=True)  # this too
        chosen = default_path() if path is None else Path(path)
        self._folder = create_folder(chosen) if create else open_folder(chosen)
        if codec is not None:
            check_codec(codec, self._folder)
        self._limits = limits or {}
        # How much was written when each of them is next looked at.
        self._look_at: dict[str, int] = {}
        self._opened: BlockStore | None = BlockStore(self._folder, on_evict)
        self._opened.limits = self._limits
        self._base: BlockStore | None = None
        if base is not None:
            self._base = open_borrowed(Path(base), self._folder.block_size)
        self.notes = LoadNotes()
        """What was loaded, asked and measured, kept until the next save."""
        # The last blocks of entries that were saved here, and of those replaced.
        self._tips: set[BlockHash] = set()
        self._known = KnownBlocks(self._folder.block_size)
        # The root of the last prompt cache, which mostly is the next one's too.
        self._root: Root | None = None

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._folder.path

    @property
    def codec(self) -> str:
        """What full blocks are saved with: a codec, or a quality."""
        return self._codec_name

    def _codec_for(self, fingerprint: Fingerprint) -> Codec:
        """Return the codec for a model's blocks; all tenants have the same."""
        # Imported here: listing a store needs neither NumPy nor MLX.
        from .ops.bases import codec_for

        digest = fingerprint.bare.digest
        return codec_for(self._folder, self._codec_name, digest)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the index, having written down what was loaded.

        Any other use of the store is an error from then on.
        """
        if self._opened is not None:
            self._write_notes()
            self._opened.close()
            self._opened = None
        if self._base is not None:
            self._base.close()

    def __repr__(self) -> str:
        state = "" if self._opened else ", closed"
        return f"<kvstore.Store {str(self.path)!r}{state}>"

    def _repr_html_(self) -> str:
        if not self._opened:
            return html.escape(repr(self))
        latest = sorted(self.entries(), key=lambda e: -e.updated_at)[:_SHOWN]
        lines = "".join(
            f"<tr><td>{html.escape(e.name or e.id[:8])}</td><td>{e.num_tokens:,}</td>"
            f"<td>{e.nbytes / 1e6:,.1f} MB</td><td>{html.escape(e.title)}</td></tr>"
            for e in latest
        )
        head = "<tr><th>entry</th><th>tokens</th><th>size</th><th>title</th></tr>"
        what = html.escape(f"{self!r}, {len(self):,} entries")
        return f"{what}<table>{head}{lines}</table>"

    def __bool__(self) -> bool:
        return True  # also where there are no entries

    def __len__(self) -> int:
        return len(self.entries())

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries())

    def __contains__(self, name: object) -> bool:
        """Whether an entry has this name."""
        entries = self.entries() if isinstance(name, str) else []
        return any(entry.is_called(str(name)) for entry in entries)

    @property
    def _blocks(self) -> BlockStore:
        if self._opened is None:
            raise KVStoreError(
                f"the store is closed: {self.path}",
                hint="open it again with `kvstore.Store(path)`, or close it later",
            )
        return self._opened

    @property
    def _catalog(self) -> Catalog:
        return Catalog(self._blocks, self._base)

    def save(
        self,
        tokens: Sequence[int],
        prompt_cache: Sequence[Any],
        fingerprint: Fingerprint,
        *,
        name: str | None = None,
        replace: bool | Entry = False,
        title: str = "",
        progress: Progress | None = None,
    ) -> Entry:
        """Save a prompt cache; only blocks that the store lacks are written.

        When this returns, the entry survives a crash.

        Args:
            tokens: Exactly the tokens whose rows are in the cache.
            prompt_cache: mlx-lm's list of per-layer caches.
            fingerprint: What computed it.
            name: A name for the entry. It moves from an entry that this continues.
            replace: Take the name from an entry that this does not continue; from that
                one only, as it was, where one is given.
            title: The first words of what is saved, by which people know it again;
                those of the entry that this continues by default.
            progress: Called with (tokens saved, tokens in all).

        Raises:
            UnsupportedCacheError: A layer is of a class that cannot be stored.
            EntryExistsError: The name is taken.
            ValueError: Tokens and rows disagree, or the name is not one.
            OSError: The disk is full or fails; nothing acknowledged is lost.
        """
        check_name(name)
        live = self._snapshot(tokens, prompt_cache, fingerprint)
        self._mark_restored(live, prompt_cache)
        return self.save_snapshot(
            live,
            name=name,
            replace=replace,
            title=title,
            progress=progress,
        )

    def snapshot(
        self,
        tokens: Sequence[int],
        prompt_cache: Sequence[Any],
        fingerprint: Fingerprint,
        *,
        without: Container[BlockHash] = (),
        reserve: Callable[[frozenset[BlockHash]], bool] | None = None,
    ) -> Snapshot:
        """Take what the store lacks of a prompt cache, for another thread to save.

        The prompt cache may grow when this returns: rows are encoded, or copied where
        a codec takes longer than that.

        Unlike :meth:`save`, it believes the mark of a prompt cache: where a batch of
        mlx-lm's has lost it, lossy rows are taken for exact.

        Args:
            tokens: As for :meth:`save`.
            prompt_cache: The same.
            fingerprint: The same.
            without: Blocks that are on their way into the store already.
            reserve: Called with the prompt's blocks before the store is asked which of
                them it has. Where it says no, they may be evicted before the snapshot
                is saved, so that all are taken.

        Returns:
            What :meth:`save_snapshot` takes, of this store or of another
            :class:`Store` on the same folder and with the same codec.

        Raises:
            UnsupportedCacheError: A layer is of a class that cannot be stored.
            ValueError: Tokens and rows disagree.
        """
        from .ops.save import missing_blocks, take_rows

        live = self._snapshot(tokens, prompt_cache, fingerprint)
        codec = self._codec_for(fingerprint)
        if reserve is None or reserve(live.chain.hashes):
            wanted = self._blocks.run(
                lambda: missing_blocks(self._blocks, codec, live, without)
            )
            if (base := self._base) is not None:
                # What the base has as good as it is copied from there.
                better = base.run(lambda: missing_blocks(base, codec, live, without))
                wanted = [block for block in wanted if block in better]
        else:
            wanted = [b for b in live.chain.blocks if b.hash not in without]
        return take_rows(self._blocks, codec, live, wanted)

    def save_snapshot(
        self,
        snapshot: Snapshot,
        *,
        name: str | None = None,
        replace: bool | Entry = False,
        title: str = "",
        progress: Progress | None = None,
        spared: Callable[[], frozenset[BlockHash]] = frozenset,
    ) -> Entry:
        """Save a snapshot as :meth:`save` does a prompt cache; uses no MLX.

        Args:
            snapshot: From :meth:`snapshot`.
            name: As for :meth:`save`.
            replace: The same.
            title: The same.
            progress: The same.
            spared: Asked, where something has to be evicted, for blocks that stay.

        Raises:
            EntryExistsError: The name is taken.
            IntegrityError: Blocks that were there, or on their way, are not any more.
            ValueError: The name is not one.
            OSError: The disk is full or fails; nothing acknowledged is lost.
        """
        from .ops.save import save_entry

        check_name(name)
        codec = self._codec_for(Fingerprint(snapshot.chain.origin.fingerprint))

        def write() -> Entry:
            self._write_notes()
            self._copy_blocks(codec, snapshot, spared)
            old = self._catalog.holder(name, snapshot.chain.tip.hex())
            self._tips |= {BlockHash(bytes.fromhex(old.tip))} if old else set()
            self._tips.add(snapshot.chain.tip)
            entry = save_entry(
                self._blocks,
                self._catalog,
                codec,
                snapshot,
                name=name,
                replace=replace,
                title=title,
                progress=progress or ignore_progress,
                spared=spared,
            )
            self._keep_to_limit(entry.model, spared)
            return entry

        return self._blocks.run(write)

    def _keep_to_limit(
        self, model: str, spared: Callable[[], frozenset[BlockHash]]
    ) -> None:
        """See now and then that a model keeps to its limit."""
        from .ops.commit import keep_to_limit

        limit = self._limits.get(model)
        written = self._blocks.index.counters().get("written_bytes", 0)
        if limit is not None and written >= self._look_at.get(model, 0):
            self._look_at[model] = written + limit // 20
            keep_to_limit(self._blocks, model, spared)

    def save_blocks(
        self,
        tokens: Sequence[int],
        prompt_cache: Sequence[Any],
        fingerprint: Fingerprint,
        *,
        checkpoint: bool = True,
    ) -> int:
        """Write the blocks of a prompt cache that is still growing.

        For a long prefill: a crash at 90 % then loses 10 %. There is no entry yet, so
        :meth:`plan_prune` frees them when an hour has passed without one. The tail is
        left for the next call, except where it carries a checkpoint.

        Args:
            tokens: As for :meth:`save`.
            prompt_cache: The same.
            fingerprint: The same.
            checkpoint: Store the state of recurrent layers too, at this position.

        Returns:
            How many leading tokens are stored now.

        Raises:
            UnsupportedCacheError: A layer is of a class that cannot be stored.
            ValueError: Tokens and rows disagree.
            OSError: The disk is full or fails.
        """
        from .caches.snapshot import take_live
        from .ops.save import save_blocks

        whole = self._make_chain(tokens, prompt_cache, fingerprint)
        keeps_tail = checkpoint and whole.has_states
        chain = whole if keeps_tail else whole.without_tail(self._folder.block_size)
        if chain is None:
            return 0
        tip = whole.num_tokens if checkpoint else None
        live = take_live(chain, prompt_cache, tip, fingerprint.label)
        codec = self._codec_for(fingerprint)
        self._mark_restored(live, prompt_cache)

        def write() -> None:
            self._copy_blocks(codec, live)
            save_blocks(self._blocks, codec, live, ignore_progress)

        self._blocks.run(write)
        return chain.num_tokens

    def _copy_blocks(
        self,
        codec: Codec,
        snapshot: Snapshot,
        spared: Callable[[], frozenset[BlockHash]] = frozenset,
    ) -> None:
        """Copy what only the base has of what is about to be saved."""
        from .ops.save import copy_blocks

        mine, base = self._blocks, self._base
        if base is not None:
            base.run(lambda: copy_blocks(base, mine, codec, snapshot, spared))

    def load(
        self,
        tokens: Sequence[int],
        fingerprint: Fingerprint,
        *,
        exact: bool = False,
        min_bits: int = 0,
        like: Sequence[Any] | None = None,
        spans: Sequence[Span] = (),
        from_codes: bool = False,
        near: Reanchoring | None = None,
        progress: Progress | None = None,
    ) -> tuple[list[Any] | None, list[int]]:
        """Restore the longest stored prefix of a prompt.

        A miss is an answer: what is damaged or was made by another model is as
        good as not there, and :meth:`lookup` says why.

        Args:
            tokens: The prompt. Negative ids mark media: a run of one such id is fed
                whole, so what is restored never ends inside it.
            fingerprint: The model's.
            exact: Take only rows that nothing lossy went into.
            min_bits: Take only rows that were coded, and computed from rows that were
                coded, in no fewer bits per number.
            like: A prompt cache, empty as a rule, of the classes and parameters wanted;
                by default any but those of codes, such as ``TurboQuantKVCache``.
            spans: More parts of the prompt that are fed whole, each as the position
                of its first token and the position behind its last.
            from_codes: Where `like` asks for a ``KVCache``, decode the codes of a live
                ``TurboQuantKVCache`` too. A run that did not ask for codes leaves this
                out: decoded rows are not those that it would compute.
            near: The model, measured. Rows behind a change are then reused too, and
                what differs is computed here. They are never exact: ``near.count`` says
                how many there are, and what is saved of them is found this way only.
            progress: Called with (tokens restored, tokens held).

        Returns:
            The prompt cache, or ``None``, and the tokens still to be fed, of which
            there is always one.

        Raises:
            OSError: The disk fails; that is no damage.
        """
        # Imported here: listing a store needs no MLX.
        from .ops.load import find_prefix, restore

        token_list = as_tokens(tokens)
        bits = EXACT_BITS if exact else min_bits
        request = self._request(
            token_list, fingerprint, bits, like, spans, from_codes=from_codes
        )

        if near is not None:
            made = self._load_near(request, fingerprint, near, progress)
            if made is not None:
                return made, token_list[made[0].offset :]

        missed: list[Match] = []
        tell = progress or ignore_progress

        def work(blocks: BlockStore) -> tuple[list[Any] | None, list[int]]:
            for tries in range(_TRIES):
                begin = time.perf_counter()
                hit = find_prefix(blocks, request)
                if isinstance(hit, str) or not hit.num_tokens:
                    break
                prompt_cache, hit = restore(blocks, hit, tell)
                # What `prune` moved meanwhile is found at its new place.
                is_last = tries == _TRIES - 1 and _is_usable(request, hit)
                if hit.reason != "damaged" or is_last:
                    self._note_load(hit, len(token_list), fingerprint, begin)
                    return prompt_cache, token_list[hit.num_tokens :]
            missed.append(replaced(_to_match(hit, len(token_list)), num_tokens=0))
            return None, token_list

        start = time.perf_counter()
        for blocks in self._layers(request):
            found = blocks.run(partial(work, blocks))
            if found[0] is not None:
                return found
        self.notes.add(None, len(token_list))
        if self._on_load is not None:
            self._on_load(missed[-1], time.perf_counter() - start)
        return None, token_list

    def _layers(self, request: Request) -> list[BlockStore]:
        """Return own blocks and those of the base, which has most of a prompt first."""
        if self._base is None:
            return [self._blocks]

        from .ops.load import find_prefix

        def held(blocks: BlockStore) -> int:
            hit = blocks.run(lambda: find_prefix(blocks, request))
            return 0 if isinstance(hit, str) else hit.num_tokens

        return sorted([self._blocks, self._base], key=held, reverse=True)

    def _holder(self, ref: str) -> tuple[BlockStore, Entry]:
        """Return an entry and the blocks that have it: own ones before the base's."""
        try:
            return self._blocks, self._catalog.find(ref)
        except EntryNotFoundError:
            if self._base is None:
                raise
            return self._base, Catalog(self._base).find(ref)

    def _with_entry(self, ref: str, work: Callable[[BlockStore, Entry], T]) -> T:
        """Run ``work`` with an entry and the blocks that have it."""
        # At a second look, the entry may have moved on.
        blocks = self._holder(ref)[0]
        return blocks.run_again(lambda: work(*self._holder(ref)))

    def load_near(
        self,
        tokens: Sequence[int],
        fingerprint: Fingerprint,
        near: Reanchoring,
        *,
        held: int = 0,
        min_bits: int = 0,
        like: Sequence[Any] | None = None,
        progress: Progress | None = None,
    ) -> tuple[list[Any] | None, list[int]]:
        """Restore what :meth:`load` does with ``near``, where that is re-anchored.

        Args:
            tokens: The prompt.
            fingerprint: The model's.
            near: The model, measured.
            held: How many of its leading tokens the caller has rows of already: then
                so many more are wanted as it takes to be worth it.
            min_bits: As for :meth:`load`.
            like: The same.
            progress: Called with (tokens restored, tokens held).

        Returns:
            The prompt cache, and the tokens still to be fed; ``None`` where
            re-anchoring brings nothing.
        """
        token_list = as_tokens(tokens)
        request = self._request(token_list, fingerprint, min_bits, like)
        made = self._load_near(request, fingerprint, near, progress, held)
        return made, token_list[made[0].offset if made else 0 :]

    def _load_near(
        self,
        request: Request,
        fingerprint: Fingerprint,
        near: Reanchoring,
        progress: Progress | None,
        held: int = 0,
    ) -> list[Any] | None:
        from .ops.near import load_near

        if request.min_bits == EXACT_BITS:
            raise ArgumentError(
                "re-anchored rows are never exact", hint="leave out `exact` or `near`"
            )
        moved, tell = fingerprint.reanchored.digest, progress or ignore_progress

        def load(blocks: BlockStore) -> list[Any] | None:
            known = Catalog(blocks).all()
            return load_near(blocks, known, request, moved, near, held, tell)

        found = (blocks.run(partial(load, blocks)) for blocks in self._layers(request))
        return next((made for made in found if made is not None), None)

    def load_entry(
        self,
        ref: str,
        fingerprint: Fingerprint | None,
        *,
        exact: bool = False,
        min_bits: int = 0,
        max_kl: float | None = None,
        progress: Progress | None = None,
    ) -> tuple[list[Any], list[int]]:
        """Restore an entry.

        Args:
            ref: Its name, or its id or the start of it.
            fingerprint: The model's; ``None`` takes whatever made the entry.
            exact: Refuse rows that something lossy went into.
            min_bits: Refuse rows that were coded, or computed from rows that were
                coded, in fewer bits per number.
            max_kl: Refuse rows whose codec was measured to move what the model says
                next by more, or was not measured; see :meth:`loss`.
            progress: Called with (tokens restored, tokens held).

        Returns:
            The prompt cache and the tokens whose rows it holds.

        Raises:
            FingerprintError: Another model made it.
            KVStoreError: Its rows are worse than was asked for.
            OSError: The disk fails; that is no damage.
        """
        from .ops.load import entry_hit, restore
        from .ops.quality import loss_of, refuse_loss

        def work(blocks: BlockStore, entry: Entry) -> tuple[list[Any], list[int]]:
            begin = time.perf_counter()
            _check_fingerprint(blocks, entry, fingerprint)
            bits = EXACT_BITS if exact else min_bits
            hit, tokens = entry_hit(blocks, entry, bits)
            if max_kl is not None:
                stored = map(blocks.stored, hit.places)
                refuse_loss(loss_of(blocks, entry, stored), max_kl)
            tell = progress or ignore_progress
            cache, hit = restore(blocks, hit, tell, strict=True)
            self._note_load(hit, len(tokens), fingerprint, begin)
            return cache, tokens

        return self._with_entry(ref, work)

    def prefetch(self, ref: str) -> Thread:
        """Start reading an entry's shards, while its prompt is tokenized say.

        A thread of its own reads them into the system's cache of files, where
        :meth:`load` finds them. A disk that fails says so then.

        Returns:
            The thread, which nobody needs to wait for.
        """
        from .ops.load import read_ahead

        blocks, entry = self._holder(ref)
        return blocks.run(lambda: read_ahead(blocks, entry))

    def lookup(
        self,
        tokens: Sequence[int],
        fingerprint: Fingerprint,
        *,
        exact: bool = False,
        min_bits: int = 0,
        like: Sequence[Any] | None = None,
        spans: Sequence[Span] = (),
    ) -> Match:
        """Return what :meth:`load` would restore, and why not more."""
        from .ops.load import find_prefix, to_match

        token_list = as_tokens(tokens)
        bits = EXACT_BITS if exact else min_bits
        request = self._request(token_list, fingerprint, bits, like, spans)
        blocks = self._layers(request)[0]
        hit = blocks.run(lambda: find_prefix(blocks, request))
        return to_match(hit, len(token_list))

    def explain(
        self,
        tokens: Sequence[int],
        fingerprint: Fingerprint,
        *,
        exact: bool = False,
        min_bits: int = 0,
        like: Sequence[Any] | None = None,
    ) -> Explanation:
        """Return what :meth:`lookup` does, and what is stored beside it.

        Takes longer: it looks through all that any model has stored of the prompt.
        """
        from .ops.explain import explain

        token_list = as_tokens(tokens)
        bits = EXACT_BITS if exact else min_bits
        request = self._request(token_list, fingerprint, bits, like)

        blocks = self._layers(request)[0]

        def work() -> Explanation:
            return explain(blocks, Catalog(blocks).all(), request, fingerprint)

        return blocks.run(work)

    def nearest(
        self, tokens: Sequence[int], fingerprint: Fingerprint
    ) -> tuple[Entry, list[int]] | None:
        """Return the entry that has most of a prompt's tokens, and its own tokens.

        They may stand anywhere in it. The latest entries of the model are looked at.
        """
        from .ops.explain import find_nearest

        token_list, known = as_tokens(tokens), self._catalog.all()
        digest = fingerprint.digest
        return self._blocks.run(
            lambda: find_nearest(self._blocks, known, token_list, digest)
        )

    def latest_tokens(self, fingerprint: Fingerprint) -> list[list[int]]:
        """Return the tokens of a model's latest entries, the latest first."""
        from .ops.explain import latest

        known, digest = self._catalog.all(), fingerprint.digest
        return self._blocks.run(
            lambda: [tokens for _, tokens in latest(self._blocks, known, digest)]
        )

    def reopen(self) -> Store:
        """Return another store on the same folder, for another thread.

        It writes down at each save what this one notes, which may only load.
        """
        base = None if self._base is None else self._base.folder.path
        other = Store(
            self.path,
            self._codec_name,
            create=False,
            base=base,
            on_load=self._on_load,
            on_evict=self._on_evict,
            limits=self._limits,
        )
        other.notes = self.notes
        return other

    def note_prefill(
        self, fingerprint: Fingerprint, num_tokens: int, seconds: float
    ) -> None:
        """Note how long a model took to compute the rows of so many tokens.

        Kept in memory until the next save, or :meth:`close`; any thread may call it.
        Fewer than 64 tokens are left out.

        Args:
            fingerprint: The model's.
            num_tokens: How many tokens were fed, all at a time or in steps.
            seconds: How long it took, the rows evaluated.
        """
        self.notes.add_timing(fingerprint, None, num_tokens, seconds=seconds)

    def note_load(
        self, fingerprint: Fingerprint, num_tokens: int, seconds: float
    ) -> None:
        """Note how long restoring took until a load was given up.

        Any thread may call it. Loads that end are noted of themselves.
        """
        codec = self._codec_for(fingerprint).name
        self.notes.add_timing(fingerprint, codec, num_tokens, seconds=seconds)

    def scores(self) -> list[Score]:
        """Return what conversations with servers have cost, the latest first.

        Of the last 256. They are lost where the index is made anew, and forgotten where
        entries are purged.
        """

        def read() -> list[Score]:
            self._write_notes()
            return self._blocks.index.scores()

        return self._blocks.run(read)

    def speeds(self, fingerprint: Fingerprint) -> Speeds:
        """Return how fast this machine computes a model's rows, and restores them.

        What was measured more than a day ago is left out. Every hit is measured;
        prefills are where :meth:`note_prefill` is called.
        """
        digest = fingerprint.bare.digest

        def read() -> list[Timing]:
            return self._blocks.run(lambda: self._blocks.index.timings(digest))

        mine = [t for t in self.notes.timings(read) if t.fingerprint == digest]
        return Speeds.choose(mine, self._codec_for(fingerprint).name, time.time())

    def entries(self) -> list[Entry]:
        """Return all entries that can be read, latest first.

        Damaged ones are left out; :meth:`verify` reports them. Those of a base come
        last, without those whose names are taken here.
        """
        mine = self._catalog.all()
        if self._base is None:
            return mine
        ids = {entry.id for entry in mine}
        theirs = Catalog(self._base).all()
        return mine + [entry for entry in theirs if entry.id not in ids]

    def entry(self, ref: str) -> Entry:
        """Return the entry with this name, or whose id starts so.

        Raises:
            EntryNotFoundError: There is none, or the start fits several.
            IntegrityError: Its file is damaged.
        """
        return self._holder(ref)[1]

    def run(self, work: Callable[[BlockStore], T]) -> T:
        """Run a job of :mod:`kvstore.ops` that this class has no method for.

        Where the index turns out to be damaged, it is rebuilt, and the job run again.
        """
        return self._blocks.run(lambda: work(self._blocks))

    def chain(self, ref: str) -> list[tuple[Place, StoredBlock]]:
        """Return the blocks of an entry, first to last, and where they lie."""
        return self._with_entry(ref, lambda blocks, entry: blocks.chain(entry))

    def loss(self, ref: str) -> Loss:
        """Return what is known of how far an entry is from what its model computed.

        By the codecs of its blocks as they are now, and what was measured of them: in
        this store, or where the entry was saved.
        """
        from .ops.quality import loss_of

        def look(blocks: BlockStore, entry: Entry) -> Loss:
            return loss_of(blocks, entry, (b for _, b in blocks.chain(entry)))

        return self._with_entry(ref, look)

    def blocks_digest(self, ref: str) -> str:
        """Return a digest of what an entry's blocks are now."""
        from .ops.quality import digest_of

        return digest_of(stored for _, stored in self.chain(ref))

    def note_probe(self, entry: Entry, probe: Probe) -> Entry:
        """Keep with an entry what was measured of it, and return the entry.

        It counts in :meth:`loss` while the entry's blocks are what they were then.

        Args:
            entry: As it was when it was measured.
            probe: With the :meth:`blocks_digest` of before.

        Raises:
            EntryNotFoundError: It is gone.
            KVStoreError: It has changed meanwhile.
        """
        from .ops.quality import note_probe

        return self.run(lambda blocks: note_probe(blocks, self._catalog, entry, probe))

    def fingerprint_of(self, ref: str) -> Fingerprint:
        """Return the fingerprint of what made an entry."""
        return Fingerprint(self._origin(ref).fingerprint)

    def is_like(self, ref: str, prompt_cache: Sequence[Any]) -> bool:
        """Whether an entry is of such caches, empty or not."""
        from .caches.fit import wanted_of, why_unfit
        from .caches.kinds import known_layout

        layout = known_layout(self._origin(ref).layout)
        return why_unfit(layout, wanted_of(prompt_cache)) is None

    def export_bundle(
        self,
        ref: str,
        file: IO[bytes],
        *,
        without_basis: bool = False,
        secret: str | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Write an entry and its blocks as one file, for :meth:`import_bundle`.

        The same entry gives the same bytes, whatever else is in the store. A bundle
        holds the tokens, so the text.

        Args:
            ref: The entry's name, or its id or the start of it.
            file: Opened for writing bytes; need not be seekable.
            without_basis: Leave out the bases that it was coded in: who takes it over
                has them already.
            secret: The key to sign it with, of
                :func:`~kvstore.storage.keys.signing_key`.
            progress: Called with (tokens written, tokens in all); what is read, which
                comes first, counts as half written.

        Returns:
            The bundle's size in bytes.

        Raises:
            IntegrityError: A part of it is missing or damaged. Nothing has been
                written, unless that happened while it was being written: then what was
                written is no bundle.
            OSError: The disk fails, or nobody reads any more.
        """
        from .ops.transfer.export_bundle import export_entry

        return export_entry(
            *self._holder(ref),
            file,
            progress or ignore_progress,
            without_basis=without_basis,
            secret=secret,
        )

    def import_bundle(
        self,
        file: IO[bytes] | BundleReader,
        *,
        fingerprint: Fingerprint | None = None,
        like: Sequence[Any] | None = None,
        name: str | None = None,
        replace: bool = False,
        progress: Progress | None = None,
    ) -> Entry:
        """Take over an entry that :meth:`export_bundle` has written.

        All of it is checked before any of it can be seen, and blocks that the store has
        already are not written again, nor replaced. Whoever made a bundle decided what
        the model has read for its tokens: take one only from whom you would take a
        model from.

        Args:
            file: Opened for reading bytes, at the start of the bundle; need not be
                seekable. It is read to its end. Or the reader that ``open_bundle`` of
                :mod:`~kvstore.ops.transfer.import_bundle` returns, which refuses what
                it can before a store is made.
            fingerprint: The model's; ``None`` takes what any model made, which only
                that model will find.
            like: The model's empty prompt cache, of :func:`make_empty_cache`: what has
                other layers, heads, dimensions or dtypes is refused.
            name: A name for the entry, in place of its own. It moves from an entry that
                this continues.
            replace: Take the name from an entry that this does not continue.
            progress: Called with (tokens checked, tokens in all).

        Returns:
            The entry, never pinned.

        Raises:
            FormatError: It is no bundle, or one of a newer release.
            IntegrityError: It is not, to the byte, what a store would have written.
            SignerError: The store takes only what was signed, and this was not.
            FingerprintError: Another model made it.
            EntryExistsError: The name is taken.
            KVStoreError: Its blocks are of another size, or
                the store's own blocks lack states or windows that it needs.
            ValueError: The name is not one.
            OSError: The disk is full or fails.
        """
        from .ops.transfer.import_bundle import import_entry, open_bundle

        check_name(name)
        bundle = open_bundle(file, fingerprint)
        self._write_notes()
        return import_entry(
            self._blocks,
            self._catalog,
            bundle,
            name,
            replace=replace,
            like=like,
            progress=progress or ignore_progress,
        )

    def calibrate(
        self,
        fingerprint: Fingerprint | None = None,
        *,
        progress: Progress | None = None,
    ) -> Calibration:
        """Make a basis of what is stored without loss, and note it for the model.

        Nothing is measured: see :func:`kvstore.models.calibrate.calibrate_model`. What
        was measured before stays.

        Args:
            fingerprint: The model's; the only model's by default.
            progress: Called with (blocks read, blocks to read).

        Raises:
            KVStoreError: There are too few such rows, or several models' of them.
            IntegrityError: A block is missing or damaged.
        """
        from .ops.calibrate import calibrate_stored

        digest = fingerprint.digest if fingerprint else None
        tell = progress or ignore_progress
        return self._blocks.run(
            lambda: calibrate_stored(self._blocks, self._catalog.all(), digest, tell)
        )

    @property
    def remotes(self) -> Remotes:
        """The object stores that this store knows: to push to and to pull from."""
        from .remote.exchange import Remotes

        self._write_notes()  # what a pull evicts was used last when it was loaded
        return Remotes(self._blocks, self._catalog)

    def remove(self, ref: str | Entry) -> Entry:
        """Remove an entry and return it; its blocks stay until they are pruned.

        Args:
            ref: Its name or id, or the entry: then only where it has not moved on.
        """
        return self._blocks.run(lambda: self._catalog.remove(ref))

    def traces_of(self, ref: str) -> Traces:
        """Return by what an entry would be known in any file, for :meth:`purge`."""
        from .ops.upkeep.purge import traces_of

        entry = self._catalog.find(ref)
        return self._blocks.run(lambda: traces_of(self._blocks, entry))

    def purge(self, removed: Traces | None = None) -> list[str]:
        """Remove every byte of what was removed: shards, quarantine, tmp, index.

        Blocks that other entries need stay. Quarantine is emptied; what is whole there
        is taken back first. A save that is under way elsewhere has to write its blocks
        again.

        Args:
            removed: What :meth:`traces_of` returned before it was removed: every file
                of the store is searched for it in the end.

        Returns:
            Digests of the bases that were fitted to stored rows, perhaps to these, and
            stay, since a calibration or a block needs them.

        Raises:
            KVStoreError: A trace was found; or an entry cannot be read or lacks a
                block, so that nobody can say what it needs; or another process is
                writing.
            StoreLockedError: Another process kept the store or the index locked.
        """
        from .ops.upkeep.purge import purge

        self._write_notes()
        return self._blocks.run(lambda: purge(self._blocks, removed or {}))

    def rename(self, ref: str | Entry, name: str) -> Entry:
        """Give an entry another name, or its first, and return it.

        Args:
            ref: Its name or id, or the entry: then only where it has not moved on.
            name: The new name.

        Raises:
            EntryExistsError: The name is taken.
            ValueError: The name could not be typed.
        """
        return self._blocks.run(lambda: self._catalog.rename(ref, name))

    def adopt(self, ref: str, fingerprint: Fingerprint) -> Entry:
        """Take an entry over for another model, for which the caller vouches.

        It leaves the model that made it, and says from then on where it came from.

        Args:
            ref: Its name, or its id or the start of it.
            fingerprint: Of the model that computes the very same rows, label included.

        Raises:
            FingerprintError: It is of this model already.
            OSError: The disk is full or fails; the entry stays as it is.
        """
        from .ops.adopt import adopt_entry

        entry = self._catalog.find(ref)
        adopted = self._blocks.run_again(
            lambda: adopt_entry(self._blocks, self._catalog, entry, fingerprint)
        )
        if adopted.id != entry.id:
            self.remove(entry)
        return adopted

    def recompress(
        self, ref: str, codec: str, *, progress: Progress | None = None
    ) -> Entry:
        """Write the exact blocks of an entry with another codec, and return it.

        What was exact is not so afterwards, in all entries that share these blocks. A
        block that something lossy went into stays as it is, and so do a tail and what
        another entry has that is pinned or signed.

        Args:
            ref: Its name, or its id or the start of it.
            codec: A codec, or a quality.
            progress: Called with (tokens done, tokens in all).

        Raises:
            CodecError: There is no such codec.
            OSError: The disk is full or fails; it can be loaded as before.
        """
        from .ops.bases import check_codec, codec_for
        from .ops.recompress import recompress_entry

        check_codec(codec, self._folder)

        def work() -> Entry:
            entry = self._catalog.find(ref)
            model = Fingerprint(self._blocks.origin(entry).fingerprint).bare
            chosen = codec_for(self._folder, codec, model.digest)
            tell = progress or ignore_progress
            return recompress_entry(self._blocks, self._catalog, entry, chosen, tell)

        return self._blocks.run(work)

    def pin(self, ref: str, *, pinned: bool = True) -> Entry:
        """Keep an entry from ever being evicted, or no longer, and return it."""
        return self._blocks.run(lambda: self._catalog.pin(ref, pinned=pinned))

    def plan_prune(
        self,
        *,
        max_bytes: int | None = None,
        older_than_s: float | None = None,
        named: bool = False,
        now: bool = False,
    ) -> PrunePlan:
        """Return what could go; its ``execute()`` frees it.

        Without options, that is what no entry reaches.

        Args:
            max_bytes: Evict entries until the shards have at most so many bytes.
            older_than_s: Evict entries that were not used for so many seconds.
            named: Evict entries with names too, after all others.
            now: Free unreachable blocks younger than an hour too, and empty
                quarantine. A save that is under way elsewhere then has to write
                its blocks again.
        """
        from .ops.upkeep.prune import GRACE_S, Policy, plan_confirmed

        grace_s = 0.0 if now else GRACE_S
        policy = Policy(max_bytes, older_than_s, named, grace_s, self._limits)

        def plan() -> PrunePlan:
            self._write_notes()
            # What is needed must not look dispensable to an index that is wrong.
            return plan_confirmed(self._blocks, policy)

        return self._blocks.run(plan)

    def free_tails(self) -> None:
        """Free what the saves of this object have left behind that no entry needs.

        Each turn of a conversation stores its last, incomplete block; the next turn
        stores those rows again. For the end of a program, when no more turns come.

        Raises:
            IntegrityError: An entry cannot be read, so that nobody knows what it needs.
            StoreLockedError: Another process kept the store or the index locked.
        """
        from .ops.upkeep.tails import free_tails

        tips, self._tips = self._tips, set()
        if tips:
            self._blocks.run(lambda: free_tails(self._blocks, self._catalog, tips))

    def repair(self) -> list[Finding]:
        """Put right what :meth:`verify` finds, and return what it found.

        Damaged files go to quarantine, good blocks of damaged shards into new ones, and
        the index is built anew. What is lost stays lost until it is saved again.
        """
        from .ops.upkeep.check import repair

        self._write_notes()
        self._blocks.close()
        return repair(self._folder)

    def set_limit(self, max_bytes: int) -> None:
        """Set the size limit of the store, in bytes of shards.

        Raises:
            ValueError: It is not positive.
        """
        self._configure(max_bytes=max_bytes)

    def set_policy(self, *, is_signed_only: bool) -> None:
        """Set whether only what a trusted key signed is taken from elsewhere."""
        self._configure(is_signed_only=is_signed_only)

    def _configure(self, **changes: Any) -> None:
        self._folder = self._blocks.folder = configured(self._folder, **changes)

    @property
    def config(self) -> StoreConfig:
        """What its ``config.json`` says, as far as this object knows."""
        return self._folder.config

    def remake(self) -> bool:
        """Go on with the store that is at the path now, made anew where it was deleted.

        For a program that runs long. Where the store's disk is gone, nothing is made.

        Returns:
            Whether it is another store than before.

        Raises:
            StoreNotFoundError: Its disk is gone, or the folder holds something else.
        """
        found = remake_folder(self._folder)
        if found.config.id == self._folder.config.id:
            return False
        self._blocks.close()
        self._folder = found
        self._opened = BlockStore(found, self._on_evict)
        self._opened.limits = self._limits
        return True

    def stats(self) -> Stats:
        """Return sums over the store."""
        known = self._catalog.all()

        def count() -> Stats:
            self._write_notes()
            return sum_up(self._blocks, known)

        return self._blocks.run(count)

    def verify(
        self, read_data: float = 1.0, *, progress: Progress | None = None
    ) -> list[Finding]:
        """Compare entries, index and shards, and return what is wrong. Never writes.

        Args:
            read_data: Which part of the shards' bytes is read and checked too.
            progress: Called with (shards checked, shards in all).
        """
        from .ops.upkeep.check import verify

        return verify(self._folder, read_data, progress or ignore_progress)

    def _origin(self, ref: str) -> Origin:
        return self._with_entry(ref, lambda blocks, entry: blocks.origin(entry))

    def _request(
        self,
        tokens: list[int],
        fingerprint: Fingerprint,
        min_bits: int,
        like: Sequence[Any] | None,
        spans: Sequence[Span] = (),
        *,
        from_codes: bool = False,
    ) -> Request:
        from .caches.fit import wanted_of
        from .ops.load import Request

        _check_fingerprint_type(fingerprint)
        if not tokens:
            raise ArgumentError(
                "there are no tokens", hint="pass the whole prompt, not its rest"
            )
        return Request(
            tokens,
            fingerprint.digest,
            min_bits=min_bits,
            wanted=None if like is None else wanted_of(like),
            spans=spans,
            from_codes=from_codes,
        )

    def _make_chain(
        self, tokens: Sequence[int], prompt_cache: Sequence[Any], model: Fingerprint
    ) -> Chain:
        # Imported here: listing a store needs no MLX.
        from .caches.snapshot import make_chain

        _check_fingerprint_type(model)
        _check_prompt_cache(prompt_cache)
        packed = pack_tokens(tokens)
        chain, self._root = make_chain(
            model.fields,
            prompt_cache,
            packed,
            self._folder.block_size,
            lambda root: self._known.split(root, packed),
            self._root,
        )
        return chain

    def _snapshot(
        self, tokens: Sequence[int], prompt_cache: Sequence[Any], model: Fingerprint
    ) -> Snapshot:
        from .caches.snapshot import take_live

        chain = self._make_chain(tokens, prompt_cache, model)
        return take_live(chain, prompt_cache, chain.num_tokens, model.label)

    def _mark_restored(self, live: Snapshot, prompt_cache: Sequence[Any]) -> None:
        from .caches.fit import wanted_of
        from .ops.recognise import mark_restored

        wanted = wanted_of(prompt_cache)
        for blocks in filter(None, (self._blocks, self._base)):
            blocks.run(partial(mark_restored, blocks, live, wanted))

    def _note_load(
        self, hit: Hit, num_tokens: int, fingerprint: Fingerprint | None, begin: float
    ) -> None:
        """Note a load that began then, and how long it took."""
        self.notes.add(hit, num_tokens)
        seconds = time.perf_counter() - begin
        if self._on_load is not None:
            self._on_load(_to_match(hit, num_tokens), seconds)
        if fingerprint is not None and hit.codec is not None:
            self.notes.add_timing(
                fingerprint, hit.codec, hit.num_tokens, seconds=seconds
            )

    def _write_notes(self) -> None:
        if self.notes:
            self.notes.write(self._blocks.index)


def _to_match(hit: Hit | str, num_prompt_tokens: int) -> Match:
    from .ops.load import to_match

    return to_match(hit, num_prompt_tokens)


def _check_fingerprint(
    blocks: BlockStore, entry: Entry, given: Fingerprint | None
) -> None:
    if given is None:
        return
    _check_fingerprint_type(given)
    stored = Fingerprint(blocks.origin(entry).fingerprint)
    refuse_other(entry.name or entry.id, stored, given)


def _check_path(path: object) -> None:
    if path is not None and not isinstance(path, str | os.PathLike):
        raise ArgumentError(
            f"a store is a folder, and no {type(path).__name__}: {path!r:.80}",
            hint="pass its path, or nothing for the usual one",
        )


def _check_fingerprint_type(fingerprint: object) -> None:
    if not isinstance(fingerprint, Fingerprint):
        raise ArgumentError(
            f"a fingerprint is no {type(fingerprint).__name__}: {fingerprint!r:.80}",
            hint="`kvstore.Fingerprint.from_path(path)` makes one of a model's folder",
        )


def _check_prompt_cache(prompt_cache: object) -> None:
    if not isinstance(prompt_cache, Sequence) or isinstance(prompt_cache, str):
        raise ArgumentError(
            f"a prompt cache is a list, one cache per layer, and no"
            f" {type(prompt_cache).__name__}",
            hint="mlx-lm's `make_prompt_cache(model)` makes one",
        )


def _is_usable(request: Request, hit: Hit) -> bool:
    """Whether a hit that damage has cut short ends where a caller can go on."""
    end = last_end(request.tokens, hit.num_tokens, request.spans)
    return 0 < hit.num_tokens == end

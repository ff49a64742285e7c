"""What a store can do without: a plan to look at, and to execute.

Unreachable blocks go when they are older than an hour, since a save that has not
committed its entry yet may need younger ones. What an evicted entry alone needed goes
at once. Rows go before files, and a file only after a second look under the lock.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from ...errors import FormatError, IntegrityError
from ...format.block import BlockHash
from ...format.entry import Entry
from ...storage import files
from ...storage.bases import basis_path, basis_size, calibrated_bases, list_bases
from ...storage.blocks import BlockStore
from ...storage.entries import copied_entry, list_ids, read_entry, remove_entries
from ...storage.folder import StoreFolder
from ...storage.index import Index, Place
from ...storage.ledger import read_entries
from ...storage.shards import (
    empty_quarantine,
    list_shards,
    open_shard,
    shard_path,
)
from ..worth import HALF_LIFE_S, advantages, sum_uses

GRACE_S = 3600.0
_SLACK_BYTES = 65_536
# Clocks are put right by so much without having been wrong.
_SKEW_S = 60.0


@dataclass(frozen=True, slots=True)
class Policy:
    """What may go."""

    # Evict until shards and quarantine have at most so many bytes; quarantine is
    # emptied where that is not enough.
    max_bytes: int | None = None
    # Evict what was not used for so many seconds.
    older_than_s: float | None = None
    # Evict entries with names too, after all others; never pinned ones.
    named: bool = False
    # How old unreachable blocks must be.
    grace_s: float = GRACE_S
    # What entries of some models may take, by what the model is called: beyond it,
    # theirs go before all others.
    limits: Mapping[str, int] = field(default_factory=dict)
    # Blocks that stay, whatever entries there are: a save builds on them.
    needed: frozenset[BlockHash] = frozenset()


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What would go, as of when the plan was made."""

    # Entries to be removed, in that order.
    entries: tuple[Entry, ...]
    # Shards that nothing needs, and their bytes.
    removed: dict[str, int]
    # Shards to be rewritten without their dead blocks, and the bytes that frees.
    repacked: dict[str, int]
    # Files of crashed saves.
    leftovers: tuple[Path, ...]
    # Bytes in quarantine, where that is to be emptied; else 0. It stays while an entry
    # lacks a block, which may be in it.
    quarantine_bytes: int
    # Bytes of all shards now.
    nbytes: int
    # Bytes that nothing needs and that stay: in blocks younger than the grace period,
    young_bytes: int
    # and in shards of which too much is needed to be worth rewriting.
    scattered_bytes: int
    _blocks: BlockStore = field(repr=False, compare=False)
    _policy: Policy = field(repr=False, compare=False)
    # Every entry can be read and has all of its blocks, so that what is left over is
    # known.
    is_whole: bool = True
    # Files of entries that a clock dated which was ahead.
    undated: tuple[Path, ...] = ()
    # Bases that neither a block nor a calibration names, and their bytes.
    bases: dict[str, int] = field(default_factory=dict)

    @property
    def freed_bytes(self) -> int:
        """Bytes that executing the plan frees."""
        shards = sum(self.removed.values()) + sum(self.repacked.values())
        return shards + self.quarantine_bytes + sum(self.bases.values())

    def execute(self) -> int:
        """Do it, and return the bytes freed.

        What other processes saved meanwhile stays.

        Raises:
            StoreLockedError: Another process kept the store locked.
        """
        evicted: list[Entry] = []
        try:
            return self._blocks.run(
                lambda: _execute_anyhow(self._blocks, self._policy, self, evicted)
            )
        finally:
            # At the end: what is called may take long, or open the store itself, and
            # what it raises is no error of this store's.
            if self._blocks.on_evict is not None:
                for entry in evicted:
                    self._blocks.on_evict(entry)


def plan_prune(blocks: BlockStore, policy: Policy) -> PrunePlan:
    """Return what a policy lets go. Never writes.

    Raises:
        FormatError: A later release wrote entries into the store.
    """
    # What is read here may be old when the plan is executed, which is why
    # `_execute` looks again under the lock before it removes a file.
    sizes = blocks.index.shards()
    survey = _Survey(blocks, policy.needed)
    put_aside = sum(files.sizes_in(blocks.folder.quarantine).values())
    used = sum(sizes.values()) + put_aside
    evicted, gone = _choose_entries(policy, survey, used)
    kept = {name: survey.kept(name, gone, policy.grace_s) for name in sizes}
    left = {name: sum(p.nbytes for p in places) for name, places in kept.items()}
    removed = {name: size for name, size in sizes.items() if not left[name]}
    dead = {name: size - left[name] for name, size in sizes.items() if left[name]}
    # Bytes can be dead without a hole: those of the header, and of copies
    # elsewhere.
    holed = {name for name in dead if len(kept[name]) < len(survey.places_in(name))}
    rest = used - sum(removed.values())
    repacked = dict(_choose_repacks(policy, sizes, dead, holed, rest))
    rest -= sum(repacked.values())
    limit = policy.max_bytes
    # Who does not wait for an hour wants what was removed gone from there too.
    is_emptied = policy.grace_s == 0 or (limit and rest > limit)
    young = (
        place.nbytes
        for places in kept.values()
        for place in places
        if not survey.is_live(place.hash)
    )
    return PrunePlan(
        evicted,
        removed,
        repacked,
        tuple(_leftovers(blocks.folder, policy.grace_s, set(sizes))),
        put_aside if survey.is_whole and is_emptied else 0,
        sum(sizes.values()),
        sum(young),
        sum(dead[name] for name in holed - repacked.keys()),
        blocks,
        policy,
        survey.is_whole,
        tuple(survey.undated()),
        _choose_bases(blocks, policy),
    )


def plan_confirmed(blocks: BlockStore, policy: Policy) -> PrunePlan:
    """Return what a policy lets go by an index that was compared with the shards.

    The headers of all shards that are to go are read, of the others those that changed.

    Raises:
        IndexDamagedError: The index says something else.
        FormatError: A later release wrote entries into the store.
    """
    blocks.confirm(only=())
    plan = plan_prune(blocks, policy)
    if not plan.is_whole:
        # What an entry lacks may be in a shard that did not change.
        blocks.confirm()
        return plan_prune(blocks, policy)
    if freed := {*plan.removed, *plan.repacked}:
        blocks.confirm(only=freed)
    return plan


def eviction_order(blocks: BlockStore) -> list[Entry]:
    """Return the entries that a save may evict, in that order."""
    return _Survey(blocks, frozenset()).candidates(named=False)


def forgotten(folder: StoreFolder) -> dict[Path, int]:
    """Return what crashed saves have left in ``tmp``, with its bytes."""
    staged = files.sizes_in(folder.staging)
    # A save may be writing a younger one, whatever a policy says.
    return {path: size for path, size in staged.items() if _is_older(path, GRACE_S)}


class _Survey:
    """All entries, the blocks that each needs, and when it was last used."""

    def __init__(self, blocks: BlockStore, needed: frozenset[BlockHash]) -> None:
        self._blocks, index = blocks, blocks.index
        self._folder = blocks.folder
        self.shards = index.contents()
        self.links = index.links()
        self.entries, self._unreadable = _known_entries(blocks.folder, index)
        self._chains = {entry.id: self.chain(entry) for entry in self.entries}
        self._references = Counter(
            block for chain in self._chains.values() for block in chain
        )
        # Blocks that a save counts on have no entry yet.
        self._references.update(needed)
        # A broken chain hides the blocks before the gap, so nothing unreachable is
        # freed while one exists.
        self.is_whole = not self._unreadable and all(
            self._first_parent(entry) == entry.root for entry in self.entries
        )

    # What only an eviction asks for.
    @cached_property
    def _uses(self) -> dict[BlockHash, tuple[float, float]]:
        return self._blocks.index.uses()

    @cached_property
    def _advantages(self) -> dict[str, float]:
        return advantages(self._blocks, self.entries)

    def chain(self, entry: Entry) -> list[BlockHash]:
        """Return the blocks of an entry, last first, as far as the chain holds."""
        block, found = BlockHash(bytes.fromhex(entry.tip)), dict[BlockHash, None]()
        # An index may say anything, circles included.
        while block in self.links and block not in found:
            found[block] = None
            block = self.links[block].parent
        return list(found)

    def _first_parent(self, entry: Entry) -> str:
        """Return what the chain of an entry leads to: its root, where it is whole."""
        chain = self._chains[entry.id]
        return self.links[chain[-1]].parent.hex() if chain else entry.tip

    def places_in(self, shard: str) -> list[Place]:
        """Return the blocks of a shard."""
        return self.shards[shard][1] if shard in self.shards else []

    def is_live(self, block: BlockHash) -> bool:
        """Whether an entry needs a block."""
        return self._references[block] > 0

    def kept(self, shard: str, gone: set[BlockHash], grace_s: float) -> list[Place]:
        """Return the blocks of a shard that stay."""
        added_at = self.shards[shard][0] if shard in self.shards else 0.0
        is_young = _age(added_at) < grace_s
        # Blocks that an evicted entry alone needed go at once, however young: nobody
        # who saves now can count on them, for a commit looks again. Others wait for the
        # grace period, as a save that has no entry yet may have written them.
        return [
            place
            for place in self.places_in(shard)
            if self.is_live(place.hash)
            or (place.hash not in gone and (is_young or not self.is_whole))
        ]

    def used_at(self, entry: Entry) -> float:
        """Return when an entry was saved or last hit, the later of both."""
        chain = self._chains[entry.id]
        uses = [self._uses[block][0] for block in chain if block in self._uses]
        return max([self._saved_at(entry), *map(_past, uses)])

    def _saved_at(self, entry: Entry) -> float:
        """Return when an entry was saved, by its file where its own time is to come."""
        if not _is_ahead(entry.updated_at):
            return entry.updated_at
        return _past(_modified_at(self._folder.entry_path(entry.id)))

    def undated(self) -> list[Path]:
        """Return the files of entries of which no clock tells how old they are."""
        paths = [
            self._folder.entry_path(entry.id)
            for entry in self.entries
            if _is_ahead(entry.updated_at)
        ]
        return [path for path in paths if _is_ahead(_modified_at(path))]

    def candidates(self, *, named: bool) -> list[Entry]:
        """Return what may be evicted: the least worth first, named ones last."""
        if self._unreadable:
            return []  # an entry that cannot be read may need any block
        found = [e for e in self.entries if not e.pinned and (e.name is None or named)]
        return sorted(found, key=lambda e: (e.name is not None, self._worth(e), e.id))

    def _worth(self, entry: Entry) -> float:
        """Return a moment: the entry with the earliest one is evicted first.

        Hits in blocks that other entries have too do not count: evicting this entry
        would leave those blocks where they are.
        """
        own = (block for block in self._chains[entry.id] if self._references[block] < 2)
        sums = (self._uses[block][1] for block in own if block in self._uses)
        # Nobody has a million uses: a clock was ahead.
        most = time.time() + 20 * HALF_LIFE_S
        known = (moment if moment <= most else _past(moment) for moment in sums)
        uses = sum_uses([self._saved_at(entry), *known])
        return uses + self._advantages[entry.root]

    def bytes_by_model(self) -> Counter[str]:
        """Return what the entries of each model take, by what it is called."""
        models = {
            block: entry.model
            for entry in self.entries
            for block in self._chains[entry.id]
        }
        found = Counter[str]()
        for block, model in models.items():
            found[model] += self.links[block].nbytes
        return found

    def release(self, entry: Entry) -> list[BlockHash]:
        """Take an entry away and return the blocks that nothing needs any more."""
        # Counted, since entries of one conversation share most of their blocks: a block
        # goes only with the last entry that needs it.
        chain = self._chains.pop(entry.id)
        self._references.subtract(chain)
        return [block for block in chain if not self.is_live(block)]


def _execute_anyhow(
    blocks: BlockStore, policy: Policy, plan: PrunePlan, evicted: list[Entry]
) -> int:
    """Carry a plan out where there is no room to note it, or to rewrite a shard."""
    gone: set[BlockHash] = set()
    try:
        return _execute(blocks, policy, plan, gone, evicted)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        blocks.take_memory(error, is_read=True)
    return _execute(blocks, policy, plan, gone, evicted)


def _execute(
    blocks: BlockStore,
    policy: Policy,
    plan: PrunePlan,
    gone: set[BlockHash],
    evicted: list[Entry],
) -> int:
    """Carry a plan out; add to what goes: the entries, and their blocks."""
    # Entries go before blocks. After a crash in between, blocks are unreachable,
    # and the next prune takes them; the other way round an entry would lack its
    # blocks.
    with files.locked(blocks.folder.lock, exclusive=True):
        removed = list(filter(partial(_is_unchanged, blocks), plan.entries))
        tips = [BlockHash(bytes.fromhex(entry.tip)) for entry in removed]
        gone |= {p.hash for tip in tips for p, _ in blocks.index.chain(tip)}
        remove_entries(blocks, [entry.id for entry in removed])
        evicted += removed
    before = blocks.index.nbytes()
    # Without the index's file, nobody could be told where a block has moved to.
    repacked = () if blocks.index.is_temporary else tuple(plan.repacked)
    if repacked:
        # Entries committed since the plan may need what it wanted to leave out.
        survey = _Survey(blocks, policy.needed)
    for name in repacked:
        kept = {place.hash for place in survey.kept(name, gone, policy.grace_s)}
        blocks.repack(name, kept)
    with files.locked(blocks.folder.lock, exclusive=True):
        _remove_shards(blocks, policy, (*plan.removed, *repacked), gone)
        # Of entries that were removed while the index was locked.
        left = blocks.index.entry_ids() - set(list_ids(blocks.folder))
        for entry_id in left:
            blocks.index.drop_entry(entry_id)
        put_aside = empty_quarantine(blocks.folder) if plan.quarantine_bytes else 0
    if plan.quarantine_bytes:
        blocks.confirm()  # which tells the index of what was taken back
    for path in plan.leftovers:
        _remove_leftover(blocks, path)
    _date(plan.undated)
    freed = before - blocks.index.nbytes() + put_aside
    if plan.bases:
        freed += blocks.remove_bases(
            lambda: _old_bases(blocks, policy).intersection(plan.bases)
        )
    if blocks.index.is_temporary:
        blocks.leave_memory()
    return freed


def _date(paths: Iterable[Path]) -> None:
    """Let entries grow old from now on, of which nobody knows how old they are."""
    at = time.time() - GRACE_S
    for path in paths:
        with suppress(OSError):  # evicted just now, or of another user
            os.utime(path, (at, at))


def _remove_shards(
    blocks: BlockStore, policy: Policy, names: tuple[str, ...], gone: set[BlockHash]
) -> None:
    """Remove shards; the store's lock is held."""
    if not names:
        return
    # The second look: entries committed since then keep their blocks.
    survey = _Survey(blocks, policy.needed)
    dead = [name for name in names if not survey.kept(name, gone, policy.grace_s)]
    blocks.drop_shards({name: survey.places_in(name) for name in dead})


def _choose_bases(blocks: BlockStore, policy: Policy) -> dict[str, int]:
    found = _old_bases(blocks, policy)
    # Reading all shards is slow, and old bases are rare.
    unnamed = blocks.unnamed_bases(found) if found else ()
    return {basis: basis_size(blocks.folder, basis) for basis in sorted(unnamed)}


def _old_bases(blocks: BlockStore, policy: Policy) -> set[str]:
    """Return bases that are old enough and that no calibration names."""
    # A save looks for room, not for these; what is set aside may come back.
    if policy.needed or files.sizes_in(blocks.folder.quarantine):
        return set()
    try:
        spared = calibrated_bases(blocks.folder)
    except (IntegrityError, FormatError, OSError):
        return set()
    return {
        basis
        for basis in set(list_bases(blocks.folder)) - spared
        if _is_older(basis_path(blocks.folder, basis), policy.grace_s)
    }


def _choose_entries(
    policy: Policy, survey: _Survey, left: int
) -> tuple[tuple[Entry, ...], set[BlockHash]]:
    """Return the entries that go, and the blocks that only they needed."""
    evicted: list[Entry] = []
    gone: set[BlockHash] = set()
    most = math.inf if policy.max_bytes is None else policy.max_bytes
    held = survey.bytes_by_model() if policy.limits else {}
    limits = {model: policy.limits.get(model, math.inf) for model in held}
    is_any_over = any(held[model] > limits[model] for model in held)
    if policy.older_than_s is None and left <= most and not is_any_over:
        return (), gone  # without asking what each is worth

    def evict(entry: Entry) -> int:
        released = survey.release(entry)
        gone.update(released)
        evicted.append(entry)
        return sum(survey.links[block].nbytes for block in released)

    others = []
    for entry in survey.candidates(named=policy.named):
        if held and held[entry.model] > limits[entry.model]:
            freed = evict(entry)
            held[entry.model] -= freed
            left -= freed
        else:
            others.append(entry)
    for entry in others:
        age = _age(survey.used_at(entry))
        is_old = policy.older_than_s is not None and age > policy.older_than_s
        if is_old or left > most:
            left -= evict(entry)
    return tuple(evicted), gone


def _choose_repacks(
    policy: Policy,
    sizes: dict[str, int],
    dead: dict[str, int],
    holed: set[str],
    left: int,
) -> Iterator[tuple[str, int]]:
    """Yield shards to rewrite and what that frees, the most wasteful first."""
    limit = policy.max_bytes
    # The most wasteful first, so that a limit is met with the fewest rewrites.
    for name in sorted(dead, key=lambda name: -dead[name]):
        is_over = limit is not None and left > limit
        is_wanted = dead[name] * 2 > sizes[name]
        # Who does not wait for an hour wants the bytes gone.
        is_wanted |= policy.grace_s == 0 and name in holed
        # A header of its own is no waste.
        if is_wanted or (is_over and dead[name] > _SLACK_BYTES):
            left -= dead[name]
            yield name, dead[name]


def _leftovers(folder: StoreFolder, grace_s: float, known: set[str]) -> Iterator[Path]:
    """Yield what crashed saves left: staged files, and shards without rows."""
    yield from forgotten(folder)
    for name in sorted(set(list_shards(folder.shards)) - known):
        path = shard_path(folder.shards, name)
        if _is_older(path, grace_s) and _is_readable(folder, name):
            yield path


def _remove_leftover(blocks: BlockStore, path: Path) -> None:
    if path.parent == blocks.folder.staging:
        with suppress(FileNotFoundError):
            files.remove_any(path)
    else:
        blocks.remove_unknown(path.stem)


def _is_readable(folder: StoreFolder, name: str) -> bool:
    """Whether a shard is one of this release; others are not ours to remove."""
    try:
        with open_shard(folder, name):
            return True
    except (IntegrityError, FormatError, OSError):
        return False


def _is_unchanged(blocks: BlockStore, entry: Entry) -> bool:
    """Whether an entry was not saved again since the plan was made."""
    try:
        return read_entry(blocks.folder, entry.id) == entry
    except (IntegrityError, OSError):
        # Its copy is never older than what was saved last.
        return copied_entry(blocks.folder, blocks.index, entry.id) == entry


def _past(stamp: float) -> float:
    """Return a time, or one of an hour ago for what a clock said that was ahead."""
    return time.time() - _age(stamp)


def _age(stamp: float) -> float:
    """Return how long ago a time was, in seconds.

    A time that is still to come was noted by a clock that was ahead: how old the thing
    is cannot be known, and it counts as old as the grace period.
    """
    return GRACE_S if _is_ahead(stamp) else max(0.0, time.time() - stamp)


def _is_ahead(stamp: float) -> bool:
    return stamp > time.time() + _SKEW_S


def _modified_at(path: Path) -> float:
    """Return when a file was written, or now where it cannot be asked."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _is_older(path: Path, age_s: float) -> bool:
    try:
        return _age(path.stat().st_mtime) > age_s
    except OSError:
        return False  # renamed away just now, or on a bad sector


def _known_entries(folder: StoreFolder, index: Index) -> tuple[list[Entry], list[str]]:
    """Return all entries, and the ids of those that neither file nor index tells.

    Raises:
        FormatError: A later release wrote one; who knows what it needs.
    """
    found, unreadable = [], []
    for entry_id, entry in read_entries(index, folder).items():
        if isinstance(entry, FormatError):
            raise entry
        if not isinstance(entry, Entry):
            copied = copied_entry(folder, index, entry_id)
            unreadable += [] if copied else [entry_id]
            found += [copied] if copied else []
        else:
            found.append(entry)
    return found, unreadable

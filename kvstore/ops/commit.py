"""What makes a save count: an entry over a chain that is whole, and room for it.

Blocks are written first, without a lock. The entry is written last, under the store's
exclusive lock, and only if all of its blocks are there at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace as changed
from typing import TYPE_CHECKING

from ..errors import EntryExistsError, FormatError, IntegrityError, StoreLockedError
from ..fingerprint import Fingerprint
from ..format.block import BlockHash, Origin
from ..format.calibration import Measured
from ..format.chain import origin_root
from ..format.entry import ADOPTED, MAX_LABEL, Entry, make_entry
from ..storage import files
from ..storage.bases import find_calibration
from ..storage.blocks import BlockStore
from ..storage.entries import Catalog
from .quality import Blocks, find_loss
from .upkeep.prune import Policy, forgotten, plan_confirmed

if TYPE_CHECKING:
    from ..caches.snapshot import Chain


def replaceable(
    catalog: Catalog, name: str | None, chain: Chain, replace: bool | Entry
) -> Entry | None:
    """Return the entry that a save replaces, or ``None``.

    Args:
        catalog: The store's entries.
        name: The name wanted.
        chain: What is to be saved under it.
        replace: Take the name from any entry, or from this one.

    Raises:
        EntryExistsError: The name belongs to something else.
    """
    old = catalog.holder(name, chain.tip.hex())
    if old is None or replace is True or chain.continues(old):
        return old
    if isinstance(replace, Entry) and replace.tip == old.tip:
        return old
    raise EntryExistsError(
        f"the name `{name}` is taken by an entry that this one does not continue",
        hint="choose another name, or replace it",
    )


def commit(
    blocks: BlockStore,
    catalog: Catalog,
    chain: Chain,
    old: Entry | None,
    *,
    name: str | None,
    codec: str,
    model: str,
    title: str = "",
    described: Entry | None = None,
) -> Entry | None:
    """Write an entry over a chain; the store's lock is held.

    Args:
        blocks: The store's blocks.
        catalog: Its entries.
        chain: The blocks.
        old: The entry that this one replaces.
        name: The entry's name.
        codec: The codec asked for.
        model: What the model is called.
        title: The first words of what is saved; those of the entry that this one
            continues by default.
        described: An entry whose description this one takes: it was made elsewhere.

    Returns:
        The entry, or ``None`` where `prune` has taken blocks meanwhile.
    """
    found = blocks.index.places_of(chain.blocks)
    places = [place for place in found if place is not None]
    if len(places) < len(found):
        return None
    try:
        # The index alone is not believed: a shard may have gone without it.
        stored = blocks.describe(places)
    except (FormatError, IntegrityError):
        return None
    if not title and old is not None and chain.continues(old):
        title = old.title
    entry = make_entry(
        old,
        title=title,
        name=name,
        tip=chain.tip.hex(),
        root=chain.root.hex(),
        num_tokens=chain.num_tokens,
        nbytes=sum(place.nbytes for place in places),
        codec=codec,
        model=model,
        receipts=receipts_of(blocks, chain.origin, stored, (described, old)),
    )
    if old is not None and ADOPTED in old.made_with and chain.continues(old):
        note = {ADOPTED: old.made_with[ADOPTED]}
        entry = changed(entry, made_with=entry.made_with | note)
    return catalog.commit(entry if described is None else _as(described, entry, old))


def receipts_of(
    blocks: BlockStore,
    origin: Origin,
    stored: Blocks,
    others: Sequence[Entry | None],
) -> tuple[Measured, ...]:
    """Return what was measured of the lossy codecs of some blocks, if all were.

    Args:
        blocks: The store's blocks, and what was measured of its models.
        origin: What made the blocks.
        stored: The blocks, as they are stored.
        others: Entries that know more, where this store has not measured itself.
    """
    # What an entry says counts only for rows of its own model and layout.
    lossy = {block.codec for block in stored if not block.is_lossless}
    told = [
        one
        for entry in others
        if entry is not None and entry.root == origin_root(origin).hex()
        for one in entry.receipts
    ]
    own: tuple[Measured, ...] = ()
    if lossy:
        model = Fingerprint(origin.fingerprint).bare
        found = find_calibration(blocks.folder, model.digest)
        own = found.told if found else ()
    if find_loss(stored, own, told).unknown:
        return ()
    known = {one.codec: one for one in (*told, *own)}
    return tuple(known[codec] for codec in sorted(lossy))


def _as(described: Entry, entry: Entry, old: Entry | None) -> Entry:
    """Return an entry with another's description; that of ``old`` stays as it is."""
    source = old if old is not None and old.tip == entry.tip else described
    return changed(
        entry,
        codec=source.codec,
        model=source.model[:MAX_LABEL],
        made_with=source.made_with,
        title=source.title,
        signer=source.signer,
        created_at=old.created_at if old else source.created_at,
    )


def keep_to_limit(
    blocks: BlockStore, model: str, needed: Callable[[], frozenset[BlockHash]]
) -> None:
    """Evict entries of a model that has a limit of its own, and has passed it.

    Args:
        blocks: The store's blocks, which have the limit.
        model: What the model is called.
        needed: Returns the blocks that other saves build on.
    """
    limit = blocks.limits[model]
    # A little more than needed, so that not every save has to look.
    policy = Policy(limits={model: limit - limit // 20}, needed=needed())
    with suppress(FormatError, StoreLockedError):  # the next save tries again
        plan = plan_confirmed(blocks, policy)
        if plan.entries:
            plan.execute()


def make_room(
    blocks: BlockStore, nbytes: int, needed: Callable[[], frozenset[BlockHash]]
) -> None:
    """Evict the entries that are least worth if new bytes would pass the size limit.

    Args:
        blocks: The store's blocks.
        nbytes: Size of the shard to be added. One that is larger than the whole limit
            evicts nothing.
        needed: Returns the blocks that must stay: those of this save, and those that
            other saves build on. Called only if something has to be evicted.
    """
    limit, index = blocks.folder.max_bytes, blocks.index
    put_aside = sum(files.sizes_in(blocks.folder.quarantine).values())
    left = forgotten(blocks.folder)
    used = index.nbytes() + put_aside
    if not nbytes <= limit < used + sum(left.values()) + nbytes:
        return
    for path in left:
        with suppress(FileNotFoundError):
            files.remove_any(path)
    evictable = index.evictable_bytes()
    if used + nbytes <= limit or not (evictable or put_aside):
        return
    # A little more than needed, or every save would have to.
    max_bytes = max(0, limit - limit // 20 - nbytes)
    # Where entries with names fill the store, what has none makes little room: it is
    # evicted when there is more of it, or every save would look through all entries.
    is_little = evictable + put_aside < limit // 20
    if is_little and used - evictable > max_bytes and used - put_aside + nbytes > limit:
        return
    policy = Policy(max_bytes=max_bytes, limits=blocks.limits, needed=needed())
    with suppress(FormatError):  # a later release's entries stay as they are
        plan = plan_confirmed(blocks, policy)
        if plan.entries or plan.quarantine_bytes:
            plan.execute()

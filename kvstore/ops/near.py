"""Of a prompt that differs in places, what is stored behind them: an approximation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..caches.layout import flatten, has_only_rows
from ..caches.live import PromptCache
from ..caches.reanchor import MIN_MOVED, MovedRun, Reanchoring, Sketch, find_runs, head
from ..errors import FormatError, IntegrityError
from ..format.block import Progress
from ..format.chain import common_run
from ..format.entry import Entry
from ..storage.blocks import BlockStore
from .load import Hit, Request, find_prefix, restore

# The latest; each costs its shards' headers once.
_MAX_ENTRIES = 64
# No token: a hit leaves one to be fed.
_NONE = -1


def load_near(
    blocks: BlockStore,
    entries: Sequence[Entry],
    request: Request,
    moved: str,
    near: Reanchoring,
    held: int,
    progress: Progress,
) -> PromptCache | None:
    """Return more of a prompt than its longest stored prefix, or ``None``.

    Args:
        blocks: The store's blocks.
        entries: Its entries, latest first.
        request: What is wanted.
        moved: Digest of the fingerprint of rows that were re-anchored themselves.
        near: The model.
        held: How many leading tokens need not be computed anyway.
        progress: Called with (tokens restored, tokens held).
    """
    tokens, least = request.tokens, near.num_fresh + MIN_MOVED
    # Images are fed whole, and the positions of their rows may have three axes.
    if request.spans or min(tokens) < 0:
        return None
    also = replace(request, fingerprint=moved)
    exact, other = _find(blocks, request, near), _find(blocks, also, near)
    held, num_other = max(held, _length(exact)), _length(other)
    is_moved = num_other >= held + MIN_MOVED
    base = other if is_moved else exact
    made = None
    if len(tokens) - 1 - max(held, _length(base)) >= least:
        made = _behind_changes(
            blocks, entries, (request, also), base, near, held, progress
        )
    if made is None and is_moved and base is not None:
        made, base = restore(blocks, base, progress)
        made = made if base.num_tokens == num_other else None
    return made


def _behind_changes(
    blocks: BlockStore,
    entries: Sequence[Entry],
    requests: tuple[Request, Request],
    base: Hit | None,
    near: Reanchoring,
    held: int,
    progress: Progress,
) -> PromptCache | None:
    """Return a prompt cache that goes on behind a prefix with another prompt's rows."""
    tokens, begin = requests[0].tokens, _length(base)
    given = Sketch.of(tokens[:-1])
    rest = Sketch.of(tokens[begin:-1]).marks if begin else given.marks
    found = _nearest(blocks, entries, requests, given.marks, rest, near)
    if found is None:
        return None
    request, stored = found
    own = stored.tokens.tolist()
    common = common_run(own, tokens[:-1])
    least = near.num_fresh + MIN_MOVED
    runs = find_runs(stored, given, begin, least)
    # What is held and not in the prefix would be computed for it.
    least_gain = max(0, held - begin) + MIN_MOVED
    if near.gain(runs) < least_gain:
        return None
    longest = max(runs, key=lambda run: run.size)
    end = longest.source + longest.size
    # Windows are there only where they were stored, which may be short of the end.
    whole = replace(request, tokens=[*own, _NONE], blocks=())
    if (hit := _find(blocks, whole, near)) is None:
        return None
    if not has_only_rows(hit.layout):
        whole, runs = replace(request, tokens=[*own[:end], _NONE], blocks=()), [longest]
        if (hit := _find(blocks, whole, near)) is None:
            return None
    source, hit = restore(blocks, hit, progress)
    runs = [
        MovedRun(run.source, run.target, size)
        for run in runs
        if (size := min(run.size, hit.num_tokens - run.source)) >= least
    ]
    if near.gain(runs) < least_gain:
        return None
    if has_only_rows(hit.layout) and common >= begin:
        made = head(source, common)
    elif base is not None:
        made, base = restore(blocks, base, progress)
        if base.num_tokens < begin:
            return None  # damaged
    else:
        made = near.make_cache()
    near.extend(made, tokens, source, runs)
    return made


def _find(blocks: BlockStore, request: Request, near: Reanchoring) -> Hit | None:
    """Return the longest prefix whose rows can be moved, if there is one."""
    hit = find_prefix(blocks, request)
    if isinstance(hit, str) or not hit.num_tokens or not near.takes(_classes(hit)):
        return None
    return hit


def _classes(hit: Hit) -> list[str]:
    """Return the classes of the caches that a hit is restored to."""
    if hit.wanted is not None:
        return [layer.signature[0] for layer in hit.wanted]
    return [layer.cache_class for layer in flatten(hit.layout)]


def _length(hit: Hit | None) -> int:
    return hit.num_tokens if hit else 0


def _nearest(
    blocks: BlockStore,
    entries: Sequence[Entry],
    requests: tuple[Request, Request],
    given: frozenset[int],
    rest: frozenset[int],
    near: Reanchoring,
) -> tuple[Request, Sketch] | None:
    """Return what is stored that has most in common with a prompt, anywhere."""
    computed, moved = (
        {root.hex() for root, _ in blocks.index.roots(request.fingerprint)}
        for request in requests
    )
    mine = [e for e in entries if e.root in computed | moved][:_MAX_ENTRIES]
    near.forget({entry.tip for entry in mine})
    best, most = None, (0, 0, True)
    for entry in mine:
        stored = _sketch(blocks, entry, near)
        # Of two that have as much, what was computed is better.
        likeness = (
            len(rest & stored.marks),
            len(given & stored.marks),
            entry.root in computed,
        )
        if likeness > most:
            best, most = (requests[entry.root in moved], stored), likeness
    return best


def _sketch(blocks: BlockStore, entry: Entry, near: Reanchoring) -> Sketch:
    """Return that of an entry, remembered; of a damaged one, that of nothing."""
    if entry.tip not in near.sketches:
        try:
            chain = blocks.chain(entry)
        except (IntegrityError, FormatError):
            # `verify` reports it. It may be whole again by the next time.
            return Sketch.of([])
        tokens = [token for _, stored in chain for token in stored.block.tokens]
        near.sketches[entry.tip] = Sketch.of(tokens)
    return near.sketches[entry.tip]

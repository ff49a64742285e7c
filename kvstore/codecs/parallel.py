"""Work on blocks in several threads, its results in order and its memory bounded."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ..errors import KVStoreError

# A container, or `taskset`, may give a process less than the machine has.
NUM_CORES = (
    len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
)
"""On how many cores this process may run."""
NUM_THREADS = min(8, NUM_CORES)
"""How many blocks are encoded at a time."""
_AHEAD = 4
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    num_threads: int,
    *,
    nbytes: Callable[[Item], int],
    max_bytes: int,
) -> Generator[Result, None, None]:
    """Yield what ``work`` returns for each item, in order.

    If an item cannot be read, its error is raised after the results of the items before
    it. When the generator ends or is closed, all threads have ended.

    Args:
        work: Called in one of the threads; with one thread, in the caller's.
        items: Read in the caller's thread.
        num_threads: How many items are worked on at a time.
        nbytes: What an item takes in memory while it is worked on.
        max_bytes: What all items under way may take, unless one alone takes more.
    """
    if num_threads == 1:
        yield from map(work, items)
        return
    waiting: deque[tuple[Future[Result], int]] = deque()
    source, error, under_way = iter(items), None, 0
    pool = ThreadPoolExecutor(num_threads, "kvstore-block")
    try:
        while error is None:
            try:
                item = next(source)
            except StopIteration:
                break
            except (KVStoreError, OSError) as failed:  # raised behind what came before
                error = failed
                break
            size = nbytes(item)
            # Far ahead, since one item that takes long is not to keep all threads idle.
            while waiting and (
                len(waiting) > _AHEAD * num_threads or under_way + size > max_bytes
            ):
                future, done = waiting.popleft()
                under_way -= done
                yield future.result()
            waiting.append((pool.submit(work, item), size))
            under_way += size
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)
    if error is not None:
        raise error

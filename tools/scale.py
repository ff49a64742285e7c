"""Simulate a fleet of servers with one remote: requests, bytes, money, and what breaks.

    python tools/scale.py [--machines N] [--prefixes N] [--days N] [--own-pushed] ...

Each machine serves sessions that begin with a prefix that others use too (a handbook, a
code base, a system prompt; popular ones more often, by Zipf) and keeps what it used
last in a store of its own. What that lacks is pulled. A rule of the provider's removes
objects by age, popular or not, and whoever misses one first computes and pushes it.

The requests of each job are those that the tests of push and pull count, and prices are
those of a large provider. A hundred machines are simulated, and counted for all.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, OrderedDict
from itertools import accumulate

BLOCK = 256
# 32 layers of 8 heads of 128 coordinates, keys and values, at 4.5 bits.
TOKEN_BYTES = 37_000
SHARD_BYTES = 64 * 2**20
PART_BYTES = 8 * 2**20
DOLLARS = {"put": 5e-6, "list": 5e-6, "get": 4e-7}
DOLLARS_GB_MONTH, DOLLARS_GB_OUT = 0.023, 0.09
SAMPLE = 100
DAY_S = 86_400


class Prefix:
    """What many sessions begin with."""

    __slots__ = ("nbytes", "pushed_at", "shards", "tokens")

    def __init__(self, chance: random.Random) -> None:
        self.tokens = int(1000 * 50 ** chance.random())  # 1,000 to 50,000
        self.nbytes = self.tokens * TOKEN_BYTES
        self.shards = -(-self.nbytes // SHARD_BYTES)
        self.pushed_at = float("-inf")

    def pull(self) -> Counter[str]:
        """Return the requests of a pull: a document, headers and parts."""
        return Counter(get=1 + self.shards + -(-self.nbytes // PART_BYTES))

    def push(self) -> Counter[str]:
        """Return those of a push: what is there, parts, begin and end, a document."""
        parts = -(-self.nbytes // PART_BYTES) + 2 * self.shards
        return Counter(get=self.shards + 1, put=parts + 1)


def simulate(given: argparse.Namespace) -> dict[str, float]:
    """Return sums over the time simulated, for all machines."""
    chance = random.Random(given.seed)
    prefixes = [Prefix(chance) for _ in range(given.prefixes)]
    weights = list(accumulate(1 / (n + 1) ** given.zipf for n in range(given.prefixes)))
    held: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(SAMPLE)]
    scale = given.machines / SAMPLE
    asked, done = Counter[str](), Counter[str]()
    pulls = Counter[int]()
    times = sorted(
        (chance.random() * given.days * DAY_S, machine)
        for machine in range(SAMPLE)
        for _ in range(given.sessions * given.days)
    )
    for now, machine in times:
        number = chance.choices(range(given.prefixes), cum_weights=weights)[0]
        prefix, mine = prefixes[number], held[machine]
        done["sessions"] += 1
        if number in mine:
            mine.move_to_end(number)
            done["from disk"] += 1
        else:
            # Of all machines that miss what is not there, one has to compute it.
            share = 0.0
            if now >= prefix.pushed_at + given.expire_days * DAY_S:
                share, prefix.pushed_at = 1 / scale, now
                done["stored bytes"] += prefix.nbytes * share
            done["computed"] += share
            done["pulled"] += 1 - share
            done["pulled bytes"] += prefix.nbytes * (1 - share)
            for kind, count in prefix.push().items():
                asked[kind] += count * share
            for kind, count in prefix.pull().items():
                asked[kind] += count * (1 - share)
            pulls[number] += 1
        mine[number] = None
        while sum(prefixes[n].nbytes for n in mine) > given.disk_gb * 1e9:
            mine.popitem(last=False)  # the least recently used
    # The list of a model's documents is read when a prompt is missed, and each document
    # once. What took long is put off twenty times as long.
    own = given.machines * given.sessions * given.days if given.own_pushed else 0
    documents = given.prefixes + own
    pages = -(-documents // 1000)
    interval = max(60.0, 20 * pages * given.small_s)
    looks = min(done["pulled"], SAMPLE * given.days * DAY_S / interval)
    asked["list"] += looks * pages
    asked["get"] += documents * SAMPLE
    found = {name: value * scale for name, value in (asked + done).items()}
    found["documents"] = documents
    found["blocks"] = sum(-(-p.tokens // BLOCK) for p in prefixes)
    hottest = max((n * prefixes[p].shards, p) for p, n in pulls.items())
    found["GET/s of the hottest prefix"] = hottest[0] * scale / given.days / DAY_S
    found["GB/s out"] = found["pulled bytes"] / 1e9 / given.days / DAY_S
    months = given.days / 30
    money = sum(found.get(kind, 0) * each for kind, each in DOLLARS.items())
    found["$ a month, requests"] = money / months
    found["$ a month, egress"] = found["pulled bytes"] / 1e9 * DOLLARS_GB_OUT / months
    # What was pushed again has taken the place of what had expired.
    found["$ a month, storage"] = (
        sum(p.nbytes for p in prefixes) / 1e9 * DOLLARS_GB_MONTH
    )
    found["s to read all documents"] = documents * given.small_s / 8
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--machines", type=int, default=10_000)
    parser.add_argument("--prefixes", type=int, default=10_000)
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--sessions", type=int, default=20, help="of a machine, a day")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--disk-gb", type=float, default=50.0)
    parser.add_argument("--expire-days", type=float, default=30.0)
    parser.add_argument("--own-pushed", action="store_true", help="`serve --push`")
    parser.add_argument("--small-s", type=float, default=0.02, help="a small request")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    for name, value in simulate(given).items():
        print(
            f"| {name} | {value:,.3g} |"
            if value < 1000
            else f"| {name} | {value:,.0f} |"
        )


if __name__ == "__main__":
    main()

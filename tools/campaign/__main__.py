"""Break a store in many ways, and count what is lost: nothing, as it should be.

    python -m tools.campaign --seed 1 --kills 1000 --errors 2000 --damage 20000 \
        --fuzz 3000000 --together 120 --connections 200 --replies 1000 \
        --poison 1000 --power-cuts 180 --requests 400 --mutants

It drives what the tests are made of: killed processes, errors of the system at the K-th
call, damaged files, mutated bytes, bad connections to an object store, and what
somebody has poisoned in it. The object store is one in memory, or that at
$KVSTORE_S3_ENDPOINT, whose bucket `kvstore-campaign` must be there. Power cuts, and
requests to a server whose disk is full, emptied and cut, take root on Linux: they mount
a disk in a file. With `--mutants`, the code itself is broken, and the tests, or this
program, must notice. Each line is an act, its count, and what was found; exit code 1
where anything was. The same seed gives the same choices.
"""

from __future__ import annotations

import argparse
import itertools
import operator
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvstore.storage import vault
from kvstore.storage.folder import create_folder
from kvstore.storage.keys import new_signing_key

from . import remotes
from .clients import ROUND as ASKED
from .clients import Clients
from .crowd import crowd
from .damage import damage_store
from .fuzz import Fuzzer
from .mutants import MUTANTS, find_survivors
from .power import cut_in_turn, file_systems, mounted

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import kit  # noqa: E402  (of the tests, which are no package)

ROUND = 20
ERRORS = ("ENOSPC", "EIO", "EACCES", "EMFILE", "EPERM", "ENOLCK", "EROFS", "ENOMEM")


@dataclass
class Outcome:
    """What an act has found."""

    count: int = 0
    note: str = ""
    failures: list[str] = field(default_factory=list)

    def attempt(self, what: str, act: Callable[..., Any], *args: Any) -> Any:
        """Count an attempt; whatever it raises is a failure."""
        self.count += 1
        try:
            return act(*args)
        except (Exception, pytest.fail.Exception):
            self.failures.append(f"{what}\n{traceback.format_exc(limit=-3)}")


def kills(chance: random.Random, count: int, folder: Path, empty: Path) -> Outcome:
    """Kill processes that save, at random moments and at exact system calls."""
    kill, caches = kit.load_beside("test_kill"), kit.load_beside("caches")
    calls = kill.count_calls(folder, empty) if kill.STRACE else {}
    timed = shutil.copytree(empty, folder / "timed-store")
    duration = kill.time_saves(timed, folder)
    found, killed = Outcome(), []
    for done in range(0, count, ROUND):
        work = folder / f"kills-{done}"
        store = shutil.copytree(empty, work / "store")
        number = min(ROUND, count - done)
        moments = [kill.at_random(chance.random() * duration) for _ in range(number)]
        points = kill.pick(calls, number, chance.random()) if calls else []
        exact = [kill.at_call(*point) for point in points]
        both = list(zip(moments, exact or moments, strict=True))
        acts = [chance.choice(pair) for pair in both]
        what = f"kills {done} to {done + number}"
        died = found.attempt(what, kill.kill_in_turn, store, work, caches, acts)
        killed.append(died or 0)
        found.note = _acknowledged(folder, sum(killed))
    found.count = count
    return found


def _acknowledged(folder: Path, killed: int) -> str:
    saves = sum(path.stat().st_size for path in folder.glob("kills-*/noted-*"))
    return f"{killed} died before their end, {saves} saves acknowledged"


def power_cuts(chance: random.Random, count: int, folder: Path, empty: Path) -> Outcome:
    """Cut the power of a disk while it is saved to; as root, on Linux."""
    kill, caches = kit.load_beside("test_kill"), kit.load_beside("caches")
    found, saves = Outcome(), 0
    disks = itertools.cycle(file_systems())
    for done in range(0, count, ROUND):
        work, number = folder / f"cuts-{done}", min(ROUND, count - done)
        work.mkdir()
        disk = next(disks)
        cut = partial(cut_in_turn, chance, number, work, empty, kill, caches, disk)
        acknowledged = found.attempt(f"cuts {done} to {done + number} of {disk}", cut)
        saves += acknowledged or 0
        (work / "image").unlink()
    found.count = count
    found.note = f"{saves} saves acknowledged, on {' and '.join(file_systems())}"
    return found


def errors(chance: random.Random, count: int, folder: Path, empty: Path) -> Outcome:
    """Let the K-th call to the disk fail, once or from then on."""
    import errno

    injected, caches = kit.load_beside("test_injected"), kit.load_beside("caches")
    made = injected.make_template(folder, empty, caches)
    found, lasting = Outcome(), 0
    with pytest.MonkeyPatch.context() as patch:
        disk = injected.Disk(patch)
        totals = {
            job: injected.count_calls(disk, job, made, folder / f"counted-{job}")
            for job in injected.JOBS
        }
        for number in range(count):
            job, name = chance.choice(sorted(totals)), chance.choice(ERRORS)
            when = chance.randint(1, totals[job])
            last = chance.choice((when, 10 * totals[job]))
            lasting += last > when
            path, code = folder / f"store-{number}", getattr(errno, name)
            what = f"error {name} at calls {when} to {last} of {job}"
            calls = (when, last)
            found.attempt(what, injected.fail_at, disk, job, code, calls, made, path)
            disk.work()
            shutil.rmtree(path, ignore_errors=True)
    found.note = f"{lasting} lasting, {len(totals)} jobs"
    return found


def damage(chance: random.Random, count: int, folder: Path, empty: Path) -> Outcome:
    """Damage files of a store: nothing wrong is loaded, and repair and saves heal."""
    faults, caches = kit.load_beside("test_faults"), kit.load_beside("caches")
    world = faults.make_world(folder, empty, caches)
    for shards in (world.path / "shards").iterdir():
        with suppress(OSError):  # one is not empty
            shards.rmdir()  # to copy all of them takes a third of the time
    found = Outcome()
    for number in range(count):
        path = shutil.copytree(world.path, folder / f"damaged-{number}")
        broken = faults.Broken(world, caches, path)
        done = damage_store(chance, path)
        is_removed = bool(re.search(r"entries/\S+: gone", done))
        found.attempt(f"damage {number}: {done}", _use, broken, chance, is_removed)
        shutil.rmtree(path)
    return found


def _use(broken: Any, chance: random.Random, is_removed: bool) -> None:
    """Ask a damaged store, then repair it, save twice, and ask again."""
    import kvstore

    if broken.load() == "FormatError":
        # A flipped bit can make the index that of a newer release. The hint is this:
        for file in broken.path.glob("index.sqlite*"):
            file.unlink()
    for ask in chance.sample([broken.load, broken.load_entry, broken.verify], 3):
        ask()  # which raises where rows are wrong, and names the project's errors
    whole = [broken.load(name) for name in "ab"]
    with kvstore.Store(broken.path, create=False) as store:
        # What is damaged frees nothing that can be loaded; a removed entry may.
        if chance.random() < 0.5 and not is_removed:
            store.plan_prune(now=True).execute()
            # An index that hides blocks may have been built anew.
            left = [broken.load(name) for name in "ab"]
            assert all(map(operator.ge, map(_rank, left), map(_rank, whole))), left
        store.repair()
    for name in "ab":
        broken.save(name)
    asked = [ask(name) for name in "ab" for ask in (broken.load, broken.load_entry)]
    assert asked == ["right"] * 4, asked
    assert broken.verify() == "", broken.verify()


def _rank(loaded: str) -> int:
    """Return how good the outcome of a load is; an error is as bad as a miss."""
    return {"right": 2, "part": 1}.get(loaded, 0)


def fuzz(chance: random.Random, count: int, folder: Path, empty: Path) -> Outcome:
    """Mutate what comes from elsewhere: only the project's own errors come back."""
    fuzzer = Fuzzer(folder, empty, kit.load_beside("caches"))
    found = Outcome()
    for number in range(count):
        # A bundle takes a hundred times as long as the others.
        subject = "bundle" if number % 500 == 0 else chance.choice(fuzzer.quick)
        found.attempt(f"{number}: {subject}", fuzzer.try_one, subject, chance)
    found.note = ", ".join(f"{n} {s}" for s, n in sorted(fuzzer.accepted.items()))
    found.note = f"accepted: {found.note or 'none'}"
    return found


def together(chance: random.Random, count: int, folder: Path, empty: Path) -> Outcome:
    """Let ten processes save and load twice what fits, for so many seconds."""
    found, path = Outcome(), shutil.copytree(empty, folder / "store")
    seed = chance.randrange(1 << 30)
    done = found.attempt("ten processes", crowd, path, 10, count, seed, ROOT / "tests")
    found.count = count
    found.note = ", ".join(f"{n:,} {what}" for what, n in sorted((done or {}).items()))
    return found


def connections(
    chance: random.Random, count: int, folder: Path, empty: Path
) -> Outcome:
    """Cut, stall and corrupt connections to an object store."""

    def choose(request: bytes) -> str | None:
        return chance.choice(remotes.FAULTS) if chance.random() < 0.3 else None

    return _through_proxy(chance, count, folder, empty, choose)


def replies(chance: random.Random, count: int, folder: Path, empty: Path) -> Outcome:
    """Lose the reply to each PUT to an object store."""

    def choose(request: bytes) -> str | None:
        return "lose" if request.startswith(b"PUT ") else None

    return _through_proxy(chance, count, folder, empty, choose)


def _through_proxy(
    chance: random.Random,
    count: int,
    folder: Path,
    empty: Path,
    choose: Callable[[bytes], str | None],
) -> Outcome:
    """Push and pull until so many connections were broken."""
    found, told, rounds = Outcome(), Counter[str](), 0
    with remotes.made_world(folder, empty, kit) as world:
        broken = Counter[str]()
        while broken.total() < count and not found.failures:
            seed = chance.randrange(1 << 30)
            act = remotes.push_and_pull
            done = found.attempt(f"round {rounds}", act, world, rounds, choose, seed)
            rounds += 1
            for sums, new in zip((broken, told), done or (), strict=False):
                sums.update(new)
    found.count = broken.total()
    sums = ", ".join(f"{n} {what}" for what, n in sorted((broken + told).items()))
    found.note = f"{rounds} rounds of 3 entries: {sums}"
    return found


def poison(chance: random.Random, count: int, folder: Path, empty: Path) -> Outcome:
    """Poison an object of a remote: it is named, and nothing becomes visible."""
    found, done = Outcome(), Counter[str]()
    with remotes.made_world(folder, empty, kit) as world:
        new_signing_key()
        for number in range(count):
            what = found.attempt(
                f"poison {number}", remotes.poison_once, world, number, chance
            )
            done[what or "failed"] += 1
    found.note = ", ".join(f"{n} {what}" for what, n in sorted(done.items()))
    return found


def requests(chance: random.Random, count: int, folder: Path, empty: Path) -> Outcome:
    """Ask a server through a full disk, a deleted store and a power cut; as root."""
    import conftest

    servers = kit.load_beside("servers").Servers(folder)
    bad, found = kit.load_beside("test_serving").BAD, Outcome()
    with mounted(folder) as disk:
        clients = Clients(servers, conftest.write_model(folder / "tiny"), bad)
        for done in range(0, count, ASKED):
            found.attempt(f"requests {done} on", clients.live, chance, disk)
            servers.close()  # before its disk goes
            disk.renew()
    found.count = clients.counts.total()
    told = sorted((clients.counts + clients.told).items())
    found.note = f"{len(servers.started) - 1} servers: " + ", ".join(
        f"{n} {what}" for what, n in told
    )
    return found


ACTS = {
    "kills": kills,
    "power-cuts": power_cuts,
    "errors": errors,
    "damage": damage,
    "fuzz": fuzz,
    "together": together,
    "connections": connections,
    "replies": replies,
    "poison": poison,
    "requests": requests,
}


def main() -> int:
    """Run the acts that are asked for, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.campaign")
    parser.add_argument("--seed", type=int, default=1)
    for name, act in ACTS.items():
        parser.add_argument(f"--{name}", type=int, default=0, help=act.__doc__)
    text = "break the code in each known way: the tests must notice"
    parser.add_argument("--mutants", nargs="*", metavar="NAME", help=text)
    text = "use encrypted stores, which goes with kills, errors and damage"
    parser.add_argument("--encrypted", action="store_true", help=text)
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="campaign-") as temporary:
        os.environ["KVSTORE_DIR"] = f"{temporary}/unused"
        kept = None
        if options.encrypted:
            kept = vault.keep_by_file(vault.new_key(), Path(temporary) / "key")
        empty = create_folder(Path(temporary) / "empty", 16, kept).path
        for name, act in ACTS.items():
            if count := getattr(options, name.replace("-", "_")):
                folder = Path(temporary) / name
                folder.mkdir()
                begin = time.monotonic()
                chance = random.Random(f"{options.seed} {name}")
                found = act(chance, count, folder, empty)
                failed |= _tell(name, found, time.monotonic() - begin)
        if options.mutants is not None:
            begin = time.monotonic()
            chosen = options.mutants or list(MUTANTS)
            survivors = find_survivors(chosen, ROOT, Path(temporary) / "mutants")
            found = Outcome(len(chosen), "each is to be caught", survivors)
            failed |= _tell("mutants", found, time.monotonic() - begin)
    return int(failed)


def _tell(name: str, found: Outcome, seconds: float) -> bool:
    """Print what an act has found; return whether anything failed."""
    for failure in found.failures[:20]:
        print(f"--- {failure}", file=sys.stderr)
    number = len(found.failures)
    print(f"| {name} | {found.count:,} | {number} | {seconds:.0f} s | {found.note} |")
    sys.stdout.flush()
    return bool(number)


if __name__ == "__main__":
    sys.exit(main())

"""Speeds: what was measured is found again, fades, expires, and decides."""

import math
import random
import struct
import threading
import time
from dataclasses import replace

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvstore
from kvstore.errors import IndexDamagedError
from kvstore.ops import speeds
from kvstore.ops.speeds import MAX_AGE_S, Speeds
from kvstore.ops.usage import LoadNotes
from kvstore.storage.index import Index, Timing

NOW = 1.8e9
MODEL = kvstore.Fingerprint({"weights": "a"}, "model-a")
OTHER = kvstore.Fingerprint({"weights": "b"}, "model-b")


def observed(observations, codec="raw", known=None, at=NOW):
    """Return the sums of observations as pairs of tokens and seconds."""
    for num_tokens, seconds in observations:
        new = speeds.observe("f", codec, num_tokens, seconds=seconds, at=at)
        known = known if new is None else speeds.add(known, new)
    return known


def loads(fixed_s, token_s, sizes, noise=0.0):
    """Return loads of these sizes on a machine of these speeds."""
    source = random.Random(1)
    return [
        (n, (fixed_s + token_s * n) * (1 + source.uniform(-noise, noise)))
        for n in sizes
    ]


def make_speeds(observations, tps):
    """Return speeds from loads and a rate of prefill."""
    return Speeds(observed([(1000, 1000 / tps)], None), observed(observations))


def test_planted_speeds_are_found_under_noise():
    """Fixed part, part per token and break-even come out of noisy observations."""
    source = random.Random(2)
    sizes = [source.randrange(300, 20_000) for _ in range(40)]
    found = make_speeds(loads(0.2, 5e-5, sizes, noise=0.05), 1000.0)
    assert found.load_s(10_000) == pytest.approx(0.7, rel=0.1)
    assert found.prefill_s(500) == pytest.approx(0.5)
    assert found.break_even_tokens == pytest.approx(0.2 / (1e-3 - 5e-5), rel=0.3)
    assert found.verdict == "pays"


def test_a_machine_that_changes_is_noticed():
    """After some loads from a slower disk, the faster one is forgotten."""
    sizes = [300, 5000, 900, 12_000] * 10
    known = observed(loads(0.0, 1e-5, sizes))
    slower = Speeds(None, observed(loads(0.5, 1e-4, sizes), known=known))
    assert slower.load_s(10_000) == pytest.approx(1.5, rel=0.1)


def test_what_was_measured_a_day_ago_decides_nothing():
    """A disk that was slow is tried again, and is measured anew then."""
    slow, prefill = observed([(1000, 9.0)] * 5), observed([(1000, 1.0)], None)
    day = NOW + MAX_AGE_S + 1
    assert Speeds.choose([slow, prefill], "raw", NOW).verdict == "pays"
    assert not Speeds.choose([slow, prefill], "raw", NOW).pays(2000)
    later = Speeds.choose([slow, prefill], "raw", day)
    assert later == Speeds()
    assert (later.verdict, later.pays(2000)) == ("unknown", True)
    again = observed([(1000, 0.1)], known=slow, at=day)
    assert again == observed([(1000, 0.1)], at=day)


def test_one_slow_load_does_not_decide():
    """The first load of a process may take long; three in a row are no accident."""
    prefill = observed([(1000, 1.0)], None)
    for num_loads, pays in ((1, True), (2, True), (3, False)):
        found = Speeds(prefill, observed([(1000, 9.0)] * num_loads))
        assert found.pays(1000) is pays
        assert found.verdict == ("unknown" if pays else "pays")


def test_a_short_prefill_says_nothing():
    """Fewer than 64 tokens are one step; of more, each token counts."""
    assert observed([(63, 1.0)], None) is None
    assert observed([(63, 1.0)], "raw") is not None
    assert Speeds(observed([(64, 1.0), (63, 9.0)], None)).prefill_tps == 64


def test_never_is_not_unknown():
    """Where a token takes longer to restore than to compute, loading never pays."""
    slow = make_speeds(loads(0.01, 1e-3, [500, 2000, 8000]), 2000.0)
    assert (slow.verdict, slow.break_even_tokens) == ("never", None)
    assert not slow.pays(10**6)
    for unknown in (Speeds(), Speeds(slow.prefill), Speeds(None, slow.load)):
        assert (unknown.verdict, unknown.break_even_tokens) == ("unknown", None)
        assert unknown.pays(10)


def test_what_is_in_memory_is_no_gain():
    """Loading is weighed against computing what is not held already."""
    found = make_speeds(loads(0.05, 1e-5, [500, 2000, 8000]), 1000.0)
    assert found.pays(1000)
    assert found.pays(1000, held=900)
    assert not found.pays(1000, held=950)
    assert not found.pays(1000, held=1000)


def test_loads_of_one_size_tell_no_parts():
    """Then the least is believed that fits: what is never tried is never measured."""
    fast = make_speeds([(1000, 0.1)] * 4, 1000.0)
    assert fast.break_even_tokens == 1
    assert fast.load_s(100) == pytest.approx(0.01)
    assert fast.load_s(5000) == pytest.approx(0.1)
    slow = make_speeds([(1000, 3.0)] * 4, 1000.0)
    assert slow.break_even_tokens == 3001
    assert not slow.pays(1000)


def test_longer_loads_that_took_less_make_no_sense():
    """No load takes less than no time, whatever a fit would say."""
    odd = make_speeds([(500, 1.0), (2000, 0.5), (8000, 0.2)], 1000.0)
    assert 0 < odd.load_s(10**6) < 1
    steep = make_speeds([(500, 0.01), (2000, 0.5), (8000, 4.0)], 1000.0)
    assert 0 < steep.load_s(1) < 0.01


@given(
    fixed_s=st.floats(1e-4, 10),
    token_s=st.floats(1e-7, 1e-2),
    tps=st.floats(10, 1e5),
    sizes=st.lists(st.integers(1, 10**5), min_size=3, max_size=20),
    num_tokens=st.integers(1, 10**6),
)
def test_from_the_break_even_on_it_pays(fixed_s, token_s, tps, sizes, num_tokens):
    """What pays for some number of tokens pays for more, from the break-even on."""
    found = make_speeds(loads(fixed_s, token_s, sizes), tps)
    first = found.break_even_tokens
    load_s, prefill_s = found.load_s(num_tokens), found.prefill_s(num_tokens)
    if load_s != pytest.approx(prefill_s, rel=1e-6):
        assert found.pays(num_tokens) == (first is not None and num_tokens >= first)


numbers = st.floats() | st.sampled_from([0.0, -1.0, 1.0, 1e-300, 1e300, math.inf])


@given(
    st.lists(
        st.builds(
            Timing, st.just("f"), st.none() | st.just("raw"), st.just(""),
            numbers, numbers, numbers, numbers, numbers,
            st.sampled_from([NOW, 0.0, -1.0, math.nan, math.inf, 1e300]),
        ),
        max_size=3,
    )
)  # fmt: skip
def test_a_damaged_file_may_say_anything(timings):
    """Whatever sums are read, the answers are numbers, and nothing is raised."""
    found = Speeds.choose(timings, "raw", NOW)
    assert found.break_even_tokens is None or found.break_even_tokens >= 1
    for answer in (found.load_s(100), found.prefill_s(100)):
        assert answer is None or (math.isfinite(answer) and answer >= 0)
    assert found.pays(100) in (True, False)
    new = speeds.observe("f", "raw", 100, seconds=1.0, at=NOW)
    for timing in timings:
        assert speeds.is_sound(speeds.add(timing, new))


@pytest.mark.parametrize(
    ("num_tokens", "seconds"),
    [(0, 1.0), (-5, 1.0), (100, 0.0), (100, -1.0), (100, math.nan), (100, math.inf)],
)
def test_impossible_observations_are_left_out(num_tokens, seconds):
    """No tokens, no time, and a clock that went mad say nothing."""
    assert speeds.observe("f", "raw", num_tokens, seconds=seconds, at=NOW) is None


def test_the_codec_asked_for_decides():
    """Of several codecs that one counts, and without it what was restored last."""
    raw = replace(observed([(1000, 0.1)] * 3), codec="raw")
    turbo = replace(observed([(1000, 0.2)] * 3), codec="turbo4", measured_at=NOW - 5)
    for wanted, chosen in (("raw", raw), ("turbo4", turbo), ("planes", raw)):
        assert Speeds.choose([turbo, raw], wanted, NOW).load == chosen


# Kept in the store


@pytest.fixture
def index(tmp_path):
    """An index as releases before this one made it."""
    opened = Index(tmp_path / "index.sqlite", create=True)
    yield opened
    opened.close()


def test_timings_are_found_again(index):
    """What was put is returned, the latest first, and one per model and codec."""
    first, second = observed([(100, 1.0)], "raw"), observed([(100, 2.0)], None)
    second = replace(second, measured_at=NOW + 1, model="m")
    index.put_timing(observed([(5, 5.0)], "raw"))
    for timing in (first, second):
        index.put_timing(timing)
    assert index.timings() == [second, first]
    assert index.timings("f") == [second, first]
    assert index.timings("g") == []
    index.drop_timings(NOW + 0.5)
    assert index.timings() == [second]


def test_an_index_of_an_earlier_release_goes_on_working(index, tmp_path):
    """It lacks the table: nothing was measured. It gets it, and keeps its version."""
    assert index.timings() == []
    tables = "SELECT count(*) FROM sqlite_master WHERE name = 'timings'"
    other = apsw.Connection(str(tmp_path / "index.sqlite"))
    assert other.execute(tables).fetchall() == [(0,)]
    index.put_timing(observed([(100, 1.0)]))
    assert other.execute(tables).fetchall() == [(1,)]
    assert other.execute("PRAGMA user_version").fetchall() == [(1,)]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE timings SET num = 'many'",
        "UPDATE timings SET model = x'00'",
        "DROP TABLE timings; CREATE TABLE timings (fingerprint TEXT)",
        "DROP TABLE timings; CREATE VIEW timings AS SELECT 1",
    ],
)
def test_a_damaged_table_is_damage(index, tmp_path, change):
    """What SQLite would not have stored so is found, and the index is rebuilt."""
    index.put_timing(observed([(100, 1.0)]))
    apsw.Connection(str(tmp_path / "index.sqlite")).execute(change)
    with pytest.raises(IndexDamagedError):
        index.timings()


@pytest.fixture
def store(store_path, caches):
    """A store with one raw conversation."""
    with kvstore.Store(store_path, codec="raw") as opened:
        tokens, cache = caches.make_conversation(8, 1, extra=3)
        opened.save(tokens, cache, MODEL, name="chat")
        yield opened


def test_every_hit_is_measured(store, caches):
    """`load` and `load_entry` note how long they took, and from which codec."""
    tokens, _ = caches.make_conversation(8, 1, extra=3)
    begin = time.perf_counter()
    store.load(tokens, MODEL)
    store.load_entry("chat", MODEL)
    store.load([7, 8, 9], MODEL)  # a miss
    store.load(tokens, OTHER)  # another miss
    most_s = time.perf_counter() - begin
    load = store.speeds(MODEL).load
    assert (load.codec, load.model) == ("raw", "model-a")
    assert load.num == pytest.approx(1.9)
    assert load.tokens == pytest.approx(0.9 * (len(tokens) - 1) + len(tokens))
    assert 0 < load.seconds < most_s
    assert store.speeds(OTHER) == Speeds()


def test_a_load_counts_for_the_codec_of_most_of_it(store_path, caches):
    """A lossless tail does not make a load of codes one of a lossless codec."""
    tokens, cache = caches.make_conversation(3, 1, extra=3)
    with kvstore.Store(store_path, codec="turbo4") as store:
        store.save(tokens, cache, MODEL)
        store.load([*tokens, 0], MODEL)
        assert store.speeds(MODEL).load.codec == "turbo4"


def test_a_load_that_met_damage_is_measured_without_it(
    store_path, store, caches, flip_bit
):
    """What is restored at the second try counts, and the first does not."""
    tokens, _ = caches.make_conversation(8, 1, extra=3)
    (path,) = store_path.glob("shards/*/*.safetensors")
    flip_bit(path, 8 * (path.stat().st_size * 3 // 4))
    rest = store.load(tokens, MODEL)[1]
    restored = len(tokens) - len(rest)
    assert 0 < restored < len(tokens) - 1
    load = store.speeds(MODEL).load
    assert (load.num, load.tokens) == (1, restored)


def test_what_is_noted_is_known_at_once_and_kept(store_path, store):
    """Nothing is written while a prompt waits; closing writes it for the next."""
    store.note_prefill(MODEL, 1000, 5.0)
    store.note_prefill(MODEL, 63, 5.0)
    assert store.speeds(MODEL).prefill_tps == 200
    with kvstore.Store(store_path) as other:
        assert other.speeds(MODEL) == Speeds()
        store.close()
        assert other.speeds(MODEL).prefill_tps == 200
        assert other.speeds(OTHER) == Speeds()


def test_a_load_that_was_given_up_counts(store, caches):
    """Who does not wait for a slow disk tells how slow it was."""
    store.note_prefill(MODEL, 1000, 1.0)
    for _ in range(3):
        assert store.speeds(MODEL).pays(1000)
        store.note_load(MODEL, 256, 2.0)
    assert not store.speeds(MODEL).pays(1000)
    assert store.speeds(MODEL).load.codec == "raw"


def test_notes_of_several_processes_add_up(store_path):
    """Each adds its own to what the others have written meanwhile."""
    with kvstore.Store(store_path) as one, kvstore.Store(store_path) as two:
        one.note_prefill(MODEL, 1000, 1.0)
        two.note_prefill(MODEL, 1000, 3.0)
    with kvstore.Store(store_path) as after:
        assert after.speeds(MODEL).prefill.num == pytest.approx(1.9)


def test_a_save_writes_what_another_store_has_noted(store_path, store, caches):
    """One that only loads never comes to write; the one that saves does it."""
    with store.reopen() as writer:
        store.note_prefill(MODEL, 1000, 5.0)
        tokens, cache = caches.make_conversation(1, 2)
        writer.save(tokens, cache, MODEL)
        with kvstore.Store(store_path) as third:
            assert third.speeds(MODEL).prefill_tps == 200


def test_seconds_saved_are_what_prefill_would_have_taken(store, caches):
    """A hit saves the time of a prefill less its own, where that is known."""
    tokens, _ = caches.make_conversation(8, 1, extra=3)
    store.load(tokens, MODEL)
    assert store.stats().seconds_saved is None
    store.note_prefill(MODEL, 1000, 100.0)
    store.load(tokens, MODEL)
    load_s = store.speeds(MODEL).load.seconds
    saved = store.stats().seconds_saved
    assert saved == pytest.approx((len(tokens) - 1) / 10 - load_s, abs=load_s + 0.001)
    store.load([*tokens[:5], 0], OTHER)  # a miss saves nothing
    assert store.stats().seconds_saved == saved


def test_a_load_that_was_slower_saves_nothing(store, caches):
    """Time lost is no time saved; nor is it taken off what others saved."""
    tokens, _ = caches.make_conversation(8, 1, extra=3)
    store.note_prefill(MODEL, 10**6, 1e-3)
    store.load(tokens, MODEL)
    assert store.stats().seconds_saved == 0


def test_a_flipped_bit_of_a_timing_ends_no_save(index):
    """Whichever bit of whichever sum: what follows from it is a number, or nothing."""
    now = time.time()
    sizes = [1003, 517, 2211, 130]
    prefill = observed([(n, n / 300) for n in sizes], None, at=now)
    load = observed(loads(0.03, 1e-4, sizes), at=now)
    for name in ("num", "tokens", "seconds", "squares", "products", "measured_at"):
        for bit in range(64):
            (number,) = struct.unpack("<Q", struct.pack("<d", getattr(prefill, name)))
            (other,) = struct.unpack("<d", struct.pack("<Q", number ^ 1 << bit))
            with index.transaction():
                index.put_timing(load)
                index.put_timing(replace(prefill, **{name: other}))
            known = Speeds.choose(index.timings("f"), "raw", now)
            # What waits for a part of that time takes no more than the system does.
            assert (known.prefill_s(10**6) or 0.0) < threading.TIMEOUT_MAX
            notes = LoadNotes()
            notes._timings.append(observed([(1000, 0.2)], at=now))
            notes.write(index)
            assert not notes


def test_notes_of_many_threads_are_all_kept(index):
    """Servers note prefills on one thread while another writes."""
    notes = LoadNotes()

    def work():
        for _ in range(500):
            notes.add(None, 3)
            notes.add_timing(MODEL, None, 100, seconds=1.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        notes.write(index)
    notes.write(index)
    assert not notes
    assert index.counters()["missed_tokens"] == 4 * 500 * 3
    assert index.timings()[0].num == pytest.approx(10, rel=0.01)


def test_while_it_is_written_a_timing_is_known(index, monkeypatch):
    """A server that asks for its speed meanwhile is not told that there is none."""
    notes, seen = LoadNotes(), []

    def asked():
        seen.append([timing.num for timing in notes.timings(index.timings)])

    def within(method):
        def call(*args):
            asked()
            found = method(*args)
            asked()
            return found

        return call

    for name in ("put_timing", "drop_timings"):
        monkeypatch.setattr(index, name, within(getattr(index, name)))
    notes.add_timing(MODEL, None, 100, seconds=1.0)
    notes.write(index)
    asked()
    assert len(seen) == 5
    assert all(seen)
    assert seen[-1] == [1]

    def read():
        """Return what was written before another thread wrote."""
        known = []
        notes.write(index)
        return known

    notes.add_timing(MODEL, None, 100, seconds=1.0)
    assert notes.timings(read)


def test_notes_that_nobody_writes_do_not_grow():
    """A store that never comes to write keeps what would count."""
    notes = LoadNotes()
    for _ in range(1000):
        notes.add_timing(MODEL, None, 100, seconds=1.0)
    assert len(notes._timings) == 256
    assert notes.timings(list)[0].num == pytest.approx(10)


def test_what_nobody_measured_for_long_is_forgotten(index):
    """Models that are not used any more leave the table."""
    index.put_timing(observed([(100, 1.0)]))
    notes = LoadNotes()
    notes.add_timing(MODEL, None, 100, seconds=1.0)
    notes.write(index)
    far = time.time() - 100 * 86_400
    index.put_timing(replace(observed([(100, 1.0)]), measured_at=far))
    notes.add_timing(MODEL, None, 100, seconds=1.0)
    notes.write(index)
    assert [timing.fingerprint for timing in index.timings()] == [MODEL.digest]

"""While something slow works, it is seen to move, and Ctrl-C is heard at once."""

import ctypes
import os
import re
import select
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from threading import Event

import mlx.core as mx
import pexpect
import pytest

import kvstore
from kvstore.cli.interrupts import Interrupts
from kvstore.cli.options import prefilling
from kvstore.cli.output import Bars
from kvstore.models import Callbacks, LoadedModel, PrefillOptions, save_prompt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_heard_at_once(number):
    """The word comes from another thread, before any handler could run."""
    heard = Event()
    with Interrupts(heard.set) as interrupts, interrupts.deferred():
        signal.raise_signal(number)
        assert heard.wait(60)


def test_it_is_heard_while_a_long_call_works():
    """A call that gives Python no turn, as MLX's do, ends only after the word."""
    ours, heard = os.pipe()
    entry = struct.pack("iHH", ours, select.POLLIN, 0)
    poll = ctypes.CDLL(None).poll

    def interrupt():
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    with Interrupts(lambda: os.write(heard, b"!")) as interrupts:
        with interrupts.deferred():
            threading.Thread(target=interrupt).start()
            assert poll(entry, 1, 60_000) == 1
        assert interrupts.is_pending
    os.close(ours)
    os.close(heard)


def test_nothing_is_said_where_nothing_works():
    """At a prompt, Ctrl-C is no end of anything."""
    heard = Event()
    with Interrupts(heard.set):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not heard.wait(0.2)


def test_each_run_is_told_once():
    """A second Ctrl-C ends at once and needs no word; the next run is told again."""
    heard: list[int] = []
    with Interrupts(lambda: heard.append(1)) as interrupts:
        for run in (1, 2):
            with interrupts.deferred():
                signal.raise_signal(signal.SIGINT)
                until = time.monotonic() + 300
                while len(heard) < run and time.monotonic() < until:
                    time.sleep(0.01)
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
    assert heard == [1, 1]


def test_the_wakeup_descriptor_is_as_before():
    """Whoever had one has it again."""
    with Interrupts(lambda: None):
        pass
    assert signal.set_wakeup_fd(-1) == -1


def test_steps_take_about_a_second():
    """A step's tokens follow from the last one's speed, unless a size is given."""
    options, most = prefilling(None, 2048), 2048
    least = options.next_size()
    assert least == (32 if mx.default_device().type == mx.cpu else 512)
    assert options.next_size(least, least / 700) == 512
    assert options.next_size(least, least / 5) == least
    assert options.next_size(least, 0.0) == most
    fixed = prefilling(64, 2048)
    assert [fixed.next_size(), fixed.next_size(64, 10.0)] == [64, 64]


def test_steps_by_time_are_seen_to_move(loaded, store_path):
    """Each ends at a multiple of its size, wherever the prompt goes on from."""
    model, tokens = LoadedModel(*loaded), [(7 * i) % 250 for i in range(300)]
    seen: list[int] = []
    with kvstore.Store(store_path, "raw") as store:
        save_prompt(model, tokens[:30], store=store)
        save_prompt(
            model,
            tokens,
            store=store,
            prefilling=PrefillOptions(64, step_s=1.0),
            callbacks=Callbacks(on_prefill=lambda done, total: seen.append(done)),
        )
        held = store.lookup(tokens[:30], model.fingerprint).num_tokens
    assert held <= 30
    start = 300 - seen[-1]
    assert all((start + done) % 32 == 0 for done in seen[1:-2])
    assert len(seen) > 5


def test_small_steps_make_no_small_shards(loaded, store_path):
    """Blocks are written as seldom as with large steps, and none is left out."""
    model, tokens = LoadedModel(*loaded), [(7 * i) % 250 for i in range(300)]
    with kvstore.Store(store_path, "raw") as store:
        few = PrefillOptions(16, save_every=160)
        save_prompt(model, tokens, store=store, prefilling=few)
        assert store.stats().num_shards <= 4
        held = store.lookup([*tokens, 1], model.fingerprint)
    assert held.num_tokens == len(tokens)


def test_bars_show_speed_and_time_left(capsys):
    """What a waiting person asks is in every bar, and a word can be said above it."""
    bars = Bars(True)
    update = bars.bar("prefill")
    update(0, 2000)
    rich = bars._started()
    kinds = [type(column).__name__ for column in rich.columns]
    assert {"RateColumn", "TimeRemainingColumn", "MofNCompleteColumn"} <= set(kinds)
    bars.say_stopping()
    bars.clear()
    assert "stopping …" in capsys.readouterr().err


def test_a_spinner_is_for_a_terminal_only(capsys):
    """A pipe gets nothing."""
    with Bars(False).spinner("loading the model"):
        pass
    assert capsys.readouterr() == ("", "")


ROOT = Path(__file__).parent.parent.parent
DOCUMENT = "The sea was calm, and nobody on the ship knew what the night would bring. "


@pytest.fixture
def long_chat(tmp_path):
    """A chat with the demo model on a terminal, which has read a long document."""
    document = tmp_path / "sea.txt"
    document.write_text(DOCUMENT * 250)
    model = os.environ.get("KVSTORE_DEMO_MODEL") or ROOT / ".cache/smollm2"
    words = ["-m", "kvstore", "--store", tmp_path / "store", "chat", "--model", model]
    env = {"PROMPT_TOOLKIT_NO_CPR": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
    chat = pexpect.spawn(
        sys.executable,
        [str(word) for word in words],
        env=os.environ | env,
        cwd=ROOT,
        timeout=300,
        dimensions=(24, 80),
    )
    chat.expect_exact("loading the model")
    chat.expect_exact("lists the commands")
    chat.expect_exact(">")
    chat.send(f"/file {document}\r")
    chat.expect_exact("goes before what you say next")
    yield chat
    chat.kill(signal.SIGKILL)
    chat.wait()


@pytest.mark.slow
@pytest.mark.model
def test_a_bar_moves_and_ctrl_c_is_heard_at_once(long_chat):
    """Both within a second and a half on an idle machine; the message comes back."""
    long_chat.expect_exact(">")
    long_chat.send("What is it about?\r")
    long_chat.expect(re.compile(rb"[m ]0/\d{4}"))
    begin = time.monotonic()
    long_chat.expect(re.compile(rb"[m ][1-9]\d*/\d{4}"))
    moved = time.monotonic() - begin
    time.sleep(2.0)
    begin = time.monotonic()
    long_chat.sendintr()
    long_chat.expect_exact("stopping")
    heard = time.monotonic() - begin
    long_chat.expect_exact("interrupted before the reply")
    stopped = time.monotonic() - begin
    long_chat.expect_exact("What is it about?")
    print(f"bar moved {moved:.2f} s, word {heard:.2f} s, stopped {stopped:.2f} s")
    assert moved < 1.5
    assert heard < 1.5

"""While something slow works, it is seen to move, and Ctrl-C is heard at once."""

import os
import signal
import time
from threading import Event, Timer

import mlx.core as mx
import pytest

import kvstore
from kvstore.cli.interrupts import Interrupts
from kvstore.cli.options import prefilling
from kvstore.cli.output import Bars
from kvstore.models import LoadedModel, PrefillOptions, save_prompt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_heard_at_once(number):
    """The word comes from another thread, before any handler could run."""
    heard = Event()
    with Interrupts(heard.set) as interrupts, interrupts.deferred():
        signal.raise_signal(number)
        assert heard.wait(1.5)


def test_it_is_heard_while_a_long_call_works():
    """MLX computes for long without giving Python its turn; the word does not wait."""
    sent: list[float] = []
    heard: list[float] = []
    x = mx.random.normal((600, 600))
    for _ in range(4):
        x = x @ x / 25

    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    with Interrupts(lambda: heard.append(time.monotonic())) as interrupts:
        with interrupts.deferred():
            timer = Timer(0.05, interrupt)
            timer.start()
            mx.eval(x)
            timer.join()
        assert interrupts.is_pending
    assert heard[0] - sent[0] < 1.5


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
                until = time.monotonic() + 1.5
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


def test_steps_are_small_where_somebody_waits_on_a_cpu():
    """A step is what a CPU computes in about a second, unless another is asked for."""
    on_cpu = mx.default_device().type == mx.cpu
    assert prefilling(None, 2048).step_size == (256 if on_cpu else 2048)
    assert prefilling(64, 2048).step_size == 64


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

"""Signals end a run between two steps; a second one does not wait."""

import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress

import pytest

from kvstore.cli.interrupts import Interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted(number):
    """While a run is under way, a signal is only looked at."""
    with Interrupts() as interrupts, interrupts.deferred():
        assert not interrupts.is_pending
        signal.raise_signal(number)
        assert interrupts.is_pending
    assert interrupts.is_pending
    assert interrupts.ending == (None if number == signal.SIGINT else number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_does_not_wait(number):
    """Who asks twice is not kept waiting for a step to end."""
    with Interrupts() as interrupts, interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_runs_is_an_interrupt(number):
    """Where nothing is under way, a signal is what Ctrl-C is everywhere."""
    with Interrupts() as interrupts:
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        with interrupts.deferred():
            assert not interrupts.is_pending
    assert interrupts.ending == (None if number == signal.SIGINT else number)


def test_all_is_as_before_at_the_end():
    """The handlers that were there are there again, after an error too."""
    former = [signal.getsignal(number) for number in SIGNALS]
    with suppress(ZeroDivisionError), Interrupts():
        assert [signal.getsignal(number) for number in SIGNALS] != former
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == former


def test_what_is_ignored_stays_ignored():
    """A process that `nohup` started outlives its terminal."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts, interrupts.deferred():
            signal.raise_signal(signal.SIGHUP)
            assert not interrupts.is_pending
    finally:
        signal.signal(signal.SIGHUP, former)


READER = """
import sys
from kvstore.cli.interrupts import Interrupts

with Interrupts() as interrupts:
    try:
        print("ready", flush=True)
        sys.stdin.readline()
    except KeyboardInterrupt:
        print("ending", interrupts.ending)
"""


def test_a_signal_ends_waiting_for_a_line():
    """A process that waits for its input is woken by SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # until it waits
    process.terminate()
    output, _ = process.communicate(timeout=300)
    assert output == f"ending {int(signal.SIGTERM)}\n"


def test_an_interrupt_that_python_drops_comes_again():
    """Raised where garbage is collected, it goes no further than to be printed."""
    from kvstore.server.app import _terminated_like_interrupted

    class Garbage:
        pass

    def wait():
        garbage = Garbage()
        seen = weakref.ref(garbage, lambda _: signal.raise_signal(signal.SIGTERM))
        del garbage
        assert seen() is None  # and nobody was interrupted
        time.sleep(60)

    usual = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), _terminated_like_interrupted():
        wait()
    assert sys.unraisablehook is usual

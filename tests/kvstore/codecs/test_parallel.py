"""Work in several threads."""

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds a process")
def test_no_more_threads_than_cores_that_are_given():
    """A container on one core of many is not served by eight threads."""
    program = "from kvstore.codecs.parallel import NUM_THREADS; print(NUM_THREADS)"
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert done.stdout.strip() == "1"

"""Fixtures of the store's tests."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from kit import load_beside

from kvstore.storage.folder import create_folder

# Machines that test are slow now and then, which is no failure.
settings.register_profile(
    "kvstore",
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("kvstore")

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def caches():
    """The module `caches.py`: makers of tiny prompt caches."""
    return load_beside("caches")


@pytest.fixture
def s3_server(monkeypatch):
    """An S3 server in memory that can be told to behave badly."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = load_beside("s3server").S3Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A store of small blocks, to be copied: making one syncs hundreds of folders."""
    return create_folder(tmp_path_factory.mktemp("empty") / "store", 16).path


@pytest.fixture
def store_path(tmp_path, empty_store):
    """A store of small blocks."""
    return shutil.copytree(empty_store, tmp_path / "store")


@pytest.fixture
def log(caplog):
    """A function that returns what kvstore has logged so far."""
    logger = logging.getLogger("kvstore")
    before = logger.propagate
    logger.propagate = True
    caplog.set_level(logging.DEBUG, "kvstore")
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.propagate = before


@pytest.fixture
def run_python():
    """A function that runs a program in a process of its own and returns its output.

    The program may `import caches`.
    """

    def run(program, *arguments, check=True, **options):
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            check=check,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{os.getcwd()}"},
            **options,
        )

    return run


@pytest.fixture
def flip_bit():
    """A function that flips one bit of a file, or of bytes."""

    def flip(target, bit):
        data = bytearray(target if isinstance(target, bytes) else target.read_bytes())
        data[bit // 8] ^= 1 << (bit % 8)
        if not isinstance(target, bytes):
            mode = target.stat().st_mode
            target.chmod(0o600)
            target.write_bytes(data)
            target.chmod(mode)
        return bytes(data)

    return flip

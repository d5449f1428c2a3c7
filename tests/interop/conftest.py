"""Fixtures of the tests with libnbd (see libnbd_support) and of those with the kernel's NBD client
(see kernel_client_support)."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from interop_support import fresh_seed
from kernel_client_support import SIZE, Work
from libnbd_support import Served
from peers import Guest


@pytest.fixture(scope="module")
def served_by_module() -> Iterator[Served]:
    """One standby for all tests of a module."""
    with tempfile.TemporaryDirectory(prefix="rnbd-") as name, Served(Path(name)) as served:
        yield served
        served.close()


@pytest.fixture
def served(served_by_module: Served) -> Iterator[Served]:
    """It, for one test."""
    served_by_module.look()
    yield served_by_module
    served_by_module.compare()


@pytest.fixture(scope="module")
def source() -> bytes:
    """The bytes that the guest reads from /dev/vda: other ones at every place."""
    return random.Random(fresh_seed()).randbytes(SIZE)


@pytest.fixture(scope="module")
def source_file(source: bytes) -> Iterator[Path]:
    """A file with them."""
    with tempfile.TemporaryDirectory(prefix="rnbd-") as name:
        path = Path(name, "source")
        path.write_bytes(source)
        yield path


@pytest.fixture(scope="module")
def guest(source_file: Path) -> Iterator[Guest]:
    """One guest for all tests of a module: a boot takes as long as a test."""
    with Guest(source_file.parent, source_file) as guest:
        yield guest


@pytest.fixture
def work(short_dir: Path, guest: Guest, source: bytes) -> Iterator[Work]:
    """A standby of an empty disk; the guest is left as it was."""
    work = Work(short_dir, guest, source)
    with work.standby:
        yield work
        work.finish()

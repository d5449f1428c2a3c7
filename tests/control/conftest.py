"""A control server over a fake backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from control_fakes import FakeBackend

from replnbd.control import ControlServer


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def server(backend: FakeBackend, short_dir: Path) -> AsyncIterator[ControlServer]:
    server = ControlServer(backend, short_dir / "qmp.sock")
    await server.start()
    yield server
    await server.close()

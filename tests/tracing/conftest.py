"""Fixtures: tracing servers as processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tracing_server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a store on disk, shared by a module's tests: they use ids of their own."""
    folder = tmp_path_factory.mktemp("tracing")
    made = Server(["--storage", str(folder / "store")], folder / "log").start()
    yield made
    assert made.stop() == 0, made.log.read_text()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server of one test's own, not yet started."""
    made = Server(["--storage", str(tmp_path / "store")], tmp_path / "log")
    yield made
    if made.process is not None and made.process.poll() is None:
        made.stop()

"""Fixtures: tracing servers as processes."""

from __future__ import annotations

import fcntl
import subprocess
import sys
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


@pytest.fixture(scope="session")
def sdk() -> Path:
    """A folder with OpenTelemetry's SDK and exporters, installed once beside the environment's own packages
    (docs/dependencies.md says why not among them)."""
    folder = Path(sys.prefix) / "opentelemetry-sdk"
    with (Path(sys.prefix) / "opentelemetry-sdk.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            packages = [f"opentelemetry-exporter-otlp-proto-{kind}" for kind in ("grpc", "http")]
            command = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(folder)]
            subprocess.run([*command, "opentelemetry-sdk", *packages], check=True, timeout=240)
            (folder / "complete").touch()
    return folder

"""Clusters' names and records, and refusals to start: one clear line each, nothing half-made."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from meshlight.embedded import launch
from meshlight.embedded.launch import LaunchError
from meshlight.embedded.layout import Layout, LayoutError, Record, clusters, start_time


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESHLIGHT_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["", "Upper", "a b", "-a", "a-", "../etc", "a" * 41, "a.b", "a\n"])
def test_a_name_must_do_for_nodes(name: str) -> None:
    with pytest.raises(LayoutError, match="cluster's name"):
        Layout(name)


@pytest.mark.parametrize("name", ["a", "cluster-101", "a" * 40, "1"])
def test_a_name_that_does(name: str) -> None:
    assert Layout(name).state.name == name


def recorded(layout: Layout, text: str) -> Layout:
    layout.state.mkdir(parents=True)
    layout.record_path.write_text(text)
    return layout


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"x"', "\x00\xff"])
def test_a_damaged_record_is_named_with_the_way_out(text: str) -> None:
    layout = recorded(Layout("c"), text)
    with pytest.raises(LayoutError) as refused:
        Record.read(layout)
    assert str(layout.record_path) in str(refused.value) and "down --purge" in str(refused.value)
    with pytest.raises(LayoutError):
        launch.stop(layout, purge=False)
    assert layout.state.exists()
    assert launch.stop(layout, purge=True) is False
    assert not layout.state.exists()


def test_a_record_of_another_version_is_read() -> None:
    layout = recorded(Layout("c"), '{"name": "c", "nodes": 2, "api_port": 7, "of-tomorrow": 1}')
    assert Record.read(layout) == Record("c", 2, 7)
    assert clusters() == ["c"]


def test_a_running_cluster_is_found_and_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "missing_requirements", list)
    monkeypatch.setattr(launch.outlet, "spawn", lambda *_: None)
    layout = Layout("c")
    layout.state.mkdir(parents=True)
    record = Record("c", 3, 6443, os.getpid(), start_time(os.getpid()))
    record.write(layout)
    assert launch.start(layout, None, None) == (record, False)
    assert launch.start(layout, 3, 6443) == (record, False)
    with pytest.raises(LaunchError, match=r"3 nodes, not 4.*meshlight down"):
        launch.start(layout, 4, None)
    with pytest.raises(LaunchError, match="port 6443, not 1"):
        launch.start(layout, None, 1)


def test_a_port_in_use_leaves_nothing(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(launch, "missing_requirements", list)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} .*--api-port"):
            launch.start(Layout("c"), 1, port)
    assert clusters() == []


def test_damaged_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "missing_requirements", list)
    layout = Layout("c")
    (layout.state / "pki").mkdir(parents=True)
    for name in ("ca.crt", "ca.key"):
        (layout.state / "pki" / name).write_text("no certificate")
    with pytest.raises(LaunchError, match="pki"):
        launch.start(layout, 1, None)


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch.shutil, "which", lambda tool, path: None if tool == "nft" else f"/bin/{tool}")
    monkeypatch.setattr(launch.os, "geteuid", lambda: 0)
    assert launch.missing_requirements() == ["nft is not installed: it comes with the package nftables"]
    with pytest.raises(LaunchError, match="nftables"):
        launch.start(Layout("c"), 1, None)
    assert clusters() == []

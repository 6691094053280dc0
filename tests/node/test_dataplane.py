"""The node proxies' data path under fire: two real proxies, pods in namespaces of the tests' own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab


@pytest.mark.parametrize("scenario", ["table", "curl"])
def test_loss(scenario: str) -> None:
    lab.run(f"loss:{scenario}")


@pytest.mark.parametrize("scenario", ["strangers", "policies", "root_rotation", "admin", "waypoint"])
def test_security(scenario: str) -> None:
    lab.run(f"security:{scenario}")


def test_names() -> None:
    lab.run("names:capture")


@pytest.mark.parametrize(
    "scenario", ["sizes", "crowds", "stalls", "changes", "cut_links", "killed_peers", "handover"]
)
def test_torture(scenario: str) -> None:
    lab.run(f"torture:{scenario}")


def test_resting_tunnels() -> None:
    lab.run("resizing:resting")

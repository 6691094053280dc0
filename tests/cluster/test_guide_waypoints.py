"""The guide to waypoints does what it says: its commands are run, its outputs must appear."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster, wait_until

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guides" / "waypoints.md"


def steps() -> list[tuple[list[str], str]]:
    """Pairs of a block of commands and the pattern that the last one must print."""
    blocks = re.findall(r"^```\n(.*?)^```$", GUIDE.read_text(), re.S | re.M)
    return [(blocks[i].strip().splitlines(), blocks[i + 1].strip()) for i in range(0, len(blocks), 2)]


@pytest.fixture
def shop(cluster: Cluster) -> Iterator[Cluster]:
    yield cluster
    cluster.kubectl("delete", "namespace", "shop", "--wait=false", check=False)


def test_the_guide(shop: Cluster) -> None:
    assert len(steps()) == 5

    def perform(line: str) -> str:
        program, *arguments = shlex.split(line)
        arguments = [str(ROOT / a) if a.startswith("samples/") else a for a in arguments]
        run = shop.kubectl if program == "kubectl" else shop.meshlight
        return run(*arguments, check=False, timeout=150)

    for commands, expected in steps():
        for line in commands[:-1]:
            perform(line)
        # A command is repeated as a reader would who sees that a change is not everywhere yet.
        last = commands[-1]
        wait_until(lambda last=last, expected=expected: re.search(expected, perform(last)), 90, last)  # type: ignore[misc]

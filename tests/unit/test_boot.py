"""What counts as booted, and which nodes are gone for good."""

from __future__ import annotations

from typing import Any

import pytest

from meshlight.embedded.install import surplus
from meshlight.embedded.layout import Record
from meshlight.operations.boot import booted


def node(name: str, ready: str = "True", boot: str = "b") -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "status": {"conditions": [{"type": "Ready", "status": ready}], "nodeInfo": {"bootID": boot}},
    }


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (node("c-node-1"), True),
        (node("c-node-1", boot="an earlier one"), False),
        (node("c-node-1", ready="Unknown"), False),
        ({"metadata": {"name": "c-node-1"}}, False),
    ],
)
def test_a_node_is_up_when_it_says_so_in_this_boot(found: dict[str, Any], expected: bool) -> None:
    assert booted(found, Record("c", 1, 6443, boot_id="b")) is expected


def test_only_the_clusters_own_nodes_beyond_its_number_are_taken_away() -> None:
    names = ["c-node-1", "c-node-3", "c-node-12", "d-node-9", "users-own", "c-node-x"]
    assert surplus([node(name) for name in names], "c", 2) == ["c-node-3", "c-node-12"]

"""The rollout's arithmetic and the scheduler's decision."""

from __future__ import annotations

from meshlight.controllers.deployment import targets
from meshlight.controllers.scheduler import choose


def test_rollout_ends_and_keeps_its_bounds() -> None:
    new, old = 0, 4
    for _ in range(10):
        grown, left = targets(4, new, new, old, 1, 0)
        assert grown + old <= 5 and new + left >= 4
        new, old = grown, left
    assert (new, old) == (4, 0)


def test_no_node_gives_kubernetes_message() -> None:
    node = {"metadata": {"name": "a"}, "spec": {"unschedulable": True}}
    why = "0/1 nodes are available: 1 node(s) were unschedulable."
    assert choose({"spec": {}}, [node], []) == (None, why)

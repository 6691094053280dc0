"""Links, Services, redirection and probes, in namespaces of the tests' own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab


@pytest.mark.parametrize(
    "scenario",
    [
        "links",
        "many_at_once",
        "services",
        "live_connections",
        "probes",
        "policing:policies",
        "dual_stack:dual_stack",
        "traffic:traffic",
    ],
)
def test_network(scenario: str) -> None:
    lab.run(scenario)

"""Pods move into the mesh and out of it, in namespaces of the tests' own, with a small ztunnel and API."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab


@pytest.mark.parametrize("scenario", ["label_changes", "restarts", "new_pods"])
def test_enrolment(scenario: str) -> None:
    lab.run(f"enrolling:{scenario}")

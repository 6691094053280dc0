"""A real embedded cluster for the tests of this folder, booted once and torn down after them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator

import pytest
from clusters import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A three-node cluster, everything ready."""
    if shutil.which("kubectl") is None:
        pytest.fail("kubectl is not on PATH: `make setup` says how to get it")
    made = Cluster(f"test-{uuid.uuid4().hex[:6]}", tmp_path_factory.mktemp("meshlight"))
    try:
        made.meshlight("up", "--name", made.name, "--nodes", "3", "--isolated", "--timeout", "150", timeout=180)
        yield made
    finally:
        if os.environ.get("MESHLIGHT_KEEP_LOGS"):
            shutil.copytree(
                made.state,
                os.environ["MESHLIGHT_KEEP_LOGS"],
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("*.sock"),
            )
        made.meshlight("down", "--name", made.name, "--purge", check=False)


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own, deleted after it."""
    name = f"t-{uuid.uuid4().hex[:6]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false", check=False)

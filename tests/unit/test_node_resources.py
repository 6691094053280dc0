"""Cgroup settings and volumes of the node, without a machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from meshlight.node.cgroups import POD_PROCESSES, Limits, settings, shares_of, weight_of
from meshlight.node.volumes import Claimed, VolumeError, claim_of, claimed, give_to_group


def container(cpu: str = "", memory: str = "", *, asked: str = "") -> dict[str, Any]:
    limits = {k: v for k, v in (("cpu", cpu), ("memory", memory)) if v}
    requests = {"cpu": asked} if asked else {}
    return {"name": "c", "resources": {"limits": limits, "requests": requests}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (container(), Limits()),
        (container("500m", "64Mi"), Limits(64 << 20, 50_000, 512)),
        (container("2", asked="250m"), Limits(0, 200_000, 256)),
        (container("1m"), Limits(0, 1000, 2)),
    ],
)
def test_limits_of_a_container(found: dict[str, Any], expected: Limits) -> None:
    assert Limits.of(found) == expected


def test_a_pod_is_bounded_where_each_of_its_containers_is() -> None:
    both = {"spec": {"containers": [container("1", "1Gi"), container("1", "1Gi")]}}
    assert Limits.of_pod(both) == Limits(2 << 30, 200_000, 2048, POD_PROCESSES)
    one = {"spec": {"containers": [container("1", "1Gi"), container(asked="100m")]}}
    assert Limits.of_pod(one) == Limits(0, 0, 1126, POD_PROCESSES)
    large = {"spec": {"containers": [container("1", "1Gi")], "initContainers": [container("3", "2Gi")]}}
    assert Limits.of_pod(large) == Limits(2 << 30, 300_000, 1024, POD_PROCESSES)


def test_what_is_written() -> None:
    limits = Limits(1024, 50_000, 512, 100)
    assert settings(limits, 1) == {
        "memory": {"memory.limit_in_bytes": "1024"},
        "cpu": {"cpu.shares": "512", "cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"},
        "pids": {"pids.max": "100"},
    }
    assert settings(limits, 2)["cpu"] == {"cpu.weight": "20", "cpu.max": "50000 100000"}
    assert settings(Limits(), 2) == {"cpu": {"cpu.weight": "1"}}


def test_shares_and_weights() -> None:
    assert (shares_of(0), shares_of(1000), weight_of(2), weight_of(1024), weight_of(262144)) == (
        2,
        1024,
        1,
        39,
        10000,
    )


def test_which_claim_a_volume_means() -> None:
    pod = {"metadata": {"name": "p"}}
    assert claim_of(pod, {"name": "v", "persistentVolumeClaim": {"claimName": "c"}}) == "c"
    assert claim_of(pod, {"name": "v", "ephemeral": {}}) == "p-v"
    assert claim_of(pod, {"name": "v", "emptyDir": {}}) is None


def test_volumes_that_can_be_mounted() -> None:
    def volume(**spec: Any) -> dict[str, Any]:
        return {"metadata": {"name": "pv"}, "spec": spec}

    assert claimed(volume(hostPath={"path": "/a"}, accessModes=["ReadOnlyMany"])) == Claimed("/a", "", True)
    assert claimed(volume(local={"path": "/a"})) == Claimed("/a", "Directory", False)
    for other in (volume(nfs={}), volume(hostPath={"path": "/a"}, volumeMode="Block")):
        with pytest.raises(VolumeError):
            claimed(other)


def test_a_volume_becomes_the_groups(tmp_path: Path) -> None:
    group = 4242 if os.geteuid() == 0 else os.getgid()
    (tmp_path / "d").mkdir(mode=0o700)
    (tmp_path / "d" / "f").write_text("x")
    give_to_group(tmp_path, group, "Always")
    found = (tmp_path / "d").stat()
    assert (found.st_gid, found.st_mode & 0o2070) == (group, 0o2070)
    assert (tmp_path / "d" / "f").stat().st_mode & 0o060 == 0o060
    (tmp_path / "d").chmod(0o700)
    give_to_group(tmp_path, group, "OnRootMismatch")
    assert (tmp_path / "d").stat().st_mode & 0o070 == 0

"""Who is evicted from a node, and what a gRPC health probe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from meshlight.node.eviction import Disk, has_disk_limit, over_disk, rank, short_of_memory, size_of
from meshlight.node.grpc_health import Call


def pod(
    request: str = "0", priority: int = 0, disk: str = "", volumes: list[Any] | None = None
) -> dict[str, Any]:
    resources: dict[str, Any] = {"requests": {"memory": request}}
    if disk:
        resources["limits"] = {"ephemeral-storage": disk}
    return {
        "spec": {
            "containers": [{"name": "c", "resources": resources}],
            "priority": priority,
            "volumes": volumes or [],
        }
    }


SCRATCH = [{"name": "scratch", "emptyDir": {"sizeLimit": "1Mi"}}]


@pytest.mark.parametrize(
    ("found", "disk", "message"),
    [
        (pod(), Disk({}, {"c": 1 << 40}), ""),
        (pod(volumes=SCRATCH), Disk({"scratch": 1 << 20}, {}), ""),
        (
            pod(volumes=SCRATCH),
            Disk({"scratch": (1 << 20) + 1}, {}),
            'Usage of EmptyDir volume "scratch" exceeds the limit "1Mi". ',
        ),
        (
            pod(disk="1Mi"),
            Disk({"any": 1 << 20}, {"c": 1}),
            'Pod ephemeral local storage usage exceeds the total limit of containers "1048576". ',
        ),
    ],
)
def test_who_takes_too_much_of_the_disk(found: dict[str, Any], disk: Disk, message: str) -> None:
    assert over_disk(found, disk) == message


def test_only_pods_with_limits_are_looked_at() -> None:
    memory = [{"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}]
    assert [has_disk_limit(p) for p in (pod(), pod(volumes=memory), pod(volumes=SCRATCH), pod(disk="1Gi"))] == [
        False,
        False,
        True,
        True,
    ]


def test_who_goes_first_when_memory_is_short() -> None:
    pods = {
        "modest": pod("100Mi"),
        "greedy": pod("10Mi"),
        "greedier": pod("10Mi"),
        "important": pod("10Mi", priority=5),
        "system": pod(priority=2_000_001_000),
    }
    used = {
        "modest": 50 << 20,
        "greedy": 20 << 20,
        "greedier": 30 << 20,
        "important": 90 << 20,
        "system": 1 << 30,
    }
    assert rank(pods, used) == ["greedier", "greedy", "important", "modest"]
    said = short_of_memory(pods["greedy"], {"c": 20 << 20}, 50 << 20)
    assert said == (
        "The node was low on resource: memory. Threshold quantity: 100Mi, available: 51200Ki. "
        "Container c was using 20480Ki, request is 10Mi, has larger consumption of memory. "
    )


def test_the_size_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x" * 100_000)
    assert size_of(tmp_path) >= 100_000 and size_of(tmp_path / "none") == 0


def answer(status: str, state: int | None, asked: list[bytes]) -> Call:
    """A call and a server's answer to it."""
    call = Call("a:1", "svc")
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    server.initiate_connection()
    for event in server.receive_data(call.send()):
        if isinstance(event, h2.events.DataReceived):
            asked.append(event.data or b"")
    server.send_headers(1, [(":status", "200"), ("content-type", "application/grpc")])
    if state is not None:
        server.send_data(1, b"\0\0\0\0\x02\x08" + bytes([state]))
    server.send_headers(1, [("grpc-status", status)], end_stream=True)
    call.receive(server.data_to_send())
    return call


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [
        ("0", 1, ""),
        ("0", 2, 'service unhealthy (responded with "NOT_SERVING")'),
        ("12", None, "does not implement the grpc health protocol"),
        ("5", None, 'service "svc" is unknown'),
    ],
)
def test_grpc_health(status: str, state: int | None, words: str) -> None:
    asked: list[bytes] = []
    call = answer(status, state, asked)
    assert call.done and asked == [b"\0\0\0\0\x05\x0a\x03svc"]
    assert words in call.verdict() and bool(words) == bool(call.verdict())

"""Protobuf bodies of clients: every built-in kind, pointers, inlined messages, times, opaque JSON."""

from __future__ import annotations

import pytest

from meshlight.kube import protobuf_wire, schema_language
from meshlight.kube.builtin_kinds import BUILTIN


def varint(number: int) -> bytes:
    out = b""
    while True:
        number, low = number >> 7, number & 0x7F
        out += bytes([low | (0x80 if number else 0)])
        if not number:
            return out


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value & (1 << 64) - 1)
    return varint(number << 3 | 2) + varint(len(value)) + value


def body(api_version: str, kind: str, raw: bytes) -> bytes:
    type_meta = field(1, api_version.encode()) + field(2, kind.encode())
    return protobuf_wire.MAGIC + field(1, type_meta) + field(2, raw)


def test_every_type_of_a_builtin_kind_has_its_numbers() -> None:
    package = schema_language.builtin()
    for served in BUILTIN:
        numbered = protobuf_wire.numbers(served.structure.name)
        assert set(served.structure.properties) - {"apiVersion", "kind"} == numbered, served.resource.kind
    for name, schema in package.types.items():
        missing = set(schema.properties) - protobuf_wire.numbers(name) - {"apiVersion", "kind"}
        assert not missing, (name, missing)


def test_zero_is_a_value_only_behind_a_pointer() -> None:
    meta = field(1, b"web") + field(8, b"")  # the zero creationTimestamp that Go writes
    spec = field(1, 0) + field(5, 0) + field(7, 0)  # replicas*, minReadySeconds, paused
    raw = field(1, meta) + field(2, spec)
    assert protobuf_wire.decode(body("apps/v1", "Deployment", raw)) == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web"},
        "spec": {"replicas": 0},
    }


def test_messages_that_json_inlines_are_read_into_the_outer_object() -> None:
    probe = field(1, field(2, field(1, b"/ready") + field(2, field(1, 1) + field(3, b"http")))) + field(2, 5)
    volume = field(1, b"scratch") + field(2, field(2, b""))
    container = field(1, b"main") + field(11, probe)
    raw = field(2, field(1, volume) + field(2, container))
    spec = protobuf_wire.decode(body("v1", "Pod", raw))["spec"]
    assert spec["volumes"] == [{"name": "scratch", "emptyDir": {}}]
    assert spec["containers"][0]["readinessProbe"] == {
        "httpGet": {"path": "/ready", "port": "http"},
        "initialDelaySeconds": 5,
    }


def test_times_quantities_maps_and_negative_numbers() -> None:
    lease = field(2, field(4, field(1, 1_700_000_000) + field(2, 250_000_000)) + field(5, -1))
    spec = protobuf_wire.decode(body("coordination.k8s.io/v1", "Lease", lease))["spec"]
    assert spec == {"renewTime": "2023-11-14T22:13:20.250000Z", "leaseTransitions": -1}
    hard = field(1, field(1, b"pods") + field(2, field(1, b"10")))
    quota = protobuf_wire.decode(body("v1", "ResourceQuota", field(2, hard)))
    assert quota["spec"] == {"hard": {"pods": "10"}}
    revision = field(2, field(1, b'{"spec":{"a":1}}')) + field(3, 4)
    kept = protobuf_wire.decode(body("apps/v1", "ControllerRevision", revision))
    assert (kept["data"], kept["revision"]) == ({"spec": {"a": 1}}, 4)


def test_delete_options_come_under_any_group() -> None:
    raw = field(1, 0) + field(2, field(1, b"uid-1")) + field(4, b"Foreground")
    options = protobuf_wire.decode(body("batch/v1", "DeleteOptions", raw))
    assert options["preconditions"] == {"uid": "uid-1"}
    assert (options["gracePeriodSeconds"], options["propagationPolicy"]) == (0, "Foreground")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"k8s\0\x0a\xff", "truncated"),
        (b"{}", "not Kubernetes protobuf"),
        (body("v1", "Nothing", b""), "kind 'Nothing' of 'v1' are not understood"),
        (body("v1", "Pod", b"\x0b"), "wire type 3"),
    ],
)
def test_broken_bodies_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protobuf_wire.decode(raw)

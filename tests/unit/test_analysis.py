"""The analysis: each case is some objects and the codes they bring, and files are read with their lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from controlplane_objects import pod, security, service

from meshlight.operations.analysis import engine, manifests
from meshlight.operations.analysis import messages as m
from meshlight.operations.analysis.engine import Suppression, analyze
from meshlight.operations.analysis.manifests import UnreadableManifest
from meshlight.operations.mesh_snapshot import Snapshot

NAMESPACE: dict[str, Any] = {"kind": "Namespace", "metadata": {"name": "shop"}}
BASE = [NAMESPACE, {"kind": "Namespace", "metadata": {"name": "istio-system"}}, pod(), service()]


def ap(**spec: Any) -> dict[str, Any]:
    return security("AuthorizationPolicy", "p", "shop", **spec)


def networking(kind: str, name: str = "x", **spec: Any) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": name, "namespace": "shop"}, "spec": spec}


def labelled(obj: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {**obj, "metadata": {**obj["metadata"], **metadata}}


TO = [{"route": [{"destination": {"host": "web"}}]}]
CASES: dict[str, tuple[list[dict[str, Any]], set[str]]] = {
    "nothing wrong": ([ap(rules=[{"from": [{"source": {"namespaces": ["shop", "*"]}}]}])], set()),
    "a namespace there is not": (
        [ap(rules=[{"from": [{"source": {"notNamespaces": ["nope"]}}]}])],
        {"IST0101"},
    ),
    "a selector that selects nothing": ([ap(selector={"matchLabels": {"app": "nope"}})], {"IST0127"}),
    "a root policy selects anywhere": (
        [security("AuthorizationPolicy", "p", "istio-system", selector={"matchLabels": {"app": "web"}})],
        set(),
    ),
    "a target there is not": ([ap(targetRefs=[{"kind": "Service", "name": "nope"}])], {"IST0101"}),
    "a target behind no waypoint": ([ap(targetRefs=[{"kind": "Service", "name": "web"}])], {"IST0167"}),
    "the old field": ([ap(targetRef={"kind": "Service", "name": "web"})], {"IST0002", "IST0167"}),
    "HTTP attributes at ztunnel": ([ap(rules=[{"to": [{"operation": {"methods": ["GET"]}}]}])], {"IST0167"}),
    "an action ztunnel does not know": ([ap(action="AUDIT", rules=[{}])], {"IST0167"}),
    "DISABLE": ([security("PeerAuthentication", mtls={"mode": "DISABLE"})], {"IST0167"}),
    "two of one scope": (
        [security("PeerAuthentication", "a", mtls={}), security("PeerAuthentication", "b", mtls={})],
        {"IST0167"},
    ),
    "a waypoint there is not": ([labelled(NAMESPACE, labels={"istio.io/use-waypoint": "nope"})], {"IST0101"}),
    "no waypoint is wished for": ([labelled(NAMESPACE, labels={"istio.io/use-waypoint": "none"})], set()),
    "a negative condition": (
        [
            {
                **ap(),
                "status": {
                    "conditions": [{"type": "ZtunnelAccepted", "status": "False", "reason": "Rejected"}]
                },
            }
        ],
        {"IST0171"},
    ),
    "an unknown annotation": ([labelled(pod(), annotations={"foo.istio.io/x": "y"})], {"IST0108"}),
    "others' annotations": ([labelled(pod(), annotations={"example.com/x": "y"})], set()),
    "a misplaced annotation": ([labelled(service(), annotations={"istio.io/dry-run": "true"})], {"IST0107"}),
    "a meaningless value": (
        [labelled(service(), annotations={"networking.istio.io/traffic-distribution": "Near"})],
        {"IST0125"},
    ),
    "a port without a protocol": (
        [service("other", ports=[{"name": "main", "port": 80, "protocol": "TCP"}])],
        {"IST0118"},
    ),
    "entries that disagree": (
        [
            networking(
                "ServiceEntry", "a", hosts=["x.com"], ports=[{"number": 1, "name": "a", "protocol": "TLS"}]
            ),
            networking(
                "ServiceEntry", "b", hosts=["x.com"], ports=[{"number": 1, "name": "a", "protocol": "TCP"}]
            ),
        ],
        {"IST0177"},
    ),
    "a route that leads somewhere": ([networking("VirtualService", hosts=["web"], http=TO)], set()),
    "a route that leads nowhere": (
        [networking("VirtualService", hosts=["web"], http=[{"route": [{"destination": {"host": "nope"}}]}])],
        {"IST0101"},
    ),
    "a gateway there is not": (
        [networking("VirtualService", hosts=["web"], gateways=["nope"], http=TO)],
        {"IST0101"},
    ),
    "a subset there is not": (
        [
            networking(
                "VirtualService",
                hosts=["web"],
                http=[{"route": [{"destination": {"host": "web", "subset": "v9"}}]}],
            )
        ],
        {"IST0101"},
    ),
    "one host, two VirtualServices": (
        [
            networking("VirtualService", "a", hosts=["web"], http=TO),
            networking("VirtualService", "b", hosts=["web"], http=TO),
        ],
        {"IST0109"},
    ),
    "a rule for nobody": ([networking("DestinationRule", host="nope")], {"IST0174"}),
    "form is not checked of what is stored": ([ap(action="DENY")], set()),
    "an unexpected form": ([networking("VirtualService", hosts=["web"], http=7)], {"IST0001"}),
}


@pytest.mark.parametrize(("objects", "codes"), CASES.values(), ids=CASES)
def test_codes(objects: list[dict[str, Any]], codes: set[str]) -> None:
    found = analyze(Snapshot.of([*BASE, *objects]))
    assert {message.kind.code for message in found} == codes, [message.line() for message in found]


MANIFEST = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: never}
spec: {action: DENY}
---
apiVersion: v1
kind: List
items:
  - {apiVersion: v1, kind: Namespace, metadata: {name: other}}
"""


def test_files_are_read_with_their_lines_and_checked_as_the_api_would(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "policy.yaml").write_text(MANIFEST)
    (folder / "notes.txt").write_text("not: [a manifest")
    extra = manifests.read([folder], "shop")
    assert [obj["kind"] for obj in extra] == ["AuthorizationPolicy", "Namespace"]
    assert extra[0]["metadata"]["namespace"] == "shop"
    (message,) = analyze(Snapshot.of([*BASE, *extra]), extra, "elsewhere")
    assert message.kind is m.SCHEMA_ERROR
    assert message.line().startswith(
        f"Error [IST0106] (AuthorizationPolicy shop/never {folder}/policy.yaml:2) spec.rules"
    )
    assert message.plain()["reference"] == f"{folder}/policy.yaml:2"


@pytest.mark.parametrize("text", ["[", "just text", "{kind: Pod}"])
def test_what_is_no_manifest_is_told_with_its_place(text: str) -> None:
    with pytest.raises(UnreadableManifest, match=r"f\.yaml"):
        list(manifests.parse(text, "f.yaml", "default"))


def test_messages_can_be_left_out() -> None:
    bad = ap(selector={"matchLabels": {"app": "nope"}})
    snapshot = Snapshot.of([*BASE, bad])
    assert len(analyze(snapshot)) == 1
    assert analyze(snapshot, suppressions=[Suppression("IST0127", "AuthorizationPolicy *.shop")]) == []
    assert len(analyze(snapshot, suppressions=[Suppression("IST0127", "AuthorizationPolicy q.shop")])) == 1
    assert analyze(snapshot, namespace="bank") == []
    quiet = labelled(bad, annotations={"galley.istio.io/analyze-suppress": "IST0108,IST0127"})
    assert analyze(Snapshot.of([*BASE, quiet])) == []


def test_every_code_is_listed_once() -> None:
    codes = [kind.code for kind in m.ALL]
    assert len(codes) == len(set(codes)) > 15
    assert yaml.safe_dump([message.plain() for message in analyze(Snapshot.of(BASE))]) == "[]\n"
    assert engine.ANALYZERS

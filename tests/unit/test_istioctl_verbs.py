"""istioctl's tables from node proxies' dumps and istiod's pages, its checks, and the shim under its name."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path
from typing import Any

from meshlight.cli.target import table
from meshlight.operations import ztunnel_config as config
from meshlight.operations.control_plane import Proxy
from meshlight.operations.installation import DEFINITIONS, Check, _definitions, _running
from meshlight.operations.shims import install
from meshlight.operations.ztunnel_config import Filters
from meshlight.operations.ztunnel_dump import istio_form

NOW = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)
SERVICE = "demo/server.demo.svc.cluster.local"

WAYPOINT = {"destination": "demo/wp.demo.svc.cluster.local", "hboneMtlsPort": 15008}


def _endpoint(uid: str) -> dict[str, Any]:
    return {"workloadUid": uid, "port": {"80": 8080}, "status": "Healthy"}


OURS: dict[str, Any] = {
    "workloadState": {},
    "workloads": [
        {
            "uid": "K//Pod/demo/server-1",
            "name": "server-1",
            "namespace": "demo",
            "workloadIps": ["10.244.1.5"],
            "protocol": "HBONE",
            "node": "n1",
            "status": "Healthy",
            "clusterId": "K",
            "authorizationPolicies": ["demo/p"],
            "waypoint": WAYPOINT,
        },
        {
            "uid": "K//Pod/demo/server-2",
            "name": "server-2",
            "namespace": "demo",
            "workloadIps": ["10.244.2.5"],
            "protocol": "TCP",
            "node": "n2",
            "status": "Unhealthy",
        },
    ],
    "services": [
        {
            "name": "server",
            "namespace": "demo",
            "hostname": "server.demo.svc.cluster.local",
            "vips": ["/10.96.0.7"],
            "ports": {"80": 8080},
            "endpoints": {uid: _endpoint(uid) for uid in ("K//Pod/demo/server-1", "K//Pod/demo/server-2")},
        },
        {
            "name": "wp",
            "namespace": "demo",
            "hostname": "wp.demo.svc.cluster.local",
            "vips": ["/10.96.0.9"],
            "ports": {},
            "endpoints": {},
        },
    ],
    "policies": [
        {
            "name": "p",
            "namespace": "demo",
            "scope": "Namespace",
            "action": "Deny",
            "rules": [
                [
                    [
                        {
                            "namespaces": {"any": [{"Exact": "bank"}], "none": []},
                            "principals": {"any": [], "none": ["Presence"]},
                            "serviceAccounts": {"any": [{"namespace": "a", "name": "b"}], "none": []},
                        }
                    ]
                ]
            ],
        }
    ],
    "certificates": [
        {
            "identity": "spiffe://x/ns/demo/sa/a",
            "state": "Available",
            "certChain": [{"serialNumber": "255", "validFrom": "", "expirationTime": "2026-06-01T00:00:00Z"}],
        },
        {"identity": "spiffe://x/ns/demo/sa/b", "state": "Unavailable: no pod", "certChain": []},
    ],
}


def test_policies_have_istios_form() -> None:
    dump = istio_form(OURS)
    assert dump["policies"][0]["rules"] == [
        [
            [
                {
                    "namespaces": [{"Exact": "bank"}],
                    "notPrincipals": [{"Presence": {}}],
                    "serviceAccounts": [{"namespace": "a", "serviceAccount": "b"}],
                }
            ]
        ]
    ]
    assert istio_form(dump) == dump, "Istio's own form is left as it is"


def test_rows_of_workloads_services_policies_and_certificates() -> None:
    dump = istio_form(OURS)
    assert config.workload_rows(dump, Filters()) == [
        ("demo", "server-1", "10.244.1.5", "n1", "wp", "HBONE"),
        ("demo", "server-2", "10.244.2.5", "n2", "None", "TCP"),
    ]
    assert config.workload_rows(dump, Filters(node="N2"))[0][1] == "server-2"
    assert config.workload_rows(dump, Filters(address="10.244.1.5", name="server-1"))[0][1] == "server-1"
    assert config.workload_rows(dump, Filters(namespace="other")) == []
    assert config.service_rows(dump, Filters())[0] == ("demo", "server", "10.96.0.7", "None", "1/2")
    assert config.policy_rows(dump, Filters()) == [("demo", "p", "Deny", "Namespace")]
    rows = config.certificate_rows(dump, NOW)
    assert rows[0] == (
        "spiffe://x/ns/demo/sa/a",
        "Leaf",
        "Available",
        "true",
        "ff",
        "2026-06-01T00:00:00Z",
        "NA",
    )
    assert rows[1] == ("spiffe://x/ns/demo/sa/b", "NA", "Unavailable", "false", "NA", "NA", "NA")


def test_connections_of_istios_form() -> None:
    state = {
        "info": {"name": "server-1", "namespace": "demo"},
        "connections": {
            "inbound": [
                {
                    "src": "10.244.2.5:4000",
                    "originalDst": "server.demo:80",
                    "actualDst": "10.244.1.5:8080",
                    "protocol": "HBONE",
                }
            ],
            "outbound": [
                {
                    "src": "10.244.1.5:5000",
                    "originalDst": "10.96.0.7:80",
                    "actualDst": "10.9.9.9:80",
                    "protocol": "TCP",
                }
            ],
        },
    }
    dump = istio_form({**OURS, "workloadState": {"1": state}})
    assert config.connection_rows(dump, Filters()) == [
        ("server-1.demo", "Inbound", "server-1.demo:8080", "server-2.demo:4000", "server.demo:80", "HBONE"),
        (
            "server-1.demo",
            "Outbound",
            "server-1.demo:5000",
            "10.9.9.9:80",
            "server.demo.svc.cluster.local:80",
            "TCP",
        ),
    ]
    assert [r[1] for r in config.connection_rows(dump, Filters(direction="inbound", raw=True))] == ["Inbound"]
    assert config.connection_rows(dump, Filters(name="server-1.other")) == []


def test_several_proxies_dumps_are_one() -> None:
    dump = istio_form(OURS)
    assert len(config.merged([dump, dump])["certificates"]) == 4


def test_proxy_status_says_the_worst_of_a_kind() -> None:
    types = {
        "istio.workload.Address": {"status": "SYNCED"},
        "istio.security.Authorization": {"status": "ERROR", "lastError": "x"},
        "envoy.config.cluster.v3.Cluster": {"status": "STALE"},
    }
    proxy = Proxy("z.istio-system", "K", "ztunnel", "n1", "1.0", "istiod-1", types)
    assert proxy.row() == (
        "z.istio-system",
        "K",
        "STALE",
        "IGNORED",
        "IGNORED",
        "IGNORED",
        "IGNORED",
        "istiod-1",
        "1.0",
        "SYNCED",
        "ERROR",
    )


def test_verify_install_names_what_is_missing_or_not_ready() -> None:
    established = {"status": {"conditions": [{"type": "Established", "status": "True"}]}}
    objects = [{"metadata": {"name": name}, **established} for name in DEFINITIONS[1:]]
    (missing,) = [check for check in _definitions(objects) if not check.good]
    assert missing.line() == f"✘ CustomResourceDefinition: {DEFINITIONS[0]}: is not installed"
    metadata = {"name": "istiod", "namespace": "istio-system"}
    half = {"metadata": metadata, "spec": {"replicas": 2}, "status": {"readyReplicas": 1, "updatedReplicas": 2}}
    assert _running(half, "Deployment") == Check(
        "Deployment", "istiod.istio-system", False, "1 of 2 pods are ready"
    )
    whole = {"metadata": metadata, "status": {"desiredNumberScheduled": 2, "numberReady": 2}}
    assert _running(whole, "DaemonSet").line() == "✔ DaemonSet: istiod.istio-system checked successfully"


def test_tables_are_as_wide_as_they_must_be() -> None:
    assert table(("A", "LONG"), [("x", "y"), ("longer", "")]) == "A        LONG\nx        y\nlonger"


def test_the_shim_hands_its_arguments_over(tmp_path: Path) -> None:
    folder = install(tmp_path / "bin")
    done = subprocess.run(
        [folder / "istioctl", "version", "--no-remote"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("client version: ")

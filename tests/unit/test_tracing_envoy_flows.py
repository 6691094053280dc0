"""Flow records of Envoy, in the form that every flow record has."""

from __future__ import annotations

from meshlight.proto import otlp_pb2 as otlp
from meshlight.tracing.envoy_flows import normal
from meshlight.tracing.otlp import decode_logs
from meshlight.tracing.rows import attributes_of, pairs

WRITTEN = {
    "event.name": "mesh.flow",
    "source.address": "10.244.6.3:0",
    "source.port": "50300",
    "source.principal": "spiffe://cluster.local/ns/demo/sa/client",
    "source.workload": "-",
    "destination.principal": "-",
    "destination.service": "server.shop.svc.cluster.local",
    "http.response.status_code": "403",
    "rpc.grpc.status_code": "-",
    "policy.details": "rbac_access_denied_matched_policy[ns[shop]-policy[no-post]-rule[0]]",
    "policy.verdict": "deny",
}


def test_numbers_names_and_what_is_not_known() -> None:
    assert normal(WRITTEN) == {
        "source.address": "10.244.6.3",
        "source.port": 50300,
        "source.principal": "spiffe://cluster.local/ns/demo/sa/client",
        "source.workload": "client",
        "source.namespace": "demo",
        "destination.service": "server.shop.svc.cluster.local",
        "destination.workload": "server",
        "destination.namespace": "shop",
        "http.response.status_code": 403,
        "policy.verdict": "deny",
        "policy.name": "shop/no-post",
    }


def test_a_refusal_for_want_of_a_rule_says_so() -> None:
    known = normal({**WRITTEN, "policy.details": "rbac_access_denied_matched_policy[none]"})
    assert "policy.name" not in known
    assert known["error"] == "rbac_access_denied_matched_policy[none]"


def test_they_are_decoded_so_and_others_are_left_alone() -> None:
    for name, changed in ((b"", True), (b"other", False)):
        request = otlp.LogsRequest()
        record = request.resource_logs.add().scope_logs.add().records.add(time=1, event_name=name)
        record.attributes.extend(pairs(WRITTEN))  # encoded KeyValues
        (row,) = decode_logs(request.SerializeToString()).rows
        assert (row.name == b"mesh.flow") is changed
        assert (attributes_of(row.attributes)["source.port"] == 50300) is changed

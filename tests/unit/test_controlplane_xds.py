"""Delta xDS without I/O: what a client is answered, and that it always ends up with the present state."""

from __future__ import annotations

from typing import Any

import pytest
from controlplane_objects import apply, delete, endpoint_slice, pod, security, service
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlight.controlplane.index import Index
from meshlight.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, WORKLOAD_TYPE
from meshlight.controlplane.settings import Mesh
from meshlight.controlplane.xds import Session, UnknownType
from meshlight.proto import discovery_pb2 as ads
from meshlight.proto import workload_pb2 as wds

WEB = "shop/web.shop.svc.cluster.local"
ONE, TWO = "Kubernetes//Pod/shop/web-1", "Kubernetes//Pod/shop/web-2"


class Client:
    """A client of one session that keeps what it is sent, as a node proxy does."""

    def __init__(self, index: Index, *, node: str = "", held: dict[str, str] | None = None) -> None:
        self.index = index
        self.session = Session(index.collections, 1)
        self.held: dict[str, str] = dict(held or {})
        self.decoded: dict[str, Any] = {}
        self.order: list[str] = []
        self._node = node

    def request(
        self,
        type_url: str = ADDRESS_TYPE,
        *,
        subscribe: tuple[str, ...] = (),
        unsubscribe: tuple[str, ...] = (),
        **fields: Any,
    ) -> list[ads.DeltaDiscoveryResponse]:
        request = ads.DeltaDiscoveryRequest(
            type_url=type_url,
            resource_names_subscribe=subscribe,
            resource_names_unsubscribe=unsubscribe,
            **fields,
        )
        request.node.id = "ztunnel~10.0.0.1~ztunnel-x.istio-system~istio-system.svc.cluster.local"
        request.node.metadata["NODE_NAME"] = self._node
        self.rejection = self.session.receive(request, 1.0)
        return self.drain()

    def changed(self, changes: Any) -> list[ads.DeltaDiscoveryResponse]:
        self.session.change(changes)
        return self.drain()

    def drain(self) -> list[ads.DeltaDiscoveryResponse]:
        decoded = []
        for response in self.session.respond(2.0):
            message = ads.DeltaDiscoveryResponse.FromString(response.encoded)
            assert message.nonce == response.nonce
            for resource in message.resources:
                self.held[resource.name] = resource.version
                self.decoded[resource.name] = resource
            for name in message.removed_resources:
                self.held.pop(name, None)
            self.order.append(message.type_url)
            decoded.append(message)
        return decoded


def contents(responses: list[ads.DeltaDiscoveryResponse]) -> tuple[set[str], set[str]]:
    assert len(responses) == 1, f"one response expected, not {len(responses)}"
    return {r.name for r in responses[0].resources}, set(responses[0].removed_resources)


@pytest.fixture
def index() -> Index:
    result = Index(Mesh())
    apply(
        result, service(), pod(), pod("web-2", ip="10.244.1.6", node="node-2"), endpoint_slice("web-1", "web-2")
    )
    return result


class TestWildcard:
    def test_everything_comes_first(self, index: Index) -> None:
        client = Client(index)
        assert contents(client.request()) == ({WEB, ONE, TWO}, set())
        resource = client.decoded[ONE].resource
        assert resource.type_url == ADDRESS_TYPE
        assert wds.Address.FromString(resource.value).workload.uid == ONE

    def test_an_explicit_star_is_the_same(self, index: Index) -> None:
        assert contents(Client(index).request(subscribe=("*",))) == ({WEB, ONE, TWO}, set())

    def test_the_first_request_is_answered_even_by_nothing(self) -> None:
        assert contents(Client(Index(Mesh())).request()) == (set(), set())

    def test_only_changes_follow(self, index: Index) -> None:
        client = Client(index)
        client.request()
        assert contents(client.changed(apply(index, pod(ready=False)))) == ({ONE}, set())
        assert contents(client.changed(delete(index, pod()))) == (set(), {ONE})
        assert client.changed({}) == []

    def test_changes_that_pile_up_are_sent_once_as_they_are_now(self, index: Index) -> None:
        client = Client(index)
        client.request()
        client.session.change(apply(index, pod(ready=False)))
        client.session.change(delete(index, pod("web-2")))
        client.session.change(apply(index, pod(account="late")))
        client.session.change(apply(index, pod("web-2", ip="10.244.1.6", node="node-2")))
        assert contents(client.drain()) == ({ONE, TWO}, set())
        assert wds.Address.FromString(client.decoded[ONE].resource.value).workload.service_account == "late"

    def test_a_reconnecting_client_gets_only_the_difference(self, index: Index) -> None:
        before = Client(index)
        before.request()
        apply(index, pod(ready=False))
        delete(index, service())
        again = Client(index, held=before.held)
        updated, removed = contents(again.request(initial_resource_versions=before.held))
        assert updated == {ONE, TWO}
        assert removed == {WEB}
        assert again.held == {r.name: r.version for r in index.collections[ADDRESS_TYPE]}

    def test_versions_outlive_the_control_plane(self, index: Index) -> None:
        client = Client(index)
        client.request()
        restarted = Index(Mesh())
        slices = endpoint_slice("web-1", "web-2")
        apply(restarted, slices, pod("web-2", ip="10.244.1.6", node="node-2"), pod(), service())
        assert contents(Client(restarted).request(initial_resource_versions=client.held)) == (set(), set())

    def test_policies_come_before_the_workloads_that_name_them(self, index: Index) -> None:
        client = Client(index)
        client.request()
        client.request(AUTHORIZATION_TYPE)
        client.order.clear()
        client.changed(apply(index, security("PeerAuthentication", mtls={"mode": "STRICT"})))
        assert client.order == [AUTHORIZATION_TYPE, ADDRESS_TYPE]

    def test_plain_workloads(self, index: Index) -> None:
        client = Client(index)
        assert contents(client.request(WORKLOAD_TYPE)) == ({ONE, TWO}, set())
        assert wds.Workload.FromString(client.decoded[ONE].resource.value).uid == ONE
        assert contents(client.changed(apply(index, pod(ready=False)))) == ({ONE}, set())
        assert client.changed(apply(index, service(ip="10.96.9.9"))) == []
        assert contents(client.changed(delete(index, pod()))) == (set(), {ONE})


class TestOnDemand:
    @pytest.fixture
    def client(self, index: Index) -> Client:
        client = Client(index)
        assert contents(client.request(subscribe=("*",), unsubscribe=("*",))) == (set(), set())
        return client

    def test_nothing_comes_unasked(self, client: Client, index: Index) -> None:
        assert client.changed(apply(index, pod(ready=False))) == []

    def test_by_name(self, client: Client, index: Index) -> None:
        assert contents(client.request(subscribe=(ONE,))) == ({ONE}, set())
        assert contents(client.changed(apply(index, pod(ready=False)))) == ({ONE}, set())
        assert contents(client.changed(delete(index, pod()))) == (set(), {ONE})

    def test_by_address(self, client: Client, index: Index) -> None:
        assert contents(client.request(subscribe=("/10.244.1.5",))) == ({ONE}, set())
        assert list(client.decoded[ONE].aliases) == ["/10.244.1.5"]
        assert contents(client.changed(apply(index, pod(ready=False)))) == ({ONE}, set())

    def test_a_service_s_address_brings_the_service(self, client: Client) -> None:
        assert contents(client.request(subscribe=("/10.96.0.7",))) == ({WEB}, set())

    def test_a_service_brings_its_workloads_now_and_later(self, client: Client, index: Index) -> None:
        assert contents(client.request(subscribe=(WEB,))) == ({WEB, ONE, TWO}, set())
        apply(index, pod("web-3", ip="10.244.1.9"))
        changes = apply(index, endpoint_slice("web-1", "web-2", "web-3"))
        assert contents(client.changed(changes)) == ({"Kubernetes//Pod/shop/web-3"}, set())
        assert contents(client.changed(delete(index, pod()))) == (set(), {ONE})

    def test_what_is_not_there_is_removed_and_comes_later(self, client: Client, index: Index) -> None:
        assert contents(client.request(subscribe=("/10.244.9.9",))) == (set(), {"/10.244.9.9"})
        changes = apply(index, pod("late", ip="10.244.9.9"))
        assert contents(client.changed(changes)) == ({"Kubernetes//Pod/shop/late"}, set())

    def test_asking_again_is_answered_again(self, client: Client) -> None:
        client.request(subscribe=(ONE,))
        assert contents(client.request(subscribe=(ONE,))) == ({ONE}, set())

    def test_unsubscribing_ends_it(self, client: Client, index: Index) -> None:
        client.request(subscribe=(ONE,))
        assert client.request(unsubscribe=(ONE,)) == []
        assert client.changed(apply(index, pod(ready=False))) == []

    def test_workloads_of_the_own_node_come_unasked(self, index: Index) -> None:
        client = Client(index, node="node-1")
        assert contents(client.request(subscribe=("*",), unsubscribe=("*",))) == ({ONE}, set())
        changes = apply(index, pod("web-3", ip="10.244.1.9"), pod("web-4", ip="10.244.2.9", node="node-2"))
        assert contents(client.changed(changes)) == ({"Kubernetes//Pod/shop/web-3"}, set())

    def test_reconnecting_keeps_what_is_held(self, index: Index) -> None:
        versions = {r.name: r.version for r in index.collections[ADDRESS_TYPE]}
        held = {ONE: versions[ONE], TWO: "old", "gone": "1"}
        client = Client(index)
        request = client.request(subscribe=("*",), unsubscribe=("*",), initial_resource_versions=held)
        assert contents(request) == ({TWO}, {"gone"})
        assert contents(client.changed(apply(index, pod(ready=False)))) == ({ONE}, set())


class TestAcknowledgement:
    def test_ack(self, index: Index) -> None:
        client = Client(index)
        (response,) = client.request()
        state = client.session.subscriptions[ADDRESS_TYPE].acknowledgement
        assert (state.sent_nonce, state.acked_nonce, state.status) == (response.nonce, "", "STALE")
        assert client.request(response_nonce=response.nonce) == [], "an ACK is not answered"
        assert (state.acked_nonce, state.status) == (response.nonce, "SYNCED")

    def test_nack(self, index: Index) -> None:
        client = Client(index)
        (response,) = client.request()
        error = ads.Status(code=3, message="no such enum value")
        assert client.request(response_nonce=response.nonce, error_detail=error) == [], (
            "not sent again unchanged"
        )
        assert client.rejection is not None
        assert (client.rejection.nonce, client.rejection.code) == (response.nonce, 3)
        state = client.session.subscriptions[ADDRESS_TYPE].acknowledgement
        assert (state.status, state.last_error, state.rejected_responses) == ("ERROR", "no such enum value", 1)
        (response,) = client.changed(apply(index, pod(ready=False)))
        client.request(response_nonce=response.nonce)
        assert (state.status, state.last_error) == ("SYNCED", "")

    def test_a_nonce_of_a_stream_before_is_no_ack(self, index: Index) -> None:
        client = Client(index)
        assert len(client.request(response_nonce="9-1")) == 1
        assert client.session.subscriptions[ADDRESS_TYPE].acknowledgement.acked_nonce == ""

    def test_nonces_are_unique_over_types(self, index: Index) -> None:
        client = Client(index)
        nonces = [r.nonce for t in (ADDRESS_TYPE, AUTHORIZATION_TYPE, WORKLOAD_TYPE) for r in client.request(t)]
        assert len(set(nonces)) == 3


def test_types_that_are_not_served_are_refused_by_name(index: Index) -> None:
    with pytest.raises(UnknownType, match=r"'x\.y/Z' is not served"):
        Client(index).request("x.y/Z")


POD_NAMES = ("a", "b", "c")
STEP = st.one_of(
    st.tuples(st.just("pod"), st.sampled_from(POD_NAMES), st.booleans()),
    st.tuples(st.just("delete"), st.sampled_from(POD_NAMES), st.just(True)),
    st.tuples(st.just("slice"), st.sets(st.sampled_from(POD_NAMES)), st.just(True)),
    st.tuples(st.sampled_from(("service", "unservice", "drain", "reconnect")), st.just(""), st.just(True)),
)


@given(st.lists(STEP, max_size=30))
@settings(max_examples=150, deadline=None)
def test_a_client_always_ends_with_the_present_state(steps: list[tuple[str, Any, bool]]) -> None:
    index = Index(Mesh())
    client = Client(index)
    client.request()
    for what, subject, ready in steps:
        match what:
            case "pod":
                changes = apply(index, pod(subject, ip=f"10.0.0.{ord(subject)}", ready=ready))
            case "delete":
                changes = delete(index, pod(subject))
            case "slice":
                changes = apply(index, endpoint_slice(*subject))
            case "service":
                changes = apply(index, service())
            case "unservice":
                changes = delete(index, service())
            case "drain":
                client.drain()
                continue
            case _:
                client = Client(index, held=client.held)
                client.request(initial_resource_versions=client.held)
                continue
        client.session.change(changes)
    client.drain()
    assert client.held == {r.name: r.version for r in index.collections[ADDRESS_TYPE]}

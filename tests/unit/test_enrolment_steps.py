"""The order in which a pod enters and leaves the mesh, and what is said to ztunnel meanwhile."""

from __future__ import annotations

import pytest

from meshlight.node.enrolment import DRAIN, Standing, Step, next_step
from meshlight.node.zds import (
    Add,
    Answer,
    Dialogue,
    EnrolledPod,
    ProtocolError,
    Remove,
    SnapshotSent,
    encode,
)
from meshlight.proto import zds_pb2

HELLO = zds_pb2.ZdsHello(version=zds_pb2.V1).SerializeToString()
ACK = zds_pb2.WorkloadResponse(ack=zds_pb2.Ack()).SerializeToString()
A, B = (EnrolledPod(uid, f"pod-{uid}", "demo", "cart", 7) for uid in "ab")


def walk(standing: Standing, *, wanted: bool, gone: bool = False) -> list[Step]:
    """Take steps until there is none left, as the agent would with a ztunnel that always answers."""
    taken, now = [], 0.0
    while (
        step := next_step(standing, wanted=wanted, networked=True, gone=gone, now=now)
    ) is not Step.REST and step is not Step.END:
        taken.append(step)
        match step:
            case Step.ASK:
                standing.asked = standing.listening = True
            case Step.REDIRECT:
                standing.redirected = True
            case Step.ANNOUNCE | Step.WITHDRAW:
                standing.announced = step is Step.ANNOUNCE
                standing.drained_at = now + DRAIN
            case Step.FLUSH:
                standing.redirected = False
                standing.drained_at = now + DRAIN
            case Step.DRAIN:
                now = standing.drained_at
            case Step.FORGET:
                standing.asked = standing.listening = False
    return taken


IN = [Step.ASK, Step.REDIRECT, Step.ANNOUNCE]
OUT = [Step.FLUSH, Step.WITHDRAW, Step.DRAIN, Step.FORGET]


@pytest.mark.parametrize(
    ("standing", "wanted", "gone", "expected"),
    [
        (Standing(), True, False, IN),
        (Standing(), False, False, []),
        (Standing(True, True, True, True), False, False, OUT),
        (Standing(True, True, True, True), True, False, []),
        # Wanted again while it drains: ztunnel still listens.
        (Standing(True, True, False, False, DRAIN), True, False, IN[1:]),
        # An agent that died in the middle, either way.
        (Standing(True, False, True, False), True, False, [Step.ANNOUNCE]),
        (Standing(True, False, True, False), False, False, [Step.FLUSH, Step.DRAIN, Step.FORGET]),
        (Standing(True, False, False, True), False, False, [Step.WITHDRAW, Step.DRAIN, Step.FORGET]),
        # An annotation that somebody copied, or of a network that is no more.
        (Standing(announced=True), True, False, IN[:2]),
        (Standing(announced=True), False, False, [Step.WITHDRAW]),
        # A deleted pod has nothing to drain.
        (Standing(True, True, True, True), True, True, [Step.FORGET]),
        (Standing(), True, True, []),
    ],
)
def test_order(standing: Standing, wanted: bool, gone: bool, expected: list[Step]) -> None:
    assert walk(standing, wanted=wanted, gone=gone) == expected


def test_nothing_is_redirected_before_ztunnel_listens() -> None:
    asked = Standing(asked=True)
    assert next_step(asked, wanted=True, networked=True, gone=False, now=0) is Step.REST
    unnetworked = next_step(Standing(), wanted=True, networked=False, gone=False, now=0)
    assert unnetworked is Step.AWAIT_NETWORK


def test_redirection_is_kept_while_ztunnel_is_away() -> None:
    away = Standing(asked=True, listening=False, redirected=True, announced=True)
    assert next_step(away, wanted=True, networked=True, gone=False, now=0) is Step.REST


def greeted() -> Dialogue:
    dialogue = Dialogue()
    assert dialogue.next({}, newest=True) is None, "ztunnel speaks first"
    assert dialogue.receive(HELLO) is None
    return dialogue


def test_a_snapshot_then_changes_one_at_a_time() -> None:
    dialogue, pods = greeted(), {"a": A, "b": B}
    assert dialogue.next(pods, newest=True) == Add(A)
    assert dialogue.next(pods, newest=True) is None, "one is outstanding"
    assert dialogue.receive(ACK) == Answer(Add(A), "")
    assert dialogue.next(pods, newest=True) == Add(B)
    del pods["b"]
    dialogue.receive(ACK)
    assert dialogue.next(pods, newest=True) == Remove("b"), "it left while it was being added"
    dialogue.receive(ACK)
    assert dialogue.next(pods, newest=True) == SnapshotSent()
    dialogue.receive(ACK)
    assert dialogue.next(pods, newest=True) is None
    assert dialogue.next({}, newest=True) == Remove("a")


def test_a_refused_pod_holds_up_nobody_and_is_tried_again() -> None:
    dialogue, pods = greeted(), {"a": A, "b": B}
    dialogue.next(pods, newest=True)
    refusal = zds_pb2.WorkloadResponse(ack=zds_pb2.Ack(error="no certificate")).SerializeToString()
    assert dialogue.receive(refusal) == Answer(Add(A), "no certificate")
    assert dialogue.next(pods, newest=True) == Add(B)
    dialogue.receive(ACK)
    assert dialogue.next(pods, newest=True) == SnapshotSent()
    dialogue.receive(ACK)
    assert dialogue.next(pods, newest=True) is None
    dialogue.retry("a")
    assert dialogue.next(pods, newest=True) == Add(A)


def test_an_older_ztunnel_is_told_of_departures_only() -> None:
    dialogue = greeted()
    dialogue.next({"a": A}, newest=True)
    dialogue.receive(ACK)
    assert dialogue.next({"a": A, "b": B}, newest=False) is None
    assert dialogue.next({"b": B}, newest=False) == Remove("a")


def test_a_pod_whose_network_was_made_anew_is_told_anew() -> None:
    dialogue = greeted()
    dialogue.next({"a": A}, newest=True)
    dialogue.receive(ACK)
    again = {"a": EnrolledPod("a", "pod-a", "demo", "cart", 8)}
    assert dialogue.next(again, newest=True) == Remove("a")
    dialogue.receive(ACK)
    assert dialogue.next(again, newest=True) == Add(again["a"])


@pytest.mark.parametrize(
    ("packets", "reason"),
    [
        ([zds_pb2.ZdsHello().SerializeToString()], "version 0"),
        ([b"\xff\xff\xff"], "no ZDS message"),
        ([HELLO, ACK], "was not made"),
    ],
)
def test_what_breaks_the_protocol(packets: list[bytes], reason: str) -> None:
    dialogue = Dialogue()
    with pytest.raises(ProtocolError, match=reason):
        for packet in packets:
            dialogue.receive(packet)


def test_the_wire() -> None:
    message = zds_pb2.WorkloadRequest.FromString(encode(Add(A)))
    about = message.add.workload_info
    assert (message.add.uid, about.name, about.namespace, about.service_account) == (
        "a",
        "pod-a",
        "demo",
        "cart",
    )
    assert getattr(zds_pb2.WorkloadRequest.FromString(encode(Remove("a"))), "del").uid == "a"
    assert zds_pb2.WorkloadRequest.FromString(encode(SnapshotSent())).HasField("snapshot_sent")

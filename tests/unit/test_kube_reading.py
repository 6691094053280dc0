"""Lists in pages, revisions, watches and their bounds, shapes of answers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from meshlight.kube import store as stores
from meshlight.kube import watch
from meshlight.kube.catalog import Catalog
from meshlight.kube.reading import Reader
from meshlight.kube.representation import Representation, Shape, shape_of
from meshlight.kube.resources import Object
from meshlight.kube.rest import MERGE_PATCH, Rest, Target, WriteOptions
from meshlight.kube.status import StatusError
from meshlight.kube.store import Store

OPTIONS = WriteOptions(field_manager="test")


class Api:
    """A Rest with a reader, and ConfigMaps of namespace x in short words."""

    def __init__(self) -> None:
        self.rest = Rest(Store(":memory:"), Catalog())
        self.reader = Reader(self.rest)
        self.rest.create(self.target("namespaces", None), {"metadata": {"name": "x"}}, OPTIONS)

    def target(self, plural: str = "configmaps", namespace: str | None = "x", name: str = "") -> Target:
        served = self.rest.catalog.lookup("", "v1", plural)
        assert served is not None
        return Target(served, namespace, name)

    def shape(self, shape: Shape = "object") -> Representation:
        return Representation(self.target().served, self.rest.presented, shape)

    def make(self, *names: str, **labels: str) -> None:
        for name in names:
            obj = {"metadata": {"name": name, "labels": labels}, "data": {"n": "0"}}
            self.rest.create(self.target(), copy.deepcopy(obj), OPTIONS)

    def change(self, name: str, body: Object) -> None:
        self.rest.patch(self.target(name=name), body, MERGE_PATCH, OPTIONS)

    def remove(self, name: str) -> None:
        from meshlight.kube import deletion

        self.rest.delete(self.target(name=name), deletion.parse({}, {}))

    def list(self, **query: str) -> Object:
        found: Object = orjson.loads(self.reader.page(self.target(), query).encode(self.shape()))
        return found

    def watch(self, **query: str) -> AsyncIterator[bytes]:
        return self.reader.events(self.target(), {"watch": "true", **query}, self.shape())


@pytest.fixture
def api() -> Api:
    return Api()


def names(listed: Object) -> list[str]:
    return [item["metadata"]["name"] for item in listed["items"]]


def refusal(call: Any) -> StatusError:
    with pytest.raises(StatusError) as refused:
        call()
    return refused.value


async def events(stream: AsyncIterator[bytes], count: int) -> list[Object]:
    """The next events of a watch."""
    found: list[Object] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            found += [orjson.loads(line) for line in (await anext(stream)).splitlines()]
    assert len(found) == count
    return found


def told(found: list[Object]) -> list[tuple[str, str]]:
    return [(e["type"], e["object"]["metadata"].get("name", "")) for e in found]


# Lists


def test_pages_are_of_one_revision_whatever_happens_between(api: Api) -> None:
    api.make("a", "b", "c", "d", "e")
    first = api.list(limit="2")
    assert names(first) == ["a", "b"] and first["metadata"]["remainingItemCount"] == 3
    api.remove("c")
    api.make("bb", "f")
    api.change("d", {"data": {"n": "1"}})
    second = api.list(limit="2", **{"continue": first["metadata"]["continue"]})
    assert names(second) == ["c", "d"] and second["items"][1]["data"] == {"n": "0"}
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    third = api.list(limit="2", **{"continue": second["metadata"]["continue"]})
    assert names(third) == ["e"] and "continue" not in third["metadata"]
    assert names(api.list()) == ["a", "b", "bb", "d", "e", "f"]


def test_a_page_too_late_is_gone_with_a_token_to_go_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "KEEP_CHANGES", 3)
    api.make("a", "b", "c")
    token = api.list(limit="1")["metadata"]["continue"]
    api.make("d", "e", "f", "g")
    refused = refusal(lambda: api.list(limit="1", **{"continue": token}))
    assert (refused.code, refused.reason) == (410, "Expired")
    rest = api.list(**{"continue": refused.body()["metadata"]["continue"]})
    assert names(rest) == ["b", "c", "d", "e", "f", "g"]


def test_selectors_choose_before_pages_are_counted(api: Api) -> None:
    api.make("a", "c", "e", tier="front")
    api.make("b", "d", tier="back")
    first = api.list(labelSelector="tier=front", limit="2")
    assert names(first) == ["a", "c"] and "remainingItemCount" not in first["metadata"]
    token = first["metadata"]["continue"]
    assert names(api.list(labelSelector="tier=front", limit="2", **{"continue": token})) == ["e"]
    assert names(api.list(fieldSelector="metadata.name=d")) == ["d"]
    refused = refusal(lambda: api.list(fieldSelector="data.n=0"))
    assert refused.code == 400 and "field label not supported: data.n" in refused.message


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"limit": "x"}, 400),
        ({"continue": "x"}, 400),
        ({"resourceVersion": "now"}, 400),
        ({"resourceVersionMatch": "Exact"}, 400),
        ({"resourceVersion": "1", "resourceVersionMatch": "Perhaps"}, 400),
        ({"resourceVersion": "0", "resourceVersionMatch": "Exact"}, 400),
        ({"resourceVersion": "99", "resourceVersionMatch": "NotOlderThan"}, 504),
        ({"resourceVersion": "99", "resourceVersionMatch": "Exact"}, 504),
        ({"labelSelector": "a in"}, 400),
    ],
)
def test_queries_that_make_no_sense_are_refused(api: Api, query: dict[str, str], code: int) -> None:
    assert refusal(lambda: api.list(**query)).code == code


def test_lists_of_a_stated_revision(api: Api) -> None:
    api.make("a")
    then = api.list()["metadata"]["resourceVersion"]
    api.make("b")
    exact = api.list(resourceVersion=then, resourceVersionMatch="Exact")
    assert names(exact) == ["a"] and exact["metadata"]["resourceVersion"] == then
    assert names(api.list(resourceVersion=then, resourceVersionMatch="NotOlderThan")) == ["a", "b"]
    assert names(api.list(resourceVersion="0")) == ["a", "b"]


# Watches


async def test_a_watch_resumes_where_a_list_ended(api: Api) -> None:
    api.make("a")
    version = api.list()["metadata"]["resourceVersion"]
    api.make("b")
    api.change("a", {"data": {"n": "1"}})
    stream = api.watch(resourceVersion=version)
    assert told(await events(stream, 2)) == [("ADDED", "b"), ("MODIFIED", "a")]
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    api.remove("b")
    assert orjson.loads(await waiting)["type"] == "DELETED"


async def test_a_selecting_watch_sees_objects_come_and_go(api: Api) -> None:
    api.make("in", tier="front")
    api.make("out", tier="back")
    version = api.list()["metadata"]["resourceVersion"]
    api.change("out", {"metadata": {"labels": {"tier": "front"}}})
    api.change("in", {"data": {"n": "1"}})
    api.change("in", {"metadata": {"labels": {"tier": "back"}}})
    api.change("in", {"data": {"n": "2"}})
    api.remove("in")
    api.remove("out")
    stream = api.watch(resourceVersion=version, labelSelector="tier=front")
    assert told(await events(stream, 4)) == [
        ("ADDED", "out"), ("MODIFIED", "in"), ("DELETED", "in"), ("DELETED", "out"),
    ]  # fmt: skip


async def test_a_watch_list_ends_its_first_part_with_a_bookmark(api: Api) -> None:
    api.make("a", "b")
    stream = api.watch(
        sendInitialEvents="true", resourceVersionMatch="NotOlderThan", allowWatchBookmarks="true"
    )
    found = await events(stream, 3)
    assert told(found) == [("ADDED", "a"), ("ADDED", "b"), ("BOOKMARK", "")]
    assert found[2]["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
    assert refusal(lambda: api.watch(sendInitialEvents="true")).code == 400


async def test_a_watch_without_a_revision_starts_with_what_is_there(api: Api) -> None:
    api.make("a")
    assert told(await events(api.watch(), 1)) == [("ADDED", "a")]


async def test_a_watch_of_a_compacted_or_future_revision_is_told_in_the_stream(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "KEEP_CHANGES", 2)
    api.make("a", "b", "c", "d")
    (error,) = await events(api.watch(resourceVersion="1"), 1)
    assert (error["type"], error["object"]["code"], error["object"]["reason"]) == ("ERROR", 410, "Expired")
    (error,) = await events(api.watch(resourceVersion="99"), 1)
    assert (error["type"], error["object"]["code"]) == ("ERROR", 504)


@pytest.mark.parametrize("bound", ["QUEUE_LIMIT", "QUEUE_BYTES"])
async def test_a_slow_watch_is_ended_and_holds_nothing(
    api: Api, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, bound, 3)
    version = api.list()["metadata"]["resourceVersion"]
    stream = api.watch(resourceVersion=version)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    api.make(*(f"n{i}" for i in range(9)))
    with pytest.raises(StopAsyncIteration):
        await waiting
        await anext(stream)
    assert not api.rest.store._shelf("/configmaps").listeners


async def test_a_quiet_watch_gets_bookmarks(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BOOKMARK_INTERVAL", 0.01)
    version = api.list()["metadata"]["resourceVersion"]
    (mark,) = await events(api.watch(resourceVersion=version, allowWatchBookmarks="true"), 1)
    assert (mark["type"], mark["object"]["metadata"]["resourceVersion"]) == ("BOOKMARK", version)


# Shapes


@pytest.mark.parametrize(
    ("accept", "shape"),
    [
        ("", "object"),
        ("*/*", "object"),
        ("application/json", "object"),
        ("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", "table"),
        ("application/vnd.kubernetes.protobuf,application/json", "object"),
        ("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1", "metadata"),
        ("application/json;as=Table;g=meta.k8s.io;v=v1beta1, application/json", "object"),
    ],
)
def test_what_an_accept_header_asks_for(accept: str, shape: str) -> None:
    assert shape_of(accept) == shape


def test_only_protobuf_cannot_be_had() -> None:
    assert refusal(lambda: shape_of("application/vnd.kubernetes.protobuf")).code == 406


def test_metadata_alone(api: Api) -> None:
    api.make("a")
    found = orjson.loads(api.reader.page(api.target(), {}).encode(api.shape("metadata")))
    assert found["kind"] == "PartialObjectMetadataList"
    assert found["items"][0]["kind"] == "PartialObjectMetadata" and "data" not in found["items"][0]

"""A cache that is told of its owner's writes before the watch shows them."""

from __future__ import annotations

from typing import Any, cast

from meshlight.kube.client import Cache, Client, WatchEvent
from meshlight.kube.resources import PODS


def pod(name: str, version: int, uid: str = "") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "x", "uid": uid or name, "resourceVersion": str(version)}}


def cache() -> Cache:
    return Cache(cast(Client, None), PODS)


def test_a_write_is_seen_at_once_and_older_news_does_not_undo_it() -> None:
    found = cache()
    found._heard(WatchEvent("ADDED", pod("a", 1)))
    found.wrote(pod("a", 5))
    found._heard(WatchEvent("MODIFIED", pod("a", 3)))
    assert found.get("a", "x") == {"apiVersion": "v1", "kind": "Pod", **pod("a", 5)}
    found._heard(WatchEvent("MODIFIED", pod("a", 6)))
    assert found.objects[("x", "a")]["metadata"]["resourceVersion"] == "6"


def test_an_answer_that_the_watch_has_passed_says_nothing() -> None:
    found = cache()
    found._heard(WatchEvent("ADDED", pod("a", 4)))
    found._heard(WatchEvent("DELETED", pod("a", 7)))
    found.wrote(pod("a", 4))
    assert found.get("a", "x") is None


def test_what_the_watch_passes_without_telling_is_gone() -> None:
    found = cache()
    changes: list[tuple[bool, bool]] = []
    found.on_change(lambda old, new: changes.append((old is not None, new is not None)))
    found.wrote(pod("ghost", 5))
    found._heard(WatchEvent("ADDED", pod("b", 9)))
    assert found.get("ghost", "x") is None and changes == [(False, True), (True, False), (False, True)]


def test_an_erased_object_does_not_come_back() -> None:
    found = cache()
    found._heard(WatchEvent("ADDED", pod("a", 1)))
    found.erased(pod("a", 1))
    found._heard(WatchEvent("MODIFIED", pod("a", 2)))
    assert found.get("a", "x") is None
    found._heard(WatchEvent("DELETED", pod("a", 3)))
    found._heard(WatchEvent("ADDED", pod("a", 4, uid="another")))
    assert found.get("a", "x") is not None

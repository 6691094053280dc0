"""Patches and selectors, from their specifications."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlight.kube.builtin_kinds import BUILTIN
from meshlight.kube.patch import PatchError, json_patch, merge, patched, strategic_merge
from meshlight.kube.schema import ANY
from meshlight.kube.schema_language import builtin
from meshlight.kube.selectors import fields, labels
from meshlight.kube.status import StatusError
from meshlight.kube.tables import human_duration, json_path

# RFC 7386, appendix A
MERGE = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "expected"), MERGE)
def test_merge_patch(target: Any, patch: Any, expected: Any) -> None:
    assert merge(target, patch) == expected


documents = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=4)


@given(documents, documents)
def test_a_merge_patch_made_of_a_document_leads_to_it(old: Any, new: Any) -> None:
    patch = {**new, **{k: None for k in old if k not in new}}
    assert merge(old, patch) == new


JSON_PATCH = [
    ({"a": 1}, [{"op": "add", "path": "/b", "value": 2}], {"a": 1, "b": 2}),
    ({"a": [1, 3]}, [{"op": "add", "path": "/a/1", "value": 2}], {"a": [1, 2, 3]}),
    ({"a": [1]}, [{"op": "add", "path": "/a/-", "value": 2}], {"a": [1, 2]}),
    ({"a": 1, "b": 2}, [{"op": "remove", "path": "/a"}], {"b": 2}),
    ({"a/b": 1}, [{"op": "replace", "path": "/a~1b", "value": 2}], {"a/b": 2}),
    ({"a": 1}, [{"op": "move", "from": "/a", "path": "/b"}], {"b": 1}),
    ({"a": [1]}, [{"op": "copy", "from": "/a", "path": "/b"}], {"a": [1], "b": [1]}),
    ({"a": 1}, [{"op": "test", "path": "/a", "value": 1}], {"a": 1}),
]


@pytest.mark.parametrize(("target", "patch", "expected"), JSON_PATCH)
def test_json_patch(target: Any, patch: Any, expected: Any) -> None:
    assert json_patch(target, patch) == expected


@pytest.mark.parametrize(
    "patch",
    [
        [{"op": "test", "path": "/a", "value": 2}],
        [{"op": "remove", "path": "/missing"}],
        [{"op": "replace", "path": "/x/y", "value": 1}],
        [{"op": "spin", "path": "/a"}],
        {"op": "add"},
    ],
)
def test_a_json_patch_that_does_not_fit_is_refused(patch: Any) -> None:
    with pytest.raises(PatchError):
        json_patch({"a": 1}, patch)


def containers(**images: str) -> dict[str, Any]:
    return {"containers": [{"name": k, "image": v} for k, v in images.items()]}


STRATEGIC = [
    # type, target, patch, result
    ("PodSpec", containers(a="1", b="2"), containers(b="3"), containers(a="1", b="3")),
    ("PodSpec", containers(a="1"), {"containers": [{"name": "a", "$patch": "delete"}]}, {"containers": []}),
    ("PodSpec", containers(a="1"), {"containers": [{"name": "b", "image": "2"}, {"$patch": "replace"}]},
     containers(b="2")),
    (
        "ServiceSpec",
        {"ports": [{"port": 80}, {"port": 81}]},
        {"ports": [{"port": 80, "name": "http"}]},
        {"ports": [{"port": 80, "name": "http"}, {"port": 81}]},
    ),
    ("ObjectMeta", {"finalizers": ["a", "b"]}, {"$deleteFromPrimitiveList/finalizers": ["a"]},
     {"finalizers": ["b"]}),
    ("ObjectMeta", {"finalizers": ["a"]}, {"finalizers": ["b"]}, {"finalizers": ["a", "b"]}),
    ("DeploymentSpec", {"strategy": {"type": "A", "rollingUpdate": {}}},
     {"strategy": {"$retainKeys": ["type"], "type": "B"}}, {"strategy": {"type": "B"}}),
    ("Container", {"args": ["a", "b"]}, {"args": ["c"]}, {"args": ["c"]}),
    ("PodSpec", {"tolerations": [{"key": "a"}]}, {"tolerations": [{"key": "b"}]},
     {"tolerations": [{"key": "b"}]}),
    ("NodeSpec", {"taints": [{"key": "a", "effect": "NoExecute"}]}, {"taints": []}, {"taints": []}),
    (
        "PodSpec",
        containers(a="1", b="2"),
        {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}], "containers": []},
        containers(b="2", a="1"),
    ),
    ("PodSpec", containers(a="1", x="1", b="2"),
     {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}, containers(b="2", x="1", a="1")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "target", "patch", "expected"), STRATEGIC)
def test_strategic_merge(kind: str, target: Any, patch: Any, expected: Any) -> None:
    assert strategic_merge(target, patch, builtin().types[kind]) == expected


def test_strategic_merge_refuses_elements_without_their_key() -> None:
    with pytest.raises(PatchError, match="does not contain declared merge key: name"):
        strategic_merge({}, {"containers": [{"image": "1"}]}, builtin().types["PodSpec"])


@pytest.mark.parametrize(
    ("content_type", "patch", "code"),
    [
        ("application/json-patch+json", [{"op": "test", "path": "/a", "value": 2}], 422),
        ("application/json-patch+json", [{"op": "remove", "path": "/missing"}], 422),
        ("application/json-patch+json", [{"op": "spin", "path": "/a"}], 400),
        ("application/json-patch+json", {"op": "test"}, 400),
        ("application/merge-patch+json", [], 400),
        ("application/merge-patch+json", {"metadata": None}, 400),
    ],
)
def test_a_patch_that_does_not_fit_is_a_status(content_type: str, patch: Any, code: int) -> None:
    with pytest.raises(StatusError) as refused:
        patched({"metadata": {}, "a": 1}, patch, content_type, ANY)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("", True), ("a=1", True), ("a==1", True), ("a!=1", False), ("b!=1", True), ("a in (1,2)", True),
        ("a notin (1)", False), ("b notin (1)", True), ("a", True), ("!a", False), ("!b,a=1", True),
    ],
)  # fmt: skip
def test_label_selectors(selector: str, matches: bool) -> None:
    assert labels(selector)({"a": "1"}) is matches


def test_field_selectors() -> None:
    pod = {"metadata": {"name": "x"}, "status": {"phase": "Running"}}
    pods = next(t for t in BUILTIN if t.resource.plural == "pods")
    assert fields("metadata.name=x,status.phase!=Pending", pods)(pod)
    assert not fields("spec.nodeName=n", pods)(pod)
    assert fields("spec.hostNetwork=false", pods)(pod)
    with pytest.raises(ValueError, match="invalid selector"):
        fields("metadata.name", pods)
    with pytest.raises(ValueError, match=r"field label not supported: spec\.tolerations"):
        fields("spec.tolerations=x", pods)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (119, "119s"), (120, "2m"), (125, "2m5s"), (600, "10m"), (3 * 3600, "3h"),
     (3 * 3600 + 300, "3h5m"), (47 * 3600, "47h"), (48 * 3600, "2d"), (8 * 86400, "8d")],
)  # fmt: skip
def test_ages(seconds: int, shown: str) -> None:
    assert human_duration(seconds) == shown


def test_json_path_of_printer_columns() -> None:
    obj = {"status": {"conditions": [{"type": "Ready", "status": "True"}], "addresses": [{"value": "v"}]}}
    assert json_path(obj, '.status.conditions[?(@.type=="Ready")].status') == ["True"]
    assert json_path(obj, ".status.addresses[*].value") == ["v"]
    assert json_path(obj, ".spec.hosts") == []

"""Server-side apply: merging, ownership and conflicts, from the Kubernetes documentation's rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlight.kube import apply, field_sets, managed_fields
from meshlight.kube.managed_fields import LAST_APPLIED, Writer
from meshlight.kube.resources import Object
from meshlight.kube.schema import ANY, from_openapi
from meshlight.kube.schema_language import builtin
from meshlight.kube.status import StatusError

DEPLOYMENT = builtin().kinds["apps/v1", "Deployment"]
CONFIG_MAP = builtin().kinds["v1", "ConfigMap"]
SERVICE = builtin().kinds["v1", "Service"]
META = builtin().types["ObjectMeta"]


def writer(name: str, time: str = "2026-01-01T00:00:00Z", **more: Any) -> Writer:
    return Writer(name, "apps/v1", time, **more)


def deployment(replicas: int | None = None, **images: str) -> Object:
    spec: Object = {"template": {"spec": {"containers": [{"name": k, "image": v} for k, v in images.items()]}}}
    if replicas is not None:
        spec["replicas"] = replicas
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec}


def owned_by(obj: Object, manager: str) -> set[str]:
    entries = [e for e in obj["metadata"].get("managedFields", []) if e["manager"] == manager]
    return {field_sets.shown(p) for e in entries for p in field_sets.from_json(e["fieldsV1"])}


def ssa(live: Object | None, config: Object, name: str, *, force: bool = False, **more: Any) -> Object:
    live = copy.deepcopy(live)
    return managed_fields.record_apply(
        live, copy.deepcopy(config), DEPLOYMENT, writer(name, **more), force=force
    )


def containers(obj: Object) -> dict[str, str]:
    return {c["name"]: c.get("image") for c in obj["spec"]["template"]["spec"].get("containers", [])}


def test_an_applier_owns_what_it_gives_and_list_elements_by_key() -> None:
    live = ssa(None, deployment(2, a="1"), "one")
    assert owned_by(live, "one") == {
        ".spec.replicas",
        '.spec.template.spec.containers[name="a"]',
        '.spec.template.spec.containers[name="a"].name',
        '.spec.template.spec.containers[name="a"].image',
    }


def test_appliers_of_different_list_elements_share_a_list() -> None:
    live = ssa(ssa(None, deployment(a="1"), "one"), deployment(b="2"), "two")
    assert containers(live) == {"a": "1", "b": "2"}


def test_what_an_applier_leaves_out_goes_unless_another_owns_it() -> None:
    live = ssa(None, deployment(2, a="1", b="2"), "one")
    live = ssa(live, deployment(b="2"), "two")
    live = ssa(live, deployment(a="1"), "one")
    assert containers(live) == {"a": "1", "b": "2"}
    assert "replicas" not in live["spec"]
    live = ssa(live, deployment(a="1"), "two")
    assert containers(live) == {"a": "1"}


def test_an_element_that_goes_takes_its_defaults_along() -> None:
    live = ssa(None, deployment(a="1", b="2"), "one")
    for container in live["spec"]["template"]["spec"]["containers"]:
        container["imagePullPolicy"] = "Always"
    live["spec"]["revisionHistoryLimit"] = 10
    live = ssa(live, deployment(a="1"), "one")
    assert live["spec"]["template"]["spec"]["containers"] == [
        {"name": "a", "image": "1", "imagePullPolicy": "Always"}
    ]
    assert live["spec"]["revisionHistoryLimit"] == 10


def test_another_value_for_anothers_field_is_a_conflict_in_kubernetes_words() -> None:
    live = ssa(None, deployment(2, a="1"), "one")
    with pytest.raises(StatusError) as refused:
        ssa(live, deployment(3), "two")
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")
    assert refused.value.message == 'Apply failed with 1 conflict: conflict with "one": .spec.replicas'
    assert refused.value.details["causes"] == [
        {"reason": "FieldManagerConflict", "message": 'conflict with "one"', "field": ".spec.replicas"}
    ]
    taken = ssa(live, deployment(3), "two", force=True)
    assert taken["spec"]["replicas"] == 3
    assert ".spec.replicas" not in owned_by(taken, "one")


def test_several_conflicts_are_listed_by_manager() -> None:
    live = ssa(None, deployment(2, a="1"), "one")
    with pytest.raises(StatusError) as refused:
        ssa(live, deployment(3, a="2"), "two")
    assert refused.value.message == (
        'Apply failed with 2 conflicts: conflicts with "one":\n- .spec.replicas\n'
        '- .spec.template.spec.containers[name="a"].image'
    )


def test_the_same_value_is_shared() -> None:
    live = ssa(ssa(None, deployment(2), "one"), deployment(2), "two")
    assert ".spec.replicas" in owned_by(live, "one") & owned_by(live, "two")


def test_an_update_takes_fields_over_and_conflicts_name_its_version() -> None:
    live = ssa(None, deployment(2, a="1"), "one")
    scaled = copy.deepcopy(live)
    scaled["spec"]["replicas"] = 5
    managed_fields.record_update(live, scaled, DEPLOYMENT, writer("kubectl-edit"))
    assert owned_by(scaled, "kubectl-edit") == {".spec.replicas"}
    assert ".spec.replicas" not in owned_by(scaled, "one")
    with pytest.raises(StatusError, match=r'conflict with "kubectl-edit" using apps/v1: \.spec\.replicas'):
        ssa(scaled, deployment(2, a="1"), "one")


def test_a_created_object_owns_maps_but_not_the_structs_every_object_has() -> None:
    obj = deployment(1, a="1")
    obj["metadata"]["labels"] = {"app": "web"}
    managed_fields.record_update(None, obj, DEPLOYMENT, writer("kubectl-create"))
    owned = owned_by(obj, "kubectl-create")
    assert {".metadata.labels", ".metadata.labels.app", '.spec.template.spec.containers[name="a"]'} <= owned
    assert not {".metadata", ".metadata.name", ".spec", ".spec.template", ".spec.template.spec"} & owned


def test_status_has_owners_of_its_own() -> None:
    live = ssa(None, deployment(2), "one", separate_status=True)
    new = copy.deepcopy(live)
    new["status"] = {"replicas": 2}
    change = writer("controller", subresource="status", separate_status=True)
    managed_fields.record_update(live, new, DEPLOYMENT, change)
    entry = next(e for e in new["metadata"]["managedFields"] if e["manager"] == "controller")
    assert entry["subresource"] == "status"
    assert entry["fieldsV1"] == {"f:status": {"f:replicas": {}}}


def test_objects_without_owners_belong_to_before_first_apply() -> None:
    live = deployment(2, a="1")
    applied = ssa(live, deployment(2), "one")
    assert ".spec.replicas" in owned_by(applied, "before-first-apply")
    with pytest.raises(StatusError, match='conflict with "before-first-apply"'):
        ssa(live, deployment(3), "one")


def test_kubectl_may_take_what_client_side_apply_gave() -> None:
    live = deployment(2)
    live["metadata"]["annotations"] = {LAST_APPLIED: '{"spec":{"replicas":2}}'}
    managed_fields.record_update(None, live, DEPLOYMENT, writer("kubectl-client-side-apply"))
    applied = ssa(live, deployment(3), "kubectl")
    assert applied["spec"]["replicas"] == 3
    assert '"replicas":3' in applied["metadata"]["annotations"][LAST_APPLIED]
    with pytest.raises(StatusError):
        ssa(live, deployment(3), "someone")


def test_clients_may_edit_or_clear_the_entries() -> None:
    live = ssa(None, deployment(2), "one")
    cleared = copy.deepcopy(live)
    cleared["metadata"]["managedFields"] = [{}]
    managed_fields.record_update(live, cleared, DEPLOYMENT, writer("x"))
    assert "managedFields" not in cleared["metadata"]
    broken = copy.deepcopy(live)
    broken["metadata"]["managedFields"] = [{"operation": "Sing"}]
    managed_fields.record_update(live, broken, DEPLOYMENT, writer("x"))
    assert broken["metadata"]["managedFields"] == live["metadata"]["managedFields"]
    with pytest.raises(StatusError, match=r"metadata\.managedFields must be nil"):
        ssa(live, cleared | {"metadata": {"managedFields": [{"manager": "x"}]}}, "one")


def test_lists_keep_the_appliers_order_and_others_elements() -> None:
    service = SERVICE.properties["spec"]
    live = {"ports": [{"port": 1}, {"port": 2}, {"port": 3}]}
    config = {"ports": [{"port": 3}, {"port": 4}, {"port": 1}]}
    merged = apply.merge(live, config, service)
    assert [p["port"] for p in merged["ports"]] == [2, 3, 4, 1]


def test_keys_left_out_are_their_defaults() -> None:
    ports = SERVICE.properties["spec"].properties["ports"]
    assert field_sets.element_of({"port": 80}, ports) == 'k:{"port":80,"protocol":"TCP"}'


def test_two_elements_with_one_key_are_refused() -> None:
    config = deployment()
    config["spec"]["template"]["spec"]["containers"] = [{"name": "a"}, {"name": "a"}]
    with pytest.raises(StatusError, match=r'duplicate entries for key \[name="a"\]'):
        ssa(None, config, "one")


def test_custom_resources_merge_by_their_schemas_list_types() -> None:
    ports = {
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
        "items": {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}},
    }
    plain = {"type": "array", "items": {"type": "string"}}
    unique = {**plain, "x-kubernetes-list-type": "set"}
    properties = {"ports": ports, "plain": plain, "unique": unique}
    schema = from_openapi({"type": "object", "properties": properties}, META)
    live = {"ports": [{"name": "a", "n": 1}], "plain": ["x"], "unique": ["x"]}
    config = {"ports": [{"name": "b", "n": 2}], "plain": ["y"], "unique": ["y"]}
    assert apply.merge(live, config, schema) == {
        "ports": [{"name": "a", "n": 1}, {"name": "b", "n": 2}],
        "plain": ["y"],
        "unique": ["x", "y"],
    }
    assert field_sets.fields_of({"unique": ["y"]}, schema) == {("f:unique", 'v:"y"')}
    assert apply.merge({"l": [1], "m": {"a": 1}}, {"l": [2], "m": {"b": 2}}, ANY) == {
        "l": [2],
        "m": {"a": 1, "b": 2},
    }


def test_only_ten_updaters_are_told_apart() -> None:
    live: Object = {"metadata": {"name": "c"}, "data": {}}
    for number in range(14):
        new = copy.deepcopy(live)
        new["data"][f"k{number}"] = "v"
        managed_fields.record_update(
            live, new, CONFIG_MAP, writer(f"m{number}", f"2026-01-01T00:00:{number:02}Z")
        )
        live = new
    managers = {e["manager"] for e in live["metadata"]["managedFields"]}
    assert len(managers) == managed_fields.MAX_UPDATERS
    assert {"ancient-changes", "m13"} <= managers


# Properties

names = st.sampled_from(["a", "b", "c", "d"])
values = st.sampled_from(["1", "2", "3"])
configs = st.builds(
    lambda replicas, images, labels: {
        **deployment(replicas, **images),
        "metadata": {"name": "web", **({"labels": labels} if labels else {})},
    },
    st.none() | st.integers(0, 3),
    st.dictionaries(names, values, max_size=3),
    st.dictionaries(names, values, max_size=3),
)
steps = st.lists(st.tuples(st.sampled_from(["one", "two", "three"]), configs), min_size=1, max_size=6)


@given(steps)
@settings(max_examples=150, deadline=None)
def test_applying_twice_changes_nothing_the_second_time(history: list[tuple[str, Object]]) -> None:
    live: Object | None = None
    for manager, config in history:
        live = ssa(live, config, manager, force=True)
        assert ssa(live, config, manager, time="2027-01-01T00:00:00Z") == live


@given(steps)
@settings(max_examples=150, deadline=None)
def test_what_was_applied_last_is_there_and_owned(history: list[tuple[str, Object]]) -> None:
    live: Object | None = None
    for manager, config in history:
        live = ssa(live, config, manager, force=True)
        assert containers(live).items() >= containers(config).items()
        given_fields = field_sets.fields_of({"spec": config["spec"]}, DEPLOYMENT)
        assert {field_sets.shown(p) for p in given_fields} <= owned_by(live, manager)


@given(steps)
@settings(max_examples=100, deadline=None)
def test_nothing_is_left_when_everybody_applies_nothing(history: list[tuple[str, Object]]) -> None:
    live: Object | None = None
    for manager, config in history:
        live = ssa(live, config, manager, force=True)
    nothing = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}}
    for manager in {manager for manager, _ in history}:
        live = ssa(live, nothing, manager)
    assert live is not None
    assert not containers(live) if "spec" in live else True
    assert not live["metadata"].get("labels")
    assert not live["metadata"].get("managedFields")


paths = st.lists(st.sampled_from(["f:a", "f:b", 'k:{"name":"x"}', 'v:"y"', "i:0"]), min_size=1, max_size=4)
sets = st.frozensets(paths.map(tuple), max_size=8)


@given(sets)
def test_field_sets_survive_their_encoding(paths: field_sets.FieldSet) -> None:
    assert field_sets.from_json(field_sets.to_json(paths)) == paths


@given(configs, configs)
def test_updates_move_ownership_and_lose_none(old: Object, new: Object) -> None:
    managed_fields.record_update(None, old, DEPLOYMENT, writer("maker"))
    changed = {**copy.deepcopy(new), "metadata": {**new["metadata"]}}
    managed_fields.record_update(old, changed, DEPLOYMENT, writer("editor"))
    same = copy.deepcopy(changed)
    managed_fields.record_update(changed, same, DEPLOYMENT, writer("editor", "2027-01-01T00:00:00Z"))
    assert same == changed
    owned = owned_by(changed, "maker") | owned_by(changed, "editor")
    leaves = field_sets.fields_of({"spec": changed["spec"]}, DEPLOYMENT)
    assert {field_sets.shown(p) for p in leaves} <= owned

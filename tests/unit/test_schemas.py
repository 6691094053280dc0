"""Schemas: the language they are written in, decoding, pruning, defaults, structural rules, OpenAPI."""

from __future__ import annotations

import copy
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlight.kube import decoding, openapi, quantity, schema_language, structural
from meshlight.kube.catalog import BUILTIN, Catalog
from meshlight.kube.resources import Object
from meshlight.kube.schema import Schema, from_openapi
from meshlight.kube.schema_language import SchemaTextError, builtin
from meshlight.kube.status import StatusError

META = builtin().types["ObjectMeta"]


@pytest.mark.parametrize("served", BUILTIN, ids=lambda s: s.resource.kind)
def test_every_builtin_kind_has_a_schema(served: Any) -> None:
    openapi_name = builtin().openapi_names[served.structure.name]
    assert openapi_name.rpartition(".")[2] == served.resource.kind
    assert {"apiVersion", "kind", "metadata"} <= served.structure.properties.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  name string\n", "file:1: a field before any type"),
        ("T: x\n  name sting\n", "file:2: 'sting'"),
        ("T: x\n  name string loud\n", "file:2: unknown modifier 'loud'"),
        ("T: x\n  ???\n", "file:2: not a field"),
        ("not a header\n", "file:1: not a type header"),
        ("T: x\nT: y\n", "type T is declared twice"),
    ],
)
def test_mistakes_in_schema_files_are_told_with_their_line(text: str, message: str) -> None:
    with pytest.raises(SchemaTextError, match=message.replace("?", r"\?")):
        schema_language.parse([("file", text)])


def test_keyed_lists_have_their_keys_as_fields() -> None:
    for schema in builtin().types.values():
        for name, below in schema.properties.items():
            if below.list_type == "map":
                assert below.items is not None
                assert set(below.list_keys) <= below.items.properties.keys(), f"{schema.name}.{name}"


# Decoding


def decoded(kind: str, obj: Object, version: str = "v1") -> tuple[Object, list[str]]:
    obj = copy.deepcopy(obj)
    schema = builtin().kinds[version, kind]
    return obj, decoding.decode(obj, schema, kind=kind, version=version.rpartition("/")[2])


def test_empty_maps_and_lists_are_dropped_but_not_empty_structs() -> None:
    volume = {"name": "v", "emptyDir": {}}
    obj, unknown = decoded(
        "Pod",
        {
            "metadata": {"labels": {}, "ownerReferences": []},
            "spec": {"containers": [], "volumes": [volume], "nodeSelector": {}, "hostNetwork": False},
        },
    )
    assert unknown == []
    assert obj == {"metadata": {}, "spec": {"containers": [], "volumes": [volume], "hostNetwork": False}}


def test_undeclared_fields_and_nulls_are_dropped() -> None:
    obj, unknown = decoded(
        "Pod",
        {
            "metadata": {"name": "p", "creationTimestamp": None, "labelz": {}},
            "spec": {"containers": [{"name": "a", "imagge": "x", "env": None}], "nodeSelector": {"a": "b"}},
        },
    )
    assert unknown == ["metadata.labelz", "spec.containers[0].imagge"]
    assert obj == {
        "metadata": {"name": "p"},
        "spec": {"containers": [{"name": "a"}], "nodeSelector": {"a": "b"}},
    }


@pytest.mark.parametrize(
    ("kind", "version", "obj", "message"),
    [
        ("Deployment", "apps/v1", {"spec": {"replicas": "3"}},
         "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32"),
        ("Pod", "v1", {"spec": {"containers": [{"env": [{"value": 1}]}]}},
         "json: cannot unmarshal number into Go struct field EnvVar.spec.containers.env.value of type string"),
        ("Pod", "v1", {"spec": "x"},
         "json: cannot unmarshal string into Go struct field Pod.spec of type v1.PodSpec"),
        ("Pod", "v1", {"spec": {"containers": {}}},
         "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container"),
        ("ConfigMap", "v1", {"data": {"a": 1}},
         "json: cannot unmarshal number into Go struct field ConfigMap.data of type string"),
        ("Secret", "v1", {"data": {"a": "ab!d"}}, "illegal base64 data at input byte 2"),
        ("Pod", "v1", {"spec": {"containers": [{"resources": {"limits": {"cpu": "lots"}}}]}},
         r"quantities must match the regular expression"),
        ("Pod", "v1", {"spec": {"containers": [{"resources": {"limits": {"cpu": "1Ku"}}}]}},
         "unable to parse quantity's suffix"),
        ("Deployment", "apps/v1", {"spec": {"replicas": 2**31}},
         "json: cannot unmarshal number 2147483648 into Go struct field DeploymentSpec.spec.replicas of type"),
        ("Pod", "v1", {"spec": {"overhead": {"cpu": "1e999999999"}}}, "is out of range"),
        ("Pod", "v1", {"metadata": {"creationTimestamp": "yesterday"}}, 'parsing time "yesterday" as'),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused_in_the_decoders_words(
    kind: str, version: str, obj: Object, message: str
) -> None:
    with pytest.raises(StatusError) as refused:
        decoded(kind, obj, version)
    assert refused.value.code == 400
    number = version.rpartition("/")[2]
    assert refused.value.message.startswith(f'{kind} in version "{number}" cannot be handled as a {kind}: ')
    assert message in refused.value.message


def test_quantities_become_canonical() -> None:
    limits = {"cpu": "0.5", "memory": "1024Mi", "a.b/c": 3}
    obj, _ = decoded("Pod", {"spec": {"containers": [{"resources": {"limits": limits}}]}})
    found = obj["spec"]["containers"][0]["resources"]["limits"]
    assert found == {"cpu": "500m", "memory": "1Gi", "a.b/c": "3"}


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("0", "0"), ("1", "1"), ("1000m", "1"), ("1500m", "1500m"), ("0.1", "100m"), ("100k", "100k"),
        ("1000k", "1M"), ("1Ki", "1Ki"), ("2048Ki", "2Mi"), ("1.5Gi", "1536Mi"), ("512", "512"),
        ("1e3", "1e3"), ("12e6", "12e6"), ("-1", "-1"), ("0.0000000001", "1n"), ("1Pi", "1Pi"), ("+2", "2"),
    ],
)  # fmt: skip
def test_canonical_quantities(text: str, canonical: str) -> None:
    assert quantity.canonical(text) == canonical


@given(st.integers(0, 10**12), st.sampled_from(["n", "u", "m", "", "k", "M", "G", "Ki", "Mi", "Gi"]))
def test_a_canonical_quantity_is_the_same_amount_and_stable(number: int, suffix: str) -> None:
    text = f"{number}{suffix}"
    canonical = quantity.canonical(text)
    assert quantity.value(canonical) == quantity.value(text)
    assert quantity.canonical(canonical) == canonical


def test_amounts() -> None:
    assert quantity.value("250m") == Decimal("0.25")
    assert quantity.value("1Gi") == 2**30


def test_fields_given_twice_are_found() -> None:
    raw = b'{"a": 1, "b": [{"c": 1, "c": 2}], "a": 2}'
    assert decoding.duplicates(raw) == ["a", "b[0].c"]


# Custom resources


def custom(properties: Object, **more: Any) -> Schema:
    spec = {"type": "object", "properties": properties, **more}
    return from_openapi({"type": "object", "properties": {"spec": spec}}, META)


def test_custom_resources_are_pruned() -> None:
    schema = custom(
        {
            "a": {"type": "string"},
            "any": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "list": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "string"}}}},
        }
    )
    spec = {"a": "1", "b": 2, "any": {"c": {"d": 3}}, "list": [{"x": "1", "y": 2}]}
    obj = {"apiVersion": "a/v1", "kind": "A", "metadata": {"name": "n", "nam": "m"}, "spec": spec}
    assert decoding.prune(obj, schema) == ["metadata.nam", "spec.b", "spec.list[0].y"]
    assert obj["spec"] == {"a": "1", "any": {"c": {"d": 3}}, "list": [{"x": "1"}]}
    assert obj["metadata"] == {"name": "n"}


def test_custom_resources_are_defaulted() -> None:
    inner = {"type": "object", "default": {}, "properties": {"y": {"type": "integer", "default": 5}}}
    schema = custom({"x": {"type": "string", "default": "d"}, "in": inner, "deep": {**inner, "default": None}})
    obj: Object = {"spec": {"x": None}}
    structural.apply_defaults(obj, schema)
    assert obj["spec"]["x"] == "d"
    assert obj["spec"]["in"] == {"y": 5}
    other: Object = {"spec": {}}
    structural.apply_defaults(other, schema)
    other["spec"]["in"]["y"] = 6
    assert obj["spec"]["in"]["y"] == 5


RULES = [
    # schema of spec.f, value, fault (None: valid)
    ({"type": "integer"}, "3", 'Invalid value: "string": spec.f in body must be of type integer: "string"'),
    ({"type": "integer"}, True, 'Invalid value: "boolean": spec.f in body must be of type integer: "boolean"'),
    ({"type": "number"}, 3, None),
    ({"type": "string", "enum": ["a", "b"]}, "c", 'Unsupported value: "c": supported values: "a", "b"'),
    ({"type": "integer", "minimum": 1}, 0,
     "Invalid value: 0: spec.f in body should be greater than or equal to 1"),
    ({"type": "integer", "maximum": 5, "exclusiveMaximum": True}, 5,
     "Invalid value: 5: spec.f in body should be less than 5"),
    ({"type": "integer", "multipleOf": 3}, 4, "Invalid value: 4: spec.f in body should be a multiple of 3"),
    ({"type": "string", "minLength": 2}, "a",
     'Invalid value: "a": spec.f in body should be at least 2 chars long'),
    ({"type": "string", "maxLength": 2}, "abc", "Too long: may not be more than 2 bytes"),
    ({"type": "string", "pattern": "^a+$"}, "b", "Invalid value: \"b\": spec.f in body should match '^a+$'"),
    ({"type": "string", "format": "date-time"}, "x",
     'Invalid value: "x": spec.f in body must be of type date-time: "x"'),
    ({"type": "string", "format": "date-time"}, "2026-01-01T00:00:00Z", None),
    ({"type": "string", "format": "ipv4"}, "1.2.3.4", None),
    ({"type": "string", "format": "unheard-of"}, "x", None),
    ({"type": "array", "maxItems": 1, "items": {"type": "string"}}, ["a", "b"],
     "Too many: 2: must have at most 1 items"),
    ({"type": "array", "minItems": 1, "items": {"type": "string"}}, [],
     "Invalid value: []: spec.f in body should have at least 1 items"),
    ({"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"}, ["a", "a"],
     'Duplicate value: "a"'),
    ({"type": "object", "required": ["x"], "properties": {"x": {"type": "string"}}}, {}, "Required value"),
    ({"x-kubernetes-int-or-string": True}, "80%", None),
    ({"x-kubernetes-int-or-string": True}, 1.5,
     'Invalid value: "number": spec.f in body must be of type integer,string: "number"'),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, {"k": "v"},
     'Invalid value: "string": spec.f.k in body must be of type integer: "string"'),
    ({"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"a": 1, "b": 2},
     'Invalid value: "": "spec.f" must validate one and only one schema (oneOf). Found 2 valid alternatives'),
    ({"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"a": 1}, None),
    ({"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {},
     'Invalid value: "": "spec.f" must validate at least one schema (anyOf)'),
    ({"type": "object", "not": {"required": ["a"]}}, {"a": 1},
     'Invalid value: "": "spec.f" must not validate the schema (not)'),
    ({"type": "string", "nullable": True}, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value", "fault"), RULES)
def test_structural_rules(schema: Object, value: Any, fault: str | None) -> None:
    causes = structural.validate({"spec": {"f": value}}, custom({"f": schema}))
    assert [c.message for c in causes] == ([fault] if fault else [])


# OpenAPI


def resolved(document: Object) -> None:
    """Fail on a reference to a component that is not there."""

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                name = node["$ref"].removeprefix("#/components/schemas/")
                assert name in document["components"]["schemas"], name
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(document)


def test_openapi_documents_are_complete() -> None:
    catalog = Catalog()
    for path in openapi.index(catalog)["paths"]:
        parts = path.split("/")
        document = openapi.document(catalog, parts[1] if len(parts) == 3 else "", parts[-1])
        assert document is not None
        resolved(document)


def test_openapi_says_how_lists_merge_and_what_kinds_are() -> None:
    document = openapi.document(Catalog(), "", "v1")
    assert document is not None
    schemas = document["components"]["schemas"]
    containers = schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"]
    assert containers["x-kubernetes-patch-merge-key"] == "name"
    assert containers["x-kubernetes-list-map-keys"] == ["name"]
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    assert schemas["io.k8s.api.core.v1.Pod"]["x-kubernetes-group-version-kind"] == [kind]
    assert schemas["io.k8s.api.core.v1.PodSpec"]["required"] == ["containers"]


def test_a_documents_url_changes_with_its_definitions() -> None:
    catalog = Catalog()
    before = openapi.index(catalog)["paths"]
    names = {"plural": "things", "kind": "Thing"}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": {"type": "object"}}}
    crd: Object = {"spec": {"group": "e.io", "names": names, "scope": "Cluster", "versions": [version]}}
    catalog.add_crd(crd)
    added = openapi.index(catalog)["paths"]
    version["schema"] = {"openAPIV3Schema": {"type": "object", "description": "more"}}
    catalog.add_crd(crd)
    changed = openapi.index(catalog)["paths"]
    assert added["api/v1"] == before["api/v1"] == changed["api/v1"]
    assert added["apis/e.io/v1"] != changed["apis/e.io/v1"]

"""CustomResourceDefinitions: rules in CEL, versions, subresources, names, structural schemas, their end."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from meshlight.kube import deletion, expressions, rules
from meshlight.kube.catalog import Catalog
from meshlight.kube.expressions import BudgetError, ExpressionError
from meshlight.kube.reading import Reader
from meshlight.kube.representation import Representation
from meshlight.kube.resources import Object
from meshlight.kube.rest import APPLY_PATCH, MERGE_PATCH, Rest, Target, WriteOptions
from meshlight.kube.schema import from_node
from meshlight.kube.status import StatusError
from meshlight.kube.store import Store

OPTIONS = WriteOptions(field_manager="test")
TEXT: Object = {"type": "string"}
NUMBER: Object = {"type": "integer"}


def version(name: str = "v1", spec: Object | None = None, **more: Any) -> Object:
    schema = {
        "type": "object",
        "properties": {
            "spec": spec or {"type": "object", "properties": {"size": NUMBER, "colour": TEXT}},
            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        },
    }
    return {"name": name, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}, **more}


def definition(*versions: Object, plural: str = "lamps", kind: str = "Lamp", **names: Any) -> Object:
    return {
        "metadata": {"name": f"{plural}.example.com"},
        "spec": {
            "group": "example.com",
            "scope": "Namespaced",
            "names": {"plural": plural, "kind": kind, **names},
            "versions": list(versions) or [version()],
        },
    }


@pytest.fixture
def rest() -> Rest:
    made = Rest(Store(":memory:"), Catalog())
    made.create(target(made, "", "v1", "namespaces"), {"metadata": {"name": "x"}}, OPTIONS)
    return made


def target(rest: Rest, group: str, number: str, plural: str, name: str = "", sub: str = "") -> Target:
    served = rest.catalog.lookup(group, number, plural)
    assert served is not None, f"{plural} is not served"
    return Target(served, "x" if served.resource.namespaced else None, name, sub)


def define(rest: Rest, crd: Object) -> Object:
    return rest.create(
        target(rest, "apiextensions.k8s.io", "v1", "customresourcedefinitions"), copy.deepcopy(crd), OPTIONS
    )


def lamp(rest: Rest, name: str = "desk", number: str = "v1", **spec: Any) -> Object:
    return rest.create(
        target(rest, "example.com", number, "lamps"), {"metadata": {"name": name}, "spec": spec}, OPTIONS
    )


def change(rest: Rest, body: Object, name: str = "desk", sub: str = "", number: str = "v1") -> Object:
    return rest.patch(target(rest, "example.com", number, "lamps", name, sub), body, MERGE_PATCH, OPTIONS)[0]


def refusal(call: Any) -> StatusError:
    with pytest.raises(StatusError) as refused:
        call()
    return refused.value


# Expressions


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("self.size() > 1 && self.all(x, x.startsWith('a'))", ["ab", "ac"]),
        ("self.?b.orValue('none') == 'none'", {"a": 1}),
        ("has(self.a) && !has(self.b)", {"a": 1}),
        ("self.isSorted() && self.sum() == 6 && self.max() == 3", [1, 2, 3]),
        ("self.indexOf('b') == 1 && self.lastIndexOf('b') == 2", ["a", "b", "b"]),
        ("self.indexOf('b') == 1 && self.split('b')[0] == 'a'", "abc"),
        ("self.find('[0-9]+') == '12' && self.findAll('[0-9]') == ['1', '2']", "ab12"),
        ("url(self).getHostname() == 'a.b' && url(self).getPort() == '80' && isURL(self)", "https://a.b:80/x?q=1"),
        ("url(self).getQuery()['q'] == ['1'] && url(self).getEscapedPath() == '/x'", "https://a.b:80/x?q=1"),
        ("isIP(self) && ip(self).family() == 6 && ip(self).isLoopback()", "::1"),
        ("cidr(self).containsIP('10.1.2.3') && cidr(self).prefixLength() == 8", "10.0.0.0/8"),
        ("cidr(self).containsCIDR('10.1.0.0/16') && !isCIDR('10.0.0.0')", "10.0.0.0/8"),
        ("quantity(self).isGreaterThan(quantity('900Mi')) && quantity(self).compareTo('1Gi') == 0", "1Gi"),
        ("quantity('500m').add(quantity('500m')) == quantity('1') && !isQuantity(self)", "x"),
        ("sets.contains(self, ['a']) && sets.intersects(self, ['b', 'z']) && sets.equivalent(self, ['b', 'a'])",
         ["a", "b"]),
        ("'%s-%d'.format([self, 3]) == 'a-3' && self.upperAscii() == 'A'", "a"),
        ("duration(self) > duration('1s') && math.greatest(1, 2) == 2", "3s"),
        ("cel.bind(n, self.size(), n + n == 4)", [1, 2]),
        ("self.distinct() == [1, 2] && self.sort()[0] == 1", [1, 2, 2]),
    ],
)  # fmt: skip
def test_functions_that_rules_use(expression: str, value: Any) -> None:
    assert expressions.compiled(expression, "self").evaluate({"self": value}) is True


def test_what_fails_says_why() -> None:
    with pytest.raises(ExpressionError, match="undeclared reference to 'nope'"):
        expressions.compiled("nope(self)", "self")
    with pytest.raises(ExpressionError, match="no such key: a"):
        expressions.compiled("self.a.b == 1", "self").evaluate({"self": {}})
    with pytest.raises(ExpressionError, match="longer than"):
        expressions.compiled("1 == 1 " * 1000, "self")


def test_an_expression_cannot_run_for_long() -> None:
    deep = "self.all(a, self.all(b, self.all(c, a + b + c >= 0)))"
    with pytest.raises(BudgetError):
        expressions.compiled(deep, "self").evaluate({"self": list(range(500))})


# Rules


def ruled(schema: Object, *found: Object) -> Any:
    return from_node({**schema, "x-kubernetes-validations": list(found)})


RANGE = {"type": "object", "properties": {"min": NUMBER, "max": NUMBER}}


def messages(schema: Any, value: Any, old: Any = None) -> list[tuple[str, str]]:
    return [(c.field, c.message) for c in rules.evaluate(value, schema, old)]


def test_a_rule_fails_with_its_words() -> None:
    schema = ruled(RANGE, {"rule": "self.min <= self.max", "message": "min is above max"})
    assert messages(schema, {"min": 1, "max": 2}) == []
    assert messages(schema, {"min": 3, "max": 2}) == [("", 'Invalid value: "object": min is above max')]
    schema = ruled(RANGE, {"rule": "self.min <= self.max"})
    assert messages(schema, {"min": 3, "max": 2})[0][1].endswith("failed rule: self.min <= self.max")
    schema = ruled(
        RANGE, {"rule": "self.min <= self.max", "messageExpression": "'%d > %d'.format([self.min, self.max])"}
    )
    assert messages(schema, {"min": 3, "max": 2})[0][1].endswith(": 3 > 2")
    schema = ruled(
        RANGE, {"rule": "self.min > 0", "fieldPath": ".min", "reason": "FieldValueForbidden", "message": "no"}
    )
    assert messages(schema, {"min": 0}) == [("min", "Forbidden: no")]
    assert (
        "rule evaluation error: no such key: max"
        in messages(ruled(RANGE, {"rule": "self.max > 0"}), {"min": 1})[0][1]
    )


def test_rules_are_applied_at_every_depth() -> None:
    item = {"type": "object", "properties": {"name": TEXT},
            "x-kubernetes-validations": [{"rule": "self.name != 'bad'", "message": "bad name"}]}  # fmt: skip
    schema = from_node(
        {"type": "object", "properties": {
            "list": {"type": "array", "items": item},
            "map": {"type": "object", "additionalProperties": item}}}
    )  # fmt: skip
    value = {"list": [{"name": "ok"}, {"name": "bad"}], "map": {"k": {"name": "bad"}}}
    assert [m[0] for m in messages(schema, value)] == ["list[1]", "map[k]"]


def test_transition_rules_see_the_value_before() -> None:
    immutable = {"rule": "self == oldSelf", "message": "immutable"}
    schema = from_node({"type": "object", "properties": {
        "a": {**TEXT, "x-kubernetes-validations": [immutable]},
        "l": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
              "items": {"type": "object", "properties": {
                  "k": TEXT, "v": {**TEXT, "x-kubernetes-validations": [immutable]}}}}}})  # fmt: skip
    old = {"a": "1", "l": [{"k": "x", "v": "1"}, {"k": "y", "v": "1"}]}
    assert messages(schema, {"a": "1"}) == []
    assert messages(schema, {"a": "2"}, old) == [("a", 'Invalid value: "string": immutable')]
    new = {"a": "1", "l": [{"k": "z", "v": "9"}, {"k": "y", "v": "2"}]}
    assert [m[0] for m in messages(schema, new, old)] == ["l[1].v"]


def test_an_optional_old_value_lets_a_rule_run_at_creation() -> None:
    rule = {"rule": "oldSelf.hasValue() || self != 'gone'", "optionalOldSelf": True, "message": "no"}
    schema = from_node({"type": "object", "properties": {"a": {**TEXT, "x-kubernetes-validations": [rule]}}})
    assert messages(schema, {"a": "gone"}) == [("a", 'Invalid value: "string": no')]
    assert messages(schema, {"a": "gone"}, {"a": "x"}) == []


def test_names_that_are_no_identifiers_are_escaped() -> None:
    properties = {"my-name": TEXT, "namespace": TEXT, "x.y/z": TEXT, "share": {"type": "number"}}
    rule = "self.my__dash__name == self.__namespace__ && self.x__dot__y__slash__z == 'c' && self.share > 0.5"
    schema = ruled({"type": "object", "properties": properties}, {"rule": rule})
    assert messages(schema, {"my-name": "a", "namespace": "a", "x.y/z": "c", "share": 1}) == []


def test_all_rules_of_an_object_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_EVALUATIONS", 10)
    item = {**TEXT, "x-kubernetes-validations": [{"rule": "self != ''"}]}
    schema = from_node({"type": "array", "items": item})
    assert "cost budget" in messages(schema, ["a"] * 20)[-1][1]


# Definitions


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"type": "array"}, "type"),
        ({"properties": {"spec": {}}}, "properties[spec].type"),
        ({"properties": {"spec": {"type": "text"}}}, "properties[spec].type"),
        ({"properties": {"spec": {"type": "array"}}}, "properties[spec].items"),
        ({"properties": {"spec": {"type": "string", "pattern": "(?=x)"}}}, "properties[spec].pattern"),
        ({"properties": {"spec": {"type": "string", "default": 1}}}, "properties[spec].default"),
        (
            {"properties": {"spec": {"type": "array", "items": TEXT, "x-kubernetes-list-type": "map"}}},
            "properties[spec].x-kubernetes-list-map-keys",
        ),
        (
            {"properties": {"spec": {**RANGE, "x-kubernetes-validations": [{"rule": "self.min <"}]}}},
            "properties[spec].x-kubernetes-validations[0].rule",
        ),
        (
            {"properties": {"spec": {"type": "array", "items": TEXT, "uniqueItems": True}}},
            "properties[spec].uniqueItems",
        ),
    ],
)  # fmt: skip
def test_schemas_that_are_not_structural_are_refused(rest: Rest, change: Object, path: str) -> None:
    crd = definition()
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].update(change)
    refused = refusal(lambda: define(rest, crd))
    assert refused.code == 422
    assert f"spec.versions[0].schema.openAPIV3Schema.{path}" in [c["field"] for c in refused.details["causes"]]


def test_a_rule_of_a_definition_refuses_objects(rest: Rest) -> None:
    spec = {"type": "object", "properties": {"size": NUMBER},
            "x-kubernetes-validations": [{"rule": "self.size < 10", "message": "too large"}]}  # fmt: skip
    define(rest, definition(version(spec=spec)))
    refused = refusal(lambda: lamp(rest, size=11))
    assert refused.message == 'Lamp.example.com "desk" is invalid: spec: Invalid value: "object": too large'
    lamp(rest, size=1)


def test_what_was_wrong_before_the_schema_changed_may_stay(rest: Rest) -> None:
    crd = define(rest, definition())
    lamp(rest, size=50, colour="red")
    spec = {"type": "object", "properties": {"size": {**NUMBER, "maximum": 10}, "colour": TEXT}}
    crds = target(rest, "apiextensions.k8s.io", "v1", "customresourcedefinitions", "lamps.example.com")
    rest.patch(crds, {"spec": {"versions": [version(spec=spec)]}}, MERGE_PATCH, OPTIONS)
    assert crd["status"]["conditions"]
    assert change(rest, {"spec": {"colour": "blue"}})["spec"] == {"size": 50, "colour": "blue"}
    assert refusal(lambda: change(rest, {"spec": {"size": 51}})).code == 422


def test_versions_are_of_one_object_with_their_own_fields_and_defaults(rest: Rest) -> None:
    newer = {"type": "object", "properties": {"size": NUMBER, "mode": {**TEXT, "default": "auto"}}}
    define(rest, definition(version(), version("v2", newer, storage=False)))
    lamp(rest, size=1, colour="red")
    seen = rest.get(target(rest, "example.com", "v2", "lamps", "desk"))
    assert (seen["apiVersion"], seen["spec"]) == ("example.com/v2", {"size": 1, "mode": "auto"})
    assert rest.get(target(rest, "example.com", "v1", "lamps", "desk"))["spec"] == {"size": 1, "colour": "red"}
    lamp(rest, "floor", "v2", size=2)
    stored = rest.store.get(target(rest, "example.com", "v2", "lamps", "floor").key)
    assert stored is not None and stored["apiVersion"] == "example.com/v1"
    served = target(rest, "example.com", "v2", "lamps").served
    listed = Reader(rest).page(Target(served, "x"), {}).encode(Representation(served, rest.presented))
    assert listed.count(b'{"apiVersion":"example.com/v2","kind":"Lamp"') == 2


def test_status_and_scale_of_a_custom_resource(rest: Rest) -> None:
    spec = {"type": "object", "properties": {"replicas": NUMBER, "size": NUMBER}}
    below = {
        "status": {},
        "scale": {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas",
                  "labelSelectorPath": ".status.selector"},
    }  # fmt: skip
    define(rest, definition(version(spec=spec, subresources=below)))
    made = lamp(rest, replicas=2)
    assert "status" not in made
    change(rest, {"status": {"replicas": 1, "selector": "a=b"}, "spec": {"replicas": 9}}, sub="status")
    scale = rest.get(target(rest, "example.com", "v1", "lamps", "desk", "scale"))
    assert (scale["spec"], scale["status"]) == ({"replicas": 2}, {"replicas": 1, "selector": "a=b"})
    change(rest, {"spec": {"replicas": 5}}, sub="scale")
    found = rest.get(target(rest, "example.com", "v1", "lamps", "desk"))
    assert found["spec"] == {"replicas": 5} and found["metadata"]["generation"] == 2


def test_selectable_fields(rest: Rest) -> None:
    define(rest, definition(version(selectableFields=[{"jsonPath": ".spec.colour"}])))
    lamp(rest, "a", colour="red")
    lamp(rest, "b", colour="blue")
    reader, where = Reader(rest), target(rest, "example.com", "v1", "lamps")
    assert reader.names(where, {"fieldSelector": "spec.colour=red"}) == [("x", "a")]
    assert refusal(lambda: reader.names(where, {"fieldSelector": "spec.size=1"})).code == 400


def test_keyed_lists_are_merged_by_server_side_apply(rest: Rest) -> None:
    light = {"type": "object", "required": ["name"], "properties": {"name": TEXT, "watt": NUMBER}}
    keyed = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    lights = {"type": "array", "items": light, **keyed}
    define(rest, definition(version(spec={"type": "object", "properties": {"lights": lights}})))
    for manager, name in (("a", "left"), ("b", "right")):
        config = {"apiVersion": "example.com/v1", "kind": "Lamp", "metadata": {"name": "desk"},
                  "spec": {"lights": [{"name": name, "watt": 5}]}}  # fmt: skip
        where = target(rest, "example.com", "v1", "lamps", "desk")
        applied, _ = rest.patch(where, config, APPLY_PATCH, WriteOptions(field_manager=manager))
    assert [light["name"] for light in applied["spec"]["lights"]] == ["left", "right"]


def test_a_name_that_is_taken_is_not_accepted(rest: Rest) -> None:
    define(rest, definition(shortNames=["la"]))
    second = define(rest, definition(plural="lanterns", kind="Lantern", shortNames=["la"]))
    conditions = {c["type"]: (c["status"], c["reason"]) for c in second["status"]["conditions"]}
    assert conditions["NamesAccepted"] == ("False", "ShortNamesConflict")
    assert conditions["Established"] == ("False", "NotAccepted")
    assert rest.catalog.lookup("example.com", "v1", "lanterns") is None


def test_a_definition_goes_after_its_objects(rest: Rest) -> None:
    define(rest, definition())
    rest.create(
        target(rest, "example.com", "v1", "lamps"),
        {"metadata": {"name": "held", "finalizers": ["example.com/off"]}},
        OPTIONS,
    )
    lamp(rest)
    crd = target(rest, "apiextensions.k8s.io", "v1", "customresourcedefinitions", "lamps.example.com")
    _, gone = rest.delete(crd, deletion.parse({}, {}))
    assert not gone
    terminating = {c["type"]: c["status"] for c in rest.get(crd)["status"]["conditions"]}
    assert terminating["Terminating"] == "True"
    assert refusal(lambda: lamp(rest, "new")).code == 405
    assert refusal(lambda: change(rest, {}, "desk")).code == 404
    change(rest, {"metadata": {"finalizers": None}}, "held")
    assert refusal(lambda: rest.get(crd)).code == 404
    assert rest.catalog.lookup("example.com", "v1", "lamps") is None


def test_stored_versions_are_kept_in_mind(rest: Rest) -> None:
    define(rest, definition())
    crd = target(rest, "apiextensions.k8s.io", "v1", "customresourcedefinitions", "lamps.example.com")
    both = [version(storage=False), version("v2")]
    patched, _ = rest.patch(crd, {"spec": {"versions": both}}, MERGE_PATCH, OPTIONS)
    assert patched["status"]["storedVersions"] == ["v1", "v2"]
    refused = refusal(lambda: rest.patch(crd, {"spec": {"versions": [version("v2")]}}, MERGE_PATCH, OPTIONS))
    assert "status.storedVersions[0]" in refused.message

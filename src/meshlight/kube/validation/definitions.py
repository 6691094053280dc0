"""Rules of CustomResourceDefinitions: names, versions, structural schemas, CEL rules that compile."""

from __future__ import annotations

import re
from typing import Any

from meshlight.kube import expressions, patterns, structural
from meshlight.kube import field_errors as faults
from meshlight.kube.expressions import ExpressionError
from meshlight.kube.resources import Object
from meshlight.kube.rules import VARIABLES, wrapped
from meshlight.kube.schema import Rule, from_node
from meshlight.kube.status import Cause
from meshlight.kube.validation import names

MAX_CAUSES = 20
"""Faults that are told of one definition."""

_TYPES = ("array", "boolean", "integer", "number", "object", "string")
_FORBIDDEN = ("$ref", "definitions", "dependencies", "additionalItems", "patternProperties", "deprecated")
_LIST_TYPES, _MAP_TYPES = ("atomic", "map", "set"), ("atomic", "granular")
_REASONS = ("FieldValueDuplicate", "FieldValueForbidden", "FieldValueInvalid", "FieldValueRequired")
_SCALE_PATHS = {"specReplicasPath": ".spec.", "statusReplicasPath": ".status.", "labelSelectorPath": ""}
_PATH = re.compile(r"(\.[a-zA-Z_][\w-]*)+")


def definition(obj: Object) -> list[Cause]:
    """Faults of a CustomResourceDefinition."""
    spec = obj.get("spec") or {}
    found = spec.get("names") or {}
    group, plural = spec.get("group") or "", found.get("plural") or ""
    causes: list[Cause] = []
    name = obj["metadata"].get("name")
    if group and plural and name != f"{plural}.{group}":
        detail = 'must be spec.names.plural+"."+spec.group'
        causes.append(faults.invalid_value("metadata.name", name, detail))
    if message := names.subdomain(group):
        causes.append(faults.invalid_value("spec.group", group, message))
    for field, text in (("plural", plural), ("singular", found.get("singular") or plural)):
        if text and (message := names.label(text)):
            causes.append(faults.invalid_value(f"spec.names.{field}", text, message))
    if (spec.get("conversion") or {}).get("strategy", "None") != "None":
        path, strategy = "spec.conversion.strategy", spec["conversion"]["strategy"]
        causes.append(faults.not_supported(path, strategy, ["None"]))
    if spec.get("preserveUnknownFields"):
        detail = "must be false in order to use defaults in the schema: set it in the schema instead"
        causes.append(faults.invalid_value("spec.preserveUnknownFields", True, detail))
    causes += _versions(spec.get("versions") or [])
    return causes[:MAX_CAUSES]


def _versions(versions: list[Object]) -> list[Cause]:
    causes: list[Cause] = []
    if not versions:
        return [faults.required("spec.versions", "must have at least one version")]
    if sum(bool(v.get("storage")) for v in versions) != 1:
        detail = "must have exactly one version marked as storage version"
        causes.append(faults.invalid_value("spec.versions", [v.get("name") for v in versions], detail))
    seen: set[str] = set()
    for index, version in enumerate(versions):
        at, name = f"spec.versions[{index}]", version.get("name") or ""
        if name in seen:
            causes.append(faults.duplicate(f"{at}.name", name))
        seen.add(name)
        if name and (message := names.label(name)):
            causes.append(faults.invalid_value(f"{at}.name", name, message))
        causes += _version(version, at)
    return causes


def _version(version: Object, at: str) -> list[Cause]:
    schema = (version.get("schema") or {}).get("openAPIV3Schema")
    if not schema:
        return [faults.required(f"{at}.schema.openAPIV3Schema", "schemas are required")]
    path = f"{at}.schema.openAPIV3Schema"
    causes: list[Cause] = []
    if schema.get("type") != "object":
        if "type" not in schema:
            causes.append(faults.required(f"{path}.type", "must not be empty at the root"))
        else:
            causes.append(faults.invalid_value(f"{path}.type", schema["type"], "must be object at the root"))
    causes += _structure(schema, path, root=True)
    for index, column in enumerate(version.get("additionalPrinterColumns") or ()):
        where = f"{at}.additionalPrinterColumns[{index}]"
        if column.get("type") not in ("boolean", "date", "integer", "number", "string"):
            listed = ["boolean", "date", "integer", "number", "string"]
            causes.append(faults.not_supported(f"{where}.type", column.get("type"), listed))
    scale = (version.get("subresources") or {}).get("scale") or {}
    for field, start in _SCALE_PATHS.items():
        text = scale.get(field)
        if text and not (_PATH.fullmatch(text) and text.startswith(start)):
            where = f"{at}.subresources.scale.{field}"
            causes.append(faults.invalid_value(where, text, f"should be a json path under {start.rstrip('.')}"))
    for index, field_ in enumerate(version.get("selectableFields") or ()):
        text = field_.get("jsonPath") or ""
        if not _PATH.fullmatch(text):
            where = f"{at}.selectableFields[{index}].jsonPath"
            causes.append(faults.invalid_value(where, text, "must be a simple path of fields"))
    return causes


def _structure(node: Object, path: str, *, root: bool = False, logic: bool = False) -> list[Cause]:
    """Faults of one node of a structural schema and of those below; `logic` below allOf, anyOf, oneOf, not."""
    causes: list[Cause] = []
    for word in _FORBIDDEN:
        if node.get(word):
            causes.append(faults.forbidden(f"{path}.{word}", f"{word} is not supported"))
    if node.get("uniqueItems"):
        detail = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic"
        causes.append(faults.forbidden(f"{path}.uniqueItems", detail))
    kind = node.get("type")
    if kind and kind not in _TYPES:
        causes.append(faults.not_supported(f"{path}.type", kind, _TYPES))
    untyped = node.get("x-kubernetes-int-or-string") or node.get("x-kubernetes-preserve-unknown-fields")
    if not kind and not untyped and not logic and not root:
        causes.append(faults.required(f"{path}.type", "must not be empty for specified object fields"))
    if kind == "array" and not node.get("items") and not logic:
        causes.append(faults.required(f"{path}.items", "must be specified"))
    if "pattern" in node:
        try:
            patterns.compiled(node["pattern"])
        except patterns.PatternError as error:
            causes.append(faults.invalid_value(f"{path}.pattern", node["pattern"], str(error)))
    causes += _merging(node, path)
    causes += _rules(node, path)
    if "default" in node and kind:
        for cause in structural.validate(node["default"], from_node(node)):
            where = f"{path}.default{'.' if cause.field else ''}{cause.field}"
            causes.append(Cause(where, cause.reason, cause.message))
    for name, child in (node.get("properties") or {}).items():
        causes += _structure(child, f"{path}.properties[{name}]", logic=logic)
    if isinstance(node.get("additionalProperties"), dict):
        causes += _structure(node["additionalProperties"], f"{path}.additionalProperties", logic=logic)
        if node.get("properties"):
            detail = "additionalProperties and properties are mutual exclusive"
            causes.append(faults.forbidden(f"{path}.additionalProperties", detail))
    if isinstance(node.get("items"), dict):
        causes += _structure(node["items"], f"{path}.items", logic=logic)
    elif isinstance(node.get("items"), list):
        causes.append(faults.forbidden(f"{path}.items", "items must be a schema object and not an array"))
    for word in ("allOf", "anyOf", "oneOf"):
        for index, branch in enumerate(node.get(word) or ()):
            causes += _structure(branch, f"{path}.{word}[{index}]", logic=True)
    if "not" in node:
        causes += _structure(node["not"], f"{path}.not", logic=True)
    return causes


def _merging(node: Object, path: str) -> list[Cause]:
    """Faults in how server-side apply is told to merge."""
    causes: list[Cause] = []
    list_type, keys = node.get("x-kubernetes-list-type"), node.get("x-kubernetes-list-map-keys") or []
    if list_type is not None and list_type not in _LIST_TYPES:
        causes.append(faults.not_supported(f"{path}.x-kubernetes-list-type", list_type, _LIST_TYPES))
    map_type = node.get("x-kubernetes-map-type")
    if map_type is not None and map_type not in _MAP_TYPES:
        causes.append(faults.not_supported(f"{path}.x-kubernetes-map-type", map_type, _MAP_TYPES))
    items: Any = node.get("items") or {}
    if list_type == "map":
        if not keys:
            detail = "must not be empty if x-kubernetes-list-type is map"
            causes.append(faults.required(f"{path}.x-kubernetes-list-map-keys", detail))
        for index, key in enumerate(keys):
            below = (items.get("properties") or {}).get(key)
            where = f"{path}.x-kubernetes-list-map-keys[{index}]"
            if below is None:
                causes.append(faults.invalid_value(where, key, "entries must all be names of item properties"))
            elif key not in (items.get("required") or ()) and "default" not in below:
                detail = (
                    "this property is in x-kubernetes-list-map-keys, so it must have a default or be required"
                )
                causes.append(faults.required(f"{path}.items.properties[{key}].default", detail))
    return causes


def _rules(node: Object, path: str) -> list[Cause]:
    causes: list[Cause] = []
    for index, source in enumerate(node.get("x-kubernetes-validations") or ()):
        at = f"{path}.x-kubernetes-validations[{index}]"
        text = source.get("rule") or ""
        if not text.strip():
            causes.append(faults.required(f"{at}.rule", "rule is not specified"))
            continue
        if source.get("reason") and source["reason"] not in _REASONS:
            causes.append(faults.not_supported(f"{at}.reason", source["reason"], _REASONS))
        rule = Rule(text, optional_old_self=bool(source.get("optionalOldSelf")))
        compiling = [("rule", text, wrapped(rule))]
        if source.get("messageExpression"):
            compiling.append(("messageExpression", source["messageExpression"], source["messageExpression"]))
        for field, shown, expression in compiling:
            try:
                expressions.compiled(expression, *VARIABLES)
            except ExpressionError as error:
                detail = f"compilation failed: {error}"
                causes.append(faults.invalid_value(f"{at}.{field}", shown, detail))
    return causes


def definition_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change of a CustomResourceDefinition: group, scope and names stay, stored versions too."""
    before, after = old["spec"], new["spec"]
    causes = [
        faults.invalid_value(f"spec.{field}", after.get(field), "field is immutable")
        for field in ("group", "scope")
        if before.get(field) != after.get(field)
    ]
    for field in ("plural", "kind"):
        if before["names"].get(field) != after["names"].get(field):
            causes.append(
                faults.invalid_value(f"spec.names.{field}", after["names"].get(field), "field is immutable")
            )
    there = {v.get("name") for v in after.get("versions") or ()}
    stored = (old.get("status") or {}).get("storedVersions") or []
    for index, version in enumerate(stored):
        if version not in there:
            detail = "must appear in spec.versions"
            causes.append(faults.invalid_value(f"status.storedVersions[{index}]", version, detail))
    return causes

"""The patches of the Kubernetes API: JSON Patch (RFC 6902), JSON Merge Patch (RFC 7386) and
strategic merge patch (lists merged by key, as the kinds' schemas declare).

Pure; every function returns a new document and leaves its arguments alone.
"""

from __future__ import annotations

import copy
from typing import Any

from meshlight.kube.resources import Object
from meshlight.kube.schema import ANY, Schema
from meshlight.kube.status import StatusError, bad_request


class PatchError(ValueError):
    """The patch is malformed; the message names the place."""


class DoesNotApplyError(PatchError):
    """A well-formed JSON Patch does not fit the document: a path is missing, or a test fails."""


def patched(document: Object, body: Any, content_type: str, schema: Schema) -> Object:
    """A JSON, merge or strategic merge patch applied to an object. Raises StatusError 400 or 422."""
    try:
        if content_type == "application/json-patch+json":
            result = json_patch(document, body)
        elif not isinstance(body, dict):
            raise PatchError(f"a {content_type} patch is an object")
        elif content_type == "application/strategic-merge-patch+json":
            result = strategic_merge(document, body, schema)
        else:
            result = merge(document, body)
    except DoesNotApplyError as error:
        message = "the server rejected our request due to an error in our request"
        causes = [{"reason": "UnexpectedServerResponse", "message": str(error)}]
        raise StatusError(422, "Invalid", message, {"causes": causes}) from error
    except PatchError as error:
        raise bad_request(str(error)) from error
    if not isinstance(result, dict) or not isinstance(result.get("metadata"), dict):
        raise bad_request("the patch leaves no Kubernetes object")
    return result


def merge(target: Any, patch: Any) -> Any:
    """JSON Merge Patch."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def json_patch(document: Any, operations: Any) -> Any:
    """JSON Patch; `test` failures and missing paths raise PatchError."""
    if not isinstance(operations, list):
        raise PatchError("a JSON patch is a list of operations")
    document = copy.deepcopy(document)
    for operation in operations:
        if not isinstance(operation, dict) or not isinstance(operation.get("path"), str):
            raise PatchError(f"not an operation with a path: {operation!r}")
        verb, path = operation.get("op"), operation["path"]
        if verb in ("move", "copy"):
            if not isinstance(operation.get("from"), str):
                raise PatchError(f"operation {verb} lacks from")
            value = copy.deepcopy(_read(document, operation["from"]))
            if verb == "move":
                document = _change(document, operation["from"], "remove", None)
            document = _change(document, path, "add", value)
        elif verb == "test":
            if _read(document, path) != operation.get("value"):
                raise DoesNotApplyError(f"testing value {path} failed: test failed")
        elif verb in ("add", "replace", "remove"):
            document = _change(document, path, verb, copy.deepcopy(operation.get("value")))
        else:
            raise PatchError(f"unknown operation {verb!r}")
    return document


def _tokens(path: str) -> list[str]:
    if path and not path.startswith("/"):
        raise PatchError(f"path {path!r} does not start with /")
    return [t.replace("~1", "/").replace("~0", "~") for t in path.split("/")[1:]]


def _index(container: list[Any], token: str, path: str) -> int:
    if not token.isdigit() or int(token) >= len(container):
        raise DoesNotApplyError(f"no element {token!r} at {path!r}")
    return int(token)


def _insertion(container: list[Any], token: str, path: str) -> int:
    if token == "-":
        return len(container)
    if not token.isdigit() or int(token) > len(container):
        raise DoesNotApplyError(f"no place {token!r} at {path!r}")
    return int(token)


def _read(document: Any, path: str) -> Any:
    for token in _tokens(path):
        if isinstance(document, list):
            document = document[_index(document, token, path)]
        elif isinstance(document, dict) and token in document:
            document = document[token]
        else:
            raise DoesNotApplyError(f"path {path!r} does not exist")
    return document


def _change(document: Any, path: str, verb: str, value: Any) -> Any:
    tokens = _tokens(path)
    if not tokens:
        return value
    parent = _read(document, "/" + "/".join(_escape(t) for t in tokens[:-1]) if tokens[1:] else "")
    token = tokens[-1]
    if isinstance(parent, list):
        if verb == "add":
            parent.insert(_insertion(parent, token, path), value)
        elif verb == "remove":
            del parent[_index(parent, token, path)]
        else:
            parent[_index(parent, token, path)] = value
    elif isinstance(parent, dict):
        if verb != "add" and token not in parent:
            raise DoesNotApplyError(f"path {path!r} does not exist")
        if verb == "remove":
            del parent[token]
        else:
            parent[token] = value
    else:
        raise DoesNotApplyError(f"path {path!r} does not exist")
    return document


def _escape(token: str) -> str:
    return token.replace("~", "~0").replace("/", "~1")


def strategic_merge(target: Any, patch: Any, schema: Schema) -> Any:
    """Strategic merge patch, with `$patch`, `$retainKeys`, `$setElementOrder` and primitive deletion.

    `schema` says which lists merge and by which key; the others are replaced.
    """
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    directive = patch.get("$patch")
    if directive == "delete":
        return {}
    if directive == "replace":
        return {k: copy.deepcopy(v) for k, v in patch.items() if k != "$patch"}
    if directive not in (None, "merge"):
        raise PatchError(f"unrecognized patch type {directive!r}")
    result = dict(target) if isinstance(target, dict) else {}
    if retain := patch.get("$retainKeys"):
        result = {k: v for k, v in result.items() if k in retain}
    for key, value in patch.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            name = key.split("/", 1)[1]
            result[name] = [v for v in result.get(name) or [] if v not in value]
        elif key.startswith("$"):
            continue
        elif value is None:
            result.pop(key, None)
        elif isinstance(value, list):
            order = patch.get(f"$setElementOrder/{key}")
            result[key] = _merge_list(result.get(key) or [], value, order, schema.member(key) or ANY, key)
        else:
            result[key] = strategic_merge(result.get(key), value, schema.member(key) or ANY)
    for key, order in patch.items():
        if key.startswith("$setElementOrder/"):
            name = key.split("/", 1)[1]
            if result.get(name) and name not in patch:
                result[name] = _ordered((schema.member(name) or ANY).merge_key, result[name], order)
    return result


def _merge_list(
    target: list[Any], patch: list[Any], order: list[Any] | None, schema: Schema, name: str
) -> list[Any]:
    if any(isinstance(e, dict) and e.get("$patch") == "replace" for e in patch):
        return [copy.deepcopy(e) for e in patch if e.get("$patch") != "replace"]
    key = schema.merge_key
    if "merge" not in schema.patch_strategy:
        return copy.deepcopy(patch)
    if not key:
        merged = [*target, *(e for e in patch if e not in target)]
        return _ordered("", merged, order) if order else merged
    result = list(target)
    for element in patch:
        if not isinstance(element, dict) or key not in element:
            raise PatchError(f"map: {element} does not contain declared merge key: {key} (in {name})")
        at = next((i for i, e in enumerate(result) if e.get(key) == element[key]), None)
        if element.get("$patch") == "delete":
            result = [e for e in result if e.get(key) != element[key]]
        elif at is None:
            result.append(strategic_merge({}, element, schema.items or ANY))
        else:
            result[at] = strategic_merge(result[at], element, schema.items or ANY)
    return _ordered(key, result, order) if order else result


def _ordered(key: str, elements: list[Any], order: list[Any]) -> list[Any]:
    """The elements in the wanted order; those it does not name keep their place among the others."""
    wanted = [o.get(key) if key else o for o in order]

    def value(element: Any) -> Any:
        return element.get(key) if key else element

    named = iter(sorted((e for e in elements if value(e) in wanted), key=lambda e: wanted.index(value(e))))
    return [next(named) if value(e) in wanted else e for e in elements]

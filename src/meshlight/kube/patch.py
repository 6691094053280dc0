"""The patches of the Kubernetes API: JSON Patch (RFC 6902), JSON Merge Patch (RFC 7386) and
strategic merge patch (lists merged by key, as `patchMergeKey` of the API types declares).

Pure; every function returns a new document and leaves its arguments alone.
"""

from __future__ import annotations

import copy
from typing import Any

MERGE_KEYS: dict[str, str] = {
    # patchMergeKey of core/v1 and apps/v1, by the name of the list's field
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "conditions": "type",
    "addresses": "type",
    "ownerReferences": "uid",
    "secrets": "name",
    "taints": "key",
    "podIPs": "ip",
    "hostIPs": "ip",
}
PRIMITIVE_LISTS = {"finalizers"}


class PatchError(ValueError):
    """The patch is malformed or does not fit the document; the message names the place."""


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
        verb, path = operation.get("op"), operation.get("path", "")
        if verb in ("move", "copy"):
            value = copy.deepcopy(_read(document, operation["from"]))
            if verb == "move":
                document = _change(document, operation["from"], "remove", None)
            document = _change(document, path, "add", value)
        elif verb == "test":
            if _read(document, path) != operation.get("value"):
                raise PatchError(f"testing value {path} failed")
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
        raise PatchError(f"no element {token!r} at {path!r}")
    return int(token)


def _read(document: Any, path: str) -> Any:
    for token in _tokens(path):
        if isinstance(document, list):
            document = document[_index(document, token, path)]
        elif isinstance(document, dict) and token in document:
            document = document[token]
        else:
            raise PatchError(f"path {path!r} does not exist")
    return document


def _change(document: Any, path: str, verb: str, value: Any) -> Any:
    tokens = _tokens(path)
    if not tokens:
        return value
    parent = _read(document, "/" + "/".join(_escape(t) for t in tokens[:-1]) if tokens[1:] else "")
    token = tokens[-1]
    if isinstance(parent, list):
        if verb == "add":
            parent.insert(len(parent) if token == "-" else min(int(token), len(parent)), value)
        elif verb == "remove":
            del parent[_index(parent, token, path)]
        else:
            parent[_index(parent, token, path)] = value
    elif isinstance(parent, dict):
        if verb != "add" and token not in parent:
            raise PatchError(f"path {path!r} does not exist")
        if verb == "remove":
            del parent[token]
        else:
            parent[token] = value
    else:
        raise PatchError(f"path {path!r} does not exist")
    return document


def _escape(token: str) -> str:
    return token.replace("~", "~0").replace("/", "~1")


def strategic_merge(target: Any, patch: Any) -> Any:
    """Strategic merge patch, with `$patch`, `$retainKeys`, `$setElementOrder` and primitive deletion."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    directive = patch.get("$patch")
    if directive == "delete":
        return {}
    if directive == "replace":
        return {k: copy.deepcopy(v) for k, v in patch.items() if k != "$patch"}
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
            result[key] = _merge_list(key, result.get(key) or [], value, order)
        else:
            result[key] = strategic_merge(result.get(key), value)
    for key, order in patch.items():
        if key.startswith("$setElementOrder/"):
            name = key.split("/", 1)[1]
            if name in result and name not in patch:
                result[name] = _ordered(_merge_key(name, result[name]), result[name], order)
    return result


def _merge_key(name: str, elements: list[Any]) -> str | None:
    objects = [e for e in elements if isinstance(e, dict)]
    if name == "ports":
        # Containers merge ports by containerPort, Services by port.
        return "containerPort" if any("containerPort" in e for e in objects) else "port"
    return MERGE_KEYS.get(name) if objects or not elements else None


def _merge_list(name: str, target: list[Any], patch: list[Any], order: list[Any] | None) -> list[Any]:
    if any(isinstance(e, dict) and e.get("$patch") == "replace" for e in patch):
        return [copy.deepcopy(e) for e in patch if e.get("$patch") != "replace"]
    key = _merge_key(name, patch or target)
    if key is None:
        if name in PRIMITIVE_LISTS:
            merged = [*target, *(e for e in patch if e not in target)]
            return _ordered(None, merged, order) if order else merged
        return copy.deepcopy(patch)
    result = list(target)
    for element in patch:
        at = next((i for i, e in enumerate(result) if e.get(key) == element.get(key)), None)
        if element.get("$patch") == "delete":
            if at is not None:
                del result[at]
        elif at is None:
            result.append(strategic_merge({}, element))
        else:
            result[at] = strategic_merge(result[at], element)
    return _ordered(key, result, order) if order else result


def _ordered(key: str | None, elements: list[Any], order: list[Any]) -> list[Any]:
    wanted = [o.get(key) if key else o for o in order]

    def rank(element: Any) -> int:
        value = element.get(key) if key else element
        return wanted.index(value) if value in wanted else len(wanted)

    return sorted(elements, key=rank)

"""ValidatingAdmissionPolicies: CEL over a request, bound to what they apply to.

Semantics of admissionregistration.k8s.io/v1: match constraints and conditions, variables, parameters, actions
Deny, Warn and Audit, failurePolicy. The `authorizer` variable is not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from meshlight.kube import expressions
from meshlight.kube.admission import Request
from meshlight.kube.admission.stored import Stored
from meshlight.kube.expressions import ExpressionError
from meshlight.kube.resources import Object
from meshlight.kube.selectors import match_labels
from meshlight.kube.status import StatusError
from meshlight.kube.store import Key, Store

GROUP = "admissionregistration.k8s.io"
VARIABLES = ("object", "oldObject", "request", "params", "namespaceObject", "variables")
_CODES = {"Unauthorized": 401, "Forbidden": 403, "RequestEntityTooLarge": 413, "Invalid": 422}
_USES = re.compile(r"\bvariables\.([A-Za-z_]\w*)")

Params = Callable[[Object, Object, str], list[Object] | None]
"""(policy, binding, namespace of the request) to the parameter objects; None when the policy takes none."""


def matches_rule(rule: Object, request: Request) -> bool:
    """Whether a rule with operations, groups, versions and resources means a request."""

    def has(field: str, value: str) -> bool:
        found = rule.get(field)
        return found is None or "*" in found or value in found

    r = request.served.resource
    if not (has("operations", request.operation) and has("apiGroups", r.group)):
        return False
    if not has("apiVersions", r.version):
        return False
    scope = rule.get("scope", "*")
    if scope != "*" and (scope == "Namespaced") is not r.namespaced:
        return False
    names = rule.get("resourceNames") or ()
    return (not names or request.name in names) and any(
        _means(pattern, r.plural, request.subresource) for pattern in rule.get("resources") or ("*",)
    )


def _means(pattern: str, plural: str, subresource: str) -> bool:
    resource, _, below = pattern.partition("/")
    if resource not in ("*", plural):
        return False
    if not below:
        return not subresource
    return below in ("*", subresource) if subresource else below == "*" and resource == "*"


def matches_resources(rules: Object, request: Request, namespace: Object | None) -> bool:
    """Whether `matchConstraints` or `matchResources` mean a request."""
    found = rules.get("resourceRules")
    if found is not None and not any(matches_rule(rule, request) for rule in found):
        return False
    if any(matches_rule(rule, request) for rule in rules.get("excludeResourceRules") or ()):
        return False
    return selected(rules, request, namespace)


def selected(rules: Object, request: Request, namespace: Object | None) -> bool:
    """Whether `namespaceSelector` and `objectSelector` choose a request's namespace and object.

    Objects that are in no namespace are chosen whatever the first says.
    """
    selector = rules.get("namespaceSelector") or {}
    if selector and namespace is not None and not match_labels(selector, _labels(namespace)):
        return False
    selector = rules.get("objectSelector") or {}
    return not selector or any(
        match_labels(selector, _labels(obj)) for obj in (request.obj, request.old) if obj is not None
    )


def _labels(obj: Object) -> dict[str, str]:
    return obj["metadata"].get("labels") or {}


def shown(request: Request) -> Object:
    """The `request` variable: what an AdmissionRequest says."""
    r = request.served.resource
    user = request.user.review() if request.user is not None else {"username": "", "groups": []}
    return {
        "kind": {"group": r.group, "version": r.version, "kind": r.kind},
        "resource": {"group": r.group, "version": r.version, "resource": r.plural},
        "subResource": request.subresource,
        "requestKind": {"group": r.group, "version": r.version, "kind": r.kind},
        "requestResource": {"group": r.group, "version": r.version, "resource": r.plural},
        "name": request.name,
        "namespace": request.namespace,
        "operation": request.operation,
        "userInfo": user,
        "dryRun": request.dry_run,
    }


class _Scope:
    """The variables of one policy on one request; its own ones are evaluated when an expression names them."""

    def __init__(
        self, request: Request, namespace: Object | None, params: Object | None, own: list[Object]
    ) -> None:
        self._own = {v["name"]: v["expression"] for v in own}
        self._found: dict[str, Any] = {}
        self._base: dict[str, Any] = {
            "object": request.obj,
            "oldObject": request.old,
            "request": shown(request),
            "params": params,
            "namespaceObject": namespace,
        }

    def evaluate(self, expression: str) -> Any:
        """The value of an expression. Raises ExpressionError."""
        for name in _USES.findall(expression):
            if name in self._own and name not in self._found:
                self._found[name] = self.evaluate(self._own[name])
        compiled = expressions.compiled(expression, *VARIABLES)
        return compiled.evaluate({**self._base, "variables": self._found})


class Policies:
    """The plug-in."""

    def __init__(self, store: Store, params: Params) -> None:
        self._store = store
        self._params = params
        self._policies = Stored(store, f"{GROUP}/validatingadmissionpolicies")
        self._bindings = Stored(store, f"{GROUP}/validatingadmissionpolicybindings")

    def __call__(self, request: Request) -> None:
        """Evaluate every bound policy. Raises StatusError of the reason that the policy gives."""
        bindings = self._bindings.all()
        if not bindings or request.served.resource.group == GROUP:
            return
        namespace = self._namespace(request)
        for binding in bindings:
            spec = binding.get("spec") or {}
            policy = self._policies.named(spec.get("policyName") or "")
            if policy is None or not matches_resources(
                (policy.get("spec") or {}).get("matchConstraints") or {}, request, namespace
            ):
                continue
            if matches_resources(spec.get("matchResources") or {}, request, namespace):
                self._apply(policy, binding, request, namespace)

    def _namespace(self, request: Request) -> Object | None:
        if request.kind == "Namespace":
            return request.obj or request.old
        return self._store.get(Key("/namespaces", "", request.namespace)) if request.namespace else None

    def _apply(self, policy: Object, binding: Object, request: Request, namespace: Object | None) -> None:
        found = self._params(policy, binding, request.namespace)
        for params in [None] if found is None else found:
            for message, reason in self._failures(policy, request, namespace, params):
                self._act(policy, binding, request, message, reason)

    @staticmethod
    def _failures(
        policy: Object, request: Request, namespace: Object | None, params: Object | None
    ) -> Iterator[tuple[str, str]]:
        """Messages and reasons of the validations that do not hold."""
        spec = policy["spec"]
        scope = _Scope(request, namespace, params, spec.get("variables") or [])
        strict = spec.get("failurePolicy", "Fail") == "Fail"
        try:
            for condition in spec.get("matchConditions") or ():
                if scope.evaluate(condition["expression"]) is not True:
                    return
        except ExpressionError as error:
            if strict:
                yield f"match condition failed: {error}", "Forbidden"
            return
        for validation in spec.get("validations") or ():
            expression = validation["expression"]
            try:
                if scope.evaluate(expression) is True:
                    continue
            except ExpressionError as error:
                if strict:
                    yield f"expression '{expression}' resulted in error: {error}", "Invalid"
                continue
            yield _message(scope, validation), validation.get("reason") or "Invalid"

    @staticmethod
    def _act(policy: Object, binding: Object, request: Request, message: str, reason: str) -> None:
        names = f"'{policy['metadata']['name']}' with binding '{binding['metadata']['name']}'"
        actions = (binding.get("spec") or {}).get("validationActions") or ["Deny"]
        if "Warn" in actions:
            request.warnings.append(f"Validation failed for ValidatingAdmissionPolicy {names}: {message}")
        if "Deny" in actions:
            refused = request.refusal(f"ValidatingAdmissionPolicy {names} denied request: {message}")
            details = {**refused.details, "causes": [{"message": message}]}
            raise StatusError(_CODES.get(reason, 422), reason, refused.message, details)


def _message(scope: _Scope, validation: Object) -> str:
    if text := validation.get("messageExpression"):
        try:
            found = scope.evaluate(text)
        except ExpressionError:
            found = None
        if isinstance(found, str) and found.strip():
            return found.strip()
    return validation.get("message") or f"failed expression: {' '.join(validation['expression'].split())}"

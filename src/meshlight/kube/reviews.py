"""Questions to the API about who may do what: access reviews, rules reviews, who am I. Pure."""

from __future__ import annotations

from meshlight.kube.authentication import Attributes, User
from meshlight.kube.authorization import Authorizer
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause, StatusError, bad_request, invalid

GROUP = "authorization.k8s.io"
KINDS = frozenset(
    ("SelfSubjectAccessReview", "SubjectAccessReview", "LocalSubjectAccessReview", "SelfSubjectRulesReview",
     "SelfSubjectReview")
)  # fmt: skip


def review(authorizer: Authorizer, kind: str, body: Object, asker: User, namespace: str | None) -> Object:
    """Answer a review of one of KINDS. Raises StatusError 400 or 422."""
    if not isinstance(body, dict) or not isinstance(body.get("spec") or {}, dict):
        raise bad_request(f"the body is not a {kind}")
    spec = body.get("spec") or {}
    match kind:
        case "SelfSubjectReview":
            status: Object = {"userInfo": asker.review()}
        case "SelfSubjectRulesReview":
            status = _rules(authorizer, asker, spec.get("namespace") or "")
        case "SelfSubjectAccessReview":
            status = _access(authorizer, kind, asker, spec)
        case _:
            status = _access(authorizer, kind, _subject(kind, spec), spec)
            stated = (spec.get("resourceAttributes") or {}).get("namespace")
            if kind == "LocalSubjectAccessReview" and stated != namespace:
                message = f"spec.resourceAttributes.namespace must match namespace: {namespace}"
                raise bad_request(message)
    return {**body, "metadata": {"creationTimestamp": None}, "spec": spec, "status": status}


def _subject(kind: str, spec: Object) -> User:
    extra = {k: tuple(v) for k, v in (spec.get("extra") or {}).items()}
    user = User(spec.get("user") or "", tuple(spec.get("groups") or ()), spec.get("uid") or "", extra)
    if not user.name and not user.groups:
        detail = "Required value: at least one of user or group must be specified"
        raise invalid(GROUP, kind, "", [Cause("spec.user", "FieldValueRequired", detail)])
    return user


def attributes(spec: Object) -> Attributes:
    """What an access review asks about."""
    if asked := spec.get("nonResourceAttributes"):
        return Attributes(asked.get("verb", ""), path=asked.get("path", ""))
    asked = spec.get("resourceAttributes") or {}
    fields = ("verb", "group", "resource", "subresource", "namespace", "name")
    return Attributes(*(asked.get(field, "") for field in fields))


def _access(authorizer: Authorizer, kind: str, user: User, spec: Object) -> Object:
    if bool(spec.get("resourceAttributes")) == bool(spec.get("nonResourceAttributes")):
        detail = "exactly one of nonResourceAttributes or resourceAttributes must be specified"
        cause = Cause("spec.resourceAttributes", "FieldValueInvalid", f"Invalid value: null: {detail}")
        raise invalid(GROUP, kind, "", [cause])
    try:
        reason = authorizer.reason(user, attributes(spec))
    except StatusError as error:
        return {"allowed": False, "evaluationError": error.message}
    return {"allowed": True, "reason": reason} if reason is not None else {"allowed": False}


def _rules(authorizer: Authorizer, user: User, namespace: str) -> Object:
    """All rules of a user in a namespace, as `kubectl auth can-i --list` shows them."""
    resource, other = [], []
    for rule in authorizer.rules(user, namespace):
        verbs = list(rule.get("verbs") or ())
        if rule.get("resources"):
            fields = ("apiGroups", "resources", "resourceNames")
            resource.append({"verbs": verbs, **{f: list(rule[f]) for f in fields if rule.get(f)}})
        if rule.get("nonResourceURLs"):
            other.append({"verbs": verbs, "nonResourceURLs": list(rule["nonResourceURLs"])})
    return {"resourceRules": resource, "nonResourceRules": other, "incomplete": False}

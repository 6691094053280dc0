"""Service-account tokens: who they are for, what they are bound to, when they end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from meshlight.embedded import pki
from meshlight.kube.status import StatusError
from meshlight.kube.tokens import ISSUER, InvalidToken, TokenIssuer

OBJECTS: dict[tuple[str, str, str], dict[str, Any]] = {
    ("serviceaccounts", "shop", "cart"): {"metadata": {"name": "cart", "uid": "sa-1"}},
    ("pods", "shop", "p"): {
        "metadata": {"name": "p", "uid": "pod-1"},
        "spec": {"serviceAccountName": "cart", "nodeName": "n1"},
    },
    ("nodes", "", "n1"): {"metadata": {"name": "n1", "uid": "node-1"}},
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("state")
    pki.ensure(state, "c", [], 1)
    return state / "pki"


def issuer(keys: Path, objects: dict[tuple[str, str, str], dict[str, Any]] | None = None) -> TokenIssuer:
    known = OBJECTS if objects is None else objects
    return TokenIssuer(keys, lambda plural, namespace, name: known.get((plural, namespace, name)))


def mint(keys: Path, **spec: Any) -> str:
    answer = issuer(keys).request("shop", "cart", {"spec": spec}, int(time.time()))
    return str(answer["status"]["token"])


def test_a_token_names_its_service_account_and_pod(keys: Path) -> None:
    bound = {"kind": "Pod", "apiVersion": "v1", "name": "p", "uid": "pod-1"}
    token = mint(keys, audiences=["istio-ca"], boundObjectRef=bound)
    user = issuer(keys).check(token, ("istio-ca",), time.time()).user
    assert user.name == "system:serviceaccount:shop:cart"
    assert "system:serviceaccounts:shop" in user.groups
    assert user.extra["authentication.kubernetes.io/pod-name"] == ("p",)
    assert user.extra["authentication.kubernetes.io/node-name"] == ("n1",)


def test_refused_tokens(keys: Path) -> None:
    token, checker = mint(keys), issuer(keys)
    with pytest.raises(InvalidToken):
        checker.check(token, ("istio-ca",), time.time())
    with pytest.raises(InvalidToken, match="expired"):
        checker.check(token, (ISSUER,), time.time() + 3601)
    head, body, signature = token.split(".")
    with pytest.raises(InvalidToken):
        checker.check(f"{head}.{body}.{signature[::-1]}", (ISSUER,), time.time())
    with pytest.raises(InvalidToken, match="gone"):
        issuer(keys, {}).check(token, (ISSUER,), time.time())


def test_a_review_says_why(keys: Path) -> None:
    review = issuer(keys).review({"spec": {"token": "nonsense"}}, time.time())
    assert review["status"]["authenticated"] is False and review["status"]["error"]
    review = issuer(keys).review({"spec": {"token": mint(keys)}}, time.time())
    assert review["status"]["user"]["username"] == "system:serviceaccount:shop:cart"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"expirationSeconds": 60}, "less than 10 minutes"),
        ({"boundObjectRef": {"kind": "Node", "name": "n1"}}, "cannot bind token"),
        ({"boundObjectRef": {"kind": "Pod", "name": "other"}}, 'pods "other" not found'),
        ({"boundObjectRef": {"kind": "Pod", "name": "p", "uid": "older"}}, "does not match the UID"),
    ],
)
def test_refused_requests(keys: Path, spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(StatusError, match=reason):
        mint(keys, **spec)

"""Admission webhooks: mutating ones change an object on its way in, validating ones refuse it.

The only part of admission that asks others, so the only one that waits: a write is tried without being stored,
the hooks are asked about what would be stored, and then the write is done with their patches, unless the object
changed meanwhile. Semantics of admissionregistration.k8s.io/v1; hooks are reached by URL or through their
Service's address.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import copy
import ssl
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from meshlight.kube import expressions
from meshlight.kube.admission import Request
from meshlight.kube.admission.policies import matches_rule, selected, shown
from meshlight.kube.admission.stored import Stored
from meshlight.kube.expressions import ExpressionError
from meshlight.kube.patch import PatchError, json_patch
from meshlight.kube.resources import Object
from meshlight.kube.status import StatusError
from meshlight.kube.store import Key, Store

GROUP = "admissionregistration.k8s.io"
MAX_ANSWER = 3 * 1024 * 1024
_VARIABLES = ("object", "oldObject", "request")

Ask = Callable[[str, str, ssl.SSLContext, Object, float], Any]
"""(URL, server name, TLS, body, seconds) to the decoded answer; a coroutine function."""


class HookError(Exception):
    """A webhook does not answer, or not with an AdmissionReview."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One webhook of a configuration."""

    webhook: Object

    @property
    def name(self) -> str:
        """Its fully qualified name."""
        return str(self.webhook["name"])

    @property
    def ignored(self) -> bool:
        """Whether its failures are ignored."""
        return bool(self.webhook.get("failurePolicy", "Fail") == "Ignore")

    def means(self, request: Request, namespace: Object | None) -> bool:
        """Whether its rules, selectors and conditions mean a request. Raises HookError if one is broken."""
        hook = self.webhook
        if not any(matches_rule(rule, request) for rule in hook.get("rules") or ()):
            return False
        if not selected(hook, request, namespace):
            return False
        variables = {"object": request.obj, "oldObject": request.old, "request": shown(request)}
        for condition in hook.get("matchConditions") or ():
            try:
                if expressions.compiled(condition["expression"], *_VARIABLES).evaluate(variables) is not True:
                    return False
            except ExpressionError as error:
                raise HookError(f"match condition {condition['name']!r}: {error}") from error
        return True


def review(request: Request, uid: str) -> Object:
    """The AdmissionReview that a hook is sent."""
    asked = {"uid": uid, **shown(request), "object": request.obj, "oldObject": request.old}
    for field in ("subResource", "namespace"):
        if not asked[field]:
            del asked[field]
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": asked}


def answered(answer: Any, uid: str) -> Object:
    """The response in a hook's answer. Raises HookError."""
    if not isinstance(answer, dict) or answer.get("kind") != "AdmissionReview":
        raise HookError("the answer is not an AdmissionReview")
    response = answer.get("response")
    if not isinstance(response, dict) or response.get("uid") != uid:
        raise HookError(f"expected response.uid={uid!r}, got {(response or {}).get('uid')!r}")
    return response


def refusal(request: Request, name: str, response: Object) -> StatusError:
    """What a client is told when a hook denies."""
    status = response.get("status") or {}
    message = status.get("message") or status.get("reason") or ""
    said = f'admission webhook "{name}" denied the request'
    code, reason = int(status.get("code") or 403), status.get("reason") or "Forbidden"
    return StatusError(
        code if code >= 400 else 403, reason, f"{said}: {message}" if message else f"{said} without explanation"
    )


def patches(response: Object) -> list[Object]:
    """The JSON patch of a response. Raises HookError."""
    if not response.get("patch"):
        return []
    if response.get("patchType") != "JSONPatch":
        raise HookError(f"patchType {response.get('patchType')!r} is not JSONPatch")
    try:
        found: list[Object] = orjson.loads(base64.b64decode(response["patch"], validate=True))
    except (ValueError, binascii.Error) as error:
        raise HookError(f"the patch cannot be decoded: {error}") from error
    return found


class Webhooks:
    """All configured webhooks, and the way to them."""

    def __init__(self, store: Store, ask: Ask) -> None:
        self._store = store
        self._ask = ask
        self._mutating = Stored(store, f"{GROUP}/mutatingwebhookconfigurations")
        self._validating = Stored(store, f"{GROUP}/validatingwebhookconfigurations")

    def any(self) -> bool:
        """Whether there are webhooks at all."""
        return bool(self._mutating.all() or self._validating.all())

    def _hooks(self, configurations: Stored, request: Request) -> Iterator[Hook]:
        """The hooks that mean a request, in the order of their configurations' names."""
        if request.served.resource.group == GROUP:
            return
        namespace = self._namespace(request)
        for configuration in sorted(configurations.all(), key=lambda c: str(c["metadata"]["name"])):
            for webhook in configuration.get("webhooks") or ():
                hook = Hook(webhook)
                try:
                    if hook.means(request, namespace):
                        yield hook
                except HookError as error:
                    if not hook.ignored:
                        raise self._failed(hook, error) from error

    def _namespace(self, request: Request) -> Object | None:
        if request.kind == "Namespace":
            return request.obj or request.old
        return self._store.get(Key("/namespaces", "", request.namespace)) if request.namespace else None

    @staticmethod
    def _failed(hook: Hook, error: Exception) -> StatusError:
        message = f'Internal error occurred: failed calling webhook "{hook.name}": {error}'
        return StatusError(500, "InternalError", message)

    async def mutate(self, request: Request) -> list[Object]:
        """The patches of every mutating hook, one after another. Raises StatusError when one denies."""
        found: list[Object] = []
        again: list[Hook] = []
        for hook in list(self._hooks(self._mutating, request)):
            made = await self._patches(hook, request)
            if made:
                found += made
                for earlier in again:
                    found += await self._patches(earlier, request)
                again.clear()
            if hook.webhook.get("reinvocationPolicy") == "IfNeeded":
                again.append(hook)
        return found

    async def _patches(self, hook: Hook, request: Request) -> list[Object]:
        response = await self._call(hook, request)
        if response is None:
            return []
        try:
            made = patches(response)
            if made and request.obj is not None:
                request.obj = json_patch(request.obj, made)
        except (HookError, PatchError) as error:
            if hook.ignored:
                return []
            raise self._failed(hook, error) from error
        return made

    async def validate(self, request: Request) -> None:
        """Ask every validating hook, all at once. Raises StatusError when one denies."""
        hooks = list(self._hooks(self._validating, request))
        answers = await asyncio.gather(*(self._call(hook, request) for hook in hooks), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    async def _call(self, hook: Hook, request: Request) -> Object | None:
        """A hook's response; None when it failed and that is ignored. Raises StatusError when it denies."""
        uid = str(uuid.uuid4())
        if request.dry_run and hook.webhook.get("sideEffects") not in ("None", "NoneOnDryRun"):
            message = f'admission webhook "{hook.name}" does not support dry run'
            raise StatusError(400, "BadRequest", message)
        try:
            url, name, tls = self._address(hook.webhook.get("clientConfig") or {})
            seconds = float(hook.webhook.get("timeoutSeconds") or 10)
            answer = await self._ask(url, name, tls, review(request, uid), seconds)
            response = answered(answer, uid)
        except (HookError, aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if hook.ignored:
                return None
            raise self._failed(
                hook, error if str(error) else TimeoutError("context deadline exceeded")
            ) from error
        request.warnings += [str(w)[:256] for w in response.get("warnings") or ()]
        if not response.get("allowed"):
            raise refusal(request, hook.name, response)
        return response

    def _address(self, config: Object) -> tuple[str, str, ssl.SSLContext]:
        """URL, server name and TLS of a hook. Raises HookError."""
        bundle = config.get("caBundle")
        authority = base64.b64decode(bundle).decode() if bundle else None
        tls = ssl.create_default_context(cadata=authority)
        if url := config.get("url"):
            return str(url), "", tls
        reference = config.get("service") or {}
        namespace, name = reference.get("namespace", ""), reference.get("name", "")
        found = self._store.get(Key("/services", namespace, name))
        if found is None:
            raise HookError(f'service "{name}" not found')
        address = (found.get("spec") or {}).get("clusterIP")
        if not address or address == "None":
            raise HookError(f'service "{namespace}/{name}" has no cluster address')
        host = f"[{address}]" if ":" in address else address
        path = "/" + (reference.get("path") or "").lstrip("/")
        return f"https://{host}:{reference.get('port') or 443}{path}", f"{name}.{namespace}.svc", tls


async def ask(url: str, server_name: str, tls: ssl.SSLContext, body: Object, seconds: float) -> Any:
    """Post an AdmissionReview. Raises HookError, and what aiohttp raises."""
    timeout = aiohttp.ClientTimeout(total=seconds)
    connector = aiohttp.TCPConnector(ssl=tls, force_close=True)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        session.post(
            url,
            data=orjson.dumps(body),
            headers={"Content-Type": "application/json"},
            server_hostname=server_name or None,
            allow_redirects=False,
        ) as answer,
    ):
        raw = await answer.content.read(MAX_ANSWER + 1)
        if answer.status != 200:
            raise HookError(f"HTTP {answer.status}: {raw[:200].decode(errors='replace')}")
        if len(raw) > MAX_ANSWER:
            raise HookError(f"the answer is longer than {MAX_ANSWER} bytes")
        return orjson.loads(raw)


Amend = Callable[[Object], Object]


def amended(obj: Object, found: Sequence[Object]) -> Object:
    """The object with hooks' patches. Raises StatusError when they do not fit any more."""
    try:
        result: Object = json_patch(copy.deepcopy(obj), list(found))
    except PatchError as error:
        raise StatusError(500, "InternalError", f"a webhook's patch does not apply: {error}") from error
    return result

"""Admission webhooks over TLS, with the real kubectl on the other side."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from apiserver import ApiServer


class Hook(BaseHTTPRequestHandler):
    """Labels every ConfigMap, and refuses those whose data say so."""

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = review["request"]
        response: dict[str, Any] = {"uid": asked["uid"], "allowed": True}
        obj = asked["object"] or {}
        if self.path == "/label":
            labels = {**(obj["metadata"].get("labels") or {}), "hooked": "yes"}
            operations = [{"op": "add", "path": "/metadata/labels", "value": labels}]
            patch = base64.b64encode(json.dumps(operations).encode()).decode()
            response |= {"patchType": "JSONPatch", "patch": patch}
        elif asked["operation"] == "DELETE" and asked["oldObject"]["metadata"]["name"] == "kept":
            response |= {"allowed": False, "status": {"message": "this one stays"}}
        elif (obj.get("data") or {}).get("bad"):
            response |= {"allowed": False, "status": {"message": f"bad data of {obj['metadata']['labels']}"}}
        body = json.dumps({**review, "response": response}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    server = ApiServer(tmp_path)
    server.start()
    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "pki" / "server.crt", tmp_path / "pki" / "server.key")
    hook.socket = tls.wrap_socket(hook.socket, server_side=True)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    bundle = base64.b64encode((tmp_path / "pki" / "ca.crt").read_bytes()).decode()
    for kind, path, operations in (
        ("Mutating", "label", ["CREATE", "UPDATE"]),
        ("Validating", "check", ["CREATE", "UPDATE", "DELETE"]),
    ):
        rule = {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["configmaps"], "operations": operations}
        webhook = {
            "name": f"{path}.example.com",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "rules": [rule],
            "clientConfig": {"url": f"https://127.0.0.1:{hook.server_port}/{path}", "caBundle": bundle},
        }
        configuration = {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": f"{kind}WebhookConfiguration",
            "metadata": {"name": path},
            "webhooks": [webhook],
        }
        server.kubectl("create", "-f", "-", stdin=json.dumps(configuration))
    yield server
    hook.shutdown()
    server.stop()


def test_hooks_change_and_refuse_what_kubectl_writes(api: ApiServer) -> None:
    label = "jsonpath={.metadata.labels.hooked}"
    api.kubectl("create", "configmap", "a", "--from-literal=x=1")
    assert api.kubectl("get", "cm", "a", "-o", label) == "yes"
    refused = api.kubectl("create", "configmap", "b", "--from-literal=bad=1", check=False)
    assert 'admission webhook "check.example.com" denied the request: bad data of' in refused
    assert "'hooked': 'yes'" in refused  # the validating hook sees what the mutating one made
    assert "NotFound" in api.kubectl("get", "cm", "b", check=False)
    refused = api.kubectl("patch", "cm", "a", "--type=merge", "-p", '{"data":{"bad":"1"}}', check=False)
    assert "denied the request" in refused
    applied = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}, "data": {"y": "1"}}
    api.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(applied))
    assert api.kubectl("get", "cm", "kept", "-o", label) == "yes"
    assert "this one stays" in api.kubectl("delete", "cm", "kept", check=False)
    api.kubectl("delete", "cm", "a")
    shown = api.kubectl("create", "configmap", "c", "--dry-run=server", "-o", label)
    assert shown == "yes" and "NotFound" in api.kubectl("get", "cm", "c", check=False)

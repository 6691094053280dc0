"""Pods reach the machine's outside, on a machine of the test's own: a network namespace with one host in it.

The cluster boots inside that namespace, so that "outside" is an address of the namespace's loopback
interface and nothing leaves the machine that runs the test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster, pod, wait_until

OUTSIDE = "10.200.0.1"
RESOLVER = "127.0.0.53"
MACHINE = f"""
import socket, socketserver, subprocess, threading
import dnslib
for command in ("link set lo up", "address add {OUTSIDE}/32 dev lo"):
    subprocess.run(["ip", *command.split()], check=True)
class Stream(socketserver.BaseRequestHandler):
    def handle(self):
        data = b""
        while piece := self.request.recv(65536):
            data += piece
        self.request.sendall(f"{{len(data)}} {{self.client_address[0]}}".encode())
class Datagram(socketserver.BaseRequestHandler):
    def handle(self):
        self.request[1].sendto(b"echo " + self.request[0], self.client_address)
class Names(socketserver.BaseRequestHandler):
    def handle(self):
        query = dnslib.DNSRecord.parse(self.request[0])
        reply = query.reply()
        if str(query.q.qname) == "outside.example." and query.q.qtype == 1:
            reply.add_answer(dnslib.RR("outside.example", 1, ttl=5, rdata=dnslib.A("{OUTSIDE}")))
        elif str(query.q.qname) != "outside.example.":
            reply.header.rcode = 3
        self.request[1].sendto(reply.pack(), self.client_address)
socketserver.ThreadingTCPServer.allow_reuse_address = True
servers = [
    socketserver.ThreadingTCPServer(("{OUTSIDE}", 8000), Stream),
    socketserver.ThreadingTCPServer(("127.0.0.1", 8000), Stream),
    socketserver.ThreadingUDPServer(("{OUTSIDE}", 8001), Datagram),
    socketserver.ThreadingUDPServer(("{RESOLVER}", 53), Names),
]
for server in servers:
    threading.Thread(target=server.serve_forever, daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""
CLIENT = """
import json, socket, sys
found = {}
try:
    with socket.create_connection(("outside.example", 8000), 10) as stream:
        stream.sendall(b"x" * 2_000_000)
        stream.shutdown(socket.SHUT_WR)
        found["tcp"] = stream.makefile().read()
except OSError as error:
    found["tcp"] = type(error).__name__
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
    link.settimeout(5)
    try:
        for number in range(3):
            link.sendto(b"%d" % number, ("10.200.0.1", 8001))
            found["udp"] = [link.recvfrom(100)[0].decode(), link.getsockname()[0]]
    except OSError as error:
        found["udp"] = type(error).__name__
TARGETS = {"closed": ("10.200.0.1", 9), "local": ("169.254.1.1", 8000), "unknown": ("none.example", 1)}
for name, target in TARGETS.items():
    try:
        with socket.create_connection(target, 5) as stream:
            found[name] = repr(stream.recv(1))
    except OSError as error:
        found[name] = type(error).__name__
print(json.dumps(found))
"""


class OnMachine(Cluster):
    """A cluster whose command line and kubectl run on the test's machine."""

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 90
    ) -> str:
        done = subprocess.run(
            [*self.prefix, "kubectl", *arguments],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout + ("" if check else done.stderr)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[OnMachine]:
    """A cluster of one node on a machine of its own, with a resolver on the machine's loopback."""
    resolv = tmp_path / "resolv.conf"
    resolv.write_text(f"nameserver {RESOLVER}\nsearch corp.example\n")
    target = os.path.realpath("/etc/resolv.conf")
    script = f'mount --bind {resolv} {target} && exec {sys.executable} -c "$0"'
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", "--net", "--mount", *user, "sh", "-c", script, MACHINE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        enter = ["nsenter", "-t", str(process.pid), "-n", "-m"]
        enter += ["-U", "--preserve-credentials"] if user else []
        made = OnMachine(f"egress-{uuid.uuid4().hex[:6]}", tmp_path, (*enter,))
        try:
            made.meshlight("up", "--name", made.name, "--nodes", "1", "--timeout", "150", timeout=180)
            yield made
        finally:
            if os.environ.get("MESHLIGHT_KEEP_LOGS"):
                shutil.copytree(
                    made.state,
                    os.environ["MESHLIGHT_KEEP_LOGS"],
                    dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("*.sock"),
                )
            made.meshlight("down", "--name", made.name, "--purge", check=False)
            process.kill()


def test_pods_reach_what_the_machine_reaches(machine: OnMachine) -> None:
    before = subprocess.run([*machine.prefix, "ip", "-j", "addr"], capture_output=True, text=True).stdout
    rules = subprocess.run([*machine.prefix, "nft", "list", "ruleset"], capture_output=True, text=True).stdout
    assert rules == "" and len(json.loads(before)) == 1, "the machine has no link or rule of the cluster's"
    machine.apply(
        pod("client", "default", ["sleep", "600"]),
        pod("plain", "default", ["sleep", "600"], dnsPolicy="Default"),
    )
    machine.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s")

    def tried(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(machine.kubectl("exec", name, "--", "python3", "-c", CLIENT))
        return found

    wanted = {
        "tcp": f"2000000 {OUTSIDE}",
        "closed": "ConnectionResetError",
        "unknown": "gaierror",
    }
    for name in ("client", "plain"):
        found = wait_until(lambda name=name: (f := tried(name))["tcp"] == wanted["tcp"] and f, what="a way out")
        assert {key: found[key] for key in wanted} == wanted, name
        assert found["udp"][0] == "echo 2" and found["local"] != "b''", found
    resolv = machine.kubectl("exec", "plain", "--", "cat", "/etc/resolv.conf")
    assert resolv == "nameserver 172.20.0.1\nsearch corp.example\n"
    # Enrolled in the mesh they still do, and a policy still holds.
    machine.kubectl("label", "namespace", "default", "istio.io/dataplane-mode=ambient")
    wait_until(
        lambda: "enabled" in machine.kubectl("get", "pod", "client", "-o", "jsonpath={.metadata.annotations}"),
        what="enrolment",
    )
    assert tried("client")["tcp"] == wanted["tcp"]
    machine.apply(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "inside", "namespace": "default"},
            "spec": {
                "podSelector": {"matchLabels": {"app": "plain"}},
                "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": [f"{OUTSIDE}/32"]}}]}],
            },
        }
    )
    wait_until(lambda: tried("plain")["udp"] == "TimeoutError", what="the policy to hold")

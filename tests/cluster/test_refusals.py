"""What a user gets wrong is one clear line, on the command line as in a pod's status; two clusters coexist."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from clusters import MESHLIGHT, Cluster, pod, wait_until
from test_durability import machine, processes


def one_line(said: str) -> str:
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said, said
    return said


def test_a_store_that_is_damaged_ends_the_boot_with_its_name(tmp_path: Path) -> None:
    made = Cluster("damaged", tmp_path)
    clean = machine(made.state)
    made.state.mkdir(parents=True)
    store = made.state / "store.db"
    store.write_bytes(b"this is no database" * 1000)
    try:
        said = made.meshlight("up", "--name", "damaged", "--nodes", "1", check=False)
        refused = said[said.index("error: ") :]
        assert str(store) in refused and "--purge" in refused and "Traceback" not in refused
        assert not processes(str(tmp_path)), "a cluster without its API is not left half-made"
        # A copy put back is found again.
        store.unlink()
        with sqlite3.connect(store):
            pass
        made.meshlight("up", "--name", "damaged", "--nodes", "1", timeout=180)
        # Nor is one lost whose record is: `up` was killed before it wrote one, or the file is damaged.
        record = json.loads((made.state / "cluster.json").read_text())
        (made.state / "cluster.json").write_text(json.dumps({**record, "supervisor_pid": 0}))
        made.meshlight("up", "--name", "damaged", timeout=180)
        assert made.supervisor_pid != record["supervisor_pid"]
        assert len(processes("meshlight.kube.server --state " + str(made.state))) == 1
        (made.state / "cluster.json").write_text("{")
    finally:
        made.meshlight("down", "--name", "damaged", "--purge", check=False)
    assert machine(made.state) == clean


def test_two_clusters_side_by_side(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster("beside", cluster.home)
    shown = json.loads(other.meshlight("up", "--name", "beside", "--nodes", "1", "-o", "json", timeout=180))
    try:
        assert shown["started"] and shown["nodes"] == 1
        listed = {c["cluster"]: c for c in json.loads(cluster.meshlight("list", "-o", "json"))}
        assert {c["state"] for c in listed.values()} == {"up"} and set(listed) == {cluster.name, "beside"}
        assert listed["beside"]["api"] == shown["api"] != listed[cluster.name]["api"]
        other.kubectl("create", "configmap", "mine")
        assert "NotFound" in cluster.kubectl("get", "configmap", "mine", check=False)
        assert other.kubectl("get", "nodes", "-o", "name") == "node/beside-node-1\n"
        said = other.meshlight("up", "--name", "beside", "--nodes", "2", check=False)
        assert "1 nodes, not 2" in one_line(said)
        assert "beside" in cluster.meshlight("list")
    finally:
        other.meshlight("down", "--name", "beside", "--purge")
    assert [c["cluster"] for c in json.loads(cluster.meshlight("list", "-o", "json"))] == [cluster.name]
    assert cluster.get("nodes")["items"]


def test_pods_that_cannot_run_say_why(cluster: Cluster, namespace: str) -> None:
    unknown = pod("unknown", namespace, [])
    unknown["spec"]["containers"][0] = {"name": "main", "image": "registry.example/no/such:1"}
    cluster.apply(unknown, pod("missing", namespace, ["/no/such/program", "x"]))

    def waiting(name: str) -> dict[str, str]:
        status = cluster.get("pod", name, "-n", namespace)["status"]
        state = (status.get("containerStatuses") or [{}])[0].get("state") or {}
        found: dict[str, str] = state.get("waiting") or {}
        return found

    wait_until(
        lambda: waiting("unknown").get("reason") in ("ErrImagePull", "ImagePullBackOff"), 30, "a refusal"
    )
    assert "registry.example/no/such:1" in waiting("unknown")["message"]
    wait_until(lambda: "/no/such/program" in waiting("missing").get("message", ""), 30, "the missing program")
    events = cluster.kubectl("get", "events", "-n", namespace, "--field-selector", "type=Warning")
    assert "Failed to pull image" in events and "/no/such/program" in events


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("up", "--name", "Not A Name"), "cluster's name"),
        (("status", "--name", "../x"), "cluster's name"),
        (("run", "--cluster", "none", "--name", "x", "--", "true"), "meshlight up"),
        (("kubeconfig", "--name", "none"), "meshlight up --name none"),
        (("status", "--name", "broken"), "cluster.json"),
        (("up", "--name", "broken"), "down --purge --name broken"),
        (("down", "--name", "broken"), "down --purge --name broken"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    arguments: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    broken = tmp_path / "clusters" / "broken"
    broken.mkdir(parents=True)
    (broken / "cluster.json").write_text("{")
    said = Cluster("none", tmp_path).meshlight(*arguments, check=False)
    assert expected in one_line(said[0].lower() + said[1:])
    assert sorted(p.name for p in (tmp_path / "clusters").iterdir()) == ["broken"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, tmp_path: Path) -> None:
    script = Cluster("none", tmp_path).meshlight("completion", shell)
    assert "_MESHLIGHT_COMPLETE" in script
    if interpreter := shutil.which(shell):
        subprocess.run([interpreter, "-n"], input=script, text=True, check=True)


def test_completion_knows_verbs_and_clusters(cluster: Cluster) -> None:
    def completed(*words: str) -> str:
        environment = {
            **cluster.environment,
            "_MESHLIGHT_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(("meshlight", *words)),
            "COMP_CWORD": str(len(words)),
        }
        return subprocess.run([MESHLIGHT], env=environment, capture_output=True, text=True, check=True).stdout

    assert "plain,status" in completed("sta")
    assert f"plain,{cluster.name}" in completed("down", "--name", cluster.name[:2])

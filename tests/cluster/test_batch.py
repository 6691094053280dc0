"""StatefulSets, Jobs and CronJobs as kubectl drives them."""

from __future__ import annotations

from typing import Any

from clusters import Cluster, pod, wait_until
from test_rollouts import deployment, reasons


def job(name: str, namespace: str, command: list[str], **spec: Any) -> dict[str, Any]:
    template = pod(name, namespace, command, restartPolicy="Never")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"template": {"spec": template["spec"]}, **spec},
    }


def test_a_stateful_set_keeps_names_order_and_claims(cluster: Cluster, namespace: str) -> None:
    item = deployment("db", namespace, 2)
    command = ["sh", "-c", "echo $HOSTNAME >> /data/names; exec sleep 1000"]
    container = item["spec"]["template"]["spec"]["containers"][0]
    container |= {"command": command, "volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "10Mi"}}}
    item |= {"kind": "StatefulSet"}
    item["spec"] |= {
        "serviceName": "db",
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": claim}],
        "persistentVolumeClaimRetentionPolicy": {"whenScaled": "Delete", "whenDeleted": "Retain"},
    }
    cluster.apply(item)
    cluster.kubectl("rollout", "status", "sts/db", "-n", namespace, "--timeout=90s")
    first = cluster.get("pod", "db-0", "-n", namespace)
    assert first["spec"]["hostname"] == "db-0"
    assert first["metadata"]["labels"]["apps.kubernetes.io/pod-index"] == "0"
    assert (
        first["metadata"]["creationTimestamp"]
        <= cluster.get("pod", "db-1", "-n", namespace)["status"]["startTime"]
    )
    cluster.kubectl("delete", "pod", "db-0", "-n", namespace)
    cluster.kubectl("rollout", "status", "sts/db", "-n", namespace, "--timeout=90s")
    names = cluster.kubectl("exec", "-n", namespace, "db-0", "--", "cat", "/data/names")
    assert names.split() == ["db-0", "db-0"], "the new pod has the old one's disk"
    cluster.kubectl("scale", "sts/db", "-n", namespace, "--replicas=1")

    def claims() -> set[str]:
        return {c["metadata"]["name"] for c in cluster.get("pvc", "-n", namespace)["items"]}

    wait_until(lambda: claims() == {"data-db-0"}, what="the claim goes with its pod")
    cluster.kubectl("delete", "sts", "db", "-n", namespace)
    wait_until(lambda: not cluster.get("pods", "-n", namespace)["items"], what="pods go")
    assert claims() == {"data-db-0"}
    folders = cluster.state / "volumes"
    (volume,) = (v["spec"]["volumeName"] for v in cluster.get("pvc", "-n", namespace)["items"])
    assert (folders / volume / "names").read_text().split() == ["db-0", "db-0"]
    cluster.kubectl("delete", "pvc", "data-db-0", "-n", namespace)
    wait_until(lambda: not (folders / volume).exists(), what="the volume's folder goes with its claim")
    said = reasons(cluster, namespace, "StatefulSet", "db")["SuccessfulCreate"]
    assert "create Pod db-0 in StatefulSet db successful" in said


def test_jobs_complete_fail_and_are_cleared_away(cluster: Cluster, namespace: str) -> None:
    cluster.apply(
        job("many", namespace, ["echo", "done"], completions=3, parallelism=2),
        job(
            "indexed", namespace, ["sh", "-c", "echo index $JOB_COMPLETION_INDEX on $HOSTNAME"], completions=2,
            parallelism=2, completionMode="Indexed",
        ),
        job("broken", namespace, ["false"], backoffLimit=0),
        job("slow", namespace, ["sleep", "1000"], activeDeadlineSeconds=1),
        job(
            "fatal", namespace, ["sh", "-c", "exit 42"], backoffLimit=5,
            podFailurePolicy={"rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42]}}
            ]},
        ),
        job("short-lived", namespace, ["true"], ttlSecondsAfterFinished=0),
    )  # fmt: skip
    names = ("many", "indexed")
    cluster.kubectl(
        "wait", "-n", namespace, "--for=condition=complete", *(f"job/{n}" for n in names), "--timeout=90s"
    )
    failed = ("broken", "slow", "fatal")
    cluster.kubectl(
        "wait", "-n", namespace, "--for=condition=failed", *(f"job/{n}" for n in failed), "--timeout=90s"
    )
    status = cluster.get("job", "many", "-n", namespace)["status"]
    assert status["succeeded"] == 3 and "completionTime" in status and not status.get("active")
    logs = cluster.kubectl("logs", "-n", namespace, "-l", "job-name=indexed", "--tail=-1")
    assert sorted(logs.splitlines()) == ["index 0 on indexed-0", "index 1 on indexed-1"]
    assert cluster.get("job", "indexed", "-n", namespace)["status"]["completedIndexes"] == "0,1"

    def why(name: str) -> str:
        conditions = cluster.get("job", name, "-n", namespace)["status"]["conditions"]
        return str(next(c["reason"] for c in conditions if c["type"] == "Failed"))

    assert [why(n) for n in failed] == ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]
    wait_until(
        lambda: "short-lived" not in cluster.kubectl("get", "jobs", "-n", namespace),
        what="its time to live is over",
    )
    assert reasons(cluster, namespace, "Job", "many").keys() >= {"SuccessfulCreate", "Completed"}
    cluster.kubectl("delete", "job", "many", "-n", namespace)
    wait_until(
        lambda: not cluster.get("pods", "-n", namespace, "-l", "job-name=many")["items"], what="its pods go too"
    )


def test_a_suspended_job_runs_when_it_is_resumed(cluster: Cluster, namespace: str) -> None:
    cluster.apply(job("later", namespace, ["true"], suspend=True))
    cluster.kubectl("wait", "-n", namespace, "--for=condition=suspended", "job/later", "--timeout=60s")
    assert not cluster.get("pods", "-n", namespace)["items"]
    cluster.kubectl("patch", "job", "later", "-n", namespace, "-p", '{"spec":{"suspend":false}}')
    cluster.kubectl("wait", "-n", namespace, "--for=condition=complete", "job/later", "--timeout=60s")


def test_a_cron_job_makes_jobs(cluster: Cluster, namespace: str) -> None:
    item = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": "tick", "namespace": namespace},
        "spec": {
            "schedule": "@every 2s",
            "successfulJobsHistoryLimit": 1,
            "jobTemplate": {"spec": job("tick", namespace, ["true"])["spec"]},
        },
    }
    cluster.apply(item)
    by_hand = cluster.kubectl("create", "job", "-n", namespace, "by-hand", "--from=cronjob/tick")
    assert "created" in by_hand
    wait_until(
        lambda: (
            "Saw completed job: tick-"
            in reasons(cluster, namespace, "CronJob", "tick").get("SawCompletedJob", "")
        ),
        what="a Job of the schedule completes",
    )
    cluster.kubectl("patch", "cronjob", "tick", "-n", namespace, "-p", '{"spec":{"suspend":true}}')
    assert "Created job tick-" in reasons(cluster, namespace, "CronJob", "tick")["SuccessfulCreate"]
    assert cluster.get("cronjob", "tick", "-n", namespace)["status"]["lastSuccessfulTime"]

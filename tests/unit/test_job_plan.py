"""Jobs: counting, ends, policies, back-off, indexes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from workload_objects import NOW, pod

from meshlight.controllers import indexes, job_plan
from meshlight.controllers.job_plan import INDEX, TRACKING


def job(status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    base = {"parallelism": 1, "completions": 1, "template": {"spec": {"restartPolicy": "Never"}}}
    return {"metadata": {"name": "j", "namespace": "x"}, "spec": {**base, **spec}, "status": status or {}}


def ended(
    name: str, phase: str, code: int = 0, index: int | None = None, tracked: bool = True
) -> dict[str, Any]:
    terminated = {"terminated": {"exitCode": code, "finishedAt": "2026-01-01T11:59:58Z"}}
    return pod(
        name,
        phase=phase,
        ready=False,
        annotations={} if index is None else {INDEX: str(index)},
        metadata={"finalizers": [TRACKING]} if tracked else {},
        status={"containerStatuses": [{"name": "main", "state": terminated}]},
    )


@pytest.mark.parametrize("text", ["", "0", "0,1", "0-2", "0-2,5", "1,2,4-9"])
def test_sets_of_indexes_read_and_write(text: str) -> None:
    assert indexes.text(indexes.parse(text)) == text


def test_a_finished_pod_counts_once() -> None:
    item = job(completions=3)
    found = job_plan.tally(item, [ended("a", "Succeeded"), ended("b", "Failed", 1), pod("c")])
    assert (found.succeeded, found.failed, len(found.active)) == (1, 1, 1)
    item["status"] = {"uncountedTerminatedPods": {"succeeded": ["uid-a"]}, "failed": 1}
    found = job_plan.tally(item, [ended("a", "Succeeded"), ended("b", "Failed", 1, tracked=False)])
    assert (found.succeeded, found.failed, found.new_succeeded) == (1, 1, [])
    assert job_plan.uncounted(item, found)


@pytest.mark.parametrize(
    ("spec", "status", "pods", "expected"),
    [
        ({}, {}, [ended("a", "Succeeded")], ("Complete", "CompletionsReached")),
        ({"completions": 2}, {}, [ended("a", "Succeeded")], None),
        ({"completions": None}, {}, [ended("a", "Succeeded"), pod("b")], None),
        ({"completions": None}, {}, [ended("a", "Succeeded")], ("Complete", "CompletionsReached")),
        ({"backoffLimit": 1}, {"failed": 1}, [ended("a", "Failed", 1)], ("Failed", "BackoffLimitExceeded")),
        ({"backoffLimit": 2}, {"failed": 1}, [ended("a", "Failed", 1)], None),
        ({"activeDeadlineSeconds": 60}, {"startTime": "2026-01-01T11:58:00Z"}, [pod("a")],
         ("Failed", "DeadlineExceeded")),
        ({"activeDeadlineSeconds": 600}, {"startTime": "2026-01-01T11:58:00Z"}, [pod("a")], None),
    ],
)  # fmt: skip
def test_how_a_job_ends(
    spec: dict[str, Any],
    status: dict[str, Any],
    pods: list[dict[str, Any]],
    expected: tuple[str, str] | None,
) -> None:
    item = job(status, **spec)
    end = job_plan.end_of(item, job_plan.tally(item, pods), NOW)
    assert (end and (end.kind, end.reason)) == expected


@pytest.mark.parametrize(
    ("spec", "status", "pods", "create", "delete"),
    [
        ({"completions": 5, "parallelism": 3}, {}, [], 3, 0),
        ({"completions": 5, "parallelism": 3}, {"succeeded": 4}, [], 1, 0),
        ({"completions": 5, "parallelism": 1}, {}, [pod("a"), pod("b")], 0, 1),
        ({"completions": 5, "parallelism": 3, "suspend": True}, {}, [pod("a"), pod("b")], 0, 2),
        ({"completions": None, "parallelism": 3}, {"succeeded": 1}, [pod("a")], 0, 0),
    ],
)
def test_how_many_pods(
    spec: dict[str, Any], status: dict[str, Any], pods: list[dict[str, Any]], create: int, delete: int
) -> None:
    item = job(status, **spec)
    wanted = job_plan.need(item, job_plan.tally(item, pods), NOW)
    assert (len(wanted.create), len(wanted.delete)) == (create, delete)


def test_failures_are_tried_again_later_and_later() -> None:
    assert [job_plan.backoff(n) for n in (0, 1, 2, 3, 20)] == [0, 10, 20, 40, 600]
    item = job({"failed": 1})
    wanted = job_plan.need(item, job_plan.tally(item, [ended("a", "Failed", 1, tracked=False)]), NOW)
    assert wanted.create == [] and wanted.wait == 8
    later = job_plan.need(
        item, job_plan.tally(item, [ended("a", "Failed", 1, tracked=False)]), NOW + timedelta(seconds=9)
    )
    assert later.create == [None]


def test_each_index_runs_once() -> None:
    item = job({"completedIndexes": "1"}, completions=4, parallelism=4, completionMode="Indexed")
    running = pod("a", annotations={INDEX: "0"})
    wanted = job_plan.need(item, job_plan.tally(item, [running, ended("b", "Succeeded", index=2)]), NOW)
    assert wanted.create == [3]
    found = job_plan.tally(item, [ended(str(n), "Succeeded", index=n) for n in (0, 2, 3)])
    assert job_plan.end_of(item, found, NOW) is not None and found.succeeded == 4


def test_an_index_that_failed_too_often_is_given_up() -> None:
    item = job(completions=2, parallelism=2, completionMode="Indexed", backoffLimitPerIndex=0)
    found = job_plan.tally(item, [ended("a", "Failed", 1, index=0), ended("b", "Succeeded", index=1)])
    assert found.given_up == {0}
    end = job_plan.end_of(item, found, NOW)
    assert end is not None and (end.kind, end.reason) == ("Failed", "FailedIndexes")


@pytest.mark.parametrize(
    ("rule", "action"),
    [
        ({"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42]}}, "FailJob"),
        ({"action": "Ignore", "onExitCodes": {"operator": "NotIn", "values": [1]}}, "Ignore"),
        ({"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1]}}, "Count"),
        (
            {"action": "FailJob", "onExitCodes": {"containerName": "o", "operator": "In", "values": [42]}},
            "Count",
        ),
        ({"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}, "Count"),
    ],
)
def test_pod_failure_policy(rule: dict[str, Any], action: str) -> None:
    item = job(podFailurePolicy={"rules": [rule]})
    assert job_plan.failure_action(item, ended("a", "Failed", 42)).action == action
    found = job_plan.tally(item, [ended("a", "Failed", 42)])
    assert bool(found.fatal) == (action == "FailJob") and len(found.ignored) == (action == "Ignore")


def test_success_policy() -> None:
    rules = {"rules": [{"succeededIndexes": "0-2", "succeededCount": 1}]}
    item = job(completions=5, parallelism=5, completionMode="Indexed", successPolicy=rules)
    found = job_plan.tally(item, [ended("a", "Succeeded", index=1)])
    end = job_plan.end_of(item, found, NOW)
    assert end is not None and end.reason == "SuccessPolicy"

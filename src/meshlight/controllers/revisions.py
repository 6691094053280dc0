"""ControllerRevisions: the templates that a DaemonSet or StatefulSet has had, for rollouts and `rollout undo`.

`Revisions.sync` finds or makes the revision of an owner's template. Data have the form that kubectl sends
back as a patch to undo.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from meshlight.controllers.ownership import Dependents
from meshlight.controllers.pods import is_terminating, labels, reference, template_hash
from meshlight.kube.client import ApiError
from meshlight.kube.resources import Object

HASH = "controller-revision-hash"


def data_of(item: Object) -> Object:
    """What is kept of an owner: its template, as a patch that replaces the present one."""
    return {"spec": {"template": {**item["spec"]["template"], "$patch": "replace"}}}


def number(revision: Object) -> int:
    """The number of a ControllerRevision."""
    return int(revision.get("revision") or 0)


class Revisions:
    """Finds, makes, renumbers and prunes the ControllerRevisions of one kind of owner."""

    def __init__(self, revisions: Dependents, kind: str) -> None:
        self.revisions, self.kind = revisions, kind

    def of(self, item: Object) -> list[Object]:
        """An owner's revisions, oldest first."""
        found = [r for r in self.revisions.of(item["metadata"]["uid"]) if not is_terminating(r)]
        return sorted(found, key=lambda r: (number(r), r["metadata"]["name"]))

    async def sync(self, item: Object) -> tuple[Object, int]:
        """The revision of the present template, and the owner's collision count, which may have grown.

        An old revision of the same template becomes the newest.
        """
        known, data = self.of(item), data_of(item)
        last = number(known[-1]) if known else 0
        count = int((item.get("status") or {}).get("collisionCount") or 0)
        for found in reversed(known):
            if found.get("data") == data:
                if number(found) < last:
                    return await self.revisions.patch(found, {"revision": last + 1}) or found, count
                return found, count
        return await self._make(item, data, last + 1, count)

    async def _make(self, item: Object, data: Object, revision: int, count: int) -> tuple[Object, int]:
        metadata, template = item["metadata"], item["spec"]["template"]
        for salt in range(count, count + 10):
            digest = template_hash(template, salt)
            made: Object = {
                "apiVersion": "apps/v1",
                "kind": "ControllerRevision",
                "metadata": {
                    "name": f"{metadata['name'][:223]}-{digest}",
                    "namespace": metadata["namespace"],
                    "labels": {**((template.get("metadata") or {}).get("labels") or {}), HASH: digest},
                    "ownerReferences": [reference(item, "apps/v1", self.kind)],
                },
                "data": data,
                "revision": revision,
            }
            if annotations := _shown(item):
                made["metadata"]["annotations"] = annotations
            try:
                return await self.revisions.create(made), salt
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
        raise ApiError(409, "AlreadyExists", f"no free name for a revision of {metadata['name']}")

    async def prune(self, item: Object, live: Collection[str], limit: int) -> None:
        """Delete the oldest revisions beyond `limit` that are neither named in `live` nor the newest."""
        spare = [r for r in self.of(item)[:-1] if r["metadata"]["name"] not in live]
        for old in spare[: max(0, len(spare) - limit)]:
            await self.revisions.delete(old)


def _shown(item: Object) -> dict[str, str]:
    notes = item["metadata"].get("annotations") or {}
    return {k: v for k, v in notes.items() if k == "kubernetes.io/change-cause"}


def digest_of(revision: Object) -> str:
    """The hash in a revision's name."""
    return labels(revision).get(HASH) or revision["metadata"]["name"].rpartition("-")[2]


def names_in_use(pods: Sequence[Object], owner: str, *, whole: bool) -> set[str]:
    """Names of the revisions that pods are of; `whole` when their label has the name and not the hash."""
    found = {labels(p).get(HASH, "") for p in pods}
    return found if whole else {f"{owner}-{digest}" for digest in found}

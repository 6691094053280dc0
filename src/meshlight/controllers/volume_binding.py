"""What a pod's PersistentVolumeClaims mean for its node: the scheduler's view of volumes.

`fits` (pure) says whether a volume can serve a claim. `VolumeBinder` tells the scheduler what keeps a pod
away, and chooses a node for claims that wait for their first consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from meshlight.controllers.node_filters import NodeState, matches_selector
from meshlight.controllers.pods import is_active, is_terminating, labels, notes
from meshlight.kube import quantity
from meshlight.kube.client import Cache, Client
from meshlight.kube.resources import PERSISTENT_VOLUME_CLAIMS, Object
from meshlight.kube.selectors import match_labels

SELECTED_NODE = "volume.kubernetes.io/selected-node"
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
PROVISIONER = "meshlight.io/disk"
NO_PROVISIONER = "kubernetes.io/no-provisioner"
CONFLICT = "node(s) had volume node affinity conflict"
NONE_TO_BIND = "node(s) didn't find available persistent volumes to bind"
TAKEN = "node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod access mode"


def claim_names(pod: Object) -> list[str]:
    """The claims of a pod, those that are made for it among them."""
    found = []
    for volume in pod["spec"].get("volumes") or []:
        if (source := volume.get("persistentVolumeClaim")) is not None:
            found.append(str(source["claimName"]))
        elif volume.get("ephemeral") is not None:
            found.append(f"{pod['metadata']['name']}-{volume['name']}")
    return found


def default_class(classes: Iterable[Object]) -> Object | None:
    """The default StorageClass; of several the newest."""
    found = [c for c in classes if notes(c).get(DEFAULT_CLASS) == "true"]
    return max(found, key=lambda c: c["metadata"]["creationTimestamp"], default=None)


def is_bound(claim: Object) -> bool:
    """Whether a claim has its volume."""
    return bool(claim["spec"].get("volumeName") and (claim.get("status") or {}).get("phase") == "Bound")


def refers_to(volume: Object, claim: Object) -> bool:
    """Whether a volume is bound, or promised, to a claim."""
    reference = volume["spec"].get("claimRef")
    if not reference:
        return False
    metadata = claim["metadata"]
    same = (reference.get("namespace"), reference.get("name")) == (metadata["namespace"], metadata["name"])
    return bool(same and reference.get("uid", "") in ("", metadata["uid"]))


def fits(volume: Object, claim: Object) -> bool:
    """Whether a volume can serve a claim: class, modes, size, labels, and not somebody else's."""
    spec, asked = volume["spec"], claim["spec"]
    if is_terminating(volume):
        return False
    if spec.get("claimRef") and not refers_to(volume, claim):
        return False
    if (spec.get("storageClassName") or "") != (asked.get("storageClassName") or ""):
        return False
    if spec.get("volumeMode", "Filesystem") != asked.get("volumeMode", "Filesystem"):
        return False
    if not set(asked.get("accessModes") or []) <= set(spec.get("accessModes") or []):
        return False
    if asked.get("selector") is not None and not match_labels(asked["selector"], labels(volume)):
        return False
    return capacity(volume) >= requested(claim)


def capacity(volume: Object) -> int:
    """A volume's size in bytes."""
    return int(quantity.value(str((volume["spec"].get("capacity") or {}).get("storage", "0"))))


def requested(claim: Object) -> int:
    """The size that a claim asks for, in bytes."""
    asked = (claim["spec"].get("resources") or {}).get("requests") or {}
    return int(quantity.value(str(asked.get("storage", "0"))))


def best(volumes: Iterable[Object], claim: Object) -> Object | None:
    """The volume for a claim: one promised to it, or else the smallest that suffices."""
    found = [v for v in volumes if fits(v, claim)]
    return min(found, key=lambda v: (not refers_to(v, claim), capacity(v), v["metadata"]["name"]), default=None)


class VolumeBinder:
    """The scheduler's questions about claims, over the caches of claims, volumes and classes."""

    def __init__(self, client: Client, claims: Cache, volumes: Cache, classes: Cache, pods: Cache) -> None:
        self.client, self.claim_cache, self.volumes, self.classes = client, claims, volumes, classes
        self.pods = pods

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back when pods that wait for volumes may go on."""
        for cache in (self.claim_cache, self.volumes, self.classes):
            cache.on_change(lambda old, new: callback())

    def storage_class(self, claim: Object) -> Object | None:
        """The class of a claim, the default one if it names none."""
        name = claim["spec"].get("storageClassName")
        return default_class(self.classes.objects.values()) if name is None else self.classes.get(name)

    def waits(self, claim: Object) -> bool:
        """Whether a claim is bound only once its pod has a node."""
        found = self.storage_class(claim)
        return bool(found and found.get("volumeBindingMode") == "WaitForFirstConsumer")

    def claims(self, pod: Object) -> tuple[list[Object], str]:
        """A pod's claims, and what keeps it from every node."""
        found = []
        namespace = pod["metadata"]["namespace"]
        for name in claim_names(pod):
            claim = self.claim_cache.get(name, namespace)
            if claim is None:
                return [], f'persistentvolumeclaim "{name}" not found'
            if is_terminating(claim):
                return [], f'persistentvolumeclaim "{name}" is being deleted'
            if (claim.get("status") or {}).get("phase") == "Lost":
                missing = claim["spec"].get("volumeName")
                return [], f'persistentvolumeclaim "{name}" bound to non-existent persistentvolume "{missing}"'
            if not is_bound(claim) and not self.waits(claim):
                return [], "pod has unbound immediate PersistentVolumeClaims"
            found.append(claim)
        return found, ""

    def refusal(self, claims: list[Object], pod: Object, state: NodeState) -> str | None:
        """Why a node cannot serve the claims."""
        for claim in claims:
            if "ReadWriteOncePod" in (claim["spec"].get("accessModes") or []) and self._in_use(claim, pod):
                return TAKEN
            if is_bound(claim):
                volume = self.volumes.get(claim["spec"]["volumeName"])
                required = ((volume or {}).get("spec", {}).get("nodeAffinity") or {}).get("required")
                if not matches_selector(required, state.node):
                    return CONFLICT
            elif self._static(claim, state) is None and not self._provisioned(claim):
                return NONE_TO_BIND
        return None

    def _in_use(self, claim: Object, pod: Object) -> bool:
        metadata = claim["metadata"]
        return any(
            p["metadata"]["uid"] != pod["metadata"]["uid"]
            and p["metadata"]["namespace"] == metadata["namespace"]
            and p["spec"].get("nodeName")
            and is_active(p)
            and metadata["name"] in claim_names(p)
            for p in self.pods.objects.values()
        )

    def _provisioned(self, claim: Object) -> bool:
        found = self.storage_class(claim)
        return bool(found and found["provisioner"] != NO_PROVISIONER)

    def _static(self, claim: Object, state: NodeState) -> Object | None:
        """A volume that exists already and can be used on the node."""
        near = [
            v
            for v in self.volumes.objects.values()
            if matches_selector((v["spec"].get("nodeAffinity") or {}).get("required"), state.node)
        ]
        return best(near, claim)

    async def bind(self, claims: list[Object], node: str) -> bool:
        """Have unbound claims bound for a node; whether all of them are."""
        done = True
        for claim in claims:
            if is_bound(claim):
                continue
            done = False
            if notes(claim).get(SELECTED_NODE) == node:
                continue
            metadata = claim["metadata"]
            patch = {"metadata": {"annotations": {SELECTED_NODE: node}}}
            answer = await self.client.patch(
                PERSISTENT_VOLUME_CLAIMS, metadata["name"], patch, metadata["namespace"]
            )
            self.claim_cache.wrote(answer)
        return done

"""Binds PersistentVolumeClaims to PersistentVolumes, makes volumes on the machine's disk, and takes them back.

The rules of binding are `volume_binding`'s. A volume that is made here is a folder below the cluster's state
directory: every node is on the same machine, so a pod finds it on whichever node it runs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from meshlight.controllers.node_filters import matches_selector
from meshlight.controllers.pods import is_finished, is_terminating, notes, reference
from meshlight.controllers.volume_binding import (
    PROVISIONER,
    SELECTED_NODE,
    best,
    capacity,
    claim_names,
    default_class,
    refers_to,
    requested,
)
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, Object, Resource

VOLUMES = "/var/lib/meshlight/volumes"
"""Where nodes show the machine's volumes; below it each has a folder of its own name."""
COMPLETED = "pv.kubernetes.io/bind-completed"
BOUND_BY = "pv.kubernetes.io/bound-by-controller"
PROVISIONED_BY = "pv.kubernetes.io/provisioned-by"
CLAIM_PROTECTION, VOLUME_PROTECTION = "kubernetes.io/pvc-protection", "kubernetes.io/pv-protection"
_VOLUME = "\0volume"
"""The queue's word for a volume, which has no namespace."""
_COMPONENT = "persistentvolume-controller"


def provisioned(claim: Object, storage: Object) -> Object:
    """The volume that is made for a claim."""
    metadata, spec = claim["metadata"], claim["spec"]
    name = f"pvc-{metadata['uid']}"
    made: Object = {
        "capacity": {"storage": (spec.get("resources") or {}).get("requests", {}).get("storage", "0")},
        "accessModes": list(spec.get("accessModes") or ["ReadWriteOnce"]),
        "persistentVolumeReclaimPolicy": storage.get("reclaimPolicy") or "Delete",
        "storageClassName": storage["metadata"]["name"],
        "volumeMode": spec.get("volumeMode") or "Filesystem",
        "hostPath": {"path": f"{VOLUMES}/{name}", "type": "DirectoryOrCreate"},
        "claimRef": claim_reference(claim),
    }
    if storage.get("mountOptions"):
        made["mountOptions"] = storage["mountOptions"]
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": name,
            "annotations": {PROVISIONED_BY: PROVISIONER},
            "finalizers": [VOLUME_PROTECTION],
        },
        "spec": made,
    }


def claim_reference(claim: Object) -> Object:
    """The reference from a volume to its claim."""
    metadata = claim["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "namespace": metadata["namespace"],
        "name": metadata["name"],
        "uid": metadata["uid"],
        "resourceVersion": metadata["resourceVersion"],
    }


def volume_phase(volume: Object, claim: Object | None) -> str:
    """The phase of a volume whose claim, if it still exists, is `claim`."""
    wanted = volume["spec"].get("claimRef")
    if not wanted:
        return "Available"
    if not wanted.get("uid"):
        return "Available"
    return "Bound" if claim is not None and claim["metadata"]["uid"] == wanted["uid"] else "Released"


class PersistentVolumes:
    """Reconciles claims and volumes from their caches, and those of classes, nodes and pods."""

    def __init__(
        self,
        client: Client,
        claims: Cache,
        volumes: Cache,
        classes: Cache,
        nodes: Cache,
        pods: Cache,
        recorder: Recorder,
        disk: Path,
    ) -> None:
        self.client, self.claims, self.volumes, self.classes = client, claims, volumes, classes
        self.nodes, self.pods, self.recorder, self.disk = nodes, pods, recorder, disk
        self.queue = WorkQueue("persistentvolume", self.reconcile)
        claims.on_change(self._claim_changed)
        volumes.on_change(self._volume_changed)
        classes.on_change(lambda old, new: self._unbound())
        pods.on_change(self._pod_changed)

    def _claim_changed(self, old: Object | None, new: Object | None) -> None:
        claim = new or old or {}
        self.queue.add((claim["metadata"]["namespace"], claim["metadata"]["name"]))
        if name := claim["spec"].get("volumeName"):
            self.queue.add((_VOLUME, name))

    def _volume_changed(self, old: Object | None, new: Object | None) -> None:
        volume = new or old or {}
        self.queue.add((_VOLUME, volume["metadata"]["name"]))
        wanted = volume["spec"].get("claimRef")
        if wanted:
            self.queue.add((wanted.get("namespace", ""), wanted.get("name", "")))
        if not wanted or not wanted.get("uid"):
            self._unbound()

    def _unbound(self) -> None:
        for key, claim in self.claims.objects.items():
            if not claim["spec"].get("volumeName"):
                self.queue.add(key)

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        pod = new or old or {}
        if any(v.get("ephemeral") is not None for v in pod["spec"].get("volumes") or []) and old is None:
            self.queue.add(("\0pod/" + pod["metadata"]["namespace"], pod["metadata"]["name"]))
        if new is None or is_finished(new):
            for name in claim_names(pod):
                self.queue.add((pod["metadata"]["namespace"], name))

    async def reconcile(self, key: Key) -> None:
        """Take one claim, volume, or pod with ephemeral volumes a step further."""
        if key[0] == _VOLUME:
            if (volume := self.volumes.get(key[1])) is not None:
                await self._volume(volume)
        elif key[0].startswith("\0pod/"):
            if (pod := self.pods.get(key[1], key[0][5:])) is not None:
                await self._ephemeral(pod)
        elif (claim := self.claims.objects.get(key)) is not None:
            await self._claim(claim)

    # Claims.

    async def _claim(self, claim: Object) -> None:
        metadata = claim["metadata"]
        if is_terminating(claim):
            await self._release_claim(claim)
            return
        if CLAIM_PROTECTION not in (metadata.get("finalizers") or []):
            patch = {"metadata": {"finalizers": [*(metadata.get("finalizers") or []), CLAIM_PROTECTION]}}
            claim = await self._patch(PERSISTENT_VOLUME_CLAIMS, self.claims, claim, patch) or claim
        unclassed = claim["spec"].get("storageClassName") is None and not claim["spec"].get("volumeName")
        default = default_class(self.classes.objects.values()) if unclassed else None
        if default is not None:
            patch = {"spec": {"storageClassName": default["metadata"]["name"]}}
            claim = await self._patch(PERSISTENT_VOLUME_CLAIMS, self.claims, claim, patch) or claim
        if claim["spec"].get("volumeName"):
            await self._bound(claim)
        else:
            await self._unbound_claim(claim)

    async def _bound(self, claim: Object) -> None:
        """A claim that names its volume: the volume must be its own."""
        volume = self.volumes.get(claim["spec"]["volumeName"])
        if volume is None:
            if notes(claim).get(COMPLETED):
                await self._phase(claim, "Lost", None)
                words = "Bound claim has lost its PersistentVolume. Data on the volume is lost!"
                self._event(claim, "Warning", "ClaimLost", words)
            else:
                await self._phase(claim, "Pending", None)
            return
        wanted = volume["spec"].get("claimRef")
        if wanted and not refers_to(volume, claim):
            words = f'volume "{volume["metadata"]["name"]}" already bound to a different claim.'
            self._event(claim, "Warning", "FailedBinding", words)
            await self._phase(claim, "Pending", None)
            return
        await self._bind(claim, volume)

    async def _unbound_claim(self, claim: Object) -> None:
        storage = self.classes.get(claim["spec"].get("storageClassName") or "")
        waits = bool(storage and storage.get("volumeBindingMode") == "WaitForFirstConsumer")
        node = notes(claim).get(SELECTED_NODE)
        if not waits or node:
            near = self._near(node) if node else self.volumes.objects.values()
            if (volume := best(near, claim)) is not None:
                await self._bind(claim, volume)
                return
        await self._phase(claim, "Pending", None)
        if storage is None:
            if name := claim["spec"].get("storageClassName"):
                self._event(
                    claim, "Warning", "ProvisioningFailed", f'storageclass.storage.k8s.io "{name}" not found'
                )
            else:
                words = "no persistent volumes available for this claim and no storage class is set"
                self._event(claim, "Normal", "FailedBinding", words)
        elif waits and not node:
            words = "waiting for first consumer to be created before binding"
            self._event(claim, "Normal", "WaitForFirstConsumer", words)
        elif storage["provisioner"] == PROVISIONER:
            await self._provision(claim, storage)
        else:
            words = (
                f"Waiting for a volume to be created either by the external provisioner "
                f"'{storage['provisioner']}' or manually by the system administrator. If volume creation is "
                "delayed, please verify that the provisioner is running and correctly registered."
            )
            self._event(claim, "Normal", "ExternalProvisioning", words)

    def _near(self, node: str) -> Iterable[Object]:
        found = self.nodes.get(node)
        if found is None:
            return []
        return [
            v
            for v in self.volumes.objects.values()
            if matches_selector((v["spec"].get("nodeAffinity") or {}).get("required"), found)
        ]

    async def _provision(self, claim: Object, storage: Object) -> None:
        volume = provisioned(claim, storage)
        folder = self.disk / volume["metadata"]["name"]
        try:
            await asyncio.to_thread(_make_folder, folder)
        except OSError as error:
            words = f'failed to provision volume with StorageClass "{storage["metadata"]["name"]}": {error}'
            self._event(claim, "Warning", "ProvisioningFailed", words)
            raise
        try:
            made = await self.client.create(PERSISTENT_VOLUMES, volume)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            made = await self.client.get(PERSISTENT_VOLUMES, volume["metadata"]["name"])
        self.volumes.wrote(made)
        words = f"Successfully provisioned volume {volume['metadata']['name']}"
        self._event(claim, "Normal", "ProvisioningSucceeded", words)
        await self._bind(claim, made)

    async def _bind(self, claim: Object, volume: Object) -> None:
        """Both name each other; first the volume, so that nobody else takes it."""
        name = volume["metadata"]["name"]
        wanted = volume["spec"].get("claimRef") or {}
        if wanted.get("uid") != claim["metadata"]["uid"]:
            version = {"resourceVersion": volume["metadata"]["resourceVersion"]}
            mine = {} if wanted else {"annotations": {BOUND_BY: "yes"}}
            patch: Object = {"metadata": {**version, **mine}, "spec": {"claimRef": claim_reference(claim)}}
            volume = await self._patch(PERSISTENT_VOLUMES, self.volumes, volume, patch) or volume
        await self._volume_phase(volume, "Bound")
        if claim["spec"].get("volumeName") != name or not notes(claim).get(COMPLETED):
            marks = {COMPLETED: "yes"}
            if not claim["spec"].get("volumeName"):
                marks[BOUND_BY] = "yes"
            patch = {"metadata": {"annotations": marks}, "spec": {"volumeName": name}}
            claim = await self._patch(PERSISTENT_VOLUME_CLAIMS, self.claims, claim, patch) or claim
        volume = await self._grow(claim, volume)
        await self._phase(claim, "Bound", volume)

    async def _grow(self, claim: Object, volume: Object) -> Object:
        """A claim that asks for more than it has gets it: a folder grows by itself."""
        storage = self.classes.get(volume["spec"].get("storageClassName") or "")
        if not storage or not storage.get("allowVolumeExpansion") or requested(claim) <= capacity(volume):
            return volume
        size = claim["spec"]["resources"]["requests"]["storage"]
        patch = {"spec": {"capacity": {"storage": size}}}
        return await self._patch(PERSISTENT_VOLUMES, self.volumes, volume, patch) or volume

    async def _phase(self, claim: Object, phase: str, volume: Object | None) -> None:
        made: Object = {"phase": phase}
        if volume is not None:
            made["accessModes"] = volume["spec"].get("accessModes")
            made["capacity"] = volume["spec"].get("capacity")
        known = claim.get("status") or {}
        if any(known.get(k) != v for k, v in made.items()):
            await self._patch(PERSISTENT_VOLUME_CLAIMS, self.claims, claim, {"status": made}, "status")

    async def _release_claim(self, claim: Object) -> None:
        """A deleted claim goes once no pod uses it."""
        metadata = claim["metadata"]
        used = any(
            p["metadata"]["namespace"] == metadata["namespace"]
            and p["spec"].get("nodeName")  # an ended pod counts as well, as long as it exists
            and metadata["name"] in claim_names(p)
            for p in self.pods.objects.values()
        )
        finalizers = metadata.get("finalizers") or []
        if not used and CLAIM_PROTECTION in finalizers:
            patch = {"metadata": {"finalizers": [f for f in finalizers if f != CLAIM_PROTECTION]}}
            await self._patch(PERSISTENT_VOLUME_CLAIMS, self.claims, claim, patch)

    # Volumes.

    async def _volume(self, volume: Object) -> None:
        wanted = volume["spec"].get("claimRef") or {}
        claim = self.claims.get(wanted.get("name", ""), wanted.get("namespace", ""))
        phase = volume_phase(volume, claim)
        finalizers = volume["metadata"].get("finalizers") or []
        if is_terminating(volume):
            if phase != "Bound" and VOLUME_PROTECTION in finalizers:
                left = [f for f in finalizers if f != VOLUME_PROTECTION]
                patch: Object = {"metadata": {"finalizers": left}}
                await self._patch(PERSISTENT_VOLUMES, self.volumes, volume, patch)
            return
        if VOLUME_PROTECTION not in finalizers:
            patch = {"metadata": {"finalizers": [*finalizers, VOLUME_PROTECTION]}}
            volume = await self._patch(PERSISTENT_VOLUMES, self.volumes, volume, patch) or volume
        await self._volume_phase(volume, phase)
        if phase == "Released":
            await self._reclaim(volume)

    async def _reclaim(self, volume: Object) -> None:
        policy = volume["spec"].get("persistentVolumeReclaimPolicy", "Retain")
        if policy != "Delete":
            return
        if notes(volume).get(PROVISIONED_BY) == PROVISIONER:
            await asyncio.to_thread(shutil.rmtree, self.disk / volume["metadata"]["name"], True)
        elif (volume["spec"].get("hostPath") or {}).get("path"):
            words = "host_path deleter only supports /tmp/.+ but received provided path"
            self._event(volume, "Warning", "VolumeFailedDelete", words)
            await self._volume_phase(volume, "Failed")
            return
        await self.client.delete(PERSISTENT_VOLUMES, volume["metadata"]["name"])

    async def _volume_phase(self, volume: Object, phase: str) -> None:
        known = (volume.get("status") or {}).get("phase")
        if known == "Failed" and phase == "Released":
            return
        if known != phase:
            patch = {"status": {"phase": phase}}
            await self._patch(PERSISTENT_VOLUMES, self.volumes, volume, patch, "status")

    # Pods' own claims.

    async def _ephemeral(self, pod: Object) -> None:
        metadata = pod["metadata"]
        for volume in pod["spec"].get("volumes") or []:
            template = (volume.get("ephemeral") or {}).get("volumeClaimTemplate")
            name = f"{metadata['name']}-{volume['name']}"
            if template is None or self.claims.get(name, metadata["namespace"]) is not None:
                continue
            given = template.get("metadata") or {}
            claim = {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {
                    **{k: given[k] for k in ("labels", "annotations") if k in given},
                    "name": name,
                    "namespace": metadata["namespace"],
                    "ownerReferences": [reference(pod, "v1", "Pod")],
                },
                "spec": template["spec"],
            }
            self.claims.wrote(await self.client.create(PERSISTENT_VOLUME_CLAIMS, claim))

    # Writes.

    async def _patch(
        self, resource: Resource, cache: Cache, obj: Object, patch: Object, subresource: str = ""
    ) -> Object | None:
        metadata = obj["metadata"]
        try:
            made = await self.client.patch(
                resource, metadata["name"], patch, metadata.get("namespace"), subresource=subresource
            )
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        if is_terminating(made) and not made["metadata"].get("finalizers"):
            cache.erased(obj)
        else:
            cache.wrote(made)
        return made

    def _event(self, obj: Object, kind: str, reason: str, message: str) -> None:
        self.recorder.record(obj, kind, reason, message, component=_COMPONENT)


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chmod(folder, 0o777)

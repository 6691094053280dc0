"""A pod's volumes as folders of the machine, and their content kept current.

What content volumes show is `volume_content`'s; here are tokens, folders in memory and on disk, and claims.
Rules: Kubernetes' Volume v1 API.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, SERVICE_ACCOUNTS, Object
from meshlight.node.environment import ConfigError, Place, Sources, expand, quantity
from meshlight.node.runtime import Mount
from meshlight.node.volume_content import Token, TokenRequest, content, is_content, tokens_of, write_atomically

TOKEN_VOLUME = "kube-api-access"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
DEFAULT_TOKEN_SECONDS = 3607
"""As Kubernetes asks for automounted tokens."""
_REFRESH = 0.8
MADE_HERE = "/var/lib/meshlight/volumes/"
"""Paths of PersistentVolumes that are the machine's: what follows is a folder of the state directory."""
_MS_NOSUID_NODEV, _MNT_DETACH = 2 | 4, 2


class VolumeError(Exception):
    """A volume cannot be mounted; the message goes into a FailedMount event."""


def api_access(pod: Object) -> Object:
    """The volume that gives a pod its service account: token, CA and namespace."""
    return {
        "name": TOKEN_VOLUME,
        "projected": {
            "defaultMode": 0o644,
            "sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": DEFAULT_TOKEN_SECONDS}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {
                    "downwardAPI": {
                        "items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]
                    }
                },
            ],
        },
    }


def with_api_access(pod: Object, account_automounts: bool) -> Object:
    """The pod with that volume mounted in every container that has nothing at its place."""
    spec = pod["spec"]
    wanted = spec.get("automountServiceAccountToken")
    if wanted is False or (wanted is None and not account_automounts):
        return pod

    def mounted(container: Object) -> Object:
        mounts = container.get("volumeMounts") or []
        if any(m["mountPath"].rstrip("/") == TOKEN_FOLDER for m in mounts):
            return container
        own = {"name": TOKEN_VOLUME, "mountPath": TOKEN_FOLDER, "readOnly": True}
        return {**container, "volumeMounts": [*mounts, own]}

    changed = {
        "containers": [mounted(c) for c in spec["containers"]],
        "initContainers": [mounted(c) for c in spec.get("initContainers") or []],
    }
    if changed["containers"] == spec["containers"] and changed["initContainers"] == (
        spec.get("initContainers") or []
    ):
        return pod
    return {
        **pod,
        "spec": {**spec, **changed, "volumes": [*(spec.get("volumes") or []), api_access(pod)]},
    }


def host_path(root: Path, source: Object) -> Path:
    """The node-local path of a hostPath volume, created as its `type` asks. Raises VolumeError."""
    path = root / str(source["path"]).lstrip("/")
    if ".." in path.parts:
        raise VolumeError(f"hostPath {source['path']} must not contain '..'")
    kind = source.get("type") or ""
    if kind in ("", "DirectoryOrCreate") and not path.exists():
        path.mkdir(parents=True, mode=0o755)
    elif kind == "FileOrCreate" and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o644)
    if not path.exists():
        raise VolumeError(f"hostPath type check failed: {source['path']} does not exist on the node")
    mode = path.stat().st_mode
    right = {
        "DirectoryOrCreate": stat.S_ISDIR, "Directory": stat.S_ISDIR, "FileOrCreate": stat.S_ISREG,
        "File": stat.S_ISREG, "Socket": stat.S_ISSOCK, "CharDevice": stat.S_ISCHR, "BlockDevice": stat.S_ISBLK,
    }  # fmt: skip
    if kind in right and not right[kind](mode):
        raise VolumeError(f"hostPath type check failed: {source['path']} is not a {kind}")
    return path


@dataclass(frozen=True, slots=True)
class Claimed:
    """The PersistentVolume behind a claim: where it is on the node, and whether it may be written."""

    path: str
    kind: str
    read_only: bool


def claim_of(pod: Object, volume: Object) -> str | None:
    """The name of the claim that a volume stands for."""
    if (source := volume.get("persistentVolumeClaim")) is not None:
        return str(source["claimName"])
    if volume.get("ephemeral") is not None:
        return f"{pod['metadata']['name']}-{volume['name']}"
    return None


def claimed(volume: Object) -> Claimed:
    """How a PersistentVolume is found on a node. Raises VolumeError for those that need a driver."""
    spec, name = volume["spec"], volume["metadata"]["name"]
    read_only = set(spec.get("accessModes") or []) == {"ReadOnlyMany"}
    if spec.get("volumeMode") == "Block":
        raise VolumeError(f'PersistentVolume "{name}": volumeMode Block is not supported; use Filesystem')
    for kind in ("hostPath", "local"):
        if (source := spec.get(kind)) is not None:
            wanted = source.get("type") or "" if kind == "hostPath" else "Directory"
            return Claimed(str(source["path"]), wanted, read_only)
    raise VolumeError(f'PersistentVolume "{name}": only hostPath and local volumes can be mounted here')


def give_to_group(folder: Path, group: int, policy: str) -> None:
    """Make a volume the group's, as `fsGroup` asks; with policy OnRootMismatch only if its root is not yet."""
    found = folder.stat()
    if policy == "OnRootMismatch" and found.st_gid == group and found.st_mode & 0o2070 == 0o2070:
        return
    for path, _, files in os.walk(folder):
        for each in (path, *(os.path.join(path, f) for f in files)):
            with contextlib.suppress(FileNotFoundError):
                mode = os.lstat(each).st_mode
                os.chown(each, -1, group, follow_symlinks=False)
                if stat.S_ISDIR(mode):
                    os.chmod(each, stat.S_IMODE(mode) | 0o2070)
                elif stat.S_ISREG(mode):
                    os.chmod(each, stat.S_IMODE(mode) | 0o060)


def _mount_memory(folder: Path, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"mode=1777,size={size}" if size else "mode=1777"
    flags = ctypes.c_ulong(_MS_NOSUID_NODEV)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, f"tmpfs at {folder}: {os.strerror(number)}")


class PodVolumes:
    """The volumes of one pod below `folder`; hostPath volumes live below `host_root`, claims on `disk`."""

    def __init__(self, client: Client, folder: Path, host_root: Path, disk: Path) -> None:
        self._client, self._folder, self._host_root, self._disk = client, folder, host_root, disk
        self._tokens: dict[TokenRequest, Token] = {}
        self._paths: dict[str, Path] = {}
        self._claims: dict[str, Claimed] = {}

    @property
    def refresh_at(self) -> float:
        """When a token is to be replaced; 0 without tokens."""
        return min((t.refresh_at for t in self._tokens.values()), default=0.0)

    def empty_folders(self, pod: Object) -> dict[str, Path]:
        """The emptyDir volumes that are not in memory of their own, by name."""
        return {
            v["name"]: self._folder / v["name"]
            for v in pod["spec"].get("volumes") or []
            if v.get("emptyDir") is not None and v["emptyDir"].get("medium") != "Memory"
        }

    async def update(self, pod: Object, sources: Sources, place: Place) -> None:
        """Create what is missing and bring the content up to date. Raises VolumeError."""
        await self._renew_tokens(pod)
        await self._find_claims(pod)
        try:
            await asyncio.to_thread(self._write, pod, sources, place)
        except (ConfigError, OSError) as error:
            raise VolumeError(str(error)) from error

    async def _find_claims(self, pod: Object) -> None:
        namespace = pod["metadata"]["namespace"]
        for volume in pod["spec"].get("volumes") or []:
            name = claim_of(pod, volume)
            if name is None or volume["name"] in self._claims:
                continue
            try:
                claim = await self._client.get(PERSISTENT_VOLUME_CLAIMS, name, namespace)
                bound = (claim.get("status") or {}).get("phase") == "Bound"
                if not bound or not claim["spec"].get("volumeName"):
                    raise VolumeError(f'PersistentVolumeClaim "{name}" is not bound yet')
                found = await self._client.get(PERSISTENT_VOLUMES, claim["spec"]["volumeName"])
            except ApiError as error:
                raise VolumeError(f'volume "{volume["name"]}": {error.message}') from error
            self._claims[volume["name"]] = claimed(found)

    async def _renew_tokens(self, pod: Object) -> None:
        now = time.time()
        for asked in tokens_of(pod):
            held = self._tokens.get(asked)
            if held is None or now >= held.refresh_at:
                self._tokens[asked] = await self._token(pod, asked)

    async def _token(self, pod: Object, asked: TokenRequest) -> Token:
        metadata = pod["metadata"]
        account = pod["spec"].get("serviceAccountName") or "default"
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [asked.audience] if asked.audience else [],
                "expirationSeconds": asked.seconds,
                "boundObjectRef": {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                },
            },
        }
        path = SERVICE_ACCOUNTS.path(metadata["namespace"], account) + "/token"
        try:
            status = (await self._client.request("POST", path, body))["status"]
        except (ApiError, ApiUnreachable) as error:
            raise VolumeError(f'no token of service account "{account}": {error}') from error
        now = time.time()
        expires = datetime.fromisoformat(status["expirationTimestamp"]).timestamp()
        return Token(status["token"], now + _REFRESH * (expires - now))

    def _write(self, pod: Object, sources: Sources, place: Place) -> None:
        context = pod["spec"].get("securityContext") or {}
        group = context.get("fsGroup")
        for volume in pod["spec"].get("volumes") or []:
            name = volume["name"]
            path = self._folder / name
            if is_content(volume):
                try:
                    write_atomically(path, content(pod, volume, sources, place, self._tokens), group)
                except ConfigError as error:
                    raise VolumeError(f'MountVolume.SetUp failed for volume "{name}": {error}') from error
            elif (source := volume.get("emptyDir")) is not None:
                self._empty(path, source, group)
            elif (source := volume.get("hostPath")) is not None:
                path = host_path(self._host_root, source)
            elif name in self._claims:
                path = self._claim_folder(self._claims[name])
                if group is not None and name not in self._paths and not self._claims[name].read_only:
                    give_to_group(path, int(group), context.get("fsGroupChangePolicy") or "Always")
            else:
                kind = next(k for k in volume if k != "name")
                raise VolumeError(
                    f'volume "{name}": {kind} volumes are not supported; use emptyDir, hostPath or a claim'
                )
            self._paths[name] = path

    def _empty(self, path: Path, source: Object, group: int | None) -> None:
        if path.exists():
            return
        path.mkdir(parents=True)
        if source.get("medium") == "Memory":
            _mount_memory(path, int(quantity(source["sizeLimit"])) if source.get("sizeLimit") else 0)
        path.chmod(0o777)
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o2777)

    def _claim_folder(self, found: Claimed) -> Path:
        if found.path.startswith(MADE_HERE):
            folder = self._disk / found.path.removeprefix(MADE_HERE)
            if not folder.is_dir():
                raise VolumeError(f"the folder of the PersistentVolume at {found.path} is gone")
            return folder
        return host_path(self._host_root, {"path": found.path, "type": found.kind})

    def mounts(self, pod: Object, container: Object, env: Mapping[str, str]) -> list[Mount]:
        """The mount steps of a container. Raises ConfigError for a mount of no volume."""
        steps = []
        sources = {v["name"]: v for v in pod["spec"].get("volumes") or []}
        for mount in container.get("volumeMounts") or []:
            name = mount["name"]
            path = self._paths.get(name)
            if path is None:
                raise ConfigError(f'volumeMounts: there is no volume "{name}"')
            base = path.resolve()
            below = mount.get("subPath") or ""
            if mount.get("subPathExpr"):
                below = expand(mount["subPathExpr"], env)
            source = (base / below).resolve() if below else base
            if not source.is_relative_to(base):
                raise ConfigError(f"subPath {below} leads out of volume {name}")
            if not source.exists():
                source.mkdir(parents=True, mode=0o755)
            claim = self._claims.get(name)
            whole = (sources.get(name) or {}).get("persistentVolumeClaim") or {}
            fixed = (base / "..data").is_symlink() or bool(claim and claim.read_only) or whole.get("readOnly")
            options = "ro" if mount.get("readOnly") or fixed else ""
            steps.append(Mount("bind", str(source), mount["mountPath"], options))
        return steps

    def unmount(self, pod: Object) -> None:
        """Give back folders in memory, so that the pod's own folder can be removed."""
        libc = ctypes.CDLL(None, use_errno=True)
        for volume in pod["spec"].get("volumes") or []:
            if (volume.get("emptyDir") or {}).get("medium") == "Memory":
                libc.umount2(str(self._folder / volume["name"]).encode(), _MNT_DETACH)

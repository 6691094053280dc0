"""A pod's volumes as folders of the machine, and their content kept current.

`content` (pure) says which files a volume has; `write_atomically` puts them in place so that a reader
sees all of the old or all of the new; `PodVolumes` is the shell. Rules: Kubernetes' Volume v1 API.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import SERVICE_ACCOUNTS, Object
from meshlight.node.environment import ConfigError, Place, Sources, expand, field_value, resource_value
from meshlight.node.runtime import Mount

TOKEN_VOLUME = "kube-api-access"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
DEFAULT_TOKEN_SECONDS = 3607
"""As Kubernetes asks for automounted tokens."""
_REFRESH = 0.8


class VolumeError(Exception):
    """A volume cannot be mounted; the message goes into a FailedMount event."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of a volume."""

    content: bytes
    mode: int


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A service-account token that a volume shows."""

    audience: str
    seconds: int


@dataclass(frozen=True, slots=True)
class Token:
    """A token, and when it is to be replaced (seconds since the epoch)."""

    value: str
    refresh_at: float


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


def tokens_of(pod: Object) -> set[TokenRequest]:
    """Every token that the pod's volumes show."""
    found = set()
    for volume in pod["spec"].get("volumes") or []:
        for source in (volume.get("projected") or {}).get("sources") or []:
            if asked := source.get("serviceAccountToken"):
                found.add(_token_request(asked))
    return found


def _token_request(asked: Object) -> TokenRequest:
    return TokenRequest(asked.get("audience") or "", int(asked.get("expirationSeconds") or 3600))


def is_content(volume: Object) -> bool:
    """Whether a volume shows objects of the API, rather than a folder."""
    return any(volume.get(kind) is not None for kind in ("configMap", "secret", "projected", "downwardAPI"))


def content(
    pod: Object, volume: Object, sources: Sources, place: Place, tokens: Mapping[TokenRequest, Token]
) -> dict[str, File]:
    """The files of a volume by relative path. Raises ConfigError naming what is missing."""
    for kind in ("configMap", "secret", "downwardAPI"):
        if (source := volume.get(kind)) is not None:
            mode = int(source.get("defaultMode") or 0o644)
            return _source(pod, kind, source, sources, place, tokens, mode)
    projected = volume["projected"]
    mode = int(projected.get("defaultMode") or 0o644)
    files: dict[str, File] = {}
    for entry in projected.get("sources") or []:
        for kind, source in entry.items():
            files.update(_source(pod, kind, source, sources, place, tokens, mode))
    return files


def _source(
    pod: Object, kind: str, source: Object, sources: Sources, place: Place,
    tokens: Mapping[TokenRequest, Token], mode: int,
) -> dict[str, File]:  # fmt: skip
    namespace = pod["metadata"]["namespace"]
    optional = bool(source.get("optional"))
    match kind:
        case "configMap":
            found = sources.config_map(source["name"], namespace, optional)
            return _selected(found, source, mode, f"configmap {namespace}/{source['name']}")
        case "secret":
            name = source.get("secretName") or source["name"]
            found = sources.secret(name, namespace, optional)
            return _selected(found, source, mode, f"secret {namespace}/{name}")
        case "downwardAPI":
            files = {}
            for item in source.get("items") or []:
                if reference := item.get("fieldRef"):
                    value = field_value(pod, reference["fieldPath"], place)
                else:
                    value = resource_value(pod, "", item["resourceFieldRef"], place)
                files[_safe(item["path"])] = File(value.encode(), int(item.get("mode") or mode))
            return files
        case "serviceAccountToken":
            token = tokens[_token_request(source)]
            return {_safe(source["path"]): File(token.value.encode(), mode)}
    raise ConfigError(f"projected volume source {kind} is not supported")


def _selected(found: dict[str, bytes] | None, source: Object, mode: int, what: str) -> dict[str, File]:
    if found is None:
        return {}
    items = source.get("items")
    if items is None:
        return {key: File(value, mode) for key, value in found.items()}
    files = {}
    for item in items:
        if item["key"] in found:
            files[_safe(item["path"])] = File(found[item["key"]], int(item.get("mode") or mode))
        elif not source.get("optional"):
            raise ConfigError(f"references non-existent config key: {item['key']} ({what})")
    return files


def _safe(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ConfigError(f"path {path} must be relative and must not contain '..'")
    return path


def write_atomically(folder: Path, files: Mapping[str, File], group: int | None) -> bool:
    """Make `folder` show exactly `files`, all at once; returns whether anything changed.

    The files stand in a folder of their own; `..data` points to it and every name points through
    `..data`, so that one rename changes them all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    current = folder / "..data"
    if current.exists() and _same(current, files):
        return False
    fresh = folder / f"..{time.time_ns()}"
    fresh.mkdir(mode=0o755)
    for path, file in files.items():
        target = fresh / path
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(file.content)
            os.fchmod(descriptor, file.mode | (0o440 if group is not None else 0))
            if group is not None:
                os.fchown(descriptor, -1, group)
    old = current.readlink().name if current.is_symlink() else None
    pointer = folder / "..data_tmp"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(fresh.name)
    pointer.rename(current)
    wanted = {path.split("/")[0] for path in files}
    for name in wanted:
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(f"..data/{name}")
    for entry in folder.iterdir():
        if entry.is_symlink() and not entry.name.startswith("..") and entry.name not in wanted:
            entry.unlink()
    if old:
        shutil.rmtree(folder / old, ignore_errors=True)
    return True


def _same(current: Path, files: Mapping[str, File]) -> bool:
    found = {str(p.relative_to(current)) for p in current.rglob("*") if p.is_file()}
    return found == set(files) and all((current / p).read_bytes() == f.content for p, f in files.items())


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


class PodVolumes:
    """The volumes of one pod below `folder`; hostPath volumes live below `host_root`."""

    def __init__(self, client: Client, folder: Path, host_root: Path) -> None:
        self._client, self._folder, self._host_root = client, folder, host_root
        self._tokens: dict[TokenRequest, Token] = {}
        self._paths: dict[str, Path] = {}

    @property
    def refresh_at(self) -> float:
        """When a token is to be replaced; 0 without tokens."""
        return min((t.refresh_at for t in self._tokens.values()), default=0.0)

    async def update(self, pod: Object, sources: Sources, place: Place) -> None:
        """Create what is missing and bring the content up to date. Raises VolumeError."""
        await self._renew_tokens(pod)
        try:
            await asyncio.to_thread(self._write, pod, sources, place)
        except (ConfigError, OSError) as error:
            raise VolumeError(str(error)) from error

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
        group = (pod["spec"].get("securityContext") or {}).get("fsGroup")
        for volume in pod["spec"].get("volumes") or []:
            name = volume["name"]
            path = self._folder / name
            if is_content(volume):
                try:
                    write_atomically(path, content(pod, volume, sources, place, self._tokens), group)
                except ConfigError as error:
                    raise VolumeError(f'MountVolume.SetUp failed for volume "{name}": {error}') from error
            elif volume.get("emptyDir") is not None or set(volume) == {"name"}:
                if not path.exists():
                    path.mkdir(parents=True)
                    path.chmod(0o777)
                    if group is not None:
                        os.chown(path, -1, group)
                        path.chmod(0o2777)
            elif (source := volume.get("hostPath")) is not None:
                path = host_path(self._host_root, source)
            else:
                kind = next(k for k in volume if k != "name")
                raise VolumeError(
                    f'volume "{name}": {kind} volumes are not supported; use emptyDir or hostPath'
                )
            self._paths[name] = path

    def mounts(self, container: Object, env: Mapping[str, str]) -> list[Mount]:
        """The mount steps of a container. Raises ConfigError for a mount of no volume."""
        steps = []
        for mount in container.get("volumeMounts") or []:
            path = self._paths.get(mount["name"])
            if path is None:
                raise ConfigError(f'volumeMounts: there is no volume "{mount["name"]}"')
            base = path.resolve()
            below = mount.get("subPath") or ""
            if mount.get("subPathExpr"):
                below = expand(mount["subPathExpr"], env)
            source = (base / below).resolve() if below else base
            if not source.is_relative_to(base):
                raise ConfigError(f"subPath {below} leads out of volume {mount['name']}")
            if not source.exists():
                source.mkdir(parents=True, mode=0o755)
            options = "ro" if mount.get("readOnly") or (base / "..data").is_symlink() else ""
            steps.append(Mount("bind", str(source), mount["mountPath"], options))
        return steps

"""What the files of ConfigMap, Secret, downward API and projected volumes are, and how they are put in place.

`content` (pure) says which files a volume has; `write_atomically` puts them there so that a reader sees all
of the old or all of the new. Rules: Kubernetes' Volume v1 API.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshlight.kube.resources import Object
from meshlight.node.environment import ConfigError, Place, Sources, field_value, resource_value


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

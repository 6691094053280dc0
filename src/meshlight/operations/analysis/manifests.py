"""Objects read from files, each with the place it stands at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from meshlight.kube.resources import Object
from meshlight.operations.errors import OperationError

EXTENSIONS = (".yaml", ".yml", ".json")


class UnreadableManifest(OperationError):
    """A file is no YAML, or holds something that is no object."""


def files(paths: Iterable[Path]) -> list[Path]:
    """The manifests among files and below folders; a file that is named counts whatever its ending is."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix in EXTENSIONS and p.is_file())
        else:
            found.append(path)
    return found


def read(paths: Iterable[Path], namespace: str) -> list[Object]:
    """Every object, those without a namespace in `namespace`. Raises UnreadableManifest and OSError."""
    return [obj for path in files(paths) for obj in parse(path.read_text(), str(path), namespace)]


def parse(text: str, name: str, namespace: str) -> Iterator[Object]:
    """The objects of a text; each carries `__reference__`, `FILE:LINE`."""
    try:
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            if node is None:
                continue
            constructor = yaml.SafeLoader("")
            obj = constructor.construct_document(node)
            where = f"{name}:{node.start_mark.line + 1}"
            yield from _objects(obj, where, namespace)
    except yaml.YAMLError as error:
        raise UnreadableManifest(f"{name}: not YAML: {error}") from error


def _objects(obj: object, where: str, namespace: str) -> Iterator[Object]:
    if obj is None:
        return
    if not isinstance(obj, dict) or not obj.get("kind") or not obj.get("apiVersion"):
        raise UnreadableManifest(f"{where}: no object: apiVersion and kind are missing")
    if obj["kind"].endswith("List") and "items" in obj:
        for item in obj["items"] or []:
            yield from _objects(item, where, namespace)
        return
    metadata = obj.setdefault("metadata", {})
    if obj["kind"] not in ("Namespace", "Node", "GatewayClass", "CustomResourceDefinition", "ClusterRole"):
        metadata.setdefault("namespace", namespace)
    yield {**obj, "__reference__": where}

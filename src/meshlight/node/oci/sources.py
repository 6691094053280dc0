"""Where images come from on disk: an OCI layout, an archive of one, an archive of `docker save`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from meshlight.node.oci.model import INDEXES, Descriptor, ImageError, Manifest, choose
from meshlight.node.oci.reference import FileImage

MOST_JSON = 4 << 20
"""Bytes that a manifest or a configuration may have."""
_UNKNOWN_SIZE = 32 << 30


@dataclass(frozen=True, slots=True)
class Found:
    """An image as its source has it: digests are empty where the source does not say."""

    digest: str
    config: bytes
    layers: tuple[Descriptor, ...]


class Source(Protocol):
    """Something that has one image."""

    def find(self) -> Found:
        """The image's parts. Raises ImageError, OSError."""

    def blob(self, layer: Descriptor) -> AbstractContextManager[BinaryIO]:
        """A layer's bytes. Raises ImageError, OSError."""


def verified(content: bytes, digest: str, what: str) -> bytes:
    """The content, if it has the digest. Raises ImageError."""
    found = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if digest and found != digest:
        raise ImageError(f"{what} has the digest {found}, not {digest}: it is damaged or was changed")
    return content


def decoded(content: bytes, what: str) -> Any:
    """JSON. Raises ImageError."""
    try:
        return json.loads(content)
    except ValueError:
        raise ImageError(f"{what} is no JSON") from None


def _small(stream: BinaryIO, what: str) -> bytes:
    content = stream.read(MOST_JSON + 1)
    if len(content) > MOST_JSON:
        raise ImageError(f"{what} is larger than {MOST_JSON} bytes")
    return content


class _Folder:
    """Files of a layout folder, by their names in it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with (self._path / name).open("rb") as stream:
            yield stream


class _Archive:
    """Members of a tar archive, by their names in it; read where they lie, never unpacked."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        try:
            with tarfile.open(self._path) as archive:
                names = [m for m in archive if m.isfile() and m.name.removeprefix("./") == name]
                if not names:
                    raise ImageError(f"{self._path} has no {name}")
                member = archive.extractfile(names[-1])
                assert member is not None
                yield cast(BinaryIO, member)
        except tarfile.TarError as error:
            raise ImageError(f"{self._path} is no archive: {error}") from None


class LayoutSource:
    """An OCI image layout, in a folder or an archive."""

    def __init__(self, files: _Folder | _Archive, tag: str) -> None:
        self._files, self._tag = files, tag

    def find(self) -> Found:
        """Follow the index to the manifest, through nested indexes, for this machine's platform."""
        with self._files.open("index.json") as stream:
            index = decoded(_small(stream, "index.json"), "index.json")
        chosen = choose(index, self._tag)
        for _ in range(3):
            if chosen.media_type not in INDEXES:
                break
            chosen = choose(decoded(self._content(chosen), "a nested index"))
        manifest = Manifest.of(decoded(self._content(chosen), "the manifest"))
        return Found(chosen.digest, self._content(manifest.config), manifest.layers)

    def _content(self, descriptor: Descriptor) -> bytes:
        with self.blob(descriptor) as stream:
            return verified(_small(stream, descriptor.digest), descriptor.digest, "a blob of the layout")

    def blob(self, layer: Descriptor) -> AbstractContextManager[BinaryIO]:
        """A blob by its digest."""
        return self._files.open(f"blobs/sha256/{layer.hex}")


class DockerArchive:
    """What `docker save` writes: layers by their path in the archive, known by their diff ids alone."""

    def __init__(self, path: Path, tag: str) -> None:
        self._archive, self._tag = _Archive(path), tag
        self._paths: list[str] = []

    def find(self) -> Found:
        """The only image, or the one of that tag."""
        with self._archive.open("manifest.json") as stream:
            entries = decoded(_small(stream, "manifest.json"), "manifest.json")
        try:
            named = [e for e in entries if not self._tag or self._tag in (e.get("RepoTags") or [])]
            tags = sorted(tag for e in entries for tag in e.get("RepoTags") or [])
            if len(named) != 1:
                raise ImageError(
                    f"the archive has {', '.join(tags) or 'no tagged image'}: name one after the path"
                )
            config, self._paths = str(named[0]["Config"]), [str(p) for p in named[0]["Layers"]]
        except (KeyError, TypeError, AttributeError):
            raise ImageError("the archive's manifest.json names no Config and Layers") from None
        with self._archive.open(config) as stream:
            content = _small(stream, config)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        layers = tuple(Descriptor("", "", number) for number in range(len(self._paths)))
        return Found(digest, content, layers)

    def blob(self, layer: Descriptor) -> AbstractContextManager[BinaryIO]:
        """A layer by its number."""
        return self._archive.open(self._paths[layer.size])


def on_disk(image: FileImage) -> Source:
    """The source that a name means. Raises ImageError when nothing is there."""
    path = Path(image.path)
    wanted = path.is_dir() if image.kind == "oci" else path.is_file()
    if not wanted:
        kind = "folder with an OCI layout" if image.kind == "oci" else "archive"
        raise ImageError(f"{path} is no {kind}, or cannot be seen from here")
    match image.kind:
        case "oci":
            return LayoutSource(_Folder(path), image.tag)
        case "oci-archive":
            return LayoutSource(_Archive(path), image.tag)
        case "docker-archive":
            return DockerArchive(path, image.tag)

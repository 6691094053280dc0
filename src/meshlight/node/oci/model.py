"""What an image says of itself: descriptors, manifests, the configuration of its programs. Pure."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}")
_MOST_LAYERS = 120
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}


class ImageError(Exception):
    """An image cannot be had or used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Content by its digest."""

    media_type: str
    digest: str
    size: int

    @classmethod
    def of(cls, found: Any) -> Descriptor:
        """From JSON. Raises ImageError."""
        try:
            media, digest, size = str(found["mediaType"]), str(found["digest"]), int(found["size"])
        except (KeyError, TypeError, ValueError):
            raise ImageError(f"no descriptor of content: {found!r:.200}") from None
        if not _DIGEST.fullmatch(digest):
            raise ImageError(f"{digest!r} is no sha256 digest")
        if size < 0:
            raise ImageError(f"{digest} has the size {size}")
        return cls(media, digest, size)

    @property
    def hex(self) -> str:
        """The digest without its algorithm."""
        return self.digest.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image: its configuration, and its layers from the lowest to the topmost."""

    config: Descriptor
    layers: tuple[Descriptor, ...]

    @classmethod
    def of(cls, found: Any) -> Manifest:
        """From JSON. Raises ImageError."""
        if not isinstance(found, dict) or not isinstance(found.get("layers"), list) or "config" not in found:
            raise ImageError("a manifest must have a config and layers (schema 2)")
        layers = tuple(Descriptor.of(layer) for layer in found["layers"])
        if len(layers) > _MOST_LAYERS:
            raise ImageError(f"{len(layers)} layers; at most {_MOST_LAYERS} can be laid over each other")
        return cls(Descriptor.of(found["config"]), layers)


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """How an image's program runs. `diff_ids` are the layers' digests once unpacked."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    user: str = ""
    working_directory: str = "/"
    stop_signal: str = ""
    diff_ids: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: Any) -> ImageConfig:
        """From JSON. Raises ImageError."""
        try:
            run = found.get("config") or {}
            diff_ids = tuple(str(d) for d in found["rootfs"]["diff_ids"])
            environment = tuple(
                (key, value) for key, _, value in (str(e).partition("=") for e in run.get("Env") or [])
            )
            made = cls(
                tuple(str(word) for word in run.get("Entrypoint") or []),
                tuple(str(word) for word in run.get("Cmd") or []),
                environment,
                str(run.get("User") or ""),
                str(run.get("WorkingDir") or "/"),
                str(run.get("StopSignal") or ""),
                diff_ids,
            )
        except (KeyError, TypeError, AttributeError):
            raise ImageError("the image's configuration cannot be read: it has no rootfs.diff_ids") from None
        for diff_id in diff_ids:
            if not _DIGEST.fullmatch(diff_id):
                raise ImageError(f"{diff_id!r} is no sha256 digest")
        return made

    def program(self, *, command: bool, args: bool) -> list[str]:
        """The image's part of a command line, given what the container brings itself.

        Kubernetes' rule: `command` replaces entrypoint and cmd, `args` replace cmd.
        """
        if command:
            return []
        return [*self.entrypoint, *(() if args else self.command)]


def decoded_config(content: bytes) -> Any:
    """A configuration's JSON. Raises ImageError."""
    try:
        return json.loads(content)
    except ValueError:
        raise ImageError("the image's configuration is no JSON") from None


def choose(index: Any, tag: str = "") -> Descriptor:
    """The manifest of an index: the one of that name, if one is given, else of this platform.

    Raises ImageError.
    """
    entries = index.get("manifests") if isinstance(index, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ImageError("the index names no manifests")
    if tag:
        names = {
            str((e.get("annotations") or {}).get("org.opencontainers.image.ref.name", "")) for e in entries
        }
        entries = [
            e
            for e in entries
            if str((e.get("annotations") or {}).get("org.opencontainers.image.ref.name", "")) == tag
        ]
        if not entries:
            raise ImageError(
                f"no image is tagged {tag}; there are {', '.join(sorted(names - {''})) or 'no tags'}"
            )
    own = platform_of(entries)
    if not own:
        raise ImageError(f"no image for linux/{architecture()}")
    return Descriptor.of(own[0])


def architecture() -> str:
    """This machine's, as images name it."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def platform_of(entries: Iterable[Any]) -> list[Any]:
    """The entries of an index that this machine can run; one that does not say counts."""
    wanted = ("linux", architecture())
    found = []
    for entry in entries:
        said = entry.get("platform") or {}
        if (said.get("os", "linux"), said.get("architecture", wanted[1])) == wanted:
            found.append(entry)
    return found

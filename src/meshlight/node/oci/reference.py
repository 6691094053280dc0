"""What an image's name means: a file of this machine, or a repository of a registry. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
DEFAULT_HOST = "docker.io"


class InvalidReference(Exception):
    """The text is no image's name; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class FileImage:
    """An OCI layout, or an archive of one or of `docker save`; `tag` chooses where there are several."""

    kind: Literal["oci", "oci-archive", "docker-archive"]
    path: str
    tag: str = ""


@dataclass(frozen=True, slots=True)
class RegistryImage:
    """A repository of a registry, with a tag, or a digest that wins over it."""

    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def version(self) -> str:
        """What a manifest is asked for by."""
        return self.digest or self.tag


Reference = FileImage | RegistryImage


def is_file(image: str) -> bool:
    """Whether the name means a file of this machine."""
    return image.startswith(("oci:", "oci-archive:", "docker-archive:"))


def parse(image: str) -> Reference:
    """An image's name, by its parts. Raises InvalidReference."""
    if is_file(image):
        kind, _, rest = image.partition(":")
        path, _, tag = rest.partition(":")
        if not path.startswith("/"):
            raise InvalidReference(f'image "{image}": the path after {kind}: must be absolute')
        return FileImage(kind, path, tag)  # type: ignore[arg-type]
    name, at, digest = image.partition("@")
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        host, path = first, rest
    else:
        host, path = DEFAULT_HOST, name if slash else f"library/{name}"
    repository, colon, tag = path.partition(":")
    if not _HOST.fullmatch(host):
        raise InvalidReference(f'image "{image}": {host!r} is no host')
    if not _REPOSITORY.fullmatch(repository):
        raise InvalidReference(f'image "{image}": {repository!r} is no repository (lower case)')
    if colon and not _TAG.fullmatch(tag):
        raise InvalidReference(f'image "{image}": {tag!r} is no tag')
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidReference(f'image "{image}": {digest!r} is no sha256 digest')
    return RegistryImage(host, repository, tag or ("" if at else "latest"), digest)

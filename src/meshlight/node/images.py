"""Which program of this machine an image stands for: the one table that replaces a registry.

Pure. A container with a `command` runs that command; else its image must be in the table or in
ConfigMap kube-system/meshlight-images, whose keys are image patterns and values command lines.
"""

from __future__ import annotations

import fnmatch
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from meshlight.kube.resources import Object
from meshlight.node.oci.reference import InvalidReference, RegistryImage, is_file, parse

CONFIG_MAP = "meshlight-images"
REGISTRIES = "meshlight-registries"
"""ConfigMap of kube-system that names the registries to pull from: `NAME: HOST [URL]`."""


class UnknownImage(Exception):
    """No program is known for the image; the message says how to map it."""


ZTUNNEL = "MESHLIGHT_ZTUNNEL"
"""Environment variable with the path of another node proxy, Istio's for example."""


def ztunnel() -> str:
    """The data plane's binary: the one named in the environment, else beside the interpreter, or on PATH."""
    if other := os.environ.get(ZTUNNEL):
        return other
    beside = Path(sys.executable).with_name("meshlight-ztunnel")
    return str(beside) if beside.exists() else shutil.which("meshlight-ztunnel") or str(beside)


def built_in() -> dict[str, list[str]]:
    """Image patterns and the programs that come with Meshlight."""
    return {
        "*istio/pilot*": [sys.executable, "-m", "meshlight.controlplane"],
        "*istio/ztunnel*": [ztunnel()],
        "*istio/proxyv2*": [sys.executable, "-m", "meshlight.controlplane.gateways.proxy"],
        "*jaegertracing/*": [sys.executable, "-m", "meshlight.tracing"],
        "*coredns*": [sys.executable, "-m", "meshlight.controllers.dns"],
    }


def repository(image: str) -> str:
    """An image without its tag and digest."""
    without_digest = image.partition("@")[0]
    folder, slash, name = without_digest.rpartition("/")
    return folder + slash + name.partition(":")[0]


def matches(pattern: str, image: str) -> bool:
    """Whether a pattern means the image: all of it, its repository, or the repository's last part."""
    name = repository(image)
    return any(fnmatch.fnmatchcase(text, pattern) for text in (image, name, name.rpartition("/")[2]))


def is_oci(container: Object, mapping: Mapping[str, str], registries: Mapping[str, object]) -> bool:
    """Whether a container's image is one to unpack rather than a name for a program of this machine.

    A file always is. A registry's is if the user named the registry, unless a mapping or the table of
    built-in programs means it. A name that cannot be read is left to `resolve`.
    """
    image = container.get("image") or ""
    if is_file(image):
        return True
    try:
        reference = parse(image)
    except InvalidReference:
        return False
    if not isinstance(reference, RegistryImage) or reference.host not in registries:
        return False
    return not any(matches(pattern, image) for pattern in (*mapping, *built_in()))


def resolve(container: Object, mapping: Mapping[str, str]) -> list[str]:
    """The program of a container without its `args`; users' mappings win over the table.

    Raises UnknownImage when neither the container nor a mapping names a program.
    """
    if container.get("command"):
        return []
    image = container.get("image") or ""
    for pattern, command in mapping.items():
        if matches(pattern, image):
            try:
                words = shlex.split(command)
            except ValueError as error:
                raise UnknownImage(f"ConfigMap kube-system/{CONFIG_MAP}, key {pattern}: {error}") from None
            if words:
                return words
    for pattern, words in built_in().items():
        if matches(pattern, image):
            return words
    key = repository(image).rpartition("/")[2] or "NAME"
    raise UnknownImage(
        f'image "{image}" stands for no program of this machine: give the container a command, or map the '
        f"image: kubectl -n kube-system patch configmap {CONFIG_MAP} --type merge "
        f"""-p '{{"data":{{"{key}":"/path/of/program argument"}}}}', or name its registry in ConfigMap """
        f"kube-system/{REGISTRIES}"
    )

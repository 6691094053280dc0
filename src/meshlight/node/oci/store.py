"""A cluster's images on disk, shared by its nodes: layers by what is in them, names by what they meant last.

`layers/<first half of the diff id>` are overlay layers, complete or not there; `names/` remember what a name
led to. Several node agents use one store: whoever makes something holds its lock meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from meshlight.node.oci.layer import MOST_BYTES, unpack
from meshlight.node.oci.model import ImageConfig, ImageError, decoded_config
from meshlight.node.oci.reference import FileImage, InvalidReference, RegistryImage, parse
from meshlight.node.oci.registry import Credentials, Dial, Registry, RegistrySource
from meshlight.node.oci.sources import Source, on_disk


class ImageNeverPull(ImageError):
    """The image is not here, and the pod's policy forbids to fetch it."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is here: `layers` are names of folders in `folder`, the topmost first."""

    id: str
    config: ImageConfig
    folder: Path
    layers: tuple[str, ...]

    def file(self, path: str) -> str:
        """A text file of the image, without following links; empty when there is none."""
        for layer in self.layers:
            found = self.folder / layer / path.lstrip("/")
            with contextlib.suppress(OSError):
                if stat.S_ISREG(found.lstat().st_mode):
                    return found.read_text(errors="replace")
        return ""


@dataclass(frozen=True, slots=True)
class Pull:
    """What is needed to fetch an image: policy, what the user named, and whom to tell that it begins."""

    policy: str
    registries: Mapping[str, Registry]
    credentials: Callable[[str], Credentials | None]
    dial: Dial
    begins: Callable[[], None]


class ImageStore:
    """The images below a folder. Its methods block: call them in threads."""

    def __init__(self, folder: Path, *, user_namespace: bool) -> None:
        self.folder, self._user_namespace = folder, user_namespace

    def known(self, image: str) -> Image | None:
        """What a name led to last, if all of it is here."""
        try:
            found = json.loads(self._name(image).read_text())
            made = self._image(str(found["id"]), json.dumps(found["config"]).encode())
        except (OSError, ValueError, KeyError, TypeError, ImageError):
            return None
        layers = self.folder / "layers"
        return made if all((layers / layer).is_dir() for layer in made.layers) else None

    def ensure(self, image: str, pull: Pull) -> Image:
        """The image, fetched if the policy asks for it. Raises ImageError, InvalidReference, OSError."""
        reference = parse(image)
        with self._locked(f"name-{_key(image)}"):
            known = self.known(image)
            if pull.policy == "Never":
                if known is None:
                    raise ImageNeverPull(f'image "{image}" is not present, and imagePullPolicy is Never')
                return known
            if known is not None and pull.policy == "IfNotPresent" and isinstance(reference, RegistryImage):
                return known
            if known is not None and isinstance(reference, FileImage) and not os.path.exists(reference.path):
                return known
            try:
                return self._fetch(image, self._source(reference, pull), reference, known, pull.begins)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ImageError(f'image "{image}": what describes it is malformed: {error!r}') from None

    def _source(self, reference: FileImage | RegistryImage, pull: Pull) -> Source:
        if isinstance(reference, FileImage):
            return on_disk(reference)
        registry = pull.registries.get(reference.host)
        if registry is None:
            raise ImageError(f"registry {reference.host} was not named by you")
        return RegistrySource(registry, reference, pull.credentials(reference.host), pull.dial)

    def _fetch(
        self,
        image: str,
        source: Source,
        reference: FileImage | RegistryImage,
        known: Image | None,
        begins: Callable[[], None],
    ) -> Image:
        found = source.find()
        where = f"{reference.host}/{reference.repository}@" if isinstance(reference, RegistryImage) else ""
        made = self._image(where + found.digest, found.config)
        if made == known:
            return known
        if len(made.config.diff_ids) != len(found.layers):
            raise ImageError("the image's configuration and its manifest differ in the number of layers")
        begins()
        for diff_id, layer in zip(made.config.diff_ids, found.layers, strict=True):
            name = _folder(diff_id)
            with self._locked(f"layer-{name}"):
                if not (self.folder / "layers" / name).is_dir():
                    with source.blob(layer) as blob:
                        size = layer.size if layer.digest else MOST_BYTES
                        self._unpack(name, lambda into, b=blob, s=size: unpack(  # type: ignore[misc]
                            b, s, into, user_namespace=self._user_namespace
                        ), layer.digest, diff_id)  # fmt: skip
        path = self._name(image)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"image": image, "id": made.id, "config": json.loads(found.config)}))
        temporary.replace(path)
        return made

    def _unpack(self, name: str, work: Callable[[Path], tuple[str, str]], digest: str, diff_id: str) -> None:
        """Make a layer, whole and checked, or nothing."""
        layers = self.folder / "layers"
        layers.mkdir(parents=True, exist_ok=True, mode=0o711)
        temporary = layers / f".new-{name}"
        remove_tree(temporary)
        temporary.mkdir(mode=0o755)
        try:
            got, content = work(temporary)
            if digest and got != digest:
                raise ImageError(f"a layer has the digest {got}, not {digest}: it is damaged or was changed")
            if content != diff_id:
                raise ImageError(f"a layer unpacks to {content}, not to {diff_id} as the image says")
            temporary.rename(layers / name)
        finally:
            remove_tree(temporary)

    def _image(self, identity: str, config: bytes) -> Image:
        read = ImageConfig.of(decoded_config(config))
        layers = tuple(_folder(diff_id) for diff_id in reversed(read.diff_ids))
        return Image(identity, read, self.folder / "layers", tuple(dict.fromkeys(layers)))

    def _name(self, image: str) -> Path:
        return self.folder / "names" / f"{_key(image)}.json"

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (folder / name).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _key(image: str) -> str:
    return hashlib.sha256(image.encode()).hexdigest()[:32]


def _folder(diff_id: str) -> str:
    """Short, as an overlay's options must fit in a page."""
    return diff_id.partition(":")[2][:24]


def remove_tree(folder: Path) -> None:
    """Remove a folder whatever its folders' modes are; absence is fine."""

    def open_up(_function: object, path: str, _error: object) -> None:
        for above in (os.path.dirname(path), path):
            with contextlib.suppress(OSError):
                if stat.S_ISDIR(os.lstat(above).st_mode):
                    os.chmod(above, 0o700)
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.lstat(path).st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)

    if folder.exists():
        shutil.rmtree(folder, onerror=open_up)


__all__ = ["Image", "ImageError", "ImageNeverPull", "ImageStore", "InvalidReference", "Pull"]

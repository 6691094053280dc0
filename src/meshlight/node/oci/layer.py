"""Unpacks one layer into a folder of its own that an overlay can use, and lets nothing out of it.

Names in a layer are hostile until proven otherwise: `..` is refused, and links are followed as if the folder
were the root of the file system. Whiteouts become the overlay's own. Devices are left out: a container's /dev
is its own, and its root has no others.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from meshlight.node.oci.model import ImageError

_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_HOPS = 40
_CHUNK = 1 << 20
MOST_BYTES = 32 << 30
MOST_ENTRIES = 2_000_000
"""Bounds of one unpacked layer."""


class Hashing:
    """A stream that is hashed and counted as it is read."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._hash = hashlib.sha256()
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        """Read and hash. Raises ImageError past the limit."""
        part = self._stream.read(size if size >= 0 else _CHUNK)
        self._hash.update(part)
        self.count += len(part)
        if self.count > self._limit:
            raise ImageError(f"a layer is larger than the {self._limit} bytes that it may have")
        return part

    def drain(self) -> str:
        """Read the rest; the digest of everything."""
        while self.read(_CHUNK):
            pass
        return f"sha256:{self._hash.hexdigest()}"


class _Ahead:
    """A stream with its first bytes put back."""

    def __init__(self, first: bytes, stream: Hashing) -> None:
        self._first, self._stream = first, stream

    def read(self, size: int = -1) -> bytes:
        if self._first:
            part, self._first = (self._first, b"") if size < 0 else (self._first[:size], self._first[size:])
            return part
        return self._stream.read(size)


def decompressed(stream: Hashing) -> BinaryIO:
    """The tar archive in a blob, by its first bytes. Raises ImageError."""
    first = b""
    while len(first) < 4 and (part := stream.read(4 - len(first))):
        first += part
    whole = cast(BinaryIO, _Ahead(first, stream))
    if first.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=whole))
    if first == b"\x28\xb5\x2f\xfd":
        raise ImageError("a layer is compressed with zstd, which is not supported; gzip and plain tar are")
    return whole


def unpack(blob: BinaryIO, size: int, into: Path, *, user_namespace: bool) -> tuple[str, str]:
    """Unpack a blob; returns the digests of the blob and of the archive in it.

    `size` is what the blob may have at most. Raises ImageError for what is no layer, OSError.
    """
    raw = Hashing(blob, size)
    content = Hashing(decompressed(raw), MOST_BYTES)
    try:
        with tarfile.open(fileobj=cast(BinaryIO, content), mode="r|", errorlevel=1) as archive:
            Layer(into, user_namespace=user_namespace).fill(archive)
        diff_id = content.drain()
        return raw.drain(), diff_id
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise ImageError(f"a layer cannot be read: {error}") from None


class Layer:
    """A folder that becomes a layer."""

    def __init__(self, root: Path, *, user_namespace: bool) -> None:
        self.root = root
        self._owned = not user_namespace
        self._opaque = "user.overlay.opaque" if user_namespace else "trusted.overlay.opaque"
        self._times: list[tuple[str, float]] = []

    def fill(self, archive: tarfile.TarFile) -> None:
        """Take over every entry. Raises ImageError, OSError."""
        for number, entry in enumerate(archive):
            if number > MOST_ENTRIES:
                raise ImageError(f"a layer has more than {MOST_ENTRIES} entries")
            self._take(archive, entry)
        for path, moment in reversed(self._times):  # what came later changed them
            os.utime(path, (moment, moment), follow_symlinks=False)

    def _take(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        parts = [part for part in entry.name.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in entry.name:
            raise ImageError(f"a layer's entry {entry.name!r:.200} leads out of it")
        if not parts:
            os.chmod(self.root, entry.mode & 0o7777)
            return
        folder, name = self.folder(parts[:-1]), parts[-1]
        if name == _OPAQUE:
            os.setxattr(folder, self._opaque, b"y")
        elif name.startswith(_WHITEOUT):
            self._white_out(folder, name.removeprefix(_WHITEOUT))
        else:
            self._make(archive, entry, os.path.join(folder, name))

    def folder(self, parts: list[str]) -> str:
        """The folder of that name inside the layer, made as needed; links lead nowhere else."""
        return self._resolve(parts, make=True)

    def _resolve(self, parts: list[str], *, make: bool) -> str:
        """A path below the root, whose links are followed as if the root were `/`. Raises ImageError."""
        done: list[str] = []
        left, hops = list(reversed(parts)), 0
        while left:
            part = left.pop()
            if part in ("", "."):
                continue
            if part == "..":
                done = done[:-1]
                continue
            path = os.path.join(self.root, *done, part)
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                if not make:
                    raise
                os.mkdir(path, 0o755)
                done.append(part)
                continue
            if stat.S_ISLNK(mode):
                hops += 1
                if hops > _HOPS:
                    raise ImageError(
                        f"a layer's links lead round in circles at {'/'.join([*done, part])!r:.200}"
                    )
                target = os.readlink(path)
                if target.startswith("/"):
                    done = []
                left += reversed(target.split("/"))
                continue
            if make and not stat.S_ISDIR(mode):
                os.unlink(path)  # a whiteout or file that a folder replaces
                os.mkdir(path, 0o755)
            done.append(part)
        return os.path.join(self.root, *done)

    def _white_out(self, folder: str, name: str) -> None:
        if name in ("", ".", ".."):
            raise ImageError("a layer has a whiteout of nothing")
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(path).st_mode):
                os.setxattr(path, self._opaque, b"y")  # made anew by this very layer
            return
        os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))

    def _make(self, archive: tarfile.TarFile, entry: tarfile.TarInfo, path: str) -> None:
        hidden = self._clear(entry, path)
        if entry.isdir():
            if not os.path.isdir(path):
                os.mkdir(path)
            if hidden:
                os.setxattr(path, self._opaque, b"y")
            self._times.append((path, entry.mtime))
        elif entry.issym():
            os.symlink(entry.linkname, path)
        elif entry.islnk():
            parts = [part for part in entry.linkname.split("/") if part not in ("", ".")]
            if ".." in parts or not parts:
                raise ImageError(f"a layer's link to {entry.linkname!r:.200} leads out of it")
            source = os.path.join(self._resolve(parts[:-1], make=False), parts[-1])
            try:
                os.link(source, path, follow_symlinks=False)
            except FileNotFoundError:
                raise ImageError(f"a layer links to {entry.linkname!r:.200}, which it does not have") from None
            return
        elif entry.isfile():
            self._write(archive, entry, path)
        elif entry.isfifo():
            os.mkfifo(path)
        else:
            return  # a device
        if self._owned:
            os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
        if not entry.issym():
            os.chmod(path, entry.mode & 0o7777)
            if not entry.isdir():
                os.utime(path, (entry.mtime, entry.mtime))

    def _clear(self, entry: tarfile.TarInfo, path: str) -> bool:
        """Make way for an entry; whether what lower layers have there is hidden by this one."""
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(found.st_mode):
            if not entry.isdir():
                shutil.rmtree(path)
            return False
        os.unlink(path)
        return stat.S_ISCHR(found.st_mode)

    def _write(self, archive: tarfile.TarFile, entry: tarfile.TarInfo, path: str) -> None:
        source = archive.extractfile(entry)
        assert source is not None
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "wb") as target:
            for part in _parts(cast(BinaryIO, source)):
                target.write(part)


def _parts(source: BinaryIO) -> Iterator[bytes]:
    while part := source.read(_CHUNK):
        yield part

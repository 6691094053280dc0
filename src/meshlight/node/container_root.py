"""The root file system that a container's first process gives itself: a view of the machine, and mounts.

Part of the pod's pid 1 (`sandbox.py`), hence no imports beyond C modules, nor any of this package. The
plan of mounts comes from `rootfs.py`; this module makes it, as root or in a user namespace.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

Record = dict[str, Any]

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 4096, 16384, 1 << 18, 1 << 21
MNT_DETACH = 2
HOST = "/.meshlight-host"
"""Where the machine's root hangs in a container's root while its mounts are made."""

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    """Raise OSError for a system call that failed."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError naming the target."""
    result = libc.mount(
        source.encode() or None,
        target.encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    checked(result, f"mount {source or kind} on {target}")


def unmount(target: str) -> None:
    """umount2(2), lazily."""
    checked(libc.umount2(target.encode(), MNT_DETACH), f"unmount {target}")


def make_read_only(target: str) -> None:
    """Remount a bind mount read-only; keeps the flags that a user namespace may not clear."""
    flags = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | 1024 | 2048)
    mount("", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_RELATIME | flags)


def make_folder(path: str) -> None:
    """Create a folder, also below one that is not ours to write to."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError:
        above = path
        while not os.path.isdir(above):
            above = os.path.dirname(above)
        open_up(above)
        os.makedirs(path, exist_ok=True)


def make_target(target: str, like: str) -> None:
    """Create the mount point: a folder, or an empty file when the source is not a folder."""
    if os.path.isdir(like):
        make_folder(target)
        return
    make_folder(os.path.dirname(target))
    if os.path.lexists(target):
        return
    try:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    except OSError:
        open_up(os.path.dirname(target))
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))


def open_up(folder: str) -> None:
    """Let entries be added to a folder of another user's: the same entries on a tmpfs of ours."""
    inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        entries = os.listdir(inner)
        mount("tmpfs", folder, "tmpfs", MS_NODEV, "mode=755")
        for name in entries:
            source, target = f"{HOST}/proc/self/fd/{inner}/{name}", f"{folder}/{name}"
            if os.path.islink(source):
                os.symlink(os.readlink(source), target)
                continue
            make_target(target, source)
            mount(source, target, "", MS_BIND | MS_REC)
    finally:
        os.close(inner)


def write_file(path: str, content: str) -> None:
    """Write a file of the container's own in place of the machine's."""
    make_folder(os.path.dirname(path))
    if os.path.islink(path) or (os.path.exists(path) and not os.access(path, os.W_OK)):
        os.unlink(path)
    with open(path, "w") as file:
        file.write(content)


def make_mount(step: tuple[str, str, str, str]) -> None:
    """One step of a mount plan: (kind, source, target, options); sources are paths of the machine."""
    kind, source, target, options = step
    if kind == "bind":
        make_target(target, HOST + source)
        try:
            mount(HOST + source, target, "", MS_BIND)
        except OSError:  # in a user namespace what hides other mounts is only bound together with them
            mount(HOST + source, target, "", MS_BIND | MS_REC)
        if options == "ro":
            make_read_only(target)
    elif kind == "symlink":
        os.symlink(source, target)
    elif kind == "file":
        write_file(target, source)
    else:
        make_folder(target)
        if kind == "sysfs":
            try:
                mount(kind, target, kind, MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)
            except PermissionError:  # a network namespace of another user namespace: the machine's will do
                mount(HOST + "/sys", target, "", MS_BIND | MS_REC)
            return
        flags = MS_NOSUID if kind == "devpts" or target == "/dev" else MS_NOSUID | MS_NODEV
        mount(kind, target, kind, flags, options)


class View:
    """A copy-on-write view of the machine's files: one overlay where the kernel allows it.

    A user namespace may not overlay a folder with mounts below it, which the kernel locks. Such a folder
    is made anew, and each of its entries is viewed by itself: a folder without mounts as an overlay of
    its own, or read-only where overlays are not allowed at all; a file read-only. `parts` are the mounts made.
    With `layers` it is a view of an image instead.
    """

    def __init__(
        self, root: str, options: str, private: tuple[str, ...], folder: str = "", layers: tuple[str, ...] = ()
    ) -> None:
        self.root, self.options, self.private = root, options, private
        self.merged = root + "/merged"
        self.parts: list[str] = []
        with open("/proc/self/mountinfo") as file:
            self.points = [line.split()[4] for line in file]
        os.makedirs(self.merged, exist_ok=True)
        if layers:
            self._lay(folder, layers)
        elif not self._overlay("/"):
            mount("tmpfs", self.merged, "tmpfs", MS_NODEV, "mode=755")
            self.parts.append("/")
            self._entries("/")

    def _lay(self, folder: str, layers: tuple[str, ...]) -> None:
        """An image's layers instead; by names relative to their folder, as options must fit in a page."""
        for name in ("upper", "work"):
            os.makedirs(f"{self.root}/{name}", exist_ok=True)
        os.chdir(folder)
        os.chmod(self.root + "/upper", os.stat(layers[0]).st_mode & 0o7777)
        above = f"upperdir={self.root}/upper,workdir={self.root}/work{self.options}"
        mount("overlay", self.merged, "overlay", MS_NODEV, f"lowerdir={':'.join(layers)},{above}")
        self.parts.append("/")

    def _overlay(self, path: str) -> bool:
        upper, work = self.root + "/upper" + path, self.root + "/work" + path
        for folder in (upper, work):
            os.makedirs(folder, exist_ok=True)
        os.chmod(upper, os.stat(path).st_mode & 0o7777)
        options = f"lowerdir={path},upperdir={upper},workdir={work}{self.options}"
        try:
            mount("overlay", self.merged + path, "overlay", MS_NODEV, options)
        except OSError:
            return False
        self.parts.append(path)
        return True

    def _entries(self, folder: str) -> None:
        for name in os.listdir(folder):
            path = folder.rstrip("/") + "/" + name
            try:
                self._entry(path)
            except OSError:  # what the user may not see is not there
                continue

    def _entry(self, path: str) -> None:
        target = self.merged + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif not os.path.isdir(path):
            make_target(target, path)
            mount(path, target, "", MS_BIND)
            make_read_only(target)
        else:
            os.mkdir(target)
            if path in self.private or self._overlay(path):
                return
            if any(point.startswith(path + "/") for point in self.points):
                self._entries(path)
                return
            mount(path, target, "", MS_BIND)
            make_read_only(target)


def enter_root(spec: Record) -> None:
    """Give this process a root of its own: a view of the machine's, with the plan's mounts."""
    checked(libc.unshare(CLONE_NEWNS), "unshare")
    mount("", "/", "", MS_REC | MS_PRIVATE)
    view = View(spec["root"], spec["overlay_options"], spec["private"], spec["layers_folder"], spec["layers"])
    merged = view.merged
    os.makedirs(merged + HOST, exist_ok=True)
    os.chdir(merged)
    checked(libc.pivot_root(b".", (merged + HOST).encode()), "pivot_root")
    os.chdir("/")
    for step in spec["mounts"]:
        make_mount(step)
    unmount(HOST)
    os.rmdir(HOST)
    if spec["read_only"]:
        for part in view.parts:
            make_read_only(part)

"""Network namespaces by name: why code of one process can act inside a pod's namespace.

A namespace belongs to a thread, so work inside another one runs in a thread of its own that enters
it and then ends: nothing has to be restored, and the event loop's thread never leaves its node.
Python before 3.12 has no `os.setns`, hence the calls into libc.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

NETNS = Path("/run/netns")
"""Where namespaces are bind-mounted by name, as `ip netns` expects them."""

CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MNT_DETACH = 0x2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
)

T = TypeVar("T")


class NetworkError(Exception):
    """A link, address or rule could not be made; the message has the tool's own words."""


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def enter(path: Path) -> None:
    """Move the calling thread into a namespace; threads and processes it starts later follow it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(
            _libc.setns(descriptor, CLONE_NEWNET),
            f"cannot enter the network namespace {path}",
        )
    finally:
        os.close(descriptor)


def exists(name: str) -> bool:
    """Whether a namespace is mounted under that name (a bare file is a creation that was cut short)."""
    path = NETNS / name
    try:
        return path.stat().st_dev != NETNS.stat().st_dev
    except FileNotFoundError:
        return False


def identity(name: str) -> int:
    """A number that tells a namespace from others alive (its inode); 0 when there is none of that name."""
    return (NETNS / name).stat().st_ino if exists(name) else 0


def create(name: str) -> Path:
    """Make an empty namespace and mount it by name, unless there is one; returns its path."""
    path = NETNS / name
    if exists(name):
        return path
    NETNS.mkdir(parents=True, exist_ok=True)
    path.touch()

    def make() -> None:
        _check(_libc.unshare(CLONE_NEWNET), "cannot make a network namespace")
        source = b"/proc/thread-self/ns/net"
        _check(
            _libc.mount(source, os.fsencode(path), None, _MS_BIND, None),
            f"cannot mount {path}",
        )

    inside(None, make)
    return path


def detach(point: str) -> None:
    """Unmount whatever is mounted there, lazily."""
    _check(_libc.umount2(os.fsencode(point), _MNT_DETACH), f"cannot unmount {point}")


def remove(name: str) -> None:
    """Unmount a namespace; the kernel ends it with its last process or descriptor. Absence is fine."""
    path = NETNS / name
    if exists(name):
        _check(_libc.umount2(os.fsencode(path), _MNT_DETACH), f"cannot unmount {path}")
    path.unlink(missing_ok=True)


def inside(path: Path | None, function: Callable[[], T]) -> T:
    """Run `function` in a thread of its own, inside the namespace if one is given; returns its result.

    Children that it starts are born in the namespace too. Raises what the function raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            if path is not None:
                enter(path)
            results.append(function())
        except BaseException as error:  # handed to the caller, who raises it
            errors.append(error)

    thread = threading.Thread(target=body, name="netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


async def within(path: Path | None, function: Callable[[], T]) -> T:
    """`inside` for coroutines. Cancellation does not interrupt the function: it is waited for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def body() -> None:
        try:
            if path is not None:
                enter(path)
            result = function()
        except Exception as error:
            loop.call_soon_threadsafe(done.set_exception, error)
        else:
            loop.call_soon_threadsafe(done.set_result, result)

    threading.Thread(target=body, name="netns", daemon=True).start()
    cancelled = False
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        with contextlib.suppress(Exception):
            done.result()
        raise asyncio.CancelledError
    return done.result()


def run(command: list[str], text: str) -> str:
    """Run `ip` or `nft` in the calling thread's namespace with `text` as its input; returns its output.

    Raises NetworkError with what the program said.
    """
    environment = {
        **os.environ,
        "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
    }
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise NetworkError(f"{' '.join(command)}: {'; '.join(said[:8])}")
    return done.stdout


def ip(commands: list[str], *, tolerant: bool = False, six: bool = False) -> None:
    """Run `ip` commands as one batch; `tolerant` goes on after refusals (what exists already).

    `six`: rules without addresses are meant for IPv6.
    """
    command = ["ip", *(["-6"] if six else []), *(["-force"] if tolerant else []), "-batch", "-"]
    try:
        run(command, "\n".join(commands) + "\n")
    except NetworkError:
        if not tolerant:
            raise


def nft(text: str) -> str:
    """Run one nft transaction."""
    return run(["nft", "-f", "-"], text)


def set_sysctls(values: dict[str, str]) -> None:
    """Write `net/…` settings of the calling thread's namespace; those the kernel lacks are left out."""
    for name, value in values.items():
        with contextlib.suppress(FileNotFoundError):
            Path("/proc/sys", name).write_text(value)

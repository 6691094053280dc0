"""Running programs in one pod: starting its containers, commands beside them, hooks, stopping.

Prepares what `sandbox.py` needs and speaks of failures in the kubelet's words. It does not decide
when anything starts or stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from meshlight.kube.client import ApiError, ApiUnreachable
from meshlight.kube.resources import PODS, SECRETS, SERVICE_ACCOUNTS, SERVICES, Object
from meshlight.node import images, lifecycle, resolver
from meshlight.node.context import NodeContext
from meshlight.node.dialing import dial
from meshlight.node.environment import ConfigError, Place, service_variables, variables
from meshlight.node.images import UnknownImage
from meshlight.node.launching import (
    Surroundings,
    base_environment,
    beside,
    identity,
    image_environment,
    image_identity,
    program,
    security,
)
from meshlight.node.logfile import last_lines
from meshlight.node.oci.registry import Credentials, credentials, registries
from meshlight.node.oci.store import Image, Pull
from meshlight.node.probes import http_get
from meshlight.node.runtime import Mount, Sandbox, SandboxError
from meshlight.node.volumes import PodVolumes, with_api_access

TERMINATION_PATH = "/dev/termination-log"
_MESSAGE_BYTES, _FALLBACK_BYTES, _FALLBACK_LINES = 4096, 2048, 80
_OUTPUT_LIMIT = 10_000
_KEPT_LOGS = 2
_MACHINE_RESOLV_CONF = Path("/run/meshlight/resolv.conf")
"""What a node knows of the machine's nameservers; the supervisor writes it."""


@dataclass(frozen=True, slots=True)
class Started:
    """What a start did beyond starting: the program's id, and what could not be honoured."""

    image_id: str
    ignored: str


class Execution:
    """Programs of one pod. `pod` is kept current by the owner; `address` is the pod's."""

    def __init__(self, node: NodeContext, pod: Object) -> None:
        self.node, self.pod, self.address = node, pod, ""
        self.uid = str(pod["metadata"]["uid"])
        self.folder = node.pod_folder(self.uid)
        self.volumes = PodVolumes(node.client, self.folder / "volumes", node.host_files, node.disk)
        self._automounts: bool | None = None
        self._services: dict[str, str] | None = None
        self._images: dict[str, Image] = {}

    # What a container is surrounded by.

    def container(self, name: str, pod: Object | None = None) -> Object:
        """A container's spec. Raises KeyError."""
        chosen = pod or self.pod
        for found in [*lifecycle.init_containers(chosen), *chosen["spec"]["containers"]]:
            if found["name"] == name:
                return dict(found)
        raise KeyError(name)

    def place(self) -> Place:
        """Where the pod runs, for the downward API."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Place(self.address, self.node.address, os.cpu_count() or 1, memory)

    async def prepared(self) -> Object:
        """Bring the pod's volumes up to date; returns the pod with its token volume. Raises VolumeError."""
        pod = with_api_access(self.pod, await self._account_automounts())
        sources = await self.node.references.sources(pod)
        await self.volumes.update(pod, sources, self.place())
        return pod

    async def _account_automounts(self) -> bool:
        if self._automounts is None:
            name = self.pod["spec"].get("serviceAccountName") or "default"
            try:
                account = await self.node.client.get(SERVICE_ACCOUNTS, name, self.pod["metadata"]["namespace"])
            except ApiError as error:
                if error.code != 404:
                    raise
                return True  # the token's own refusal says what is missing
            self._automounts = account.get("automountServiceAccountToken") is not False
        return self._automounts

    async def _environment(self, pod: Object, container: Object, image: Image | None = None) -> dict[str, str]:
        if self._services is None:
            self._services = {}
            if pod["spec"].get("enableServiceLinks") is not False:
                listed = await self.node.client.list(SERVICES, pod["metadata"]["namespace"])
                self._services = service_variables(listed.items)
        base = {**self._services, **base_environment(pod, self.node.machine)}
        if image is not None:
            _, home = image_identity(pod, security(pod, container), self.node.machine, image)
            base = {k: v for k, v in base.items() if k != "LANG"} | image_environment(image, home)
        sources = await self.node.references.sources(pod)
        return variables(pod, container, sources, self.place(), base)

    def _termination_file(self, container: Object, attempt: int) -> Path:
        return self.folder / "termination" / str(container["name"]) / str(attempt)

    # Images.

    async def image(self, name: str) -> Image | None:
        """The image that a container was started with, or will be if it is here; None for a program of ours."""
        if not self._unpacks(name):
            return None
        if name not in self._images:
            found = await asyncio.to_thread(self.node.images.known, self.container(name)["image"])
            if found is None:
                raise UnknownImage(f'image "{self.container(name)["image"]}" is not here any more')
            self._images[name] = found
        return self._images[name]

    def _unpacks(self, name: str) -> bool:
        named = registries(self.node.registries)
        return images.is_oci(self.container(name), self.node.image_mapping, named)

    async def pull(self, name: str, begins: Callable[[], None]) -> bool:
        """See to a container's image by its policy; whether anything had to be fetched.

        `begins` is called when it is fetched. Raises ImageError, InvalidReference, OSError, ApiError.
        """
        if not self._unpacks(name):
            return False
        container, loop = self.container(name), asyncio.get_running_loop()
        logins = await self._logins()
        fetched = False

        def tell() -> None:
            nonlocal fetched
            fetched = True
            loop.call_soon_threadsafe(begins)

        wanted = Pull(
            container.get("imagePullPolicy") or "IfNotPresent",
            registries(self.node.registries),
            logins.get,
            dial,
            tell,
        )
        self._images[name] = await asyncio.to_thread(self.node.images.ensure, container["image"], wanted)
        return fetched

    async def _logins(self) -> dict[str, Credentials]:
        """What the pod's imagePullSecrets, or its account's, say of registries, by host. Raises ApiError."""
        metadata, spec = self.pod["metadata"], self.pod["spec"]
        named = list(spec.get("imagePullSecrets") or [])
        if not named:
            with contextlib.suppress(ApiError):
                account = spec.get("serviceAccountName") or "default"
                found = await self.node.client.get(SERVICE_ACCOUNTS, account, metadata["namespace"])
                named = list(found.get("imagePullSecrets") or [])
        logins: dict[str, Credentials] = {}
        for reference in named:
            with contextlib.suppress(ApiError):  # as the kubelet: what is not there is no credential
                secret = await self.node.client.get(SECRETS, reference["name"], metadata["namespace"])
                logins |= credentials(secret)
        return logins

    # Containers.

    async def start(self, sandbox: Sandbox, name: str, attempt: int, crashes: int) -> Started:
        """Start an attempt. Raises UnknownImage, ConfigError, VolumeError, SandboxError."""
        image = await self.image(name)
        bare = self.container(name)
        if image is None:
            image_program = images.resolve(bare, self.node.image_mapping)
        else:
            own = {"command": bool(bare.get("command")), "args": bool(bare.get("args"))}
            image_program = image.config.program(**own)
        pod = await self.prepared()
        container = self.container(name, pod)
        env = await self._environment(pod, container, image)
        mounts = self.volumes.mounts(pod, container, env)
        around = await asyncio.to_thread(self._surroundings, pod, container, attempt, mounts)
        wanted = program(pod, container, image_program, env, self.node.machine, around, image)
        await sandbox.start(name, attempt, wanted, {"crashes": crashes})
        context, machine = security(pod, container), self.node.machine
        who = image_identity(pod, context, machine, image)[0] if image else identity(pod, context, machine)
        found = shutil.which(wanted.argv[0], path=env.get("PATH")) or wanted.argv[0]
        return Started(image.id if image else f"file://{found}", who.ignored)

    def _surroundings(self, pod: Object, container: Object, attempt: int, mounts: list[Mount]) -> Surroundings:
        name = container["name"]
        log_path = self.node.log_path(self.uid, name, attempt)
        log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in log_path.parent.iterdir():
            if old.name.partition(".")[0].isdigit() and int(old.name.partition(".")[0]) <= attempt - _KEPT_LOGS:
                old.unlink(missing_ok=True)
        termination = self._termination_file(container, attempt)
        termination.parent.mkdir(parents=True, exist_ok=True)
        termination.touch(mode=0o666)
        termination.chmod(0o666)
        target = container.get("terminationMessagePath") or TERMINATION_PATH
        machine = _MACHINE_RESOLV_CONF.read_text() if _MACHINE_RESOLV_CONF.exists() else ""
        return Surroundings(
            self.folder / "roots" / name / str(attempt),
            log_path,
            resolver.files(pod, self.address, machine),
            [*mounts, Mount("bind", str(termination), target)],
            self.node.cgroups.prepare(self.uid, pod, container),
        )

    def ending(self, name: str, attempt: int, code: int) -> str:
        """The termination message of an attempt that has ended, by the container's policy."""
        try:
            container = self.container(name)
            path = self._termination_file(container, attempt)
            message = path.read_bytes()[:_MESSAGE_BYTES].decode(errors="replace") if path.exists() else ""
        except (KeyError, OSError):
            return ""
        if message or code == 0 or container.get("terminationMessagePolicy") != "FallbackToLogsOnError":
            return message
        return last_lines(self.node.log_path(self.uid, name, attempt), _FALLBACK_LINES, _FALLBACK_BYTES)

    def forget_root(self, name: str, attempt: int) -> None:
        """Remove what an ended attempt wrote to its root."""
        shutil.rmtree(self.folder / "roots" / name / str(attempt), ignore_errors=True)

    # Commands beside containers.

    async def spawn(
        self,
        sandbox: Sandbox,
        name: str,
        argv: list[str],
        stdin: int,
        stdout: int,
        stderr: int,
        tty: bool = False,
    ) -> asyncio.Future[int]:
        """Run a command in a running container on our descriptors; its exit code comes later."""
        container = self.container(name)
        image = await self.image(name)
        env = await self._environment(self.pod, container, image)
        if tty:
            env = {"TERM": "xterm", **env}
        wanted = beside(self.pod, container, argv, env, self.node.machine, tty, image)
        return await sandbox.execute(name, wanted, stdin, stdout, stderr)

    async def run(self, sandbox: Sandbox, name: str, argv: list[str], limit: float) -> tuple[int, str]:
        """Run a command to its end: exit code and output. Raises SandboxError, TimeoutError."""
        async with _Capture() as capture:
            ended = await self.spawn(sandbox, name, argv, capture.stdin, capture.write, capture.write)
            capture.close_write()
            async with asyncio.timeout(limit):
                output = await capture.output(_OUTPUT_LIMIT)
                return await ended, output.decode(errors="replace")

    # Hooks and stopping.

    async def hook(self, sandbox: Sandbox, name: str, kind: str, limit: float) -> str:
        """Run a container's `postStart` or `preStop` hook; why it failed, or an empty string."""
        container = self.container(name)
        action = (container.get("lifecycle") or {}).get(kind) or {}
        try:
            async with asyncio.timeout(limit):
                if command := action.get("exec"):
                    code, output = await self.run(sandbox, name, list(command.get("command") or []), limit)
                    return f"exit code {code}: {output[:200].strip()}" if code else ""
                if request := action.get("httpGet"):
                    return await http_get(request, container, self.address, self.node.http)
                if pause := action.get("sleep"):
                    await asyncio.sleep(float(pause.get("seconds") or 0))
        except TimeoutError:
            return f"no end within {limit:g} s"
        except (SandboxError, ConfigError, ApiError, ApiUnreachable, aiohttp.ClientError) as error:
            return str(error)
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    async def stop(self, sandbox: Sandbox, name: str, grace: float, failed: Callable[[str], None]) -> None:
        """The preStop hook, SIGTERM, the rest of the grace period, then the end of every process."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        with contextlib.suppress(SandboxError):
            if grace > 0 and (why := await self.hook(sandbox, name, "preStop", grace)):
                failed(why)
            image = self._images.get(name)
            await sandbox.signal(name, _stop_signal(self.container(name), image))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(deadline - loop.time(), 0)):
                    await sandbox.ended(name)
            while sandbox.running(name):
                await sandbox.kill(name)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await sandbox.ended(name)

    async def delete(self) -> None:
        """Remove the pod from the API; one that is gone or was replaced is left alone."""
        metadata = self.pod["metadata"]
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
        try:
            await self.node.client.request(
                "DELETE", PODS.path(metadata["namespace"], metadata["name"]), options
            )
        except ApiError as error:
            if error.code not in (404, 409):
                raise


def _stop_signal(container: Object, image: Image | None) -> int:
    asked = str(
        (container.get("lifecycle") or {}).get("stopSignal") or (image and image.config.stop_signal) or ""
    )
    if asked.isdigit() and 0 < int(asked) < signal.NSIG:
        return int(asked)
    return int(getattr(signal, asked if asked.startswith("SIG") else f"SIG{asked}", signal.SIGTERM))


class _Capture:
    """A pipe that collects what a command writes; `stdin` is empty."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        self.stdin = os.open(os.devnull, os.O_RDONLY)
        self._stream = asyncio.StreamReader()
        self._transport: asyncio.ReadTransport | None = None

    async def __aenter__(self) -> _Capture:
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._stream), os.fdopen(self._read, "rb", 0)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close_write()
        os.close(self.stdin)
        if self._transport is not None:
            self._transport.close()

    def close_write(self) -> None:
        """The child has its copy; ours would keep the pipe from ending."""
        if self.write >= 0:
            os.close(self.write)
            self.write = -1

    async def output(self, limit: int) -> bytes:
        """Everything written, of which the first `limit` bytes are kept."""
        kept = b""
        while part := await self._stream.read(limit):
            kept = (kept + part)[:limit]
        return kept

"""From a container's spec to the program that pid 1 starts: identity, limits of power, surroundings.

Pure: mounts, environment and paths come from the caller. Rules: Kubernetes' SecurityContext v1 API.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshlight.kube.resources import Object
from meshlight.node.environment import ConfigError, command_line, expand
from meshlight.node.oci import accounts
from meshlight.node.oci.store import Image
from meshlight.node.resolver import hostname
from meshlight.node.rootfs import PRIVATE, Machine, dropped_capabilities, own_plan, plan
from meshlight.node.runtime import Mount, Program

_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
API_ADDRESS, API_PORT = "10.96.0.1", "443"


@dataclass(frozen=True, slots=True)
class Identity:
    """Ids to run with; None leaves root. `ignored` says what could not be honoured."""

    uid: int | None
    gid: int | None
    groups: list[int] | None
    ignored: str = ""


def security(pod: Object, container: Object) -> Object:
    """The container's securityContext over the pod's."""
    shared = pod["spec"].get("securityContext") or {}
    inherited = {k: shared[k] for k in ("runAsUser", "runAsGroup", "runAsNonRoot") if shared.get(k) is not None}
    return {**inherited, **{k: v for k, v in (container.get("securityContext") or {}).items() if v is not None}}


def identity(pod: Object, context: Object, machine: Machine) -> Identity:
    """Who the program runs as. Raises ConfigError for root where root is forbidden."""
    shared = pod["spec"].get("securityContext") or {}
    user, group = context.get("runAsUser"), context.get("runAsGroup")
    groups = [*(shared.get("supplementalGroups") or [])]
    if shared.get("fsGroup") is not None:
        groups.append(shared["fsGroup"])
    if machine.in_user_namespace:
        asked = [v for v in (user, group) if v]
        why = "runAsUser and runAsGroup need the cluster to run as root" if asked else ""
        return Identity(None, None, None, why)
    if context.get("runAsNonRoot") and user == 0:
        raise ConfigError("container's runAsUser breaks non-root policy")
    ignored = ""
    if context.get("runAsNonRoot") and user is None:
        ignored = "runAsNonRoot without runAsUser: programs of this machine have no user of their own"
    if user is None and group is None and not groups:
        return Identity(None, None, None, ignored)
    return Identity(user, group if group is not None else 0, groups, ignored)


def image_identity(pod: Object, context: Object, machine: Machine, image: Image) -> tuple[Identity, str]:
    """Who a program of an image runs as, and that user's home.

    `runAsUser` wins over the image's user, whose name is looked up in the image. Raises ConfigError.
    """
    account = accounts.user(image.config.user, image.file("/etc/passwd"), image.file("/etc/group"))
    if account is None:
        raise ConfigError(f"the image runs as {image.config.user!r}, whom its /etc/passwd does not know")
    asked = context.get("runAsUser")
    if asked is not None:
        account = accounts.user(str(asked), image.file("/etc/passwd"), image.file("/etc/group"))
        assert account is not None
    if context.get("runAsNonRoot") and account.uid == 0:
        raise ConfigError("container has runAsNonRoot and image will run as root")
    shown = {**context, "runAsUser": account.uid}
    if context.get("runAsGroup") is None:
        shown["runAsGroup"] = account.gid
    who = identity(pod, shown, machine)
    if who.uid is not None:
        who = Identity(who.uid, who.gid, sorted({*(who.groups or []), *account.groups}), who.ignored)
    return who, account.home


def image_environment(image: Image, home: str) -> dict[str, str]:
    """Variables that a container of an image has from it."""
    return {"PATH": _DEFAULT_PATH, "HOME": home, **dict(image.config.environment)}


def base_environment(pod: Object, machine: Machine) -> dict[str, str]:
    """Variables that every container has."""
    return {
        "PATH": machine.path,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "HOSTNAME": hostname(pod),
        "KUBERNETES_SERVICE_HOST": API_ADDRESS,
        "KUBERNETES_SERVICE_PORT": API_PORT,
        "KUBERNETES_SERVICE_PORT_HTTPS": API_PORT,
        "KUBERNETES_PORT": f"tcp://{API_ADDRESS}:{API_PORT}",
        "KUBERNETES_PORT_443_TCP": f"tcp://{API_ADDRESS}:{API_PORT}",
        "KUBERNETES_PORT_443_TCP_PROTO": "tcp",
        "KUBERNETES_PORT_443_TCP_PORT": API_PORT,
        "KUBERNETES_PORT_443_TCP_ADDR": API_ADDRESS,
    }


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the caller prepared for a container: folders, files by path, mounts of its volumes."""

    root: Path
    log: Path
    files: Mapping[str, str]
    volumes: list[Mount]
    cgroups: list[str]


def program(
    pod: Object, container: Object, image_program: list[str], env: dict[str, str], machine: Machine,
    around: Surroundings, image: Image | None = None,
) -> Program:  # fmt: skip
    """The program of a container, of this machine's or of an image. Raises ConfigError."""
    context = security(pod, container)
    argv = command_line(container, image_program, env)
    if image is None:
        who = identity(pod, context, machine)
        cwd = expand(container.get("workingDir") or "/", env)
        mounts = plan(machine, dict(around.files), around.volumes, [*argv, cwd])
    else:
        who, _ = image_identity(pod, context, machine, image)
        cwd = expand(container.get("workingDir") or image.config.working_directory, env)
        mounts = own_plan(dict(around.files), around.volumes)
    if not argv:
        raise ConfigError("no command specified: the image has no entrypoint, give the container a command")
    return Program(
        argv=argv,
        env=env,
        cwd=cwd,
        root=str(around.root),
        mounts=mounts,
        layers_folder=str(image.folder) if image else "",
        layers=image.layers if image else (),
        overlay_options=",userxattr" if machine.in_user_namespace else "",
        private=PRIVATE,
        read_only=bool(context.get("readOnlyRootFilesystem")),
        log=str(around.log),
        drop=dropped_capabilities(context),
        uid=who.uid,
        gid=who.gid,
        groups=who.groups,
        no_new_privileges=context.get("allowPrivilegeEscalation") is False,
        cgroups=around.cgroups,
        stdin=bool(container.get("stdin")),
    )


def beside(
    pod: Object, container: Object, argv: list[str], env: dict[str, str], machine: Machine, tty: bool,
    image: Image | None = None,
) -> Program:  # fmt: skip
    """A program that runs beside a running container's, with its environment and no more power."""
    context = security(pod, container)
    who = image_identity(pod, context, machine, image)[0] if image else identity(pod, context, machine)
    home = image.config.working_directory if image else "/"
    return Program(
        argv=argv,
        env=env,
        cwd=expand(container.get("workingDir") or home, env),
        drop=dropped_capabilities(context),
        uid=who.uid,
        gid=who.gid,
        groups=who.groups,
        no_new_privileges=context.get("allowPrivilegeEscalation") is False,
        tty=tty,
    )

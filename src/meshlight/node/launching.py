"""From a container's spec to the program that pid 1 starts: identity, limits of power, surroundings.

Pure: mounts, environment and paths come from the caller. Rules: Kubernetes' SecurityContext v1 API.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshlight.kube.resources import Object
from meshlight.node.environment import ConfigError, command_line, expand
from meshlight.node.resolver import hostname
from meshlight.node.rootfs import PRIVATE, Machine, dropped_capabilities, plan
from meshlight.node.runtime import Mount, Program

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
    around: Surroundings,
) -> Program:  # fmt: skip
    """The program of a container."""
    context = security(pod, container)
    who = identity(pod, context, machine)
    argv = command_line(container, image_program, env)
    cwd = expand(container.get("workingDir") or "/", env)
    return Program(
        argv=argv,
        env=env,
        cwd=cwd,
        root=str(around.root),
        mounts=plan(machine, dict(around.files), around.volumes, [*argv, cwd]),
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
    pod: Object, container: Object, argv: list[str], env: dict[str, str], machine: Machine, tty: bool
) -> Program:
    """A program that runs beside a running container's, with its environment and no more power."""
    context = security(pod, container)
    who = identity(pod, context, machine)
    return Program(
        argv=argv,
        env=env,
        cwd=expand(container.get("workingDir") or "/", env),
        drop=dropped_capabilities(context),
        uid=who.uid,
        gid=who.gid,
        groups=who.groups,
        no_new_privileges=context.get("allowPrivilegeEscalation") is False,
        tty=tty,
    )

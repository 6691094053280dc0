"""The command line: verbs, and how refusals are shown."""

from __future__ import annotations

import copy
import sys

import click
from rich.console import Console
from rich.markup import escape

from meshlight import __version__
from meshlight.cli.analyze import analyze
from meshlight.cli.ca import ca
from meshlight.cli.cluster import down, kubeconfig, list_, up
from meshlight.cli.completion import completion
from meshlight.cli.env import env, shell
from meshlight.cli.expose import expose
from meshlight.cli.flows import flows
from meshlight.cli.istioctl import proxy_status, verify_install, version
from meshlight.cli.node import node
from meshlight.cli.policy import policy
from meshlight.cli.run import run
from meshlight.cli.status import status
from meshlight.cli.traces import traces
from meshlight.cli.tracing import tracing
from meshlight.cli.waypoint import waypoint
from meshlight.cli.why import why
from meshlight.cli.ztunnel_config import ztunnel_config
from meshlight.embedded.control import ControlError
from meshlight.embedded.launch import LaunchError
from meshlight.embedded.layout import LayoutError
from meshlight.kube.client import ApiError, ApiUnreachable
from meshlight.kube.port_forward import ForwardError
from meshlight.operations.boot import BootError
from meshlight.operations.errors import OperationError
from meshlight.operations.expose import ExposeError
from meshlight.operations.nodes import NodeError
from meshlight.operations.run import RunError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="meshlight")
def cli() -> None:
    """A Kubernetes API and an Istio-compatible mesh on this machine.

    \b
    meshlight up                    boot the embedded cluster-101
    export KUBECONFIG=$(meshlight kubeconfig)
    kubectl get namespaces          your own kubectl works against it

    \b
    meshlight run --name web -n demo --port 8000 -- python3 -m http.server 8000
    kubectl label namespace demo istio.io/dataplane-mode=ambient
    meshlight status                its traffic is mTLS now: PROTOCOL says HBONE

    \b
    meshlight why A B:80            would A reach B, and which object says so?
    meshlight analyze -A            what is wrong with the configuration?
    eval "$(meshlight env)"         a shell with kubectl and istioctl set up

    \b
    meshlight list                  every cluster you have
    meshlight node stop NODE        what if it fails? `meshlight node -h`
    meshlight down                  stop it; nothing stays behind

    Output is for people on a terminal, and for programs with -o json. Exit codes: 0 done, 1 failed, 2 wrong
    usage. Clusters live in ~/.meshlight, or in $MESHLIGHT_HOME.
    """


for verb in (
    up,
    down,
    list_,
    kubeconfig,
    env,
    shell,
    status,
    run,
    node,
    expose,
    why,
    policy,
    waypoint,
    ca,
    analyze,
    traces,
    flows,
    tracing,
    proxy_status,
    ztunnel_config,
    verify_install,
    version,
    completion,
):
    cli.add_command(verb)
for short, verb in (("ps", proxy_status), ("zc", ztunnel_config)):  # istioctl's short names
    hidden = copy.copy(verb)
    hidden.hidden = True
    cli.add_command(hidden, short)


_REFUSALS = (
    ApiError, BootError, ControlError, ExposeError, LaunchError, LayoutError, NodeError, RunError,
)  # fmt: skip


def main() -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 wrong usage)."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except FileNotFoundError as error:
        return _refuse(f"{error.filename} does not exist; is the cluster up? `meshlight up` boots it")
    except ApiUnreachable as error:
        return _refuse(f"{error}; is the cluster up? `meshlight up` boots it")
    except (
        LaunchError,
        LayoutError,
        BootError,
        RunError,
        ExposeError,
        ControlError,
        NodeError,
        ApiError,
    ) as error:
        return _refuse(str(error))
    except (ForwardError, OperationError) as error:
        return _refuse(str(error))
    return 0


def _refuse(message: str) -> int:
    Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())

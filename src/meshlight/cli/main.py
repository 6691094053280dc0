"""The command line: verbs, and how refusals are shown."""

from __future__ import annotations

import sys

import click

from meshlight import __version__
from meshlight.cli.verbs import Verbs
from meshlight.refusal import Refusal


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
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
    except Refusal as error:
        return _refuse(f"{error}; {error.advice}" if error.advice else str(error))
    return 0


def _refuse(message: str) -> int:
    from rich.console import Console  # a tenth of a second that only a refusal needs
    from rich.markup import escape

    Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())

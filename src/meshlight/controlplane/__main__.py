"""The control plane's process: `python -m meshlight.controlplane`, the pod `istiod`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import cast

import uvloop

from meshlight.controlplane import logs
from meshlight.controlplane.authority import AuthorityError
from meshlight.controlplane.command_line import from_arguments, parser
from meshlight.controlplane.istiod import Istiod
from meshlight.controlplane.settings import Settings, SettingsError
from meshlight.kube.client import ApiError, Client

log = logs.Scope("istiod")


async def main(settings: Settings, kubeconfig: str | None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    try:
        client = Client.from_kubeconfig(kubeconfig) if kubeconfig else Client.in_pod()
    except (OSError, ValueError, KeyError) as error:
        next_step = "run it in a pod with a service account, or name a file with --kubeconfig"
        log.error("no access to a Kubernetes API", error=repr(error), next=next_step)
        return 2
    async with client:
        task = asyncio.create_task(Istiod(settings, client).serve())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await asyncio.wait({task})
        if task.cancelled():
            log.info("istiod stopped")
            return 0
        return _failed(task.exception())


def _failed(error: BaseException | None) -> int:
    """Say why istiod could not go on; what is no known cause keeps its traceback."""
    causes = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
    for cause in causes:
        if not isinstance(cause, (AuthorityError, ApiError, OSError)):
            raise error or AssertionError("istiod ended by itself")
        log.error("istiod cannot run", error=str(cause))
    return 1


def run() -> int:
    """Read the environment and the command line, then serve."""
    arguments, unknown = parser().parse_known_args()
    try:
        settings = from_arguments(Settings.from_environment(os.environ), arguments)
    except SettingsError as error:
        log.error("bad configuration", error=str(error))
        return 2
    logs.set_level(cast(logs.Level, settings.log_level))
    if unknown:
        log.warn("arguments of Istio's pilot-discovery that mean nothing here", arguments=unknown)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main(settings, arguments.kubeconfig))


if __name__ == "__main__":
    sys.exit(run())

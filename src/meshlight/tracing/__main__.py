"""The tracing server's process: `python -m meshlight.tracing`, the pod `jaeger`, `meshlight tracing serve`."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Sequence

import uvloop

from meshlight.tracing.logs import report
from meshlight.tracing.settings import Settings, SettingsError, from_arguments, parser


async def main(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    from meshlight.tracing.sampling import StrategyError
    from meshlight.tracing.serve import Server
    from meshlight.tracing.store.blocks import Damaged

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with Server(settings).running():
            await stop.wait()
    except (OSError, Damaged, StrategyError) as error:
        report("the tracing server cannot run", level="error", error=str(error))
        return 1
    report("stopped", level="info")
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, then serve."""
    known, unknown = parser().parse_known_args(arguments)
    try:
        settings = from_arguments(known)
    except SettingsError as error:
        report("bad configuration", level="error", error=str(error))
        return 2
    if unknown:
        report("arguments that mean nothing here", arguments=unknown)
    # Rows are many, short-lived and without cycles: looking for cycles among them costs a fifth of all work.
    gc.set_threshold(100_000, 20, 50)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main(settings))


if __name__ == "__main__":
    sys.exit(run())

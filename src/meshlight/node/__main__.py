"""Entry point of `python -m meshlight.node`: enters the node's network namespace, then serves."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from meshlight.node.network import enter_node


def main() -> None:
    """Parse the command line and run the agent until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m meshlight.node")
    parser.add_argument("--name", required=True)
    parser.add_argument("--index", required=True, type=int, help="1-based; decides the node's addresses")
    parser.add_argument("--kubeconfig", required=True)
    parser.add_argument("--state", required=True, type=Path)
    arguments = parser.parse_args()
    enter_node(arguments.name, arguments.index)  # before any thread or loop exists
    from meshlight.kube.client import Client
    from meshlight.node.agent import serve
    from meshlight.node.registration import NodeIdentity

    client = Client.from_kubeconfig(arguments.kubeconfig)
    asyncio.run(serve(client, NodeIdentity(arguments.name, arguments.index), arguments.state))


if __name__ == "__main__":
    main()

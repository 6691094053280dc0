"""docs/guides/tracing.md works: its commands, one after another, on ports of this test's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tracing_server import Server

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "tracing.md"


def test_the_guides_commands(own_server: Server, tmp_path: Path) -> None:
    serve, *blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert serve.startswith("meshlight tracing serve --storage")
    own_server.start()
    script = "set -e\n" + "\n".join(blocks)
    for name, port in (("zipkin", 9411), ("query", 16686)):
        script = script.replace(f"localhost:{port}", f"127.0.0.1:{own_server.ports[name]}")
    script = script.replace("tracing backup", f"tracing backup --admin {own_server.url('admin')}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "NO_COLOR": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✗ db query" in done.stdout and "2 spans imported" in done.stdout
    assert re.search(r"front +db +1", done.stdout)
    assert (tmp_path / "copy" / "spans" / "manifest.json").exists()

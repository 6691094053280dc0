"""Builds an OCI image from this machine's own files, and serves it as a registry would."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import tarfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PROGRAMS = ("sh", "cat", "ls", "id", "sleep", "env")
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
SCRIPT = """
id -u; id -g; pwd; echo "$FOO $1 $HOME"; cat /etc/base.txt
ls /opt; ls /opt/opaque; ls / | cat; ls -ld /app; echo mine > /app/made && cat /app/made
exec sleep 86000
"""


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def libraries(programs: list[Path]) -> set[Path]:
    """The shared libraries that the programs need, the loader among them."""
    found: set[Path] = set()
    for program in programs:
        said = subprocess.run(["ldd", str(program)], capture_output=True, text=True).stdout
        found |= {Path(match) for match in re.findall(r"(/\S+) \(0x", said)}
    return found


def layer(entries: dict[str, bytes | Path | str | None], owner: int = 0) -> bytes:
    """A tar archive: content, a file of the machine, `-> target` for a link, or None for a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, what in entries.items():
            entry = tarfile.TarInfo(name)
            entry.uid = entry.gid = owner
            entry.mode = 0o755
            if what is None:
                entry.type = tarfile.DIRTYPE
                archive.addfile(entry)
            elif isinstance(what, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, what
                archive.addfile(entry)
            else:
                content = what.read_bytes() if isinstance(what, Path) else what
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@dataclass
class Built:
    """An image: everything by its digest, and the manifest's."""

    blobs: dict[str, bytes]
    manifest: str
    config: str
    layers: list[bytes]
    tag: str = "1.0"

    def layout(self, folder: Path) -> Path:
        """As an OCI layout."""
        (folder / "blobs" / "sha256").mkdir(parents=True)
        for name, content in self.blobs.items():
            (folder / "blobs" / "sha256" / name.partition(":")[2]).write_bytes(content)
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        manifest = {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": self.manifest,
            "size": len(self.blobs[self.manifest]),
            "annotations": {"org.opencontainers.image.ref.name": self.tag},
        }
        (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
        return folder

    def archive(self, path: Path, scratch: Path) -> Path:
        """As an archive of such a layout."""
        with tarfile.open(path, "w") as archive:
            archive.add(self.layout(scratch), arcname=".")
        return path

    def docker_archive(self, path: Path) -> Path:
        """As `docker save` writes it."""
        files: dict[str, bytes | Path | str | None] = {"config.json": self.blobs[self.config]}
        names = []
        for number, content in enumerate(self.layers):
            names.append(f"{number}/layer.tar")
            files[names[-1]] = content
        listed = [{"Config": "config.json", "RepoTags": [f"app:{self.tag}"], "Layers": names}]
        files["manifest.json"] = json.dumps(listed).encode()
        path.write_bytes(layer(files))
        return path


@functools.cache
def machine_files() -> tuple[bytes, bytes]:
    """A layer of the machine's programs with their libraries: as it is, and compressed."""
    programs = [Path(found) for name in PROGRAMS if (found := shutil.which(name))]
    files: dict[str, bytes | Path | str | None] = {"bin": None}
    files |= {f"bin/{p.name}": p.resolve() for p in programs}
    files |= {str(lib).lstrip("/"): lib.resolve() for lib in libraries(programs)}
    content = layer(files)
    return content, gzip.compress(content, compresslevel=1, mtime=0)


def build(text: str = "from the base\n", user: str = "app", **run: Any) -> Built:
    """Programs of the machine, files, a script with a whiteout and an opaque folder, a folder of the user's."""
    base: dict[str, bytes | Path | str | None] = {
        "etc": None, "tmp": None, "opt": None, "opt/opaque": None,
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\napp:x:1234:2345:app:/home/app:/bin/sh\n",
        "etc/group": b"root:x:0:\napp:x:2345:\nextra:x:77:app\n",
        "etc/base.txt": text.encode(),
        "opt/gone.txt": b"gone", "opt/stays.txt": b"stays", "opt/opaque/below": b"hidden",
    }  # fmt: skip
    upper: dict[str, bytes | Path | str | None] = {
        "opt/.wh.gone.txt": b"", "opt/opaque/.wh..wh..opq": b"", "opt/opaque/above": b"seen",
        "run.sh": SCRIPT.encode(),
    }  # fmt: skip
    programs, compressed = machine_files()
    layers = [programs, layer(base), layer(upper), layer({"app": None}, owner=1234)]
    packed = [compressed, gzip.compress(layers[1], mtime=0), layers[2], gzip.compress(layers[3], mtime=0)]
    config = {
        "architecture": ARCHITECTURE,
        "os": "linux",
        "config": {
            "Entrypoint": ["/bin/sh", "/run.sh"],
            "Cmd": ["default"],
            "Env": ["FOO=bar", "PATH=/bin"],
            "User": user,
            "WorkingDir": "/app",
            **run,
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(content) for content in layers]},
    }
    encoded = json.dumps(config).encode()
    types = [f"application/vnd.oci.image.layer.v1.tar{suffix}" for suffix in ("+gzip", "+gzip", "", "+gzip")]
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest(encoded),
            "size": len(encoded),
        },
        "layers": [
            {"mediaType": kind, "digest": digest(content), "size": len(content)}
            for kind, content in zip(types, packed, strict=True)
        ],
    }
    raw = json.dumps(manifest).encode()
    blobs = {digest(content): content for content in (*packed, encoded, raw)}
    return Built(blobs, digest(raw), digest(encoded), layers)


@dataclass
class Registry:
    """A distribution registry on loopback, with bearer tokens if it has a user. `asked` are its requests."""

    image: Built
    user: str = ""
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> Registry:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.answer(self)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, _, _query = request.path.partition("?")
        self.asked.append(path)
        given = request.headers.get("Authorization", "")
        if path == "/token":
            wanted = base64.b64encode(f"{self.user}:secret".encode()).decode()
            known = given == f"Basic {wanted}"
            body = b'{"token": "opens"}' if known else b'{"errors": [{"message": "who are you?"}]}'
            self._send(request, 200 if known else 401, "application/json", body)
            return
        if self.user and given != "Bearer opens":
            challenge = f'Bearer realm="{self.url}/token",service="test",scope="repository:team/app:pull"'
            self._send(request, 401, "application/json", b"{}", {"WWW-Authenticate": challenge})
            return
        kind, name = path.split("/")[-2:]
        content = self.image.blobs.get(self.image.manifest if name == self.image.tag else name)
        if not path.startswith("/v2/team/app/") or content is None:
            body = b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}'
            self._send(request, 404, "application/json", body)
        elif kind == "manifests":
            self._send(request, 200, "application/vnd.oci.image.manifest.v1+json", content)
        elif "moved" not in request.path:
            self._send(request, 307, "text/plain", b"", {"Location": f"{path}?moved=1"})
        else:
            self._send(request, 200, "application/octet-stream", content)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        status: int,
        kind: str,
        body: bytes,
        headers: dict[str, str] | None = None,
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

"""PEP 517 backend: compile `proto/*.proto` for Python, then let maturin build the wheel.

The protobuf modules are generated here, at build time, so that none is committed; the Rust side
compiles the same files in its own build script. Everything else is maturin's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import maturin

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "src" / "meshlight" / "proto"


def generate() -> None:
    """Write `src/meshlight/proto/*_pb2.py` and the grpclib stubs from `proto/*.proto`."""
    from grpc_tools import protoc

    OUT.mkdir(exist_ok=True)
    (OUT / "__init__.py").write_text('"""Protobuf modules generated at build time."""\n')
    for source in sorted((ROOT / "proto").glob("*.proto")):
        arguments = [
            "protoc",
            f"-I{ROOT / 'proto'}",
            f"-I{_well_known_types()}",
            f"--python_out={OUT}",
            f"--pyi_out={OUT}",
            str(source),
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"protoc failed on {source.name}")
    for module in OUT.glob("*_pb2.py*"):
        text = module.read_text()
        # protoc writes absolute imports; inside a package they must be relative.
        for other in (p.stem for p in (ROOT / "proto").glob("*.proto")):
            text = text.replace(f"import {other}_pb2 as", f"from meshlight.proto import {other}_pb2 as")
        module.write_text(text)


def _well_known_types() -> Path:
    import grpc_tools

    return Path(grpc_tools.__file__).parent / "_proto"


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    """Build the wheel (PEP 517)."""
    generate()
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    """Build the editable wheel (PEP 660)."""
    generate()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)


build_sdist = maturin.build_sdist
get_requires_for_build_wheel = maturin.get_requires_for_build_wheel
get_requires_for_build_editable = maturin.get_requires_for_build_editable
get_requires_for_build_sdist = maturin.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = maturin.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = maturin.prepare_metadata_for_build_editable

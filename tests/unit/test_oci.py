"""OCI images: names, manifests, layers that mean harm, registries, and a store of only what is whole."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import socket
import stat
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))

import images
from images import Registry, build, layer

from meshlight.node.images import is_oci
from meshlight.node.oci import accounts
from meshlight.node.oci.layer import unpack
from meshlight.node.oci.model import ImageConfig, ImageError, Manifest, choose
from meshlight.node.oci.reference import FileImage, InvalidReference, RegistryImage, parse
from meshlight.node.oci.registry import Credentials, credentials, registries
from meshlight.node.oci.store import ImageNeverPull, ImageStore, Pull

HEX = "a" * 64
ROOT = os.geteuid() == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("app", RegistryImage("docker.io", "library/app", "latest")),
        ("team/app:1", RegistryImage("docker.io", "team/app", "1")),
        ("localhost/app", RegistryImage("localhost", "app", "latest")),
        ("localhost:5000/team/app:1.0-x", RegistryImage("localhost:5000", "team/app", "1.0-x")),
        (f"r.example/a@sha256:{HEX}", RegistryImage("r.example", "a", "", f"sha256:{HEX}")),
        (f"r.example/a:t@sha256:{HEX}", RegistryImage("r.example", "a", "t", f"sha256:{HEX}")),
        ("oci:/images/app", FileImage("oci", "/images/app")),
        ("oci-archive:/a.tar:1.0", FileImage("oci-archive", "/a.tar", "1.0")),
        ("docker-archive:/a.tar:app:1.0", FileImage("docker-archive", "/a.tar", "app:1.0")),
    ],
)
def test_names(name: str, expected: object) -> None:
    assert parse(name) == expected


@pytest.mark.parametrize(
    "name",
    ["", "Upper/App", "a b", "oci:relative", "app:", "app:bad tag", "app@sha256:12", "r.example:x/app", "../x"],
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InvalidReference):
        parse(name)


def test_which_images_are_unpacked() -> None:
    named = registries({"mine": "localhost:5000 http://127.0.0.1:5000", "mine.crt": "PEM", "bad": "a b c"})
    assert named["localhost:5000"].server == "http://127.0.0.1:5000"
    assert named["localhost:5000"].authority == "PEM" and len(named) == 1

    def unpacked(image: str, mapping: dict[str, str] | None = None) -> bool:
        return is_oci({"image": image}, mapping or {}, named)

    assert unpacked("oci:/x") and unpacked("localhost:5000/app")
    assert not unpacked("localhost:5000/app", {"app": "/bin/app"}), "a mapping of the user's wins"
    assert not unpacked("docker.io/istio/pilot") and not unpacked("other/app") and not unpacked("No Name")


def test_command_lines_follow_kubernetes() -> None:
    config = ImageConfig(entrypoint=("e",), command=("c",))
    assert config.program(command=False, args=False) == ["e", "c"]
    assert config.program(command=False, args=True) == ["e"]
    assert config.program(command=True, args=False) == []


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (0, 0, (77,), "/root")),
        ("app", (1234, 2345, (77,), "/home/app")),
        ("1234", (1234, 2345, (77,), "/home/app")),
        ("app:extra", (1234, 77, (), "/home/app")),
        ("9:8", (9, 8, (), "/")),
        ("9", (9, 0, (), "/")),
        ("nobody", None),
        ("app:nobody", None),
    ],
)
def test_users_of_the_image(user: str, expected: tuple[object, ...] | None) -> None:
    passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1234:2345::/home/app:/bin/sh\nbroken\n"
    found = accounts.user(user, passwd, "extra:x:77:root,app\n")
    assert (found and (found.uid, found.gid, found.groups, found.home)) == expected


@pytest.mark.parametrize(
    "found", [None, [], {}, {"config": {}, "layers": []}, {"config": {}, "layers": "x"}, {"layers": []}]
)
def test_manifests_that_are_none(found: object) -> None:
    with pytest.raises(ImageError):
        Manifest.of(found)


def test_the_platform_decides_in_an_index() -> None:
    def entry(architecture: str, letter: str) -> dict[str, object]:
        platform = {"os": "linux", "architecture": architecture}
        return {"mediaType": "m", "digest": f"sha256:{letter * 64}", "size": 1, "platform": platform}

    index = {"manifests": [entry("s390x", "b"), entry(images.ARCHITECTURE, "c")]}
    assert choose(index).hex == "c" * 64
    with pytest.raises(ImageError, match="linux/"):
        choose({"manifests": [entry("s390x", "b")]})


# Layers.


def raw(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry, content in entries:
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode = kind, target, 0o644 if kind == tarfile.REGTYPE else 0o755
    made.uid, made.gid = os.getuid(), os.getgid()
    return made


def unpacked(content: bytes, into: Path) -> Path:
    into.mkdir(exist_ok=True)
    unpack(io.BytesIO(content), len(content), into, user_namespace=not ROOT)
    return into


@pytest.mark.parametrize(
    "entries",
    [
        [(entry("../escaped"), b"x")],
        [(entry("a/../../escaped"), b"x")],
        [(entry("a", tarfile.LNKTYPE, "../outside"), b"")],
        [(entry("a", tarfile.LNKTYPE, "/no/such/file"), b"")],
        [(entry("loop", tarfile.SYMTYPE, "loop"), b""), (entry("loop/x"), b"x")],
        [(entry(".wh..."), b"")],
    ],
)
def test_layers_that_mean_harm_are_refused(
    entries: list[tuple[tarfile.TarInfo, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "outside").write_text("safe")
    with pytest.raises((ImageError, FileNotFoundError)):
        unpacked(raw(*entries), tmp_path / "layer")
    assert not (tmp_path / "escaped").exists() and (tmp_path / "outside").stat().st_nlink == 1


@pytest.mark.parametrize("target", ["{outside}", "../outside", "/"])
def test_links_lead_nowhere_else(target: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = entry("out", tarfile.SYMTYPE, target.format(outside=outside))
    content = raw((link, b""), (entry("out/file"), b"caught"), (entry("file2"), b"mine"))
    made = unpacked(content, tmp_path / "layer")
    assert not list(outside.iterdir()) and not Path("/file").exists()
    assert "caught" in {path.read_text() for path in made.rglob("file")} and (made / "file2").exists()


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("safe")
    link = entry("config", tarfile.SYMTYPE, str(victim))
    made = unpacked(raw((link, b""), (entry("config"), b"new")), tmp_path / "layer")
    assert victim.read_text() == "safe" and (made / "config").read_text() == "new"
    assert not (made / "config").is_symlink()


def test_devices_are_left_out_and_absolute_names_are_the_layers(tmp_path: Path) -> None:
    made = unpacked(
        raw((entry("dev/null", tarfile.CHRTYPE), b""), (entry("/etc/x"), b"x"), (entry("./a//b"), b"y")),
        tmp_path / "layer",
    )
    assert not (made / "dev" / "null").exists()
    assert (made / "etc" / "x").read_text() == "x" and (made / "a" / "b").read_text() == "y"


@pytest.mark.skipif(not ROOT, reason="whiteouts are devices, which only root makes outside a user namespace")
def test_whiteouts_become_the_overlays_own(tmp_path: Path) -> None:
    made = unpacked(
        layer({"a/.wh.gone": b"", "b/.wh..wh..opq": b"", "c/x": b"x", ".wh.c": b""}), tmp_path / "layer"
    )
    found = (made / "a" / "gone").lstat()
    assert stat.S_ISCHR(found.st_mode) and found.st_rdev == 0
    assert os.getxattr(made / "b", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(made / "c", "trusted.overlay.opaque") == b"y" and (made / "c" / "x").exists()
    again = unpacked(layer({".wh.d": b"", "d": None, "d/x": b"x"}), tmp_path / "again")
    assert os.getxattr(again / "d", "trusted.overlay.opaque") == b"y", "made anew, hiding what was below"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x28\xb5\x2f\xfdxxxx", "zstd"),
        (b"no archive at all" * 100, "cannot be read"),
        (gzip.compress(b"x" * 5000, mtime=0)[:40], "cannot be read"),
        (gzip.compress(random.Random(1).randbytes(5000), mtime=0)[:2000] + b"something else", "cannot be read"),
        (b"", "digest|cannot be read"),
    ],
)
def test_what_is_no_layer_is_said(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=words):
        unpacked(content, tmp_path / "layer")


def test_a_blob_larger_than_it_says_is_refused(tmp_path: Path) -> None:
    content = layer({"x": b"x" * 100_000})
    (tmp_path / "layer").mkdir()
    with pytest.raises(ImageError, match="larger"):
        unpack(io.BytesIO(content), 1000, tmp_path / "layer", user_namespace=True)


# The store, from disk and from a registry.


def dial(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port))


def pull(policy: str = "IfNotPresent", registry: Registry | None = None, **logins: Credentials) -> Pull:
    named = registries({"r": f"r.example {registry.url}"}) if registry else {}
    return Pull(policy, named, lambda host: logins.get("login"), dial, lambda: None)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", user_namespace=not ROOT)


needs_root = pytest.mark.skipif(not ROOT, reason="the image has a whiteout")


@needs_root
def test_an_image_is_kept_by_name_and_content(store: ImageStore, tmp_path: Path) -> None:
    name = f"oci:{build().layout(tmp_path / 'layout')}"
    with pytest.raises(ImageNeverPull):
        store.ensure(name, pull("Never"))
    made = store.ensure(name, pull())
    assert store.known(name) == made and len(made.layers) == 4
    assert made.file("/etc/base.txt") == "from the base\n" and made.file("/no") == ""
    layers = sorted((store.folder / "layers").iterdir())
    # The same in another form shares the layers; a changed one brings only what changed.
    archive = build().docker_archive(tmp_path / "saved.tar")
    assert store.ensure(f"docker-archive:{archive}", pull()).layers == made.layers
    assert sorted((store.folder / "layers").iterdir()) == layers
    (tmp_path / "layout").rename(tmp_path / "old")
    build("changed\n").layout(tmp_path / "layout")
    assert store.ensure(name, pull()).file("/etc/base.txt") == "changed\n"
    assert len(list((store.folder / "layers").iterdir())) == 5
    (tmp_path / "layout").rename(tmp_path / "older")
    assert store.ensure(name, pull()).file("/etc/base.txt") == "changed\n", "the file is gone, the image is not"


@needs_root
def test_a_damaged_layer_leaves_nothing(store: ImageStore, tmp_path: Path) -> None:
    layout = build().layout(tmp_path / "layout")
    first = next(
        blob for blob in (layout / "blobs" / "sha256").iterdir() if blob.read_bytes().startswith(b"\x1f\x8b")
    )
    first.write_bytes(
        gzip.compress(layer({"other": b"x"})).ljust(first.stat().st_size, b"\0")[: first.stat().st_size]
    )
    with pytest.raises(ImageError):
        store.ensure(f"oci:{layout}", pull())
    assert store.known(f"oci:{layout}") is None
    assert not [p for p in (store.folder / "layers").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("what", ["index.json", "manifest", "config"])
def test_damage_elsewhere_is_said(what: str, store: ImageStore, tmp_path: Path) -> None:
    built = build()
    layout = built.layout(tmp_path / "layout")
    path = layout / "index.json"
    if what != "index.json":
        path = layout / "blobs" / "sha256" / getattr(built, what).partition(":")[2]
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(ImageError, match=r"digest|JSON"):
        store.ensure(f"oci:{layout}", pull())


@pytest.mark.parametrize("text", ["[]", '{"manifests": [1]}', '{"manifests": [{"platform": 1}]}', "null", "1"])
def test_indexes_that_are_malformed(text: str, store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ImageError):
        store.ensure(f"oci:{tmp_path}", pull())


def test_a_tag_chooses_in_a_layout(store: ImageStore, tmp_path: Path) -> None:
    layout = build().layout(tmp_path / "layout")
    with pytest.raises(ImageError, match=r"tagged 2\.0; there are 1\.0"):
        store.ensure(f"oci:{layout}:2.0", pull())
    with pytest.raises(ImageError, match="is no archive"):
        store.ensure(f"oci-archive:{layout}", pull())
    with pytest.raises(ImageError, match="is no folder"):
        store.ensure("oci:/no/such/folder", pull())


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry(build()) as made:
        yield made


@needs_root
def test_pulling_from_a_registry(store: ImageStore, registry: Registry) -> None:
    name = "r.example/team/app:1.0"
    made = store.ensure(name, pull(registry=registry))
    assert made.id == f"r.example/team/app@{registry.image.manifest}"
    asked = len(registry.asked)
    assert store.ensure(name, pull(registry=registry)) == made and len(registry.asked) == asked
    store.ensure(name, pull("Always", registry))
    assert not [path for path in registry.asked[asked:] if path.count("/blobs/") and "config" not in path][2:]
    pinned = f"r.example/team/app@{registry.image.manifest}"
    assert store.ensure(pinned, pull(registry=registry)).layers == made.layers
    with pytest.raises(ImageError, match=r"404.*manifest unknown"):
        store.ensure("r.example/team/app:none", pull(registry=registry))
    with pytest.raises(ImageError, match="not named by you"):
        store.ensure("other.example/app:1", pull(registry=registry))


@needs_root
def test_registries_that_want_to_know_who_asks(store: ImageStore) -> None:
    with Registry(build(), user="me") as private:
        name = "r.example/team/app:1.0"
        with pytest.raises(ImageError, match="401"):
            store.ensure(name, pull(registry=private))
        with pytest.raises(ImageError, match="who are you"):
            store.ensure(name, pull(registry=private, login=Credentials("me", "wrong")))
        assert store.ensure(name, pull(registry=private, login=Credentials("me", "secret"))).layers


def test_a_registry_that_lies_is_found_out(store: ImageStore, registry: Registry) -> None:
    blobs = registry.image.blobs
    manifest = json.loads(blobs[registry.image.manifest])
    first = manifest["layers"][0]["digest"]
    blobs[first] = gzip.compress(layer({"evil": b"x"}))
    with pytest.raises(ImageError, match="digest"):
        store.ensure("r.example/team/app:1.0", pull(registry=registry))
    with pytest.raises(ImageError, match="digest"):
        blobs["sha256:" + HEX] = blobs[registry.image.manifest]
        store.ensure(f"r.example/team/app@sha256:{HEX}", pull(registry=registry))
    assert store.known("r.example/team/app:1.0") is None


def test_credentials_of_a_secret() -> None:
    import base64

    auth = base64.b64encode(b"me:pass:word").decode()
    text = json.dumps(
        {"auths": {"https://r.example/v1/": {"auth": auth}, "h:5": {"username": "u", "password": "p"}}}
    )
    secret = {"data": {".dockerconfigjson": base64.b64encode(text.encode()).decode()}}
    assert credentials(secret) == {"r.example": Credentials("me", "pass:word"), "h:5": Credentials("u", "p")}
    assert credentials({}) == {} and credentials({"data": {".dockerconfigjson": "%%"}}) == {}

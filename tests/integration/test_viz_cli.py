"""score-viz from a video file to a picture."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from PIL import Image

from score_vllm import RetentionPolicy, methods
from score_vllm.demo import demo_model
from score_vllm.viz import cli as viz_cli
from tests.conftest import moving_square, write_clip, write_selector


@pytest.fixture(autouse=True)
def _demo_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("SCORE_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))


def test_picture_of_every_method(clips: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # CaCoVID's policy reads LLaVA's tokens.
    names = ",".join(name for name in methods.names() if name != "cacovid")
    selector = write_selector(demo_model(), tmp_path / "selector")
    out = tmp_path / "out.png"
    argv = ["--retention", "0.25", "--method", names, "--selector", str(selector), "-o", str(out)]
    viz_cli.main([str(clips["plain"]), *argv])
    assert f"written: {out}" in capsys.readouterr().out
    with Image.open(out) as picture:
        width, height = picture.size
    one = tmp_path / "one.png"
    viz_cli.main([str(clips["plain"]), "--method", "score", "-o", str(one)])
    with Image.open(one) as picture:
        assert picture.size[0] == width
        assert picture.size[1] < height, "every method has rows of its own"


def test_moving_picture(clips: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    viz_cli.main([str(clips["odd"]), "--method", "score,evs", "--max-frames", "8", "-o", str(out)])
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{plain}", "--method", "magic", "-o", "x.png"], "--method must be names out of"),
        (["{plain}", "--retention", "2", "-o", "x.png"], r"--retention must be a number in \(0, 1\]"),
        (["{plain}", "-o", "x.gif"], "must end in .png or .mp4"),
        (["{plain}", "-o", "x.png", "--cell-width", "4"], r"--cell-width must be an integer in \[16, 4096\], got 4"),
        (["{plain}", "-o", "x.png", "--cell-width", "1000000"], r"in \[16, 4096\], got 1000000"),
        (["{plain}", "-o", "/nowhere/x.png"], "--output '/nowhere/x.png': the folder '/nowhere' does not exist"),
        (["{plain}", "-o", "/proc/x.png"], "--output '/proc/x.png' cannot be written"),
        (["{plain}", "-o", "x.png", "--start", "60"], r"--start must be in \[0, 6\.000\)"),
        (["{plain}", "-o", "x.png", "--start", "-3"], "--start must be a number of seconds >= 0, got -3"),
        (["{plain}", "-o", "x.png", "--start", "3", "--end", "2"], "--end must be above start = 3"),
        (["{long}", "-o", "x.png"], "6000x16: the longer side may be at most 200 times the other"),
        (["{plain}", "--fps", "0", "-o", "x.png"], r"--fps must be a number in \(0, 240\], got 0"),
        (["{plain}", "--fps", "1e5", "-o", "x.png"], r"--fps must be a number in \(0, 240\], got 100000"),
        (["{plain}", "--max-frames", "0", "-o", "x.png"], "--max-frames must be an integer >= 1, got 0"),
        (["{plain}", "--server", "http://127.0.0.1:9", "-o", "x.png"], "http://127.0.0.1:9/v1: ConnectError"),
        (["{plain}", "--policy", "/nowhere", "-o", "x.png"], "--policy: policy directory '/nowhere' does not exist"),
        (["{plain}", "--model", "/nowhere", "-o", "x.png"], "--model '/nowhere' is no directory"),
        (["{plain}", "--model", "{folder}", "-o", "x.png"], "needs --policy"),
        (["{plain}", "--model", "{folder}", "--method", "evs", "-o", "x.png"], "--model: "),
        (["{audio}", "-o", "x.png"], "no video stream"),
        (["/nowhere.mp4", "-o", "x.png"], "cannot read the video"),
    ],
)
def test_mistakes_are_one_sentence(
    argv: list[str], message: str, clips: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = clips["plain"]
    if "{long}" in argv:
        write_clip(tmp_path / "long.avi", moving_square(4, 16, 6000), codec="mjpeg")
    names = {"plain": plain, "audio": clips["audio"], "folder": plain.parent, "long": tmp_path / "long.avi"}
    argv = [part.format(**names) for part in argv]
    with pytest.raises(SystemExit, match=message) as caught:
        viz_cli.main(argv)
    assert str(caught.value).startswith("score-viz: error: ")


@pytest.mark.parametrize(("height", "width"), [(16, 3000), (3000, 16)])
@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_extreme_shapes_are_drawn(height: int, width: int, suffix: str, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.avi", moving_square(8, height, width), codec="mjpeg")
    viz_cli.main([str(clip), "--method", "uniform", "-o", str(tmp_path / f"out{suffix}")])
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        frame = next(container.decode(video=0))
    assert frame.height < 1200
    assert frame.width < 2500


def test_a_window_of_seconds(clips: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    viz_cli.main([str(clips["plain"]), "--method", "uniform", "--start", "2", "--end", "5", "-o", str(out)])
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6


def test_policy_of_another_size(clips: dict[str, Path], tmp_path: Path) -> None:
    RetentionPolicy(64).save_pretrained(tmp_path / "p")
    with pytest.raises(SystemExit, match=r"hidden size 64, but the model has hidden size 192"):
        viz_cli.main([str(clips["plain"]), "--policy", str(tmp_path / "p"), "-o", str(tmp_path / "x.png")])

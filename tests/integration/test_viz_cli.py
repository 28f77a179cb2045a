"""score-viz from a video file to a picture."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from PIL import Image

from score_vllm import RetentionPolicy
from score_vllm.viz import cli as viz_cli


@pytest.fixture(autouse=True)
def _demo_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("SCORE_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))


def test_picture_of_every_method(clips: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "score,evs,vidcom2,fastvid,holitom,dycoke,uniform,random"
    out = tmp_path / "out.png"
    viz_cli.main([str(clips["plain"]), "--retention", "0.25", "--method", names, "-o", str(out)])
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
        (["{plain}", "-o", "x.png", "--cell-width", "4"], "--cell-width must be >= 16, got 4"),
        (["{plain}", "--fps", "0", "-o", "x.png"], "--fps > 0"),
        (["{plain}", "--policy", "/nowhere", "-o", "x.png"], "--policy: policy directory '/nowhere' does not exist"),
        (["{plain}", "--model", "/nowhere", "-o", "x.png"], "--model '/nowhere' is no directory"),
        (["{plain}", "--model", "{folder}", "-o", "x.png"], "needs --policy"),
        (["{plain}", "--model", "{folder}", "--method", "evs", "-o", "x.png"], "--model: "),
        (["{audio}", "-o", "x.png"], "no video stream"),
        (["/nowhere.mp4", "-o", "x.png"], "cannot read the video"),
    ],
)
def test_mistakes_are_one_sentence(argv: list[str], message: str, clips: dict[str, Path]) -> None:
    plain = clips["plain"]
    argv = [part.format(plain=plain, audio=clips["audio"], folder=plain.parent) for part in argv]
    with pytest.raises(SystemExit, match=message) as caught:
        viz_cli.main(argv)
    assert str(caught.value).startswith("score-viz: error: ")


def test_policy_of_another_size(clips: dict[str, Path], tmp_path: Path) -> None:
    RetentionPolicy(64).save_pretrained(tmp_path / "p")
    with pytest.raises(SystemExit, match=r"hidden size 64, but the model has hidden size 192"):
        viz_cli.main([str(clips["plain"]), "--policy", str(tmp_path / "p"), "-o", str(tmp_path / "x.png")])

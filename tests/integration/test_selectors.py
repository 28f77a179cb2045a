"""``--selector`` and ``score-selector``: directories, hub ids, an unreachable hub, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
from score_vllm import catalog, methods
from score_vllm.methods import cli
from score_vllm.methods.visionselector_weights import SelectorWeights
from score_vllm.server import arguments, options
from score_vllm.server.selectors import resolve_selectors
from tests.stub_hub import COMMIT, REPO, D, Hub, stub

__all__ = ["stub"]

QWEN, LLAVA = "Qwen2_5_VLForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def resolve(
    *given: str, methods: tuple[str, ...] = ("visionselector",), width: int = D, architecture: str = QWEN
) -> tuple[dict[str, str], dict[str, str]]:
    return resolve_selectors(list(given), methods, width, architecture)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    SelectorWeights.random(D).save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("prefix", ["", "visionselector="])
def test_a_directory_with_and_without_the_methods_name(prefix: str, folder: Path) -> None:
    directories, digests = resolve(f"{prefix}{folder}")
    assert directories == {"visionselector": str(folder)}
    assert digests == {"visionselector": SelectorWeights.random(D).digest()}


def test_methods_without_weights_need_none() -> None:
    assert methods.learned_names() == ["cacovid", "visionselector"]
    assert resolve(methods=("score", "vcast", "tango")) == ({}, {})


@pytest.mark.parametrize(
    ("given", "keywords", "message"),
    [
        ((), {}, "method visionselector needs its trained weights: --selector visionselector=DIR or a hub id"),
        (("{}",), {"methods": ("vcast",)}, "must be METHOD=SOURCE: the learned methods of this server are []"),
        (
            ("{}",),
            {"methods": ("visionselector", "cacovid"), "architecture": LLAVA},
            "must be METHOD=SOURCE: the learned methods of this server are ['visionselector', 'cacovid']",
        ),
        (("vcast={}",), {}, "--selector names method 'vcast'; the learned methods of this server are"),
        (("{}", "visionselector={}"), {}, "--selector is given twice for method 'visionselector'"),
        (("{}",), {"width": 3584}, f"was made for hidden size {D}, but the model has hidden size 3584"),
        (("{}",), {"architecture": LLAVA}, f"exists for {QWEN}, but the model is {LLAVA}"),
        (("/runs/lr=3/{}",), {}, "--selector: /runs/lr=3/"),
        (("",), {}, "--selector '' must name a directory or a hub id"),
        (("visionselector=",), {}, "--selector 'visionselector=' must name a directory or a hub id"),
        (("./nowhere",), {}, "has neither model.safetensors.index.json nor a .safetensors file"),
    ],
)
def test_what_cannot_be_served_is_refused(
    given: tuple[str, ...], keywords: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(catalog.UsageError) as caught:
        resolve(*(value.format(folder) for value in given), **keywords)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_fetched_once_and_serves_without_a_network(stub: Hub, cache: Path) -> None:
    directories, digests = resolve(REPO)
    target = cache / "selectors" / "visionselector" / "owner--selector"
    assert directories == {"visionselector": str(target)}
    assert json.loads((target / "source.json").read_text())["commit"] == COMMIT
    sent = stub.sent
    stub.missing = True
    assert resolve(f"visionselector={REPO}") == (directories, digests)
    assert stub.sent == sent


def test_a_hub_that_cannot_be_reached_and_no_copy(stub: Hub) -> None:
    stub.missing = True
    with pytest.raises(catalog.UsageError, match=f"--selector: cannot fetch {REPO}"):
        resolve(REPO)


def test_score_serve_takes_it_up_to_the_engine(tiny_model: Path, tiny_selector: Path) -> None:
    argv = ["--model", str(tiny_model), "--method", "visionselector", "--selector", str(tiny_selector)]
    args = arguments.build_parser().parse_args(argv)
    options.configure(args)
    serving = args.hf_overrides["score"]
    assert (serving["method"], serving["policy"]) == ("visionselector", None)
    assert serving["selectors"] == {"visionselector": str(tiny_selector.resolve())}
    digest = SelectorWeights.from_pretrained(str(tiny_selector)).digest()
    assert serving["selector_digests"] == {"visionselector": digest}


def test_fetch_by_command_line(stub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    cli.main(["fetch", REPO, str(out)])
    digest = SelectorWeights.from_pretrained(str(out)).digest()
    assert capsys.readouterr().out == f"score-selector: {out}: visionselector, hidden size {D}, digest {digest}\n"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "source.json"]
    assert resolve(str(out))[1] == {"visionselector": digest}


@pytest.mark.parametrize(
    ("repo", "message"),
    [("no-owner", "repo must be a hub id, owner/name, got 'no-owner'"), (REPO, f"cannot fetch {REPO}")],
)
def test_fetch_refuses_in_one_line(repo: str, message: str, stub: Hub, tmp_path: Path) -> None:
    stub.missing = True
    with pytest.raises(SystemExit) as caught:
        cli.main(["fetch", repo, str(tmp_path / "out")])
    assert str(caught.value.code).startswith(f"score-selector: error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_repository_without_the_methods_tensors(stub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no tensors of this method"):
        cli.main(["fetch", REPO, str(tmp_path / "out"), "--method", "cacovid"])


def test_help_says_where_weights_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in {("--help",): "fetch", ("fetch", "--help"): "owner/name"}.items():
        with pytest.raises(SystemExit):
            cli.main(list(argv))
        assert words in capsys.readouterr().out

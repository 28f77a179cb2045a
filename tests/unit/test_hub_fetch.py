"""A selector's four tensors out of a sharded checkpoint behind a stub of the hub: byte ranges, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from score_vllm.methods import hub
from score_vllm.methods.visionselector_weights import FIELDS, PREFIXES, SelectorWeights
from tests.stub_hub import COMMIT, REPO, D, Hub, stub, write_checkpoint

__all__ = ["stub"]


def test_only_the_tensors_bytes_are_read(stub: Hub, tmp_path: Path) -> None:
    fetched = hub.fetch(REPO, tmp_path / "out", SelectorWeights.wanted)
    weights, whole = (SelectorWeights.from_pretrained(str(folder)) for folder in (fetched, tmp_path / "repo"))
    assert weights.hidden_size == D
    assert weights.digest() == whole.digest()
    wanted = 2 * sum(getattr(weights, field).numel() for field in FIELDS.values())
    assert wanted <= stub.sent < wanted + 20_000, "headers, index and config besides"
    assert json.loads((fetched / "source.json").read_text()) == {"repo": REPO, "commit": COMMIT}
    assert not list(fetched.glob("*.part"))
    before = stub.sent
    assert hub.fetch(REPO, tmp_path / "out", SelectorWeights.wanted) == fetched
    assert stub.sent == before, "the same commit is not fetched twice"


def test_an_interrupted_fetch_goes_on(stub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BLOCK", 50_000)
    stub.break_after = 200_000
    with pytest.raises(OSError, match=f"cannot fetch {REPO}"):
        hub.fetch(REPO, tmp_path / "out", SelectorWeights.wanted)
    kept = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.part"))
    assert kept >= 100_000
    assert not (tmp_path / "out" / "model.safetensors").exists()
    stub.break_after, stub.sent = None, 0
    fetched = hub.fetch(REPO, tmp_path / "out", SelectorWeights.wanted)
    total = 2 * 2 * (D * D // 2 + D // 2)
    assert stub.sent < total - kept + 20_000
    whole = SelectorWeights.from_pretrained(str(tmp_path / "repo"))
    assert SelectorWeights.from_pretrained(str(fetched)).digest() == whole.digest()


def test_somebodys_model_is_left_alone(stub: Hub, tmp_path: Path) -> None:
    config = (tmp_path / "repo" / "config.json").read_text()
    with pytest.raises(ValueError, match="holds other files"):
        hub.fetch(REPO, tmp_path / "repo", SelectorWeights.wanted)
    assert (tmp_path / "repo" / "config.json").read_text() == config
    assert not (tmp_path / "repo" / "model.safetensors").exists()
    (tmp_path / "empty").mkdir()
    assert hub.fetch(REPO, tmp_path / "empty", SelectorWeights.wanted) == tmp_path / "empty"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_file_without_an_index(stub: Hub, tmp_path: Path, prefix: str) -> None:
    write_checkpoint(tmp_path / "single", single=True, prefix=prefix)
    stub.folder = tmp_path / "single"
    weights = SelectorWeights.from_pretrained(str(hub.fetch(REPO, tmp_path / "out", SelectorWeights.wanted)))
    assert weights.hidden_size == D


def test_a_repository_that_does_not_exist_and_one_without_a_selector(stub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tensors of this method"):
        hub.fetch(REPO, tmp_path / "out", lambda _name: None)
    stub.missing = True
    with pytest.raises(OSError, match="cannot fetch owner/selector"):
        hub.fetch(REPO, tmp_path / "out", SelectorWeights.wanted)


def test_a_damaged_header_is_refused(stub: Hub, tmp_path: Path) -> None:
    shard = tmp_path / "repo" / "model-00002-of-00002.safetensors"
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        hub.fetch(REPO, tmp_path / "out", SelectorWeights.wanted)


def rewrite(folder: Path, change: Any) -> None:
    """Change the query weights of a single-file checkpoint."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = f"{PREFIXES[0]}q_proj.weight"
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: q[:-1].contiguous(), r"q_proj.weight must be \[D / 2, D\], got \(255, 512\)"),
        (
            lambda q: q.index_fill(0, torch.tensor([3]), float("nan")),
            r"q_proj.weight has 512 of 131072 values that are",
        ),
        (lambda q: torch.zeros(128, 256), r"q_proj.bias must be \[128\], got \[256\]"),
    ],
)
def test_wrong_weights_are_refused_with_the_numbers(tmp_path: Path, change: Any, match: str) -> None:
    write_checkpoint(tmp_path / "single", single=True)
    rewrite(tmp_path / "single", change)
    with pytest.raises(ValueError, match=match):
        SelectorWeights.from_pretrained(str(tmp_path / "single"))

"""Each published method's ``reference`` mode against what the published code produced: index for index, row for row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from score_vllm import TokenSelection, methods, select_tokens
from score_vllm.methods import fastvid, fastvid_plan, holitom, vidcom2

A, C, D_TIES = "a_T8_N36_D64", "c_T13_N48_D64", "d_T16_N36_D64_ties"
RATIOS = ("r10", "r25", "r40")

# File prefix -> method, variant, cases, tags.
FILES: dict[str, tuple[str, str | None, tuple[str, ...], tuple[str, ...]]] = {
    "evs": ("evs", None, (A, C, D_TIES), RATIOS),
    "vidcom2": ("vidcom2", "paper", (A, C), RATIOS),
    "vidcom2_vllm": ("vidcom2", "vllm", (A, C), RATIOS),
    "dycoke": ("dycoke", "official", (A, C), ("k070", "k050", "r25", "r40")),
    "dycoke_vidcom2port": ("dycoke", "port", (A, C), RATIOS),
    "fastvid_qwen25vl": ("fastvid", "qwen25vl", (A, C), (*RATIOS, "c3_r25")),
    "fastvid_llavaov": ("fastvid", "llavaov", (A, C), (*RATIOS, "c3_r25")),
    "fastvid_vidcom2port": ("fastvid", "port", (A, C), RATIOS),
    "holitom": ("holitom", "official", (A, C), RATIOS),
    "holitom_vidcom2port": ("holitom", "port", (A, C), RATIOS),
}
# The newer ones, in a folder of their own: file prefix -> method, variant. All runs of every file.
NEW_FILES: dict[str, tuple[str, str | None]] = {
    "cacovid": ("cacovid", None),
    "flashvid_llava": ("flashvid", "llava"),
    "flashvid_qwen": ("flashvid", "qwen"),
    "tango_qwen25vl": ("tango", None),
    "vcast": ("vcast", None),
    "visionselector": ("visionselector", None),
}
RUNS = [(prefix, case, tag) for prefix, (_m, _v, cases, tags) in FILES.items() for case in cases for tag in tags]


class Run:
    """One fixture: its inputs, the call that reproduces it, and what the published code gave."""

    def __init__(self, folder: Path, prefix: str, case: str, tag: str) -> None:
        self.stored = np.load(folder / f"{prefix}_{case}.npz", allow_pickle=False)
        self.meta = json.loads(str(self.stored["meta"]))
        self.facts: dict[str, Any] = self.meta["runs"][tag]
        self.tag = tag
        self.method, self.variant, _, _ = FILES[prefix]
        inputs = np.load(folder / self.meta["inputs"], allow_pickle=False)
        self.x = torch.from_numpy(inputs["X"].astype(np.float32))
        self.signals: dict[str, Any] = {}
        if "attn" in self.meta["extra_inputs"]:
            self.signals["saliency"] = torch.from_numpy(inputs["attn"])
        if "frame_global" in self.meta["extra_inputs"]:
            self.signals["frame_features"] = torch.from_numpy(inputs["frame_global"].astype(np.float32))
        arguments = dict(self.facts["args"])
        # DyCoke's own runs name k and no ratio.
        self.ratio = arguments.pop("rho", 0.5)
        for name, value in arguments.pop("hp", {}).items():
            arguments[name.rsplit("_", 1)[1]] = value
        self.options = arguments

    def __getitem__(self, name: str) -> np.ndarray:
        return self.stored[f"{name}_{self.tag}"]

    def get(self, name: str, default: np.ndarray | None = None) -> Any:
        return self.stored.get(f"{name}_{self.tag}", default)

    def select(self) -> TokenSelection:
        return select_tokens(
            self.x,
            self.ratio,
            method=self.method,
            mode="reference",
            variant=self.variant,
            **self.signals,
            **self.options,
        )


@pytest.fixture(scope="module")
def fixtures(shared_dir: Path) -> Path:
    folder = shared_dir / "peers" / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"no fixtures of published code at {folder}")
    return folder


@pytest.mark.parametrize(("prefix", "case", "tag"), RUNS)
def test_reference_mode_is_the_peers_code(fixtures: Path, prefix: str, case: str, tag: str) -> None:
    run = Run(fixtures, prefix, case, tag)
    got = run.select()
    kept = run["kept"]
    if run.facts.get("noise_decides_ties", False):
        assert got.num_retained == len(kept)
        pytest.skip("the published random noise decides which tokens are kept here; only the count was checked")

    order = run.get("order", kept)
    np.testing.assert_array_equal(got.indices.numpy(), order)
    assert got.kept_per_frame().tolist() == run.facts["per_frame"]
    raw = run.x.reshape(-1, run.x.shape[-1])[order].numpy()
    want = raw
    if (stored := run.get("emb")) is not None:
        # Fixture rows stand by ascending index, ours in the order emitted.
        want = stored[np.searchsorted(kept, order)]
        assert run.facts["emb_equal_gather"] == np.array_equal(want, raw)
    np.testing.assert_allclose(got.embeddings.numpy(), want, rtol=0, atol=1e-5)


def test_every_fixture_file_is_tested(fixtures: Path) -> None:
    stored = {path.stem: path for path in fixtures.glob("*.npz") if not path.stem.startswith("inputs_")}
    listed = {f"{prefix}_{case}" for prefix, (_m, _v, cases, _t) in FILES.items() for case in cases}
    assert set(stored) == listed
    for stem, path in stored.items():
        runs = json.loads(str(np.load(path, allow_pickle=False)["meta"]))["runs"]
        tested = {tag for prefix, case, tag in RUNS if f"{prefix}_{case}" == stem}
        assert {tag for tag, facts in runs.items() if "error" not in facts} == tested


@pytest.mark.parametrize("case", [A, C])
@pytest.mark.parametrize("tag", RATIOS)
def test_vidcom2_scores_and_frame_shares(fixtures: Path, case: str, tag: str) -> None:
    run = Run(fixtures, "vidcom2", case, tag)
    v, w = vidcom2.closeness(run.x)
    np.testing.assert_allclose(v.numpy(), run["vid_score"], atol=1e-5)
    np.testing.assert_allclose(w.numpy(), run["frame_score"], atol=1e-5)
    budgets = np.maximum(1, np.round(run["scales"].astype(np.float64) * run.x.shape[1]))
    np.testing.assert_array_equal(vidcom2.frame_budgets(v, run.ratio).numpy(), budgets)


@pytest.mark.parametrize("case", [A, C])
@pytest.mark.parametrize("prefix", ["fastvid_qwen25vl", "fastvid_llavaov"])
@pytest.mark.parametrize("tag", ["r25", "c3_r25"])
def test_fastvid_segments(fixtures: Path, prefix: str, case: str, tag: str) -> None:
    run = Run(fixtures, prefix, case, tag)
    settings = fastvid_plan.DEFAULTS[str(run.variant)]
    similarity = fastvid.frame_similarity(run.x, run.signals.get("frame_features"))
    segments = fastvid_plan.find_segments(similarity, run.options.get("c", settings.c), settings.tau)
    assert [stop - start for start, stop in segments] == run["segment_sizes"].tolist()


@pytest.mark.parametrize("case", [A, C])
@pytest.mark.parametrize("tag", RATIOS)
def test_holitom_windows_and_static_tokens(fixtures: Path, case: str, tag: str) -> None:
    run = Run(fixtures, "holitom", case, tag)
    counts = holitom.static_counts(holitom.static_runs(run.x, run.options["tau"]))
    windows, gain = holitom.best_windows(counts)
    assert [list(window) for window in windows] == run["windows"].tolist()
    assert gain == run["total_reduced"]
    plan = holitom.plan_reference(counts, run.x.shape[1], run.ratio)
    assert sum(plan.centres) == run["is_static"].sum()


@pytest.mark.parametrize("case", [A, C])
@pytest.mark.parametrize(
    ("prefix", "tag"), [("evs", "r25"), ("evs", "r40"), ("vidcom2_vllm", "r25"), ("fastvid_qwen25vl", "r25")]
)
def test_exact_mode_agrees_where_the_peer_hits_the_count(fixtures: Path, prefix: str, case: str, tag: str) -> None:
    run = Run(fixtures, prefix, case, tag)
    exact = select_tokens(run.x, run.ratio, method=run.method, variant=run.variant, **run.signals)
    reference = run.select()
    assert reference.num_retained == exact.num_retained, "pick a case in which the published code keeps exactly K"
    assert torch.equal(exact.indices, reference.indices)
    torch.testing.assert_close(exact.embeddings, reference.embeddings, rtol=0, atol=1e-6)


def test_every_peer_has_a_reference_mode() -> None:
    named = {v[0] for v in FILES.values()} | {v[0] for v in NEW_FILES.values()}
    assert {name for name in methods.names() if methods.get(name).reference} == named


@pytest.mark.parametrize(
    ("frames", "options", "match"),
    [
        (4, {"method": "dycoke"}, "T >= 5"),
        (1, {"method": "dycoke", "variant": "port"}, "T >= 2"),
        (7, {"method": "fastvid"}, "T >= c=8"),
        (7, {"method": "fastvid", "variant": "llavaov"}, "T >= c=8"),
    ],
)
def test_reference_mode_refuses_the_short_videos_that_the_peer_refuses(
    frames: int, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        select_tokens(torch.randn(frames, 9, 8), 0.5, mode="reference", **options)


def test_reference_mode_refuses_shares_that_the_peer_fails_on() -> None:
    x = torch.randn(8, 16, 8)
    with pytest.raises(ValueError, match=r"dycoke.*\[0.25, 1\], got 0.2"):
        select_tokens(x, 0.2, method="dycoke", mode="reference")
    # One token per frame: it goes to context and leaves no salient one.
    with pytest.raises(ValueError, match="0 salient and 1 context"):
        select_tokens(x, 0.07, method="fastvid", mode="reference")
    with pytest.raises(ValueError, match="1 salient and 0 context"):
        select_tokens(x, 0.07, method="fastvid", mode="reference", variant="llavaov")
    assert select_tokens(x, 0.07, method="fastvid", mode="reference", variant="port").num_retained == 8

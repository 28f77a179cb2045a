"""``reference`` mode of the newer methods against what each one's own code produced, run by run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from score_vllm import VideoGrid, select_tokens
from score_vllm.methods import cacovid, cacovid_weights, flashvid, vcast, visionselector
from score_vllm.methods.visionselector_weights import FIELDS, PREFIXES, SelectorWeights

from .test_methods_parity import NEW_FILES, A, C

FILES = [(prefix, case) for prefix in NEW_FILES for case in (A, C)]
PATCHES_PER_SIDE = 2


class Stored:
    """One fixture file: inputs, weights, runs."""

    def __init__(self, shared: Path, prefix: str, case: str) -> None:
        folder = shared / "peers" / "fixtures_new"
        if not folder.is_dir():
            pytest.skip(f"no fixtures at {folder}")
        self.arrays = np.load(folder / f"{prefix}_{case}.npz", allow_pickle=False)
        meta = json.loads(str(self.arrays["meta"]))
        self.runs: dict[str, dict[str, Any]] = meta["runs"]
        self.prefix, self.weight_names = prefix, meta.get("weights", [])
        self.inputs = np.load(folder.parent / "fixtures" / meta["inputs"], allow_pickle=False)
        self.x = torch.from_numpy(self.inputs["X"].astype(np.float32))

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def selector(self, dtype: str) -> SelectorWeights:
        read = {field: self.tensor(PREFIXES[0] + name) for name, field in FIELDS.items()}
        return SelectorWeights(**{field: value.to(getattr(torch, dtype)).float() for field, value in read.items()})

    def cacovid(self) -> cacovid_weights.CacovidWeights:
        tensors = {name.removeprefix(cacovid_weights.PREFIX): self.tensor(name) for name in self.weight_names}
        return cacovid_weights.CacovidWeights(tensors, heads=4, kv_heads=2)

    def arguments(self, tag: str) -> tuple[torch.Tensor, float, dict[str, Any]]:
        """``(x, ratio, keywords)`` of a run."""
        args = dict(self.runs[tag]["args"])
        start, frames, ratio = args.pop("start", 0), args.pop("frames"), args.pop("rho")
        window = slice(start, start + frames)
        saliency = torch.from_numpy(self.inputs["attn"])[window]
        if self.prefix.startswith("flashvid"):
            args.pop("token_selection_method")
            args["saliency"] = saliency
        elif self.prefix.startswith("tango"):
            _, height, width = (int(n) for n in self.inputs["grid_thw"])
            args["grid"] = VideoGrid(frames, height // PATCHES_PER_SIDE, width // PATCHES_PER_SIDE)
            args["seconds"] = torch.arange(frames) * args.pop("seconds_per_frame")
            args["saliency"] = saliency
        elif self.prefix == "visionselector":
            args["weights"] = self.selector(args.pop("weights_dtype"))
        elif self.prefix == "cacovid":
            text_after = self.tensor(args.pop("text_after"))
            args |= {"weights": self.cacovid(), "text_before": self.tensor("text_before")}
            if args.pop("attention") == "bidir":
                args["text_after"] = torch.cat([self.tensor("newline"), text_after])
        return self.x[window], ratio, args


def assert_rows(got: np.ndarray, want: np.ndarray, indices: np.ndarray) -> None:
    """Equal up to 2e-5 of a row's norm; rows of a repeated index in any order."""
    for index in np.unique(indices):
        left = list(got[indices == index])
        for row in want[indices == index]:
            errors = [float(np.linalg.norm(row - other)) for other in left]
            nearest = int(np.argmin(errors))
            assert errors[nearest] <= 2e-5 * np.linalg.norm(row)
            left.pop(nearest)


@pytest.mark.parametrize(("prefix", "case"), FILES)
def test_reference_mode_is_the_published_code(shared_dir: Path, prefix: str, case: str) -> None:
    stored = Stored(shared_dir, prefix, case)
    method, variant = NEW_FILES[prefix]
    exactly = 0
    for tag, facts in stored.runs.items():
        x, ratio, keywords = stored.arguments(tag)
        call = {"method": method, "mode": "reference", "variant": variant, **keywords}
        if "error" in facts:
            with pytest.raises(ValueError, match=method):
                select_tokens(x, ratio, **call)
            continue
        got, kept = select_tokens(x, ratio, **call), stored.arrays[f"kept_{tag}"]
        assert got.num_retained == len(kept), tag
        if facts.get("noise_decides_ties") or not facts.get("indices_stable_under_1e6_relative_noise", True):
            continue  # their random noise decides which tokens are kept; the count does not depend on it
        exactly += 1
        np.testing.assert_array_equal(got.indices.numpy(), kept, err_msg=tag)
        assert got.kept_per_frame().tolist() == facts["per_frame"], tag
        raw = x.reshape(-1, x.shape[-1]).numpy()[kept]
        assert_rows(got.embeddings.numpy(), stored.arrays.get(f"emb_{tag}", raw), kept)
        if f"scores_{tag}" in stored.arrays:
            np.testing.assert_allclose(got.scores.numpy(), stored.arrays[f"scores_{tag}"], rtol=1e-4, atol=1e-5)
    assert exactly >= 8


@pytest.mark.parametrize("case", [A, C])
def test_cacovid_logits_and_selection_from_them(shared_dir: Path, case: str) -> None:
    stored = Stored(shared_dir, "cacovid", case)
    for tag, facts in stored.runs.items():
        x, ratio, keywords = stored.arguments(tag)
        tokens, frames = (stored.tensor(f"{kind}_logits_{tag}") for kind in ("token", "frame"))
        got = cacovid.logits(x, keywords["text_before"], keywords.get("text_after"), keywords["weights"])
        torch.testing.assert_close(got[0].flatten(), tokens[:, 1] - tokens[:, 0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(got[1], frames[:, 1] - frames[:, 0], rtol=1e-4, atol=2e-5)
        if ratio < 1:
            scores, args = (tokens[:, 1] - tokens[:, 0]).view(x.shape[:2]), facts["args"]
            kept = cacovid.choose(
                scores,
                frames[:, 1] - frames[:, 0],
                facts["n_kept"],
                ratio,
                args["imp_ratio"],
                args["max_sample_ratio_for_each_frame"],
            )
            np.testing.assert_array_equal(kept.numpy(), stored.arrays[f"kept_{tag}"])


@pytest.mark.parametrize("case", [A, C])
def test_vcast_curvature(shared_dir: Path, case: str) -> None:
    stored = Stored(shared_dir, "vcast", case)
    got = vcast.curvature(vcast.frame_directions(stored.x))
    np.testing.assert_allclose(got.numpy(), stored.arrays["curvature"], atol=1e-4)


@pytest.mark.parametrize("case", [A, C])
@pytest.mark.parametrize("variant", ["qwen", "llava"])
def test_flashvid_segments(shared_dir: Path, case: str, variant: str) -> None:
    stored = Stored(shared_dir, f"flashvid_{variant}", case)
    for tag in stored.runs:
        if f"segment_sizes_{tag}" not in stored.arrays:
            continue
        x, _ratio, keywords = stored.arguments(tag)
        s = flashvid.Settings(
            0.7,
            0.8,
            keywords.get("segment_threshold", 0.9),
            keywords["min_segment_num"],
            keywords.get("do_segment", True),
        )
        want = [size for size in stored.arrays[f"segment_sizes_{tag}"].tolist() if size]
        assert [stop - start for start, stop in flashvid.find_segments(x, s)] == want, tag


def test_visionselector_from_a_checkpoint_of_two_shards(shared_dir: Path) -> None:
    stored = Stored(shared_dir, "visionselector", A)
    sample = shared_dir / "peers" / "fixtures_new" / "visionselector_ckpt_sample"
    weights = SelectorWeights.from_pretrained(str(sample))
    assert weights.digest() == stored.selector("bfloat16").digest()
    for tag in ("w16_r10", "w16_r25"):
        x, ratio, _ = stored.arguments(tag)
        exact = select_tokens(x, ratio, method="visionselector", weights=weights)
        np.testing.assert_array_equal(exact.indices.numpy(), stored.arrays[f"kept_{tag}"])
        np.testing.assert_allclose(
            visionselector.importance(x, weights).numpy(), stored.arrays[f"scores_{tag}"], rtol=1e-4, atol=1e-5
        )

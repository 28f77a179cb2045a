"""The oracle of each family: transformers' own model on the kept rows of the unpruned prompt, at their positions.

The unpruned prompt comes from the family's own processor and rope function where it has them, and is written out by
hand for LLaVA and InternVL; nothing is shared with the package. Vision rows are those that the engine's tower made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

from .oracle import VisualItem, unpruned_positions

# Families whose language model has 1-D positions.
ONE_AXIS = ("llava", "internvl")


@dataclass
class Unpruned:
    """A prompt before anything is dropped.

    Attributes:
        embeds: [n, D].
        positions: [3, n] int64.
        vision: [n] int64: index of the video that a row is a vision row of; -1 elsewhere.
        levels: deepstack rows [n, D] per level; empty without deepstack.
        visual: [n] bool, rows that get the levels.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    vision: torch.Tensor
    levels: list[torch.Tensor] = field(default_factory=list)
    visual: torch.Tensor | None = None


class Oracle:
    """Greedy decoding of pruned prompts.

    Args:
        directory: of the checkpoint.
        family: name in :data:`tests.integration.test_families.FAMILIES`.
        model_class: transformers' class.
    """

    def __init__(self, directory: Path, family: str, model_class: str) -> None:
        dtype = torch.float32
        self.family = family
        self.model: Any = getattr(tf, model_class).from_pretrained(directory, dtype=dtype).eval()
        self.processor: Any = tf.AutoProcessor.from_pretrained(directory)
        self.tokenizer = self.processor.tokenizer
        self.embed = self.model.get_input_embeddings()

    @torch.no_grad()
    def unpruned(self, prompt: str, videos: list[Any], images: list[Any], seen: Any) -> Unpruned:
        """The prompt with the rows that the engine's tower made (``seen.compressed``, ``seen.images``)."""
        rows = [x.float() for x, *_ in seen.compressed]
        pictures = [x.float() for x in seen.images]
        if self.family.startswith("llava"):
            return self._llava(prompt, videos, rows, pictures)
        if self.family == "internvl":
            return self._internvl(prompt, videos, rows, pictures)
        return self._patch_grids(prompt, videos, images, rows, pictures)

    def _patch_grids(self, prompt: str, videos: Any, images: Any, rows: Any, pictures: Any) -> Unpruned:
        given: dict[str, Any] = {}
        if videos:
            given["videos"] = [torch.from_numpy(frames).permute(0, 3, 1, 2) for frames, _ in videos]
            if self.family != "qwen2_vl":
                known = ("total_num_frames", "fps", "duration", "video_backend", "frames_indices")
                given["video_metadata"] = [{key: metadata[key] for key in known} for _, metadata in videos]
            given["do_sample_frames"] = False
        if images:
            given["images"] = images
        inputs = self.processor(text=[prompt], return_tensors="pt", **given)
        ids = inputs["input_ids"][0]
        grids = {key: inputs[key] for key in ("video_grid_thw", "image_grid_thw") if key in inputs}
        config = self.model.config
        if self.family == "qwen2_vl":
            positions = self._whole_video_positions(ids, grids)
        else:
            positions = self.model.model.get_rope_index(
                inputs["input_ids"], inputs["mm_token_type_ids"], attention_mask=inputs["attention_mask"], **grids
            )[0][:, 0]
        video, image = ids == config.video_token_id, ids == config.image_token_id
        if self.family.startswith("glm4v"):  # frames take the image's token
            types = inputs["mm_token_type_ids"][0]
            video, image = types == 2, types == 1
        width = self.embed.weight.shape[1]
        embeds = self.embed(ids)
        every = torch.zeros(len(ids), rows[0].shape[1] if rows else width)
        if rows:
            every[video] = torch.cat(rows)
        if pictures:
            every[image] = torch.cat(pictures)
        visual = video | image
        embeds[visual] = every[visual, :width]
        vision = torch.full((len(ids),), -1)
        vision[video] = torch.cat([torch.full((len(x),), i) for i, x in enumerate(rows)]) if rows else vision[:0]
        levels = list(every[:, width:].split(width, dim=1)) if every.shape[1] > width else []
        return Unpruned(embeds, positions, vision, levels, visual)

    def _whole_video_positions(self, ids: torch.Tensor, grids: dict[str, torch.Tensor]) -> torch.Tensor:
        """One grid over a whole video, by hand: transformers 5.19 lets text follow it after max(h, w) positions,
        whatever its duration, where vLLM (and we) go on after the largest position."""
        config = self.model.config
        names = {config.video_token_id: "video_grid_thw", config.image_token_id: "image_grid_thw"}
        left = {token: iter(grids.get(name, ())) for token, name in names.items()}
        parts: list[int | VisualItem] = []
        at = 0
        while at < len(ids):
            token = int(ids[at])
            if token not in names:
                parts.append(token)
                at += 1
                continue
            t, h, w = next(left[token]).tolist()
            grid = (t, h // 2, w // 2)
            parts.append(VisualItem(torch.empty(0), grid, 1.0, torch.empty(0)))
            at += grid[0] * grid[1] * grid[2]
        return torch.cat(unpruned_positions(parts)[0], dim=1)

    def _llava(self, prompt: str, videos: Any, rows: Any, pictures: Any) -> Unpruned:
        config = self.model.config
        newline = self.model.model.image_newline[None]
        per_row = getattr(config, "mm_newline_position", "one_token") == "grid"
        embeds, vision = [], []
        left, pictures_left, number = list(rows), list(pictures), -1
        for token in self.tokenizer(prompt).input_ids:
            if token == config.video_token_index:
                number += 1
                frames = left.pop(0).view(len(videos[number][0]), -1, newline.shape[1])
                side = round(frames.shape[1] ** 0.5)
                for frame in frames:
                    for row in frame.view(side, side, -1):
                        embeds += [row, newline] if per_row else [row]
                        vision += [number] * side + [-1] * per_row
                if not per_row:
                    embeds.append(newline)
                    vision.append(-1)
            elif token == config.image_token_index:
                embeds.append(pictures_left.pop(0))
                vision += [-1] * len(embeds[-1])
            else:
                embeds.append(self.embed(torch.tensor([token])))
                vision.append(-1)
        joined = torch.cat(embeds)
        return Unpruned(joined, torch.arange(len(joined)).expand(3, -1).clone(), torch.tensor(vision))

    def _internvl(self, prompt: str, videos: Any, rows: Any, pictures: Any) -> Unpruned:
        """Each video as one text with a token per row of the tower, each image as another."""
        processor = self.processor
        tokens = processor.image_token, processor.video_token
        left, pictures_left, number, owners, visual = iter(rows), iter(pictures), -1, list[int](), list[Any]()
        text = ""
        for part in re.split(f"({'|'.join(map(re.escape, tokens))})", prompt):
            if part == processor.video_token:
                number += 1
                x = next(left)
                count = len(videos[number][0])
                frame = processor.image_token * (len(x) // count)
                frames = [f"Frame{i}: <img>{frame}</img>" for i in range(1, count + 1)]
                text += "\n".join(frames)
                owners += [number] * len(x)
                visual.append(x)
            elif part == processor.image_token:
                x = next(pictures_left)
                text += f"<img>{processor.image_token * len(x)}</img>"
                owners += [-1] * len(x)
                visual.append(x)
            else:
                text += part
        ids = torch.tensor(self.tokenizer(text).input_ids)
        slots = ids == processor.image_token_id
        embeds, vision = self.embed(ids), torch.full((len(ids),), -1)
        if visual:
            embeds[slots] = torch.cat(visual)
            vision[slots] = torch.tensor(owners)
        return Unpruned(embeds, torch.arange(len(ids)).expand(3, -1).clone(), vision)

    @torch.no_grad()
    def greedy(
        self, prompt: Unpruned, kept: list[torch.Tensor], num_tokens: int, merged: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[int], list[float]]:
        """Log-probabilities [vocab] of the first token, greedy tokens, and the gap to the runner-up at each.

        Args:
            prompt: unpruned.
            kept: per video the flat indices of its vision rows that stay.
            num_tokens: to generate.
            merged: per video [K, D] rows in place of the kept ones.
        """
        stays = prompt.vision < 0
        embeds = prompt.embeds.clone()
        for video, indices in enumerate(kept):
            slots = (prompt.vision == video).nonzero()[:, 0][indices]
            stays[slots] = True
            if merged is not None:
                embeds[slots] = merged[video].float()
        rows, positions = embeds[stays], prompt.positions[:, stays]
        following = int(prompt.positions.max()) + 1
        visual = None if prompt.visual is None else prompt.visual[stays]
        levels = [level[stays] for level in prompt.levels]
        first, tokens, gaps = None, [], []
        for _ in range(num_tokens):
            logprobs = self._step(rows, positions, visual, levels)
            first = logprobs if first is None else first
            best = logprobs.topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            rows = torch.cat([rows, self.embed(torch.tensor([tokens[-1]]))])
            positions = torch.cat([positions, torch.full((3, 1), following)], dim=1)
            visual = None if visual is None else torch.cat([visual, torch.tensor([False])])
            levels = [torch.cat([level, torch.zeros_like(level[:1])]) for level in levels]
            following += 1
        assert first is not None
        return first, tokens, gaps

    def _step(self, rows: Any, positions: Any, visual: Any, levels: Any) -> torch.Tensor:
        return self.model.lm_head(self.states(rows, positions, visual, levels)[-1]).float().log_softmax(-1)

    @torch.no_grad()
    def states(self, rows: Any, positions: Any, visual: Any, levels: Any) -> torch.Tensor:
        """[n, D] final hidden states of a pruned prompt."""
        # The mask matters: without one transformers takes gaps in 1-D positions for packed sequences.
        given: dict[str, Any] = {"attention_mask": torch.ones(1, len(rows), dtype=torch.int64), "use_cache": False}
        given["position_ids"] = positions[:1] if self.family.startswith(ONE_AXIS) else positions[:, None]
        if levels:
            given["visual_pos_masks"] = visual[None]
            given["deepstack_visual_embeds"] = [level[visual] for level in levels]
        return self.model.model.language_model(inputs_embeds=rows[None], **given).last_hidden_state[0]


def random_video(num_frames: int, height: int, width: int, seed: int, fps: float = 2.0) -> tuple[Any, dict[str, Any]]:
    """Random frames and their metadata."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    metadata = {
        "total_num_frames": num_frames,
        "fps": fps,
        "duration": num_frames / fps,
        "video_backend": "test",
        "frames_indices": list(range(num_frames)),
        "do_sample_frames": False,
    }
    return frames, metadata

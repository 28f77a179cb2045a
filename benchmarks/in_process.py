"""A checkpoint of any family through transformers, asked like an endpoint: what a server's answers are compared with.

It also runs what a server cannot: ``newlines="kept-rows"`` keeps a row's newline only where the row keeps a token, as
FastVID and HoliTom evaluate LLaVA-Video and as the paper's table 2 has it. That count depends on the selection.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

from benchmarks.public.evaluate import NEWLINES
from score_vllm import RetentionPolicy, methods, select_tokens
from score_vllm.architectures import BY_NAME
from score_vllm.client import Reply, RequestFailed
from score_vllm.layout import LEARNED, VideoLayout
from score_vllm.server.options import TRAINING_FREE_METHOD
from score_vllm.train.frozen.model import EncodedSample, FrozenVLM
from score_vllm.video import DecodedVideo, VideoError, decode_video
from score_vllm.vision.tower import VisionTower


def kept_structure(layout: VideoLayout, kept: torch.Tensor, newlines: str) -> torch.Tensor:
    """[S] bool: which structure rows stay beside these vision tokens.

    Args:
        layout: of the video.
        kept: [K] int64 flat indices.
        newlines: ``all``, or ``kept-rows``: a newline stays where its row keeps a token.

    Raises:
        ValueError: ``kept-rows`` where no newline stands after each row of tokens.
    """
    stays = torch.ones(layout.structure_tokens, dtype=torch.bool)
    if newlines == "all":
        return stays
    slots = torch.from_numpy(layout.slots)
    grid, learned = layout.grid, torch.from_numpy(layout.ids == LEARNED)
    if int(learned.sum()) != grid.t * grid.h:
        raise ValueError("--newlines kept-rows is for LLaVA-Video, which has a newline after each row of each frame")
    vision = torch.from_numpy(layout.vision()[:, 0])
    seen = torch.zeros(layout.structure_tokens + grid.num_tokens, dtype=torch.bool)
    seen[vision[kept]] = True
    row = slots[learned][:, None] - torch.arange(1, grid.w + 1)
    stays[learned] = seen[row].any(dim=1)
    return stays


class InProcess:
    """Greedy answers about one video, with the interface of :class:`score_vllm.client.Client`.

    Args:
        directory: of the checkpoint.
        policy: directory of a retention policy; None: ``score`` cannot be asked for.
        newlines: one of :data:`benchmarks.public.evaluate.NEWLINES`.
        dtype: of the model.
        device: of the model.

    Attributes:
        ids: token ids of the last answer.

    Raises:
        ValueError: a kind of model or newlines that is not known, or a policy of another model.
    """

    base_url = "transformers"

    def __init__(
        self,
        directory: str | Path,
        policy: str | Path | None = None,
        newlines: str = "all",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if newlines not in NEWLINES:
            raise ValueError(f"newlines must be one of {', '.join(NEWLINES)}, got {newlines!r}")
        model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
        self.engine = FrozenVLM(model.to(device), directory)
        self.tower = VisionTower(directory, device, dtype, loaded=model)
        self.processor: Any = AutoProcessor.from_pretrained(directory)
        self.newlines, self.name, self.ids = newlines, Path(directory).name, list[int]()
        self.architecture = BY_NAME[self.engine.architecture]
        self.policy = None if policy is None else RetentionPolicy.from_pretrained(policy)
        if self.policy is not None:
            self.policy.check_model(str(policy), self.tower.hidden_size, self.architecture.name)
            self.policy.to(device)
        ends = model.generation_config.eos_token_id
        self._ends = {self.processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    async def __aenter__(self) -> InProcess:
        self._turn = asyncio.Lock()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""

    async def models(self) -> list[str]:
        """The checkpoint's name."""
        return [self.name]

    async def chat(self, body: dict[str, Any]) -> Reply:
        """One answer; requests wait for each other.

        Raises:
            RequestFailed: the video or a field cannot be used.
        """
        async with self._turn:
            try:
                return await asyncio.to_thread(self.answer, body)
            except (OSError, ValueError, VideoError) as error:
                raise RequestFailed(str(error)) from error

    @torch.no_grad()
    def answer(self, body: dict[str, Any]) -> Reply:
        """As :meth:`chat`, in this thread."""
        video, before, after = self._read(body)
        method = body.get("retention_method") or ("score" if self.policy else TRAINING_FREE_METHOD)
        kind = methods.get(method).saliency
        rows, grid = self.tower.encode_rows(video.frames)
        x = rows[..., : self.tower.hidden_size]
        saliency = None if kind is None else self.tower.encode_with_saliency(video.frames, [kind])[2][kind]
        metadata = video.metadata()
        times = [index / metadata["fps"] for index in metadata["frames_indices"]]
        layout = self.tower.layout(grid, len(video.frames), 1 / video.step, times)
        seconds = None
        if self.tower.kind == "qwen2_5_vl":
            seconds = torch.from_numpy(layout.cells[:, 1] / self.tower.config.vision_config.tokens_per_second)
        made = select_tokens(
            x,
            body.get("retention_ratio", 1.0),
            method,
            self.policy if method == "score" else None,
            saliency=saliency,
            variant=methods.variant_for(methods.get(method), self.architecture.name),
            grid=grid,
            seconds=seconds,
        )
        levels = rows[..., self.tower.hidden_size :] if rows.shape[-1] > self.tower.hidden_size else None
        nothing = torch.zeros(1, dtype=torch.int64)
        encoded = EncodedSample("", x, layout, before, after, nothing, levels)
        self.ids, length, structure = self._decode(encoded, made, int(body["max_tokens"]))
        text = self.processor.tokenizer.decode(self.ids, skip_special_tokens=True)
        counts = {"original_tokens": grid.num_tokens, "retained_tokens": made.num_retained}
        report = {"grid": [grid.t, grid.h, grid.w], **counts, "structure_tokens": structure}
        return Reply(text, None, length, len(self.ids), {"method": method, "videos": [report]})

    def _read(self, body: dict[str, Any]) -> tuple[DecodedVideo, torch.Tensor, torch.Tensor]:
        """The video, and token ids before and after it."""
        urls, messages = [], []
        for message in body["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                urls += [part["video_url"]["url"] for part in content if part["type"] == "video_url"]
                content = [{"type": "video"} if part["type"] == "video_url" else part for part in content]
            messages.append({**message, "content": content})
        if len(urls) != 1:
            raise ValueError(f"a request must have one video, got {len(urls)}")
        fps, frames = self.architecture.sampling
        with urlopen(urls[0]) as file:
            data = file.read()
        video = decode_video(
            data,
            fps=body.get("video_fps") or fps or 0,
            max_frames=min(frames, int(body.get("video_max_frames") or frames)),
            resize=self.tower.resize,
        )
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, after = text.split(self.processor.video_token)
        encode = self.processor.tokenizer
        return video, *(torch.tensor(encode(part, add_special_tokens=False).input_ids) for part in (before, after))

    def _decode(self, encoded: EncodedSample, made: Any, max_tokens: int) -> tuple[list[int], int, int]:
        """``(token ids, length of the prompt, structure rows kept)``."""
        layout, model = encoded.layout, self.engine.model
        table, positions, levels = self.engine.table(encoded)
        first = encoded.prefix.shape[0]
        stays = torch.ones(len(table), dtype=torch.bool)
        stays[-1] = False  # the table's padding
        vision = first + torch.from_numpy(layout.vision()[:, 0])
        kept = made.indices.cpu()
        stays[vision] = False
        stays[vision[kept]] = True
        structure = kept_structure(layout, kept, self.newlines)
        stays[first + torch.from_numpy(layout.slots)] = structure
        table[vision[kept].to(table.device)] = made.embeddings.to(table)
        chosen = stays.nonzero()[:, 0].to(table.device)
        rows, places = table[None, chosen], positions[:, chosen]
        # One axis for 1-D families. The mask matters: without one transformers takes gaps for packed sequences.
        places = places[:1] if self.tower.square_frames else places[:, None]
        mask = torch.ones(1, len(chosen), dtype=torch.int64, device=rows.device)
        given: dict[str, Any] = {}
        if levels is not None:
            seen = torch.isin(chosen.cpu(), vision).to(rows.device)
            given = {
                "visual_pos_masks": seen[None],
                "deepstack_visual_embeds": [level[chosen][seen] for level in levels],
            }
        return self._greedy(model, rows, places, mask, given, max_tokens), len(chosen), int(structure.sum())

    def _greedy(
        self, model: Any, rows: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, given: Any, max_tokens: int
    ) -> list[int]:
        from transformers import DynamicCache

        text, following = model.model.language_model, int(places.max())
        cache, ids = DynamicCache(config=text.config), list[int]()
        while len(ids) < max_tokens:
            out = text(
                inputs_embeds=rows,
                position_ids=places,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **given,
            )
            given = {}
            best = int(model.lm_head(out.last_hidden_state[0, -1]).float().argmax())
            if best in self._ends:
                break
            ids.append(best)
            following += 1
            rows = model.get_input_embeddings()(torch.tensor([[best]], device=rows.device))
            places = torch.full_like(places[..., -1:], following)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        return ids

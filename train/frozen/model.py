"""The frozen video model of training: visual tokens, and the cross-entropy of an answer under any kept subset.

One file: encoding and cross-entropy share the tables and the padding of one batch layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from score_vllm.layout import LEARNED, VideoLayout
from score_vllm.positions import VisualSpan, prompt_positions
from score_vllm.train.data.sample import BrokenSampleError, TrainingSample
from score_vllm.train.frozen.decoder import answer_states, check_decoder
from score_vllm.train.frozen.sharding import Lockstep, shard_layers
from score_vllm.train.objective.rollout import micro_batches
from score_vllm.train.schema import ConfigurationError, MissingError
from score_vllm.types import VideoGrid
from score_vllm.vision.tower import VisionTower

# transformers' model types whose language model :mod:`score_vllm.train.frozen.decoder` runs.
TRAINABLE = (
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "llava_onevision",
    "internvl",
)
END_OF_TURN = "<|im_end|>"
DEFAULT_MAX_ROLLOUT_TOKENS = 8192
# Logits in fp32 that exist at a time: 64 Mi of them, 256 MiB.
LOGITS_AT_ONCE = 1 << 26
# Logits [n, V] and token ids [n] to [n] float32.
PerToken = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class EncodedSample:
    """A sample as the language model meets it, before anything is dropped.

    Attributes:
        key: the sample's name.
        x: [T, N, D] visual tokens in the model's dtype, as the policy reads them.
        layout: the video's span in the prompt.
        prefix: [P] int64 token ids before the video.
        suffix: [S] int64 token ids after the video, up to where the answer starts.
        target: [M] int64 token ids of the answer, end of turn included; M >= 2.
        levels: [T, N, D * levels] deepstack rows, which travel with the kept tokens; None: the model has none.
    """

    key: str
    x: torch.Tensor
    layout: VideoLayout
    prefix: torch.Tensor
    suffix: torch.Tensor
    target: torch.Tensor
    levels: torch.Tensor | None = None

    @property
    def grid(self) -> VideoGrid:
        """T, rows, columns."""
        return self.layout.grid

    @property
    def num_tokens(self) -> int:
        """T * N."""
        return self.grid.num_tokens

    @property
    def num_text_tokens(self) -> int:
        """Tokens read besides the vision rows, structure included: the answer's last one is only predicted."""
        text = self.prefix.shape[0] + self.suffix.shape[0] + self.target.shape[0] - 1
        return int(text) + self.layout.structure_tokens


class Engine(Protocol):
    """What the training loop asks of a frozen model."""

    hidden_size: int
    architecture: str
    identity: str

    def encode(self, sample: TrainingSample) -> EncodedSample: ...

    def cross_entropy(self, encoded: EncodedSample, kept: Sequence[torch.Tensor]) -> torch.Tensor: ...

    def finish_step(self) -> None:
        """Called by every process once its passes of a step are done."""


@runtime_checkable
class AnsweringEngine(Engine, Protocol):
    """An engine whose answers can be right or wrong, which the report asks for."""

    def with_text(self, encoded: EncodedSample, prompt: str, target: str) -> EncodedSample:
        """The same video, asked something else."""

    def answers_right(self, encoded: EncodedSample, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """[K] bool: whether greedy decoding under each selection gives exactly the target."""


class FrozenVLM:
    """A frozen video model through transformers. Positions follow serving: see :mod:`score_vllm.positions`.

    Args:
        model: a loaded model of one of :data:`TRAINABLE`; it is frozen and put in eval mode.
        path: its directory or hub id, for tokenizer and processor.
        max_rollout_tokens: most tokens (padding included) that run through the language model at once. One
            sequence longer than this runs alone.
        sharded: the layers are spread over processes, which then run forward passes together.
        tower: of another encoder than the model's own, with ``encode_rows`` and ``layout`` as of
            :class:`~score_vllm.vision.tower.VisionTower`.

    Attributes:
        hidden_size: D.
        architecture: vLLM's name of the model, for the policy's configuration.
        identity: what visual tokens depend on besides the sample: the checkpoint and the dtype.
        model: the transformers model.
        tokenizer: its tokenizer.

    Raises:
        ValueError: another kind of model, its attention is not plainly causal, or ``max_rollout_tokens`` < 1.
    """

    def __init__(
        self,
        model: Any,
        path: str | Path,
        *,
        max_rollout_tokens: int = DEFAULT_MAX_ROLLOUT_TOKENS,
        sharded: bool = False,
        tower: Any = None,
    ) -> None:
        from transformers import AutoProcessor

        if max_rollout_tokens < 1:
            raise ValueError(f"max_rollout_tokens must be >= 1, got {max_rollout_tokens}")
        check_decoder(model.model.language_model)
        self.model = model.eval().requires_grad_(False)
        embedding = model.get_input_embeddings().weight
        self.device, self.dtype = embedding.device, embedding.dtype
        self._tower = tower or VisionTower(path, str(self.device), self.dtype, loaded=model)
        self.hidden_size: int = self._tower.hidden_size
        self.max_rollout_tokens = max_rollout_tokens
        self._lockstep = Lockstep(self.device, self._empty_pass) if sharded else None
        self.identity = f"{path}:{self.dtype}:{_stamp(Path(path))}"
        processor: Any = AutoProcessor.from_pretrained(path)
        self.tokenizer = processor.tokenizer
        self._template = processor.chat_template or self.tokenizer.chat_template
        self._video_token = processor.video_token
        self.architecture = str(type(model).__name__)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        max_rollout_tokens: int = DEFAULT_MAX_ROLLOUT_TOKENS,
        shard: bool = False,
    ) -> FrozenVLM:
        """Load a checkpoint.

        Args:
            path: directory or hub id.
            dtype: of tower and language model.
            device: of both.
            max_rollout_tokens: see the class.
            shard: spread the language model over the processes, see :mod:`score_vllm.train.frozen.sharding`.

        Raises:
            FileNotFoundError: neither a directory nor a reachable hub id.
            ValueError: it is of no kind that training supports.
        """
        from transformers import AutoModelForImageTextToText

        cls.config_of(path)
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        except OSError as error:
            raise ConfigurationError(
                f"model.path {str(path)!r} has no weights: {str(error).splitlines()[0]}"
            ) from error
        if shard:
            shard_layers(model.model.language_model, torch.device(device))
        return cls(model.to(device), path, max_rollout_tokens=max_rollout_tokens, sharded=shard)

    @staticmethod
    def config_of(path: str | Path) -> Any:
        """The checkpoint's configuration.

        Raises:
            FileNotFoundError: neither a directory nor a reachable hub id.
            ValueError: it is of no kind that training supports.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise MissingError(
                f"model.path {str(path)!r} is neither the directory of a checkpoint nor a hub id that can be "
                f"reached: {str(error).splitlines()[0]}"
            ) from error
        if config.model_type not in TRAINABLE:
            raise ConfigurationError(
                f"model.path {str(path)!r} is a {config.model_type}; training supports {', '.join(TRAINABLE)}"
            )
        return config

    @classmethod
    def tokens_of(cls, config: Any) -> tuple[int, str]:
        """Width of the visual tokens, and the name of the model that policies for them carry, by its configuration."""
        return int(config.get_text_config().hidden_size), str(config.architectures[0])

    def render(self, prompt: str) -> tuple[str, str]:
        """The server's rendering of "video, then this text", split at the video.

        Returns:
            ``(before, after)``: ``before`` ends with the start of the vision span, ``after`` with the
            generation prompt.

        Raises:
            ValueError: the prompt itself holds a video placeholder, or the template writes none.
        """
        content = [{"type": "video"}, {"type": "text", "text": prompt}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
        )
        parts = text.split(self._video_token)
        if len(parts) != 2:
            raise ValueError(f"the rendered prompt must hold {self._video_token} once, it does {len(parts) - 1} times")
        return parts[0], parts[1]

    def encode(self, sample: TrainingSample) -> EncodedSample:
        """Run the vision tower and tokenise the text.

        Returns:
            The encoded sample; ``x`` on the engine's device, token ids on the CPU.

        Raises:
            BrokenSampleError: the prompt or the target cannot be tokenised as one turn.
        """
        texts = self._texts(sample.key, sample.prompt, sample.target)
        rows, grid = self._tower.encode_rows(sample.frames)
        return EncodedSample(
            key=sample.key,
            x=rows[..., : self.hidden_size],
            layout=self._tower.layout(grid, len(sample.frames), sample.fps),
            levels=rows[..., self.hidden_size :] if rows.shape[-1] > self.hidden_size else None,
            **texts,
        )

    def with_text(self, encoded: EncodedSample, prompt: str, target: str) -> EncodedSample:
        """The same video with another question; raises as :meth:`encode`."""
        return replace(encoded, **self._texts(encoded.key, prompt, target))

    def _texts(self, key: str, prompt: str, target: str) -> dict[str, Any]:
        try:
            before, after = self.render(prompt)
        except ValueError as error:
            raise BrokenSampleError(f"{key}: {error}") from error
        answer = self._ids(target.strip())
        if bool(torch.isin(answer, torch.tensor(self.tokenizer.all_special_ids)).any()):
            raise BrokenSampleError(f"{key}: the target holds a special token of the model")
        ended = torch.cat([answer, self._ids(END_OF_TURN)])
        return {"prefix": self._ids(before), "suffix": self._ids(after), "target": ended}

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)

    def cross_entropy(self, encoded: EncodedSample, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of the target when only some visual tokens are read, at their original positions.

        Args:
            encoded: of one video.
            kept: K ascending int64 index tensors into its T * N tokens; one may be empty.

        Returns:
            [K] float32 on the engine's device, nats per target token.

        Raises:
            ValueError: no selection, or indices that are not ascending in [0, T * N).
        """
        return self._answer_means(encoded, kept, _cross_entropies)

    def answers_right(self, encoded: EncodedSample, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """[K] bool: whether greedy decoding gives exactly the target, where every token of it is the likeliest one.

        Arguments and errors as of :meth:`cross_entropy`.
        """
        return self._answer_means(encoded, kept, _hits) == 1

    def finish_step(self) -> None:
        """Let other processes finish their forward passes; does nothing where each has the whole model."""
        if self._lockstep:
            with torch.no_grad():
                self._lockstep.finish()

    def _empty_pass(self) -> None:
        rows = torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        nowhere = torch.zeros(3, 1, 1, dtype=torch.int64, device=self.device)
        answer_states(self.model.model.language_model, rows, nowhere, nowhere[0])

    def _answer_means(self, encoded: EncodedSample, kept: Sequence[torch.Tensor], measure: PerToken) -> torch.Tensor:
        """[K] float32: the mean of a measure over the target's tokens, under each selection."""
        self._check(encoded, kept)
        # Sharded weights are gathered into plain tensors, which inference mode would forbid.
        with torch.no_grad() if self._lockstep else torch.inference_mode():
            means = self._run(encoded, kept, measure)
        # A plain tensor: inference tensors may not meet autograd.
        return means.clone()

    def _run(self, encoded: EncodedSample, kept: Sequence[torch.Tensor], measure: PerToken) -> torch.Tensor:
        first = encoded.prefix.shape[0]
        structure = torch.from_numpy(encoded.layout.slots)
        vision = torch.from_numpy(encoded.layout.vision()[:, 0])
        rows, positions, levels = self.table(encoded)
        before, after = torch.arange(first), torch.arange(first + len(structure) + len(vision), rows.shape[0] - 1)
        sequences = [
            torch.cat([before, first + torch.cat([structure, vision[k.cpu()]]).sort().values, after]) for k in kept
        ]
        lengths = [int(s.shape[0]) for s in sequences]
        target = encoded.target.to(self.device)
        means = torch.empty(len(kept), dtype=torch.float32, device=self.device)
        for batch in micro_batches(lengths, self.max_rollout_tokens):
            # Right padding reads the table's last row.
            padded = torch.nn.utils.rnn.pad_sequence(
                [sequences[i] for i in batch], batch_first=True, padding_value=rows.shape[0] - 1
            ).to(self.device)
            if self._lockstep:
                self._lockstep.before_pass()
            ends = torch.tensor([lengths[i] for i in batch], device=self.device)
            answers = ends[:, None] - target.shape[0] + torch.arange(target.shape[0], device=self.device)
            extra = None if levels is None else levels[:, padded]
            hidden = answer_states(self.model.model.language_model, rows[padded], positions[:, padded], answers, extra)
            means[torch.tensor(batch, device=self.device)] = self._over_target(hidden, target, measure)
        return means

    def table(self, encoded: EncodedSample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Rows and positions of the whole sequence and of one row of padding: every rollout is a gather of these.

        Returns:
            ``(rows, positions, levels)``: [P + S + T*N + suffix + M, D] (the answer's last token is replaced by the
            padding), [3, the same], and deepstack rows [levels, the same, D] or None.
        """
        embed, layout = self.model.get_input_embeddings(), encoded.layout
        first = encoded.prefix.shape[0]
        after = torch.cat([encoded.suffix, encoded.target[:-1]])
        x = self.project(encoded.x.to(self.device, self.dtype).reshape(encoded.num_tokens, -1), encoded.grid)
        vision = first + torch.from_numpy(layout.vision()[:, 0]).to(self.device)
        # One padding token at the end; vision slots are overwritten.
        span = torch.zeros(layout.structure_tokens + encoded.num_tokens, dtype=torch.int64)
        span[torch.from_numpy(layout.slots)] = torch.from_numpy(layout.ids).clamp(min=0)
        rows = embed(torch.cat([encoded.prefix, span, after, after[-1:]]).to(self.device)).clone()
        rows[vision] = x
        if bool((layout.ids == LEARNED).any()):
            learned = first + torch.from_numpy(layout.slots[layout.ids == LEARNED])
            rows[learned.to(self.device)] = self.model.model.image_newline.to(self.dtype)
        levels = None
        if encoded.levels is not None:
            flat = encoded.levels.to(self.device, self.dtype).reshape(encoded.num_tokens, -1, self.hidden_size)
            levels = rows.new_zeros(flat.shape[1], *rows.shape)
            levels[:, vision] = flat.transpose(0, 1)
        positions, _ = prompt_positions(rows.shape[0], [VisualSpan.unpruned(first, layout)])
        return rows, torch.from_numpy(positions).to(self.device), levels

    def project(self, x: torch.Tensor, grid: VideoGrid) -> torch.Tensor:
        """Rows of the language model [T * N, W] from a whole video's tokens [T * N, D]: they are these already."""
        return x

    def _over_target(self, hidden: torch.Tensor, target: torch.Tensor, measure: PerToken) -> torch.Tensor:
        """[B] mean over ``target`` [M] from ``hidden`` [B, M, D]; a bounded number of logits at a time."""
        flat, wanted = hidden.flatten(0, 1), target.repeat(hidden.shape[0])
        step = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        parts = [
            measure(self.model.lm_head(h).float(), w) for h, w in zip(flat.split(step), wanted.split(step), strict=True)
        ]
        return torch.cat(parts).view(hidden.shape[0], -1).mean(dim=1)

    @staticmethod
    def _check(encoded: EncodedSample, kept: Sequence[torch.Tensor]) -> None:
        if not kept:
            raise ValueError("kept must hold at least one selection")
        for k in kept:
            if k.ndim != 1 or k.dtype != torch.int64:
                raise ValueError(f"each selection must be [k] int64, got {tuple(k.shape)} {k.dtype}")
            if k.numel() and (int(k[0]) < 0 or int(k[-1]) >= encoded.num_tokens or bool((k[1:] <= k[:-1]).any())):
                raise ValueError(f"each selection must be ascending in [0, {encoded.num_tokens}), without repeats")


def _cross_entropies(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, wanted, reduction="none")


def _hits(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(-1) == wanted).float()


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a checkpoint's weight files; empty for a hub id, which names a revision's content."""
    return sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in path.glob("*.safetensors"))

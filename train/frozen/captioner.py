"""The frozen model describes a video that it sees with all tokens: greedy decoding at the positions of training."""

from __future__ import annotations

import torch

from score_vllm.train.data.sample import BrokenSampleError
from score_vllm.train.frozen.model import END_OF_TURN, EncodedSample, FrozenVLM


@torch.no_grad()
def describe(engine: FrozenVLM, encoded: EncodedSample, max_tokens: int) -> str:
    """An answer to the sample's prompt.

    Args:
        engine: the model, whole on this device.
        encoded: the sample; its target is not read.
        max_tokens: longest answer.

    Returns:
        Text without special tokens.

    Raises:
        BrokenSampleError: the answer is empty.
    """
    from transformers import DynamicCache

    language_model, tokenizer = engine.model.model.language_model, engine.tokenizer
    embed, head = engine.model.get_input_embeddings(), engine.model.lm_head
    rows, positions, levels = engine.table(encoded)
    span = encoded.num_tokens + encoded.layout.structure_tokens
    length = encoded.prefix.shape[0] + span + encoded.suffix.shape[0]
    rows, positions = rows[None, :length], positions[:, None, :length]
    if "mrope_section" not in language_model.config.rope_parameters:
        positions = positions[0]
    given = {}
    if levels is not None:
        seen = torch.zeros(1, length, dtype=torch.bool, device=rows.device)
        seen[0, encoded.prefix.shape[0] + torch.from_numpy(encoded.layout.vision()[:, 0]).to(rows.device)] = True
        given = {"visual_pos_masks": seen, "deepstack_visual_embeds": [level[:length][seen[0]] for level in levels]}
    stop = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    banned = torch.tensor([i for i in tokenizer.all_special_ids if i != stop], device=rows.device)
    cache, ids = DynamicCache(config=language_model.config), list[int]()
    while len(ids) < max_tokens:
        out = language_model(inputs_embeds=rows, position_ids=positions, past_key_values=cache, use_cache=True, **given)
        given = {}
        logits = head(out.last_hidden_state[0, -1]).float().index_fill(0, banned, float("-inf"))
        if (best := int(logits.argmax())) == stop:
            break
        ids.append(best)
        rows = embed(torch.tensor([[best]], device=rows.device))
        positions = positions[..., -1:] + 1
    text: str = tokenizer.decode(ids).strip()
    if not text:
        raise BrokenSampleError(f"{encoded.key}: the model's description is empty")
    return text

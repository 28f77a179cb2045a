"""One vLLM engine in a process of its own that answers orders on its standard input; started by ``scaling.py``.

An order is a JSON line ``{"frames": F, "seed": s, "tokens": n}``; the answer is a JSON line behind :data:`MARK` with
times in milliseconds, memory in bytes and the prompt's tokens, or with ``refused``: vLLM's own words for "too long", or
an out-of-memory error. ``rest_bytes`` is what was in use before the order, ``peak_bytes`` the most during it: on a GPU
by torch's own counter (weights and KV cache are part of it), on a CPU by the kernel's high-water mark of resident
memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MARK = "@scaling "


def video(order: dict[str, Any], height: int, width: int) -> tuple[Any, dict[str, Any]]:
    """Frames and metadata as a loader gives them: 2 frames per second, all of them read."""
    sys.path.append(str(Path(__file__).resolve().parent))
    from clips import ClipShape, draw_frames

    count = order["frames"]
    frames = draw_frames(ClipShape(count, height, width), order["seed"])
    metadata = {
        "total_num_frames": count,
        "fps": 2.0,
        "duration": count / 2.0,
        "video_backend": "benchmark",
        "frames_indices": list(range(count)),
        "do_sample_frames": False,
    }
    return frames, metadata


class Engine:
    """vLLM with stop-watches round the language model and selection.

    Args:
        setup: model, policy (None: plain vLLM), ratio, dtype, max_model_len, batch_tokens, kv_blocks, height, width.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        from vllm import LLM

        self.setup = setup
        options: dict[str, Any] = {}
        if setup["policy"] is not None:
            from score_vllm.config import ServingConfig

            options["hf_overrides"] = ServingConfig(setup["ratio"], policy=setup["policy"]).to_overrides()
        if setup["kv_blocks"] is not None:
            options["num_gpu_blocks_override"] = setup["kv_blocks"]
        self.llm = LLM(
            model=setup["model"],
            dtype=setup["dtype"],
            enforce_eager=True,
            max_model_len=setup["max_model_len"],
            max_num_batched_tokens=setup["batch_tokens"],
            max_num_seqs=1,
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            limit_mm_per_prompt={"image": 0, "video": 1},
            seed=0,
            **options,
            **setup["engine_args"],
        )
        import torch

        self.cuda = torch.cuda.is_available()
        self.milliseconds = {"llm": 0.0, "compressor": 0.0}
        module = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        self._watch(module.language_model.model, "forward", "llm")
        if setup["policy"] is not None:
            self._watch(module.compressor, "compress", "compressor")

    def _synchronize(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def _watch(self, owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._synchronize()
            start = time.perf_counter()
            out = inner(*args, **kwargs)
            self._synchronize()
            self.milliseconds[label] += (time.perf_counter() - start) * 1000
            return out

        setattr(owner, name, timed)

    def _reset_peak(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)

    def _peak(self) -> int:
        if self.cuda:
            import torch

            return int(torch.cuda.max_memory_allocated())
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("VmHWM is missing in /proc/self/status")

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """One request from frames to its last token."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        self._reset_peak()
        rest = self._peak()
        prompt = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What happens?<|im_end|>\n"
        frames = video(order, self.setup["height"], self.setup["width"])
        request: dict[str, Any] = {"prompt": prompt, "multi_modal_data": {"video": [frames]}}
        if order.get("ratio") is not None:
            request["mm_processor_kwargs"] = {"retention_ratio": order["ratio"]}
        self.milliseconds.update(llm=0.0, compressor=0.0)
        start = time.perf_counter()
        params = SamplingParams(max_tokens=order["tokens"], temperature=0, ignore_eos=True)
        try:
            outputs = self.llm.generate([request], params, use_tqdm=False)
        except (VLLMClientError, ValueError) as error:
            return {"refused": " ".join(str(error).split())[:300]}
        except (MemoryError, RuntimeError) as error:
            said = str(error).lower()
            memory = isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
            if not memory:
                raise
            # vLLM has not given the request up: this engine must not be asked again.
            return {"refused": " ".join(str(error).split())[:300], "ended": True}
        (output,) = outputs
        self._synchronize()
        pad = self.llm.get_tokenizer().convert_tokens_to_ids("<|video_pad|>")
        ids = list(output.prompt_token_ids)
        return {
            "total_ms": (time.perf_counter() - start) * 1000,
            "llm_ms": self.milliseconds["llm"],
            "compressor_ms": self.milliseconds["compressor"],
            "rest_bytes": rest,
            "peak_bytes": self._peak(),
            "visual_tokens": ids.count(pad),
            "prompt_tokens": len(ids),
            "answer": list(output.outputs[0].token_ids),
        }


def main() -> None:
    setup = json.loads(sys.argv[1])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_PLUGINS"] = "" if setup["policy"] is None else "score"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(setup["kv_gib"])
    # vLLM prints to standard output; answers go to the stream that the parent reads, logs to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(MARK + json.dumps(content) + "\n")
        answers.flush()

    engine = Engine(setup)
    block_size = engine.llm.llm_engine.vllm_config.cache_config.block_size
    answer({"ready": True, "block_size": block_size})
    for line in sys.stdin:
        result = engine.run(json.loads(line))
        answer(result)
        if result.get("ended"):
            break


if __name__ == "__main__":
    main()

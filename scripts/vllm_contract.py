"""What we take from vLLM, override or replace there: signatures and bodies, recorded per version and compared.

Nothing of vLLM is imported: its source is parsed, so a CUDA wheel can be read on any machine.

Usage:
    python scripts/vllm_contract.py record VERSION FOLDER    # FOLDER holds vllm/, e.g. an unpacked wheel
    python scripts/vllm_contract.py diff OLD NEW             # of two recorded versions

Record a new version with ``pip download --no-deps vllm==X``, ``unzip -q vllm-*.whl 'vllm/*.py' -d X``, this script, and
read the difference before ``plugin.SUPPORTED_VERSIONS`` names it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "integration" / "vllm_contract.json"
MISSING = "missing"

PROCESSOR = "vllm.multimodal.processing.processor:BaseMultiModalProcessor"
QWEN2_VL = "vllm.model_executor.models.qwen2_vl"
QWEN2_5_VL = "vllm.model_executor.models.qwen2_5_vl"
# Methods that we override, or call as if they were ours: they appear in no import.
METHODS = {
    PROCESSOR: "apply get_dummy_inputs get_dummy_mm_inputs _get_mm_hashes _get_cache_missing_processor_kwargs"
    " _apply_hf_processor _merge_mm_kwargs _apply_hf_processor_main _get_mm_fields_config _get_prompt_updates"
    " _maybe_apply_prompt_updates",
    "vllm.multimodal.processing.context:BaseProcessingInfo": "_merge_and_resolve_mm_processor_kwargs"
    " get_mm_max_tokens_per_item get_hf_processor",
    "vllm.multimodal.processing.dummy_inputs:BaseDummyInputsBuilder": "get_dummy_mm_data _get_dummy_videos",
    f"{QWEN2_VL}:Qwen2VLProcessingInfo": "_merge_and_resolve_mm_processor_kwargs _get_vision_size get_max_video_tokens"
    " get_image_size_with_most_features get_mm_max_tokens_per_item",
    f"{QWEN2_VL}:Qwen2VLDummyInputsBuilder": "get_dummy_mm_data",
    f"{QWEN2_5_VL}:Qwen2_5_VLMultiModalProcessor": "_get_mm_fields_config _get_prompt_updates _get_hf_mm_inputs",
    f"{QWEN2_5_VL}:Qwen2_5_VisionTransformer": "forward prepare_encoder_metadata",
    f"{QWEN2_5_VL}:Qwen2_5_VisionAttention": "forward",
    f"{QWEN2_5_VL}:Qwen2_5_VLForConditionalGeneration": "__init__ forward embed_multimodal _process_video_input"
    " _process_image_input _parse_and_validate_video_input get_mrope_input_positions get_encoder_cudagraph_config",
    "vllm.model_executor.models.interfaces:SupportsMultiModal": "embed_input_ids",
    "vllm.v1.core.encoder_cache_manager:EncoderCacheManager": "create_manager __init__ can_allocate allocate"
    " check_and_update_cache get_freed_mm_hashes reset free free_encoder_input",
    "vllm.v1.core.sched.scheduler:Scheduler": "_try_schedule_encoder_inputs",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": "_execute_mm_encoder _gather_mm_embeddings",
    "vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner": "execute_mm_encoder",
    "vllm.v1.worker.gpu_worker:Worker": "sleep wake_up",
    "vllm.multimodal.media.base:MediaIO": "get_max_bytes",
    "vllm.multimodal.media.video:VideoMediaIO": "__init__ load_bytes load_base64",
    "vllm.multimodal.media.connector:MediaConnector": "__init__ load_from_url load_from_url_async fetch_video_async",
    "vllm.renderers.base:BaseRenderer": "render_chat_async render_cmpl_async",
    "vllm.v1.engine.input_processor:InputProcessor": "process_inputs",
    "vllm.v1.engine.async_llm:AsyncLLM": "collective_rpc generate",
    "vllm.v1.engine.core_client:AsyncMPClient": "call_utility_all_async",
    "vllm.v1.engine.core:EngineCore": "collective_rpc",
    "vllm.v1.metrics.stats": "RequestStateStats",
    "vllm.v1.core.encoder_cache_manager": "compute_mm_encoder_budget",
    "vllm.plugins": "load_general_plugins load_endpoint_plugins",
}


def our_imports() -> set[str]:
    """``module:name`` of everything that our packages import from vLLM."""
    found = set()
    for folder in ("score_vllm", "server"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                    found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return found


def symbols() -> list[str]:
    """Everything to record: ``module:name`` or ``module:Class.method``."""
    methods = set()
    for owner, names in METHODS.items():
        methods |= {f"{owner}{'.' if ':' in owner else ':'}{name}" for name in names.split()}
    return sorted(our_imports() | methods)


class Source:
    """The parsed source of one vLLM.

    Args:
        folder: holds ``vllm/``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parse = cache(self._read)

    def _read(self, module: str) -> ast.Module | None:
        stem = self._folder.joinpath(*module.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return ast.parse(path.read_text())
        return None

    def describe(self, symbol: str) -> str:
        """``(arguments) #digest of the body`` of a function, ``(bases)`` of a class, ``value`` of anything else."""
        module, _, name = symbol.partition(":")
        tree = self._parse(module)
        node: ast.AST | None = tree
        for part in name.split("."):
            node = node and _child(node, part)
        if isinstance(node, ast.ImportFrom):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            return self.describe(f"{self._target(module, node)}:{original}")
        if node is not None:
            return _describe(node)
        if self._parse(f"{module}.{name}") is not None:
            return "module"
        for child in ast.iter_child_nodes(tree) if tree else ():
            if isinstance(child, ast.ImportFrom) and child.names[0].name == "*":
                found = self.describe(f"{self._target(module, child)}:{name}")
                if found != MISSING:
                    return found
        # vLLM's top package loads its names when asked, out of a table.
        return "lazy" if tree and f"'{name}'" in ast.unparse(tree) else MISSING

    def _target(self, module: str, node: ast.ImportFrom) -> str:
        """The module that an import in ``module`` names."""
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        up = node.level - int((self._folder.joinpath(*parts) / "__init__.py").is_file())
        return ".".join([*parts[: len(parts) - up], *(node.module.split(".") if node.module else ())])


def _child(node: ast.AST, name: str) -> ast.AST | None:
    """The last definition of a name in a module or class, also inside ``if`` and ``try``."""
    found = None
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found = child if child.name == name else found
            case ast.ImportFrom():
                found = child if any((a.asname or a.name) == name for a in child.names) else found
            case ast.Assign():
                found = child if any(getattr(t, "id", "") == name for t in child.targets) else found
            case ast.AnnAssign():
                found = child if getattr(child.target, "id", "") == name else found
            case ast.If() | ast.Try():
                found = _child(child, name) or found
    return found


def _describe(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class ({', '.join(ast.unparse(base) for base in node.bases)})"
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return "value"
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    digest = hashlib.sha256("\n".join(ast.unparse(line) for line in body).encode()).hexdigest()[:8]
    kind = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    marks = "".join(f"@{ast.unparse(decorator)} " for decorator in node.decorator_list)
    return f"{marks}{kind}({ast.unparse(node.args)}) #{digest}"


def describe_all(folder: Path) -> dict[str, str]:
    """Every symbol of one vLLM; ``missing`` where it is not there."""
    source = Source(folder)
    return {symbol: source.describe(symbol) for symbol in symbols()}


def load() -> dict[str, dict[str, str]]:
    """``{version: {symbol: description}}``. In the file a later version holds only what differs from the first."""
    recorded: dict[str, dict[str, str]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    first = next(iter(recorded.values()), {})
    return {version: {**first, **differing} for version, differing in recorded.items()}


def save(recorded: dict[str, dict[str, str]]) -> None:
    """Write what :func:`load` reads."""
    first = next(iter(recorded.values()))
    small = {
        version: {s: d for s, d in described.items() if described is first or first.get(s) != d}
        for version, described in recorded.items()
    }
    RECORD.write_text(json.dumps(small, indent=1, sort_keys=True) + "\n")


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """One line per symbol that moved: what it was and what it is."""
    return [
        f"{symbol}: {old.get(symbol, MISSING)} -> {new.get(symbol, MISSING)}"
        for symbol in sorted(old.keys() | new.keys())
        if old.get(symbol, MISSING) != new.get(symbol, MISSING)
    ]


def main() -> None:
    """Entry point."""
    match sys.argv[1:]:
        case ["record", version, folder]:
            recorded = {**load(), version: describe_all(Path(folder))}
            save(dict(sorted(recorded.items())))
            print(
                f"{len(recorded[version])} symbols of {version}; missing: "
                f"{[s for s, d in recorded[version].items() if d == MISSING]}"
            )
        case ["diff", old, new]:
            recorded = load()
            print("\n".join(differences(recorded[old], recorded[new])) or "nothing moved")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()

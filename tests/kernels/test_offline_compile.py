"""Every committed configuration compiled for its chip, without the chip: spills, shared memory, instructions.

The launches are the real ones: the launchers run on CPU tensors with each kernel's ``run`` replaced by a recorder.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from score_vllm import VideoGrid
from score_vllm.kernels import configs, ops
from score_vllm.layout import grid_layout

triton = pytest.importorskip("triton", reason="the CPU-only install has no triton")

# Dynamic shared memory that one block may have, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_MEMORY_COLUMNS = 512
ARCHITECTURES = {"sm_80": (80,), "sm_90": (90,), "sm_100": (100,), "other": (86, 120)}
# In PTX, and in machine code: a kernel that cannot fit its chip compiles to a bare trap.
MATRIX_INSTRUCTION = {
    80: ("mma.sync", "HMMA"),
    86: ("mma.sync", "HMMA"),
    90: ("wgmma.mma_async", "HGMMA"),
    100: ("tcgen05.mma", "UTCHMMA"),
    120: ("mma.sync", "HMMA"),
}
TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class Built(NamedTuple):
    ptx: str
    sass: str
    shared: int
    tensor_memory: int


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile afresh: a cached binary would pass for a kernel that no longer compiles."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    from score_vllm.kernels import gather, score, topk

    recorded: list[Launch] = []

    def recorder(kernel: Any) -> Any:
        def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            named = dict(zip(kernel.arg_names, args, strict=False))
            named |= {key: value for key, value in kwargs.items() if key in kernel.arg_names}
            options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
            recorded.append(Launch(kernel, named, options))

        return run

    for module in (score, topk, gather):
        for value in vars(module).values():
            if isinstance(value, triton.runtime.JITFunction) and value.__name__.endswith("_kernel"):
                monkeypatch.setattr(value, "run", recorder(value))
    return recorded


def build(launch: Launch, arch: int) -> Built:
    """What a launch on ``arch`` would compile: Triton specialises on ones, multiples of 16 and pointer alignment."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        aligned = False
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        else:
            shape = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPE_NAMES[value.base.dtype]}[{shape}]>"
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    built = triton.compile(source, target=target, options=launch.options)
    tensor_memory = getattr(built.metadata, "tmem_size", None) or 0
    return Built(built.asm["ptx"], disassemble(built.asm["cubin"]), built.metadata.shared, tensor_memory)


def disassemble(cubin: bytes) -> str:
    path = f"{triton.knobs.cache.dir}/kernel.cubin"
    with open(path, "wb") as file:
        file.write(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, "--dump-sass", path], check=True, capture_output=True, text=True).stdout


def assert_clean(built: Built, arch: int) -> None:
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", built.sass, re.M)
    assert len(instructions) > 50, "the disassembly could not be read"
    spills = [name for name in instructions if re.match(r"(LDL|STL)\b", name)]
    assert not spills, f"{len(spills)} spill instructions"
    assert built.shared <= SHARED_LIMIT[arch]
    assert built.tensor_memory <= TENSOR_MEMORY_COLUMNS


def tokens_and_weights(dtype: torch.dtype, width: int, d: int = 3584) -> tuple[torch.Tensor, ops.PolicyWeights]:
    x = torch.zeros(2, 3, d, dtype=dtype)
    w_in = torch.zeros(width, 2 * d)
    return x, ops.pack_weights(w_in, torch.zeros(width), torch.zeros(width), torch.zeros(1), dtype)


def score_cases() -> list[Any]:
    cases = []
    for (name, itemsize), table in configs.SCORE_CONFIGS.items():
        for arch in ARCHITECTURES[name]:
            for config in table:
                # At the widest, several programs share a token tile, and a remainder is cut into pieces.
                width = 512 if config is table[0] else config.block_h
                for dtype in (torch.bfloat16, torch.float16) if itemsize == 2 else (torch.float32,):
                    # fp16 shares every choice with bf16: the widest tile stands for the others.
                    if dtype == torch.float16 and config is not table[0]:
                        continue
                    for aligned in (True, False) if config.tma and dtype == torch.bfloat16 else (True,):
                        label = f"{arch}-{TYPE_NAMES[dtype]}-{config.block_h}-{'aligned' if aligned else 'strided'}"
                        cases.append(pytest.param(arch, config, width, dtype, aligned, id=label))
    return cases


@pytest.mark.parametrize(("arch", "config", "width", "dtype", "aligned"), score_cases())
def test_score_configurations(arch, config, width, dtype, aligned, launches):
    from score_vllm.kernels import score

    x, weights = tokens_and_weights(dtype, width)
    score.score_partials(x if aligned else x[:, ::2], weights, config)
    (launch,) = launches
    assert launch.arguments["TMA"] == (config.tma and aligned)
    built = build(launch, arch)
    assert_clean(built, arch)
    if dtype != torch.float32:
        in_ptx, in_sass = MATRIX_INSTRUCTION[arch]
        assert in_ptx in built.ptx
        assert re.search(rf"\b{in_sass}\b", built.sass)
        # No product may fall back to the older unit.
        assert in_ptx == "mma.sync" or not re.search(r"\bHMMA\b", built.sass)
    assert ("cp.async.bulk.tensor" in built.ptx) == launch.arguments["TMA"]


@pytest.mark.parametrize("width", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_width_has_a_configuration(arch, width):
    config = configs.score_config(f"sm_{arch}", 2, width)
    assert width % config.block_h == 0
    assert config.block_h == min(width, 256 if arch == 90 else 128)


@pytest.mark.parametrize(("d", "use_residual"), [(16, True), (48, False), (8192, True)])
def test_score_on_hopper_at_other_sizes(d, use_residual, launches):
    from score_vllm.kernels import score

    x = torch.zeros(2, 3, d, dtype=torch.bfloat16)
    w_in = torch.zeros(1024, 2 * d if use_residual else d)
    weights = ops.pack_weights(w_in, torch.zeros(1024), torch.zeros(1024), torch.zeros(1), x.dtype, use_residual)
    score.score_partials(x, weights)
    built = build(launches[0], 90)
    assert_clean(built, 90)
    assert "wgmma.mma_async" in built.ptx


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_selection_and_gather(arch, launches):
    x, weights = tokens_and_weights(torch.bfloat16, 512)
    with ops.force_backend("triton"):
        ops.select_rows(x, weights, 2, ops.PositionTable.from_layout(grid_layout(VideoGrid(2, 1, 3), 1.0)))
        ops.gather(x, torch.zeros(2, dtype=torch.int64))
        ops.score(x, weights.w_in, weights.b_in, weights.w_out, weights.b_out)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == [
        "score_kernel",
        "first_digit_kernel",
        "second_digit_kernel",
        "third_digit_kernel",
        "compact_kernel",
        "gather_kernel",
        "gather_kernel",
        "score_kernel",
        "combine_kernel",
    ], "one compress is six launches"
    for launch in launches[1:7] + launches[8:]:
        assert_clean(build(launch, arch), arch)


def test_a_spilling_kernel_would_be_caught(launches):
    # The check itself: the epilogue without its splitting spills at this size, so the test above can fail.
    from dataclasses import replace

    from score_vllm.kernels import score

    x, weights = tokens_and_weights(torch.bfloat16, 512)
    config = configs.score_config("sm_90", 2, 512)
    score.score_partials(x, weights, replace(config, num_warps=4))
    with pytest.raises(AssertionError, match="spill"):
        assert_clean(build(launches[0], 90), 90)

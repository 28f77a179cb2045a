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


class Loop(NamedTuple):
    """What one loop around matrix instructions is made of, in machine code."""

    products: int
    from_registers: int
    # Of ``wgmma.wait_group``: how many products may still be running.
    waits: list[int]
    loads: int
    float_arithmetic: int


INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)\s*([^;]*);", re.M)


def loops(built: Built, arch: int) -> list[Loop]:
    """The loops of a kernel that multiply: code between a conditional backward branch and its target."""
    product = MATRIX_INSTRUCTION[arch][1]
    code = [(int(at, 16), predicate, name, rest) for at, predicate, name, rest in INSTRUCTION.findall(built.sass)]
    found = []
    for end, predicate, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if not predicate or not name.startswith("BRA") or target is None or int(target[1], 16) >= end:
            continue
        body = [(name, rest) for at, _, name, rest in code if int(target[1], 16) <= at < end]
        products = [rest for name, rest in body if name.startswith(product)]
        if not products:
            continue
        found.append(
            Loop(
                len(products),
                # A from shared memory: ``HGMMA R24, gdesc[UR16], R24``; from registers: ``HGMMA R24, R4, gdesc[UR16]``.
                sum(re.match(r"\w+, R\d", rest) is not None for rest in products),
                [int(rest.split("0x")[1], 16) for name, rest in body if "DEPBAR" in name and "gsb" in rest],
                sum(name.startswith(("UTMALDG", "LDGSTS")) for name, _ in body),
                sum(name.startswith(("FADD", "HADD", "F2F", "FFMA", "HFMA")) for name, _ in body),
            )
        )
    return found


def tokens_and_weights(
    dtype: torch.dtype, width: int, d: int = 3584, second: str = "previous"
) -> tuple[torch.Tensor, ops.PolicyWeights]:
    x = torch.zeros(2, 3, d, dtype=dtype)
    w_in = torch.zeros(width, d if second == "none" else 2 * d)
    if second == "residual":
        w_in[:, d:] = 1.0
    weights = ops.pack_weights(w_in, torch.zeros(width), torch.zeros(width), torch.zeros(1), dtype, second != "none")
    assert weights.second == second
    return x, weights


def slow_if(repeats: bool) -> Any:
    """`make check` leaves out what repeats another case on a chip or type that takes the same way."""
    return [pytest.mark.slow] if repeats else []


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
                        repeats = name == "other" or dtype == torch.float16
                        repeats |= not aligned and config is not table[0]
                        cases.append(
                            pytest.param(arch, config, width, dtype, aligned, id=label, marks=slow_if(repeats))
                        )
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


@pytest.mark.parametrize(("width", "tiles"), [(512, [256, 64]), (128, [128, 64]), (64, [64])])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "strided"])
def test_the_main_loop_on_hopper_overlaps_loads_and_products(width, tiles, aligned, launches):
    from score_vllm.kernels import score

    config = configs.score_config("sm_90", 2, width)
    assert (config.block_k, config.num_stages) == (64, 4)
    x, weights = tokens_and_weights(torch.bfloat16, width)
    score.score_partials(x if aligned else x[:, ::2], weights, config)
    built = build(launches[0], 90)
    assert_clean(built, 90)
    found = loops(built, 90)
    # Whole tiles, and the pieces of the last wave.
    assert len(found) == len(tiles)
    for loop in found:
        # A warpgroup takes 64 rows by 16 columns a product.
        assert loop.products == (64 // 16) * (config.block_m // 64) // (config.num_warps // 4)
        assert loop.from_registers == 0
        assert loop.waits == [1], "a product must run while the next one's operands are waited for"
        assert loop.float_arithmetic == 0, "no residual"
        # Both tiles by one instruction each, or spread over the threads.
        assert loop.loads == 2 if aligned else loop.loads > 2


@pytest.mark.slow
def test_the_loop_that_subtracts_first_would_be_caught(launches):
    from score_vllm.kernels import score

    x, weights = tokens_and_weights(torch.bfloat16, 512, second="residual")
    score.score_partials(x, weights, configs.score_config("sm_90", 2, 512, "residual"))
    for loop in loops(build(launches[0], 90), 90):
        assert loop.from_registers == loop.products // 2
        assert 0 in loop.waits
        assert loop.float_arithmetic > 0


def residual_cases() -> list[Any]:
    return [
        pytest.param(
            arch, itemsize, config.block_h, id=f"{arch}-{itemsize}-{config.block_h}", marks=slow_if(name == "other")
        )
        for (name, itemsize), table in configs.SCORE_CONFIGS.items()
        for arch in ARCHITECTURES[name]
        for config in table[:1]
    ]


@pytest.mark.parametrize(("arch", "itemsize", "width"), residual_cases())
def test_subtracting_first_fits_every_chip(arch, itemsize, width, launches):
    from score_vllm.kernels import score

    x, weights = tokens_and_weights({2: torch.bfloat16, 4: torch.float32}[itemsize], width, second="residual")
    name = next(name for name, chips in ARCHITECTURES.items() if arch in chips)
    score.score_partials(x, weights, configs.score_config(name, itemsize, width, "residual"))
    built = build(launches[0], arch)
    assert_clean(built, arch)
    assert itemsize == 4 or MATRIX_INSTRUCTION[arch][0] in built.ptx


@pytest.mark.parametrize("width", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_width_has_a_configuration(arch, width):
    config = configs.score_config(f"sm_{arch}", 2, width)
    assert width % config.block_h == 0
    assert config.block_h == min(width, 256 if arch == 90 else 128)


@pytest.mark.parametrize(
    ("d", "second"), [pytest.param(16, "previous", marks=slow_if(True)), (48, "none"), (8192, "previous")]
)
def test_score_on_hopper_at_other_sizes(d, second, launches):
    from score_vllm.kernels import score

    x, weights = tokens_and_weights(torch.bfloat16, 1024, d, second)
    score.score_partials(x, weights)
    built = build(launches[0], 90)
    assert_clean(built, 90)
    assert "wgmma.mma_async" in built.ptx


@pytest.mark.parametrize("arch", [pytest.param(80, marks=slow_if(True)), 90, pytest.param(100, marks=slow_if(True))])
def test_selection_and_gather(arch, launches):
    x, weights = tokens_and_weights(torch.bfloat16, 512)
    with ops.force_backend("triton"):
        ops.select_rows(x, weights, 2, ops.PositionTable.from_layout(grid_layout(VideoGrid(2, 1, 3), 1.0)))
        ops.gather(x, torch.zeros(2, dtype=torch.int64))
        ops.score(x, torch.zeros(512, 2 * 3584), torch.zeros(512), torch.zeros(512), torch.zeros(1))
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


@pytest.mark.slow
def test_a_spilling_kernel_would_be_caught(launches):
    # The check itself: the epilogue without its splitting spills at this size, so the test above can fail.
    from dataclasses import replace

    from score_vllm.kernels import score

    x, weights = tokens_and_weights(torch.bfloat16, 512)
    config = configs.score_config("sm_90", 2, 512)
    score.score_partials(x, weights, replace(config, num_warps=4))
    with pytest.raises(AssertionError, match="spill"):
        assert_clean(build(launches[0], 90), 90)

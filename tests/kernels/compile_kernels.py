"""Compiles every kernel for a GPU that need not be there, and prints what came of it as JSON.

A process of its own: kernels that are to be interpreted cannot be compiled as well.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shiftkv_kernels.device import Gpu
from shiftkv_kernels.fused import (
    gather,
    group_mass,
    keep_best,
    log_sums,
    project_token,
    rotation,
    samples,
    search,
    tiles,
    token_statistics,
    vote,
)

FLOATS = {"scale", "threshold", "remainder", "gamma"}
POINTERS = {"p_valid": "*u8", "p_cuts": "*i32", "p_kept": "*i64", "p_indices": "*i64"}
INPUTS = {"p_proxies", "p_last", "p_keys", "p_values", "p_kept_keys", "p_kept_values", "p_states", "p_samples"}
INPUTS |= {f"p_{part}_{index}" for part in ("weight", "bias", "out") for index in range(3)} | {"p_state"}
INPUTS |= {"p_queries", "p_cos", "p_sin", "p_rotated", "p_rotated_last"}
UNIT_STRIDES = {"stride_kd", "stride_vd"}
UNSPECIALIZED = {"T", "C", "S", "tiles_per_part", "chunks_per_program", "seed", "stream", "first"}


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: str, capability: int, **options: Any) -> Any:
    """The kernel as it is launched for aligned tensors of `dtype` ("bf16", "fp16", "fp32")."""
    signature, values, alignment = {}, dict(constants), {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in UNIT_STRIDES:
            signature[name], values[name] = "constexpr", 1
        elif name.startswith("p_"):
            signature[name] = f"*{dtype}" if name in INPUTS else POINTERS.get(name, "*fp32")
            alignment[position,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            if name not in FLOATS | UNSPECIALIZED:
                alignment[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=values, attrs=alignment)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def group_mass_cases(capability: int) -> dict[str, Any]:
    """Both passes at some dtypes and head dims, with the tiles that are chosen for them."""
    gpu = Gpu(multiprocessors=132, has_warpgroup_products=capability == 90)
    compiled = {}
    for dtype, head_dim, padded in (("bf16", 128, False), ("fp16", 40, True), ("bf16", 256, True), ("fp32", 80, False)):
        block = triton.next_power_of_2(head_dim)
        passes = tiles.choose_tiles(block, 4 if dtype == "fp32" else 2, gpu)
        constants = {"R": 7, "D": head_dim, "BLOCK_D": block, "EXACT": dtype == "fp32"}
        if not padded:
            constants["p_valid"] = None
        names = ("BLOCK_Q", "BLOCK_T"), ("BLOCK_T", "BLOCK_Q")
        kernels = log_sums._log_sum_kernel, group_mass._group_mass_kernel
        more: tuple[dict[str, Any], dict[str, Any]] = ({}, {"GROUP_SIZE": 16, "SPAN": 16, "EVEN": not padded})
        for kernel, choice, (kept, streamed), extra in zip(kernels, passes, names, more, strict=True):
            compiled[f"{kernel.__name__} {dtype} {head_dim}"] = compile_kernel(
                kernel,
                {**constants, **extra, kept: choice.kept, streamed: choice.streamed},
                dtype,
                capability,
                num_warps=choice.warps,
                num_stages=choice.stages,
                maxnreg=choice.registers,
            )
    combine = log_sums._combine_kernel
    compiled[combine.__name__] = compile_kernel(combine, {"PARTS": 9, "BLOCK": 256}, "fp32", capability)
    return compiled


def other_cases(capability: int) -> dict[str, Any]:
    """All other kernels, at the sizes of Qwen2.5-VL-7B."""
    compiled = {}
    for tokens in (2048, 32768, 131072):
        rows: dict[str, Any] = dict(search.row_options(tokens))
        warps = rows.pop("num_warps")
        cases = (vote._cut_kernel, rows), (keep_best._keep_best_kernel, {**rows, "PIECE": min(rows["BLOCK"], 4096)})
        for kernel, constants in cases:
            compiled[f"{kernel.__name__} {tokens}"] = compile_kernel(
                kernel, constants, "fp32", capability, num_warps=warps
            )
    for kernel, constants in (
        (vote._count_kernel, {"BLOCK_G": 32, "BLOCK_T": 128}),
        (gather._gather_kernel, {"D": 128, "D_V": 64, "BLOCK_S": 16, "BLOCK_D": 128, "BLOCK_D_V": 64}),
        (token_statistics._token_statistics_kernel, {"D": 3584, "BLOCK": 4096}),
        (samples._samples_kernel, {"D": 3584, "BLOCK_T": 2048, "BLOCK": 512}),
        (rotation._rotate_kernel, {"D": 128, "ROTATED": 64, "BLOCK_N": 32, "BLOCK_HALF": 32, "BLOCK_REST": 64}),
    ):
        compiled[kernel.__name__] = compile_kernel(kernel, constants, "bf16", capability, num_warps=8)
    return compiled


def projection_cases(capability: int) -> dict[str, Any]:
    """Projections of queries, keys and values, with biases, and of one layer without."""
    three = {"BLOCK_K": project_token._INPUTS_AT_ONCE}
    one = {f"p_{part}_{index}": None for part in ("weight", "bias", "out") for index in (1, 2)} | {"p_bias_0": None}
    kernel = project_token._project_token_kernel
    return {
        f"{kernel.__name__} {name}": compile_kernel(
            kernel, constants, "bf16", capability, num_warps=project_token._WARPS
        )
        for name, constants in (("three", three), ("one", three | one))
    }


if __name__ == "__main__":
    target = int(sys.argv[1])
    kernels = group_mass_cases(target) | other_cases(target) | projection_cases(target)
    report = {
        name: {"shared": kernel.metadata.shared, "wgmma": "wgmma.mma_async" in kernel.asm["ptx"]}
        for name, kernel in kernels.items()
    }
    json.dump(report, sys.stdout)

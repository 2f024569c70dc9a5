"""Compiles every kernel for a GPU that need not be there, and prints what came of it as JSON.

A process of its own: kernels that are to be interpreted cannot be compiled as well.
"""

import itertools
import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shiftkv_kernels.device import Gpu
from shiftkv_kernels.fused import (
    attend,
    attend_token,
    gather,
    group_mass,
    keep_best,
    log_sums,
    project_gate,
    project_token,
    refit_values,
    rotation,
    samples,
    search,
    solve,
    tiles,
    token_statistics,
    value_scores,
    vote,
)

FLOATS = {"scale", "cap_scale", "threshold", "remainder", "gamma", "per_row", "last_weight", "ridge", "eps"}
POINTERS = {"p_valid": "*u8", "p_cuts": "*i32", "p_kept": "*i64", "p_indices": "*i64", "p_mask": "*u8"}
INPUTS = {"p_proxies", "p_last", "p_keys", "p_values", "p_kept_keys", "p_kept_values", "p_states", "p_samples"}
INPUTS |= {f"p_{part}_{index}" for part in ("weight", "bias", "out") for index in range(3)} | {"p_state"}
INPUTS |= {"p_norm", "p_residual", "p_out"}
INPUTS |= {"p_query"} | {"p_refitted", "p_sinks"} | {"p_queries", "p_cos", "p_sin", "p_rotated", "p_rotated_last"}
UNIT_STRIDES = {"stride_kd", "stride_vd"}
UNSPECIALIZED = {"T", "C", "S", "tiles_per_part", "chunks_per_program", "steps_per_program", "seed", "stream", "first"}
UNSPECIALIZED |= {"parts", "shares", "tiles", "rows"}


# What few models have: None for the others.
SINKS_AND_CAPPING = {"p_sinks", "cap_scale"}


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    dtype: str,
    capability: int,
    *,
    sinks_and_capping: bool = False,
    **options: Any,
) -> Any:
    """The kernel as it is launched for aligned tensors of `dtype` ("bf16", "fp16", "fp32").

    Args:
        sinks_and_capping: with learned sinks, of the same dtype, and capped logits.
    """
    signature, values, alignment = {}, dict(constants), {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SINKS_AND_CAPPING and not sinks_and_capping:
            signature[name], values[name] = "constexpr", None
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
    for dtype, head_dim, padded, sinks_and_capping in (
        ("bf16", 128, False, False),
        ("fp16", 40, True, True),
        ("bf16", 256, True, False),
        ("fp32", 80, False, False),
    ):
        case = f"{dtype} {head_dim}{' with sinks and capping' if sinks_and_capping else ''}"
        block = triton.next_power_of_2(head_dim)
        passes = tiles.choose_tiles(block, 4 if dtype == "fp32" else 2, 8192, gpu)
        constants = {"R": 7, "D": head_dim, "BLOCK_D": block, "EXACT": dtype == "fp32"}
        if not padded:
            constants["p_valid"] = None
        names = ("BLOCK_Q", "BLOCK_T"), ("BLOCK_T", "BLOCK_Q")
        kernels = log_sums._log_sum_kernel, group_mass._group_mass_kernel
        more: tuple[dict[str, Any], dict[str, Any]] = ({}, {"GROUP_SIZE": 16, "SPAN": 16, "EVEN": not padded})
        for kernel, choice, (kept, streamed), extra in zip(kernels, passes, names, more, strict=True):
            compiled[f"{kernel.__name__} {case}"] = compile_kernel(
                kernel,
                {**constants, **extra, kept: choice.kept, streamed: choice.streamed},
                dtype,
                capability,
                sinks_and_capping=sinks_and_capping,
                num_warps=choice.warps,
                num_stages=choice.stages,
                maxnreg=choice.registers,
            )
        value_kernel = value_scores._moments_kernel
        _, choice = tiles.choose_value_tiles(block, 4 if dtype == "fp32" else 2, 8192, gpu)
        compiled[f"{value_kernel.__name__} {case}"] = compile_kernel(
            value_kernel,
            {**constants, "EVEN": not padded, "BLOCK_T": choice.kept, "BLOCK_Q": choice.streamed},
            dtype,
            capability,
            sinks_and_capping=sinks_and_capping,
            num_warps=choice.warps,
            num_stages=choice.stages,
            maxnreg=choice.registers,
        )
    combine = log_sums._combine_kernel
    sizes: dict[str, Any] = {"BLOCK": 256}
    without = sizes | {"N": None, "H": None}
    compiled[combine.__name__] = compile_kernel(combine, without, "fp32", capability)
    compiled[f"{combine.__name__} with sinks"] = compile_kernel(
        combine, sizes, "fp32", capability, sinks_and_capping=True
    )
    return compiled


def value_cases(capability: int) -> dict[str, Any]:
    """The kernels that count values, at some dtypes and head dims; values may have another head dim than keys."""
    gpu = Gpu(multiprocessors=132, has_warpgroup_products=capability == 90)
    compiled = {}
    for dtype, head_dim, value_dim in (("bf16", 128, 128), ("fp16", 40, 24), ("bf16", 256, 256), ("fp32", 80, 80)):
        blocks = [max(triton.next_power_of_2(size), 16) for size in (head_dim, value_dim)]
        shape = {"R": 7, "D": head_dim, "D_V": value_dim, "BLOCK_D": blocks[0], "BLOCK_D_V": blocks[1]}
        exact = {"EXACT": dtype == "fp32"}
        choice = tiles.choose_attend_tiles(max(blocks), 4 if dtype == "fp32" else 2, gpu)
        sizes = {"BLOCK_Q": choice.kept, "BLOCK_T": choice.streamed}
        wide = max(blocks) > 128
        values = {"D_V": value_dim, "BLOCK_D_V": blocks[1], "BLOCK_T": value_scores._TOKENS_AT_ONCE}
        cases: tuple[tuple[Any, dict[str, Any], dict[str, int]], ...] = (
            (attend._attend_kernel, shape | exact | sizes, {"num_warps": choice.warps, "num_stages": choice.stages}),
            (
                refit_values._missing_kernel,
                shape | exact | {"BLOCK_Q": 64, "BLOCK_C": 32 if wide else 64, "FITS": not wide},
                {"num_warps": 8 if wide else 4, "num_stages": 1},
            ),
            (value_scores._mean_output_kernel, values, {}),
            (value_scores._scores_kernel, values, {}),
            (solve._solve_kernel, {"D_V": value_dim, "BLOCK_C": 128, "BLOCK_D": 16}, {"num_warps": 8}),
            (
                solve._solve_in_blocks_kernel,
                {"D_V": value_dim, "BLOCK_C": 256, "BLOCK_K": 32, "BLOCK_D": 16},
                {"num_warps": 8},
            ),
        )
        for kernel, constants, options in cases:
            if wide and kernel in (solve._solve_kernel, solve._solve_in_blocks_kernel):
                continue  # of a value's features they take BLOCK_D at a time, however many there are
            # One dtype has them, so that each kernel is compiled with them and without.
            special = head_dim == 40 and set(kernel.arg_names) >= SINKS_AND_CAPPING
            name = f"{kernel.__name__} {dtype} {head_dim}{' with sinks and capping' if special else ''}"
            compiled[name] = compile_kernel(kernel, constants, dtype, capability, sinks_and_capping=special, **options)
    products, combine = refit_values._products_kernel, attend._combine_kernel
    compiled[products.__name__] = compile_kernel(products, {"D_V": 128, "BLOCK_R": 64, "BLOCK": 32}, "fp32", capability)
    sizes = {"D_V": 128, "BLOCK_D_V": 128, "BLOCK": 16}
    compiled[f"{combine.__name__} of outputs"] = compile_kernel(combine, sizes, "fp32", capability)
    return compiled


def other_cases(capability: int) -> dict[str, Any]:
    """All other kernels, at the sizes of Qwen2.5-VL-7B."""
    compiled = {}
    for options in search.ROW_OPTIONS:
        rows: dict[str, Any] = dict(options)
        warps = rows.pop("num_warps")
        cases = (vote._cut_kernel, rows), (keep_best._keep_best_kernel, {**rows, "PIECE": 4096})
        for kernel, constants in cases:
            compiled[f"{kernel.__name__} {rows['BLOCK']}"] = compile_kernel(
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
    """Projections of one row and of several, of one layer and of three with biases; what one row has besides."""
    biases = {"p_bias_0": None, "p_bias_1": None, "p_bias_2": None}
    one = {f"p_{part}_{index}": None for part in ("weight", "out") for index in (1, 2)} | biases
    norm, residual = {"p_norm": None}, {"p_residual": None}
    layers, rows, gate = (
        project_token._project_token_kernel,
        project_token._project_rows_kernel,
        project_gate._project_gate_kernel,
    )
    missing: dict[str, tuple[Any, dict[str, None]]] = {
        "three": (layers, norm | residual),
        "three with a norm": (layers, residual),
        "one": (layers, one | norm | residual),
        "one with a residual": (layers, one | norm),
        "gate with biases": (gate, norm),
        "gate with a norm": (gate, {name: biases[name] for name in ("p_bias_0", "p_bias_1")}),
    }
    compiled = {}
    for name, (kernel, without) in missing.items():
        options = dict(project_token.ONE_ROW)
        tile = {"BLOCK_K": options.pop("BLOCK_K")}
        compiled[f"{kernel.__name__} {name}"] = compile_kernel(kernel, without | tile, "bf16", capability, **options)
    for (name, without), dtype in itertools.product({"three": {}, "one": one}.items(), (torch.bfloat16, torch.float32)):
        options = project_token.several_rows(dtype)
        tiles = {size: options.pop(size) for size in ("ROWS", "BLOCK_N", "BLOCK_K")}
        short = "bf16" if dtype == torch.bfloat16 else "fp32"
        compiled[f"{rows.__name__} {short} {name}"] = compile_kernel(
            rows, without | tiles, short, capability, **options
        )
    return compiled


def token_attention_cases(capability: int) -> dict[str, Any]:
    """One token's attention with each of the masks, and what puts the parts of 1,024 slots together."""
    shape = {"D_V": 128, "BLOCK_D_V": 128}
    part = {**shape, "R": 7, "D": 128, "BLOCK_D": 128, "BLOCK_S": attend_token._SLOTS_PER_PROGRAM}
    kernel, joining = attend_token._attend_part_kernel, attend_token._join_parts_kernel
    compiled = {
        f"{kernel.__name__} {mask}": compile_kernel(kernel, {**part, "IS_ADDED": mask == "added"}, "bf16", capability)
        for mask in ("bool", "added")
    }
    return compiled | {joining.__name__: compile_kernel(joining, {**shape, "BLOCK_PARTS": 16}, "bf16", capability)}


if __name__ == "__main__":
    target = int(sys.argv[1])
    kernels = group_mass_cases(target) | value_cases(target) | other_cases(target) | projection_cases(target)
    kernels |= token_attention_cases(target)
    report = {
        name: {
            "shared": kernel.metadata.shared,
            "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
            "mma": "mma.sync" in kernel.asm["ptx"],
        }
        for name, kernel in kernels.items()
    }
    json.dump(report, sys.stdout)

"""TorchAO's configs as JSON, and weights for each."""

from __future__ import annotations

from typing import Any

import torch

from qcompile.methods.torchao import TorchAo
from qcompile.methods.torchao_config import TorchAoConfig

AO = TorchAo()
LONG = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def per(kind: str, **sizes: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": 1, "_data": sizes}


def enum(kind: str, name: str) -> dict[str, Any]:
    return {"_type": kind, "_data": name}


def said(name: str, version: int = 2, **data: Any) -> dict[str, Any]:
    return {"_type": f"{name}Config", "_version": version, "_data": data}


def made_of(recipe: dict[str, Any], **more: Any) -> TorchAoConfig:
    return TorchAoConfig.from_dict({"quant_type": {"default": recipe}, **more})


FP8, FP8_2 = enum("torch.dtype", "float8_e4m3fn"), enum("torch.dtype", "float8_e5m2")
FP4, ROW, GROUP = enum("torch.dtype", "float4_e2m1fn_x2"), per("PerRow", dim=-1), per("PerGroup", group_size=16)
BLOCKS = [per("PerBlock", block_size=[1, 128]), per("PerBlock", block_size=[128, 128])]
ASYMMETRIC = enum("MappingType", "ASYMMETRIC")
TILES, HQQ = enum("Int4PackingFormat", "TILE_PACKED_TO_4D"), enum("IntxChooseQParamsAlgorithm", "HQQ_SCALE_ONLY")
STEPS = enum("Int4ChooseQParamsAlgorithm", "HQQ")
INT4, F32 = enum("torch.dtype", "int4"), enum("torch.dtype", "float32")
NO_CLIPPING = enum("MappingType", "SYMMETRIC_NO_CLIPPING_ERR")
EVEN, FLOOR, CEIL = (enum("ScaleCalculationMode", name) for name in ("EVEN", "FLOOR", "CEIL"))

# Recipes, the shape and dtype of a weight for each, and how far its values may be from it, as a share of the largest.
RECIPES: list[tuple[dict[str, Any], int, int, str, float]] = [
    (said("Int8WeightOnly"), 19, 33, "f32", 0.005),
    (said("Int8WeightOnly", granularity=per("PerTensor")), 5, 32, "bf16", 0.005),
    (said("Int8WeightOnly", granularity=GROUP), 5, 48, "f16", 0.005),
    (said("Int8DynamicActivationInt8Weight"), 19, 33, "f32", 0.005),
    (said("Int8DynamicActivationInt8Weight", act_mapping_type=ASYMMETRIC, granularity=per("PerTensor")), 1, 7, "bf16", 0.005),
    (said("Int8DynamicActivationInt8Weight", granularity=[per("PerTensor"), ROW], reduce_range=True), 5, 8, "f32", 0.01),
    (said("IntxWeightOnly", weight_dtype=enum("torch.dtype", "int5")), 7, 9, "f32", 0.04),
    (said("IntxWeightOnly", weight_dtype=INT4, granularity=GROUP, mapping_type=ASYMMETRIC), 7, 48, "bf16", 0.1),
    (said("IntxWeightOnly", mapping_type=NO_CLIPPING), 7, 48, "f16", 0.005),
    (said("IntxWeightOnly", intx_choose_qparams_algorithm=HQQ), 7, 48, "f32", 0.01),
    (said("Int8DynamicActivationIntxWeight", weight_granularity=GROUP, weight_scale_dtype=F32), 5, 48, "bf16", 0.005),
    (said("Int4WeightOnly", group_size=32), 19, 96, "bf16", 0.08),
    (said("Int4WeightOnly", group_size=64, int4_packing_format=TILES), 19, 192, "bf16", 0.08),
    (said("Int4WeightOnly", group_size=64, int4_packing_format=TILES, int4_choose_qparams_algorithm=STEPS), 19, 192, "bf16", 0.1),
    (said("Float8WeightOnly"), 19, 33, "f32", 0.04),
    (said("Float8WeightOnly", weight_dtype=FP8_2, granularity=GROUP), 5, 48, "bf16", 0.08),
    (said("Float8DynamicActivationFloat8Weight"), 32, 48, "f32", 0.04),
    (said("Float8DynamicActivationFloat8Weight", granularity=[ROW, ROW], activation_value_ub=3.0), 32, 48, "bf16", 0.04),
    (said("Float8DynamicActivationFloat8Weight", granularity=BLOCKS), 128, 256, "bf16", 0.04),
    (said("MXDynamicActivationMXWeight", 1), 19, 96, "bf16", 0.04),
    (said("MXDynamicActivationMXWeight", 1, weight_dtype=FP8_2, activation_dtype=FP8_2, scaling_mode=EVEN), 3, 64, "bf16", 0.15),
    (said("MXDynamicActivationMXWeight", 1, weight_dtype=FP4, activation_dtype=FP4, scaling_mode=FLOOR), 130, 160, "bf16", 0.35),
    (said("MXDynamicActivationMXWeight", 1, scaling_mode=CEIL), 3, 64, "bf16", 0.08),
    (said("NVFP4WeightOnly", 1), 144, 80, "bf16", 0.2),
    (said("NVFP4WeightOnly", 1, use_dynamic_per_tensor_scale=False), 16, 32, "f32", 0.3),
    (said("NVFP4DynamicActivationNVFP4Weight", 1), 16, 48, "bf16", 0.2),
    (said("NVFP4DynamicActivationNVFP4Weight", 1, use_dynamic_per_tensor_scale=False), 16, 48, "bf16", 0.3),
]  # fmt: skip
IDS = [f"{recipe['_type']}-{n}x{k}-{dtype}-{i}" for i, (recipe, n, k, dtype, _) in enumerate(RECIPES)]


def sample(n: int, k: int, dtype: str = "f32") -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(DTYPES[dtype])

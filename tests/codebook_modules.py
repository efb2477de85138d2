"""Random modules as AQLM and VPTQ store them, with the weights that their published formulas give."""

from __future__ import annotations

from typing import Any

import torch

from qcompile.methods.aqlm import AqlmConfig

Tensors = dict[str, torch.Tensor]
GENERATOR = torch.Generator()


def ints(least: int, most: int, *shape: int) -> torch.Tensor:
    return torch.randint(least, most, shape, generator=GENERATOR.manual_seed(sum(shape)))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR.manual_seed(sum(shape))).half()


def aqlm(config: AqlmConfig, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
    """A module as AQLM stores it, and the weight that its formula gives."""
    rows, columns, books = config.out_group_size, config.in_group_size, config.num_codebooks
    bits = config.nbits_per_codebook
    codes = ints(0, 2**bits, n // rows, k // columns, books)
    book, scales = floats(books, 2**bits, rows, columns), floats(n // rows, 1, 1, 1)
    total = sum(book[i].float()[codes[:, :, i]] for i in range(books))
    assert isinstance(total, torch.Tensor)
    wrapped = codes - (codes >= 2 ** (bits - 1)).long() * 2**bits
    dtype = torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32
    made = (total * scales.float()).permute(0, 2, 1, 3).reshape(n, k)
    return {"codes": wrapped.to(dtype), "codebooks": book, "scales": scales}, made


def stream(fields: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers [..., C] as a little-endian stream of `width` bits each: i32 words [..., ceil(C * width / 32)]."""
    bits = (fields[..., None] >> torch.arange(width) & 1).flatten(-2)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)


def entries(book: torch.Tensor, index: torch.Tensor, vector: int) -> torch.Tensor:
    """The columns [R * vector, C] that indices [R, C] name in a codebook."""
    return book.float().reshape(-1, vector)[index].permute(0, 2, 1).flatten(0, 1)


LAYER: dict[str, Any] = {"vector_lens": [-1, 6], "num_centroids": [-1, 32], "num_res_centroids": [-1, -1]}
RESIDUAL = LAYER | {"num_res_centroids": [-1, 8], "group_num": 2}
OUTLIERS = RESIDUAL | {"vector_lens": [4, 6], "num_centroids": [16, 32], "outlier_size": 6}
PLAIN = LAYER | {"enable_norm": False, "enable_perm": False}


def vptq(layer: dict[str, Any], n: int, k: int) -> tuple[dict[str, Any], Tensors, torch.Tensor]:
    """The completed layer config, a module as VPTQ stores it, and the weight that its formula gives."""
    groups, (short, vector), outliers = layer.get("group_num", 1), layer["vector_lens"], layer.get("outlier_size", 0)
    columns, (few, count), residuals = (k - outliers) // groups, layer["num_centroids"], layer["num_res_centroids"][1]
    index, book = ints(0, count, groups, -(-n // vector), columns), floats(groups, count * vector)
    width, tensors, fields = (count - 1).bit_length(), {"centroids.weight": book}, index
    parts = [entries(book[g], index[g], vector)[:n] for g in range(groups)]
    if residuals > 0:
        more, extra = ints(0, residuals, groups, -(-n // vector), columns), floats(groups, residuals * vector)
        parts = [part + entries(extra[g], more[g], vector)[:n] for g, part in enumerate(parts)]
        tensors["res_centroids.weight"] = extra
        fields, width = index | more << width, width + (residuals - 1).bit_length()
    tensors["indices"] = stream(fields, width)
    if outliers:
        own, small = ints(0, few, 1, -(-n // short), outliers), floats(1, few * short)
        parts.insert(0, entries(small[0], own[0], short)[:n])
        tensors |= {"outlier_indices": own.to(torch.int16), "outlier_centroids.weight": small}
    made = torch.cat(parts, 1)
    if layer.get("enable_perm", True):
        order = torch.randperm(k, generator=GENERATOR.manual_seed(k))
        made, tensors["perm"] = made[:, order.argsort()], order.to(torch.int16)
    if layer.get("enable_norm", True):
        tensors |= {"weight_scale": floats(k), "weight_bias": floats(k + 1)[1:].clone()}
        made = made * tensors["weight_scale"].float() + tensors["weight_bias"].float()
    return layer | {"group_size": columns, "in_features": k, "out_features": n}, tensors, made

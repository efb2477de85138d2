"""One linear layer, int4 in groups: qcompile in both accuracies against torch, onnxruntime, OpenVINO and ARK.

Each contender holds as many different random weights as are needed to come from memory, and rotates over them.
All hold the same 4-bit codes and scales (torch: the same weights, dequantized), and must agree on the result first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import qcompile
from benchmarks.interleave import Work, medians
from qcompile.format import Packed
from qcompile.formats.gptq import Gptq
from qcompile.methods.base import Method, MethodConfig, Quantized
from qcompile.methods.index import register_method
from qcompile.pack import pack
from qcompile.program import Module

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1536, 576))
ROWS = (1, 16, 128, 512)
GROUP = 64


@dataclass(frozen=True)
class Weights:
    """Symmetric 4-bit codes [N, K] in 0..15 (zero 8) and float32 scales [N, K // GROUP]."""

    codes: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def random(n: int, k: int, seed: int) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        # Scales that float16 holds exactly, so that every contender multiplies by the same numbers.
        scales = (torch.rand(n, k // GROUP, generator=generator) * 0.01 + 0.002).half().float()
        return Weights(codes, scales)

    def dense(self) -> torch.Tensor:
        return (self.codes.float() - 8) * self.scales.repeat_interleave(GROUP, 1)


Layer = Callable[[torch.Tensor], Any]
Runs = Callable[[torch.Tensor], Sequence[Any]]  # every layer once, on the same rows
Maker = Callable[[Sequence[Weights]], Runs]


def torch_float32(weights: Weights) -> Layer:
    dense = weights.dense()
    return lambda x: nn.functional.linear(x, dense)


def torch_bfloat16(weights: Weights) -> Layer:
    dense = weights.dense().bfloat16()
    return lambda x: nn.functional.linear(x.bfloat16(), dense)


def each(make: Callable[[Weights], Layer]) -> Maker:
    """Layers that are called from Python one after another."""

    def make_all(weights: Sequence[Weights]) -> Runs:
        layers = [make(item) for item in weights]
        return lambda x: [layer(x) for layer in layers]

    return make_all


def onnxruntime(level: int) -> Maker:
    def make(weights: Sequence[Weights]) -> Runs:
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        n, k = weights[0].codes.shape
        nodes, stored = [], []
        for i, item in enumerate(weights):
            packed = (item.codes[:, ::2] | (item.codes[:, 1::2] << 4)).reshape(n, k // GROUP, GROUP // 2)
            stored += [
                numpy_helper.from_array(packed.numpy(), f"w{i}"),
                numpy_helper.from_array(item.scales.numpy(), f"s{i}"),
            ]
            nodes.append(helper.make_node(
                "MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft",
                K=k, N=n, bits=4, block_size=GROUP, accuracy_level=level,
            ))  # fmt: skip
        results = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["m", n]) for node in nodes]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
        graph = helper.make_graph(nodes, "layers", [x], results, stored)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda x: [torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()})]

    return make


def openvino(activations: str) -> Maker:
    def make(weights: Sequence[Weights]) -> Runs:
        import numpy as np
        import openvino as ov
        from openvino import opset13 as ops

        n, k = weights[0].codes.shape
        x, results = ops.parameter([-1, k], np.float32, name="x"), []
        for item in weights:
            packed = item.codes.reshape(n, k // GROUP, GROUP).numpy()
            codes = ops.convert(ops.constant(packed, dtype=ov.Type.u4), np.float16)
            zero = ops.convert(ops.constant(np.array([[[8]]], np.uint8), dtype=ov.Type.u4), np.float16)
            scales = ops.constant(item.scales.reshape(n, k // GROUP, 1).half().numpy())
            dense = ops.reshape(ops.multiply(ops.subtract(codes, zero), scales), [n, k], False)
            results.append(ops.matmul(x, ops.convert(dense, np.float32), False, True))
        group = GROUP if activations == "int8" else 0
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
        }
        request = ov.Core().compile_model(ov.Model(results, [x]), "CPU", options).create_infer_request()

        def run(x: torch.Tensor) -> list[torch.Tensor]:
            found = request.infer([x.numpy()], share_inputs=True)
            return [torch.from_numpy(found[i]) for i in range(len(results))]

        return run

    return make


def ark(compute: str) -> Callable[[Weights], Layer]:
    def make(weights: Weights) -> Layer:
        import auto_round_kernel

        kernels = auto_round_kernel.ARK() if hasattr(auto_round_kernel, "ARK") else auto_round_kernel
        n, k = weights.codes.shape
        codes = (weights.codes.to(torch.int8) - 8).T.contiguous()
        empty = torch.empty(0)
        settings = (GROUP, compute, "int4", "fp32", False)
        blob = kernels.repack_quantized_weight(codes, weights.scales.T.contiguous(), empty, *settings)
        return lambda x: kernels.woqgemm(x, blob, empty, n, k, *settings)

    return make


@dataclass(frozen=True)
class RandomConfig(MethodConfig):
    """The config of `Random`: it has no fields."""

    method: ClassVar[str] = "benchmark"


class Random(Method):
    """A quantization method whose weight of layer `<name>.<i>` is `Weights.random` number i, whatever it is given."""

    name = "benchmark"
    source = "benchmarks/layers.py"
    Config = RandomConfig
    formats = ("gptq",)
    format = Gptq(bits=4, group=GROUP, v1=False, scale="f32")

    def prequantized(self, config: MethodConfig, source: Any) -> bool:
        return False

    def select(self, config: MethodConfig, module: Module, source: Any, modules: Any) -> Quantized:
        return Quantized(self.format)

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        made = Weights.random(module.n, module.k, int(module.path.rpartition(".")[2]))
        fields = {
            "code": made.codes.int(),
            "zero": torch.full((module.n, module.k), 8, dtype=torch.int32),
            "scale": made.scales.repeat_interleave(GROUP, 1),
        }
        return Packed(self.format, pack(self.format, fields, module.n, module.k), module.n, module.k)


register_method(Random)


class Layers(nn.Module):
    """Several linear layers of one size, each with an input of its own so that nothing is merged."""

    def __init__(self, n: int, k: int, count: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, n, bias=False, device="meta") for _ in range(count))
        for layer in self.layers:
            layer.weight = nn.Parameter(torch.zeros(1).expand(n, k), requires_grad=False)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def ours(n: int, k: int, count: int, accuracy: Any) -> Callable[[torch.Tensor], Any]:
    """All layers compiled as one model: a call runs each of them once."""
    rows = {0: torch.export.Dim("m", min=1, max=4096)}
    compiled = qcompile.compile(
        Layers(n, k, count),
        RandomConfig(),
        example_inputs=tuple(torch.randn(8, k) for _ in range(count)),
        dynamic_shapes={"inputs": (rows,) * count},
        accuracy=accuracy,
        strict=True,
        threads=torch.get_num_threads(),
    )
    return lambda x: compiled(*[x] * count)


CONTENDERS: dict[str, dict[str, Maker]] = {
    "exact": {
        "torch float32": each(torch_float32),
        "torch bfloat16": each(torch_bfloat16),
        "onnxruntime 0": onnxruntime(0),
        "openvino exact": openvino("float"),
        "ark fp32": each(ark("fp32")),
    },
    "int8": {
        "onnxruntime 4": onnxruntime(4),
        "openvino int8": openvino("int8"),
        "ark int8": each(ark("int8")),
    },
}


def copies(n: int, k: int, rows: int) -> int:
    """How many weights to rotate over: 128 MB of int4 where memory decides (few rows), else two.

    Contenders take turns, so each finds the caches full of the others' weights.
    """
    return min(48, max(2, 128_000_000 // (n * k // 2))) if rows <= 16 else 2


def bytes_of(n: int, k: int) -> int:
    """What the int4 weight and its float32 scales occupy (OpenVINO holds float16 ones)."""
    return n * k // 2 + n * k // GROUP * 4


READ = "memory read"  # no contender: torch's sum of a float32 array of as many bytes as the weights


def time_shape(n: int, k: int, rows: int, accuracy: str, seconds: float) -> dict[str, float]:
    """Median seconds of one y = x @ W.T, [rows, K] by [N, K], for each contender of `accuracy`, and of `READ`.

    A turn runs every weight once. qcompile, onnxruntime and OpenVINO hold all of them in one model, which is called once a
    turn; torch and ARK are called from Python once a layer.
    """
    weights = [Weights.random(n, k, seed) for seed in range(copies(n, k, rows))]
    x = torch.randn(rows, k)
    expected = x @ weights[0].dense().T

    def check(name: str, found: torch.Tensor, bound: float) -> None:
        error = ((found.float() - expected).norm() / expected.norm()).item()
        if not error < bound:
            raise AssertionError(f"{name} computes something else: relative error {error:.3g}")

    bound = 0.005 if accuracy == "exact" else 0.02  # bfloat16 and float16 scales among the exact
    compiled = ours(n, k, len(weights), accuracy)
    check("qcompile", compiled(x)[0], bound)
    work: dict[str, Work] = {f"qcompile {accuracy}": lambda _: compiled(x)}
    for name, make in CONTENDERS[accuracy].items():
        layers = make(weights)
        check(name, layers(x)[0], bound)
        work[name] = lambda _, layers=layers: layers(x)  # type: ignore[misc]
    array = torch.ones(bytes_of(n, k) * len(weights) // 4)
    work[READ] = lambda _: array.sum()
    return {name: value / len(weights) for name, value in medians(work, seconds, least=5).items()}

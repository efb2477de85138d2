"""Methods that need calibration data, or days, to quantize: their checkpoints are read, and float models refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NoReturn

from qcompile.errors import ConfigError
from qcompile.methods import skip, stored
from qcompile.methods.base import Method, MethodConfig, Skip

if TYPE_CHECKING:
    import torch

    from qcompile.format import Packed
    from qcompile.program import Module
    from qcompile.sources import TensorSource


class Calibrated(Method):
    """A method whose modules are those that the checkpoint stores with the tensor `mark`.

    `needs` says what its quantization takes, `field` which of the config's fields names modules that stay dense.
    """

    mark: ClassVar[str]
    needs: ClassVar[str]
    field: ClassVar[str] = "modules_to_not_convert"

    def prequantized(self, config: MethodConfig, source: TensorSource) -> bool:
        return any(name.endswith(f".{self.mark}") or name == self.mark for name in source.names())

    def dense(
        self, config: MethodConfig, module: Module, source: TensorSource, modules: Mapping[str, Module]
    ) -> Skip | None:
        """Why a module stays dense; ConfigError for one that the method would have to quantize itself."""
        if self.prequantized(config, source):
            names = stored.tensors(source, module)
            if self.mark in names:
                stored.refuse_both(names, self.mark, module, self.name)
                return None
            stored.require(names, ("weight",), module, self.name)
            return Skip("the checkpoint stores its weight dense")
        reason = skip.dense(module, modules, self.field, self.patterns(config))
        return Skip(reason) if reason else self._refuse(module)

    def patterns(self, config: MethodConfig) -> list[str] | None:
        """The module names of the config's `field`; older checkpoints name the parameters there."""
        names: list[str] | None = getattr(config, self.field)
        return None if names is None else [name.removesuffix(".weight") for name in names]

    def quantize(self, config: MethodConfig, module: Module, weight: torch.Tensor) -> Packed:
        """ConfigError: there is no way from the weight alone."""
        self._refuse(module)

    def _refuse(self, module: Module) -> NoReturn:
        raise ConfigError(
            f"{self.name} reads checkpoints and quantizes nothing",
            where=module.path,
            found="a float model",
            expected=f"a checkpoint that {self.name} made: its quantization needs {self.needs}",
            remedy="quantize with the method's own tools, or choose one that needs no data: hqq, higgs, bitsandbytes",
        )

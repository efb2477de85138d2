"""A quantization compiler: `compile` a PyTorch or Hugging Face model under any quantization config, `load` the result.

Nothing heavy is imported here: each public name is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.compiler import compile
    from qcompile.conversion import convert
    from qcompile.errors import QCompileError
    from qcompile.loading import load
    from qcompile.methods.index import register_method
    from qcompile.planning import plan
    from qcompile.runtime.model import CompiledModel

__all__ = ["CompiledModel", "QCompileError", "compile", "convert", "load", "plan", "register_method"]
__version__ = "0.1.0"

_HOMES = {
    "CompiledModel": "qcompile.runtime.model",
    "QCompileError": "qcompile.errors",
    "compile": "qcompile.compiler",
    "convert": "qcompile.conversion",
    "load": "qcompile.loading",
    "plan": "qcompile.planning",
    "register_method": "qcompile.methods.index",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qcompile' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""qcompile among transformers' exporters: importing this module registers the export format "qcompile".

transformers 5.20 and later have exporters; with an older one the import fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_structure
from transformers.exporters.auto import register_backend
from transformers.exporters.base import HfExporter
from transformers.exporters.configs import ExportConfigMixin
from transformers.exporters.metadata import build_export_metadata
from transformers.exporters.runners.base import ModelRunner

import qcompile

NAME = "qcompile"


@dataclass
class QCompileExportConfig(ExportConfigMixin):
    """The arguments of `qcompile.compile` beside the model."""

    export_format: str = NAME
    config: Any = None
    target: str = "cpu"
    accuracy: Literal["exact", "int8"] = "exact"


class QCompileExporter(HfExporter):
    """Compiles a model; the program is a `qcompile.CompiledModel`, saved as an artifact folder."""

    export_format = NAME
    config_class = QCompileExportConfig
    program_suffix = ".qc"

    def export_program(self, model: Any, sample_inputs: Mapping[str, Any], config: Any) -> tuple[Any, Any]:
        q = qcompile.compile(model, config.config, target=config.target, accuracy=config.accuracy)
        inputs, outputs = tree_structure(((), dict(sample_inputs))), tree_structure(q(**sample_inputs))
        specs = SimpleNamespace(call_spec=SimpleNamespace(in_spec=inputs, out_spec=outputs))
        return q, build_export_metadata(model, sample_inputs, specs, ["torch"])

    @classmethod
    def save_program(cls, program: Any, path: str | Path) -> None:
        program.save(path)

    @classmethod
    def load_program(cls, path: str | Path) -> Any:
        return qcompile.load(path)


class QCompileRunner(ModelRunner):
    """Runs an artifact, in place of whatever device is asked for: an artifact is made for one."""

    def __init__(self, program: Any, metadata: Any):
        super().__init__(metadata)
        self.program = program

    @property
    def device(self) -> torch.device:
        return torch.device(self.program.target.device if self.program.target.backend == "reference" else "cpu")

    @classmethod
    def from_program(cls, program: Any, metadata: Any, device: Any = None) -> QCompileRunner:
        return cls(program, metadata)

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any) -> Any:
        return self.program(**kwargs)


register_backend(QCompileExporter, QCompileRunner)

"""A process that compiles Triton kernels: a request in JSON on each line of its input, an answer on a line of its output.

It runs by itself (`python -P worker.py FOLDER`), imports Triton and nothing of this package, and keeps Triton's files in
FOLDER, which its caller removes. The environment variables that steer Triton are its caller's to remove.

A request has `text` (a module), `entry`, `signature` (the Triton types of its arguments, in order), `gpu` (what Triton calls
it: "cuda" and the capability or "hip" and the architecture, and the threads of a warp), `warps`, `stages`, `fusion` (whether
products and sums may fuse), `ptx` (the version that the PTX is written in, None for the newest) and `assemble` (false: the
PTX is the object, not machine code). An answer has `error`, or `object` and, where its version was asked for, `ptx` (both
base64), `shared`, `warps`, `registers`, `spills` and `parameters`, the number of the entry's.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    # Triton prints to stdout when it fails; only answers may go where the caller reads.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for count, line in enumerate(sys.stdin):
        try:
            answer = compile_kernel(json.loads(line), folder / f"kernel{count}.py")
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}\n{_place(error)}"}
        print(json.dumps(answer), file=answers, flush=True)


def compile_kernel(request: dict[str, Any], file: Path) -> dict[str, Any]:
    """The answer to a request; `file` is where its text is put, for Triton to read it."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Line numbers would carry the name of the file into the object.
    knobs.compilation.disable_line_info = True
    file.write_text(request["text"])
    function = getattr(_module(file), request["entry"])
    signature = dict(zip(function.arg_names, request["signature"], strict=True))
    aligned = [["tt.divisibility", 16]]
    attributes = {(at,): aligned for at, type_ in enumerate(request["signature"]) if type_.startswith("*")}
    source = ASTSource(function, signature, {}, attributes)
    options = {"num_warps": request["warps"], "num_stages": request["stages"], "enable_fp_fusion": request["fusion"]}
    if request["ptx"] is not None:
        options["ptx_version"] = request["ptx"]
    old = tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 8)
    knobs.runtime.add_stages_inspection_hook = _stages(file.with_suffix(".cubin"), request["assemble"], old)
    try:
        made = triton.compile(source, target=GPUTarget(*request["gpu"]), options=options)
    finally:
        knobs.runtime.add_stages_inspection_hook = None
    meta = made.metadata
    for name in ("global_scratch_size", "profile_scratch_size", "tensordesc_meta"):
        if getattr(meta, name, None):
            raise ValueError(f"the kernel needs {name} = {getattr(meta, name)}, which its caller would have to provide")
    ptx = ""
    if "hsaco" in made.asm:
        content, (registers, spills, parameters) = made.asm["hsaco"], _described(made.asm["amdgcn"])
    else:
        ptx = made.asm["ptx"]
        content, parameters = made.asm["cubin"] if request["assemble"] else ptx.encode(), _count(r"\.param\s", ptx)
        registers, spills = meta.usage if request["assemble"] else (0, 0)
    return {
        "object": _text(content), "ptx": _text(ptx.encode()) if request["ptx"] else "",
        "shared": meta.shared, "warps": meta.num_warps, "registers": registers, "spills": spills, "parameters": parameters,
    }  # fmt: skip


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _stages(file: Path, assemble: bool, fence: bool) -> Callable[..., Any]:
    """Triton's hook on its stages: called without arguments for a cache key, with the table of stages second otherwise.

    `file` is where a cubin is put for a look at it; what is seen is added to the kernel's metadata as `usage`.
    """

    def hook(*arguments: Any) -> Any:
        if not arguments:
            return (f"{assemble} {fence}",) * 2
        stages = arguments[1]
        if "cubin" not in stages:
            return None
        translated, assembled = stages["ptx"], stages["cubin"]

        def cubin(ptx: str, metadata: dict[str, Any]) -> bytes:
            made: bytes = assembled(ptx, metadata)
            metadata["usage"] = _usage(made, file)
            if metadata["usage"][1]:
                made = assembled(limited(ptx, min(255, 65536 // (32 * metadata["num_warps"]))), metadata)
                metadata["usage"] = _usage(made, file)
            return made

        if fence:
            stages["ptx"] = lambda source, metadata: fenced(translated(source, metadata))
        stages["cubin"] = cubin if assemble else lambda ptx, metadata: b""
        return None

    return hook


def limited(ptx: str, most: int) -> str:
    """PTX of a kernel whose threads have `most` registers.

    The assembler keeps registers few for more programs at a time; told how many there are, it takes them before it spills.
    """
    return re.sub(r"^\.reqntid .*$", rf"\g<0>\n.maxnreg {most}", ptx, count=1, flags=re.MULTILINE)


def fenced(ptx: str) -> str:
    """PTX whose tensor cores see what was copied to shared memory before them.

    Those of 9.0 and 10.0 read it by another way than copies write it, and Triton before 3.8 has no fence between them where
    the copy is a cp.async.
    """
    return re.sub(
        r"^(?=.*\b(wgmma\.fence|tcgen05\.mma)\b)", "fence.proxy.async.shared::cta;\n", ptx, flags=re.MULTILINE
    )


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _count(pattern: str, text: str) -> int:
    """The lines of a text that begin with a pattern."""
    return len(re.findall(rf"^\s*{pattern}", text, re.MULTILINE))


def _described(amdgcn: str) -> tuple[int, int, int]:
    """What AMD's assembly says of its kernel: registers of a thread, bytes of it in memory, and how many arguments it has."""
    registers, spills = (
        int(re.search(rf"^\s*\.{name}:\s*(\d+)", amdgcn, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, spills, _count(r"\.value_kind:\s+(?:global_buffer|by_value)", amdgcn)


def _usage(cubin: bytes, file: Path) -> tuple[int, int]:
    """Registers of a thread, and the bytes of it that lie in memory."""
    from triton import knobs

    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of registers: {text[:200]}")
    return int(found[1]), max(int(found[2]), int(found[3]))


def _place(error: BaseException) -> str:
    """The last lines of the traceback, which name the line of the kernel or of Triton that failed."""
    return "".join(traceback.format_tb(error.__traceback__)[-2:])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

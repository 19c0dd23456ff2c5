"""Compiles the Triton kernels that a call launches for an H100 (sm_90), without a GPU.

The launch code itself runs, on CPU tensors, under a driver that only compiles; what would run on the GPU does not.
Every configuration an autotuner would try is compiled. cuobjdump says what the compiler made of each kernel.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARED_LIMIT = 227 * 1024  # bytes of shared memory a block may have on sm_90


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled: bytes of shared memory, registers and bytes spilled to local memory for a thread."""

    name: str
    config: str
    shared: int
    registers: int
    spilled: int


class _Driver:
    """Stands for an H100 that nobody launches anything on."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching() -> dict[str, Compiled]:
    """From here on in this process, launching a kernel compiles it and adds it to the result."""
    import triton
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    compiled: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if callable(grid):
            grid(dict(zip(self.arg_names, args, strict=False)) | kwargs)  # part of the launch code too
        kernel = run(self, *args, grid=(1,), warmup=True, **kwargs)
        if kernel.hash not in compiled:
            config = f"warps {kernel.metadata.num_warps}, stages {kernel.metadata.num_stages}"
            compiled[kernel.hash] = Compiled(kernel.name, config, kernel.metadata.shared, *_resources(kernel))
        return kernel

    def every_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        for config in self.configs:
            kernel = self.fn.run(*args, **kwargs, **config.all_kwargs())
        return kernel

    triton.runtime.driver.set_active(_Driver())
    JITFunction.run, Autotuner.run = compile_only, every_config
    return compiled


def _resources(kernel: Any) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK"))  # type: ignore[union-attr]
    return registers, stack


def in_a_process(module: str, function: str) -> list[Compiled]:
    """The kernels that `module.function()` launches, compiled in a process that does not interpret them. The function
    calls a backend's implementation directly: the dispatch would want a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.aot", module, function]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Compiled(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    module, function = sys.argv[1:]
    kernels = compile_instead_of_launching()
    getattr(importlib.import_module(module), function)()
    print(json.dumps([asdict(kernel) for kernel in kernels.values()]))


if __name__ == "__main__":
    main()

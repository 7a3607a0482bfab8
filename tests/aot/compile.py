"""Compiles the kernels of `tests.aot.kernels` for every target without a GPU; run in a process of its own.

    python -m tests.aot.compile OUT.json

writes, per variant and target: registers, spilled bytes, shared memory, and the matrix instructions of the PTX.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from tests.aot.kernels import TARGETS, VARIANTS, Variant

MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")


def compile_variant(variant: Variant, target: int) -> dict:
    """What ptxas says of one variant on one target."""
    constants = dict(variant.constants)
    if "PDL" in constants:
        constants["PDL"] = target >= 90 and constants.get("CONDITIONED", True)
    signature, values, attributes = {}, {}, {}
    for index, parameter in enumerate(variant.kernel.params):
        kind = variant.types.get(parameter.name, "constexpr" if parameter.is_constexpr else "i32")
        signature[parameter.name] = kind
        if kind == "constexpr":
            values[index,] = constants.get(parameter.name)
        elif parameter.name not in variant.unaligned:
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, values, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return {
        **_resources(compiled.asm["ptx"], target),
        "shared": compiled.metadata.shared,
        "matrix": sorted(set(MATRIX.findall(compiled.asm["ptx"]))),
        "waits": "griddepcontrol" in compiled.asm["ptx"],
    }


def _resources(ptx: str, target: int) -> dict:
    """Registers per thread and spilled bytes, from ptxas itself: the compiled kernel does not say what was spilled."""
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            get_ptxas(target).path,
            "-v",
            f"--gpu-name={architecture}",
            str(path),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    return {"registers": int(re.search(r"Used (\d+) registers", said)[1]), "spilled": spilled}


def main(out: Path) -> None:
    found = {}
    for variant in VARIANTS:
        for target in TARGETS:
            try:
                found[f"{variant.name} sm_{target}"] = compile_variant(variant, target)
            except Exception as error:  # noqa: BLE001  (the test reports every failure, not the first)
                found[f"{variant.name} sm_{target}"] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Compiles the kernels of `tests.aot.variants` for every target without a GPU; run in a process of its own.

    python -m tests.aot.compile OUT.json

writes, per variant and target: registers, spilled bytes, shared memory, the matrix instructions, whether products and
sums were contracted, whether anything is float64, whether the kernel takes part in programmatic dependent launch, and
its loads of 16 bytes.
Results are kept under build/aot by the hash of what they depend on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from tests.aot.variant import TARGETS, Variant
from tests.aot.variants import VARIANTS

CACHE = Path(__file__).resolve().parents[2] / "build" / "aot"

MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")
WIDE = re.compile(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global\S* \[[^;]*, 0x10")


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
        "contracted": re.search(r"\bfma\.rn\.f(32|64)\b", compiled.asm["ptx"]) is not None,
        "double": ".f64" in compiled.asm["ptx"],
        "waits": "griddepcontrol" in compiled.asm["ptx"],
        "wide": len(WIDE.findall(compiled.asm["ptx"])),
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


def digest(variant: Variant) -> str:
    """Of everything the result depends on: the sources of the kernel's operator, the variant and the compiler."""
    operator = Path(sys.modules[variant.kernel.__module__].__file__).parent
    state = hashlib.sha256()
    # Beside the model's attention lie files that have nothing to do with it; the decode layer shares its functions.
    pattern = "*_triton.py" if operator.name == "network" else "*.py"
    shared = sorted(operator.parent.glob("*_triton.py"))
    for path in (*sorted(operator.glob(pattern)), *shared, Path(__file__), Path(__file__).with_name("variant.py")):
        state.update(path.read_bytes())
    plain = dataclasses.replace(variant, kernel=variant.kernel.__name__)
    state.update(f"{plain} {TARGETS} {triton.__version__}".encode())
    return state.hexdigest()[:24]


def results(index: int) -> dict[str, dict]:
    """Per target, of the variant with this index; from the cache if nothing has changed."""
    variant = VARIANTS[index]
    path = CACHE / f"{digest(variant)}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = {}
    for target in TARGETS:
        try:
            found[str(target)] = compile_variant(variant, target)
        except Exception as error:  # noqa: BLE001  (the tests report every failure, not the first)
            return {str(t): {"error": f"sm_{target}: {type(error).__name__}: {error}"[:2000]} for t in TARGETS}
    path.write_text(json.dumps(found))
    return found


def main(out: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(2) as pool:
        found = pool.map(results, range(len(VARIANTS)), chunksize=1)
    out.write_text(json.dumps({variant.name: result for variant, result in zip(VARIANTS, found)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Builds the two libraries with ninja on libtorch's stable ABI; without a compiler the package still installs."""

from __future__ import annotations

import os
import runpy
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

CPU_LIBRARY, CUDA_LIBRARY = "vpt_kernels._C", "vpt_kernels._C_cuda"
# 2.11: the oldest torch whose stable ABI has every call we make; one binary serves it and all later versions.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# The resampling coefficients must be rounded after every operation, as Pillow's are.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-fvisibility=hidden", STABLE_ABI]
NVCC_FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "--fmad=false", "--threads=2", "-Xcompiler=-fvisibility=hidden"]
NVCC_FLAGS += [STABLE_ABI]
if sysconfig.get_platform().endswith("x86_64"):
    # gcc moves 64 bits through an MMX register now and then and never says EMMS; the next long double or `fprem` of the
    # process, wherever that is, is then NaN.
    CXX_FLAGS += ["-mno-mmx"]
    NVCC_FLAGS += ["-Xcompiler=-mno-mmx"]
# Machine code for A100 and its relatives, Hopper, Blackwell of the data centre and of the desk. The PTX is of 9.0, the
# oldest with all that the kernels use, so that every other device from there on can compile it.
CUDA_TARGETS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100a", "120")]
CUDA_TARGETS += ["-gencode=arch=compute_90,code=compute_90"]
# Named as needed whatever the linker thinks: a symbol that torch lacks then fails the loading, not a call.
CUDA_LINK_FLAGS = ["-Wl,--no-as-needed", "-ltorch_cuda"]


def say(problem: object) -> None:
    print(f"vpt-kernels: {problem}", file=sys.stderr)


def extensions() -> dict:
    """The two libraries and their build command, or nothing where torch is missing from the build environment.

    `_C` holds the CPU kernels, `_C_cuda` the CUDA ones: a toolkit that cannot be used costs the second alone.
    """
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        say(f"building without the C++ extension ({error}); install torch first and `pip install --no-build-isolation`")
        return {}

    class BuildWhatBuilds(BuildExtension):
        """One library after the other; one that fails is left out, and the installation says so when asked."""

        def run(self) -> None:
            modules, compiler, inplace, built = self.extensions, self.compiler, self.inplace, []
            # What an earlier build has left would be taken for this one's, in the build folder and beside the sources.
            for self.inplace in {False, bool(inplace)}:
                for name in (CPU_LIBRARY, CUDA_LIBRARY):
                    Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)
            for module in modules:
                # A run leaves its own in these, and a failed one does not put them back.
                self.extensions, self.compiler, self.inplace = [module], compiler, inplace
                try:
                    super().run()
                    built.append(module)
                except Exception as error:  # noqa: BLE001  (compilers fail in many ways, none may stop the installation)
                    why = toolkit_problem() if module.name == CUDA_LIBRARY else None
                    say(f"{module.name} is left out: {f'{why} ({error})' if why else error}")
                    say("run `python -m vpt_kernels.env` for what is missing")
            self.extensions, self.inplace = built, inplace

    def toolkit_problem() -> str | None:
        return runpy.run_path("vpt_kernels/toolkit.py")["toolkit_problem"](torch.version.cuda)

    modules = [
        CppExtension(
            CPU_LIBRARY,
            sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            extra_compile_args={"cxx": CXX_FLAGS},
            py_limited_api=True,
        )
    ]
    # A CPU build of torch gets no CUDA code, whatever toolkit is installed.
    if torch.version.cuda and not CUDA_HOME:
        say(f"{CUDA_LIBRARY} is left out: {toolkit_problem()}")
    elif torch.version.cuda:
        # The list of the environment, if there is one, is turned into flags by torch.
        targets = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else CUDA_TARGETS
        modules.append(
            CUDAExtension(
                CUDA_LIBRARY,
                sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp")),
                extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": [*NVCC_FLAGS, *targets]},
                extra_link_args=CUDA_LINK_FLAGS,
                py_limited_api=True,
            )
        )
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": BuildWhatBuilds.with_options(no_python_abi_suffix=True)},
        # The libraries call torch only, never Python: one wheel serves every version.
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(license="Apache-2.0", **extensions())

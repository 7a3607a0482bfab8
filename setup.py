"""Builds the C++ extension with ninja on libtorch's stable ABI; without a compiler the package still installs."""

from __future__ import annotations

import os
import sys
from glob import glob

from setuptools import setup

# 2.11: the oldest torch whose stable ABI has every call we make; one binary serves it and all later versions.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# The resampling coefficients must be rounded after every operation, as Pillow's are.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-fvisibility=hidden", STABLE_ABI]
NVCC_FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "--fmad=false", "--threads=2", "-Xcompiler=-fvisibility=hidden"]
NVCC_FLAGS += [STABLE_ABI]
# Machine code for A100 and its relatives, Hopper, Blackwell of the data centre and of the desk. The PTX is of 9.0, the
# oldest with all that the kernels use, so that every other device from there on can compile it.
CUDA_TARGETS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100a", "120")]
CUDA_TARGETS += ["-gencode=arch=compute_90,code=compute_90"]


def extension() -> dict:
    """The extension and its build command, or nothing where torch is missing from the build environment."""
    try:
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        print(
            f"vpt-kernels: building without the C++ extension ({error}); install torch first and use "
            "`pip install --no-build-isolation`",
            file=sys.stderr,
        )
        return {}

    class BuildOrContinue(BuildExtension):
        """A failed compilation leaves a working pure-Python installation, which says so when asked."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # noqa: BLE001  (compilers fail in many ways, none may stop the installation)
                print(
                    f"vpt-kernels: the C++ extension was not built: {error}\n"
                    "vpt-kernels: run `python -m vpt_kernels.env` for what is missing",
                    file=sys.stderr,
                )
                self.extensions = []

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    arguments = {"name": "vpt_kernels._C", "py_limited_api": True, "extra_compile_args": {"cxx": CXX_FLAGS}}
    # torch gives no CUDA_HOME on its CPU builds, whatever toolkit is installed: they get no CUDA code either.
    if CUDA_HOME:
        sources += sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
        # The list of the environment, if there is one, is turned into flags by torch.
        targets = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else CUDA_TARGETS
        cxx_flags = [*CXX_FLAGS, "-DUSE_CUDA"]
        arguments["extra_compile_args"] = {"cxx": cxx_flags, "nvcc": [*NVCC_FLAGS, *targets]}
        module = CUDAExtension(sources=sources, **arguments)
    else:
        module = CppExtension(sources=sources, **arguments)
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildOrContinue.with_options(no_python_abi_suffix=True)},
        # The extension calls torch only, never Python: one wheel serves every version.
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**extension())

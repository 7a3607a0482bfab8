"""Builds the C++ extension with ninja on libtorch's stable ABI; without a compiler the package still installs."""

from __future__ import annotations

import sys
from glob import glob

from setuptools import setup

# 2.11: the oldest torch whose stable ABI has every call we make; one binary serves it and all later versions.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# The resampling coefficients must be rounded after every operation, as Pillow's are.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-fvisibility=hidden", STABLE_ABI]


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
    cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    arguments = {"name": "vpt_kernels._C", "py_limited_api": True, "extra_compile_args": {"cxx": CXX_FLAGS}}
    if cuda_sources and CUDA_HOME:
        arguments["extra_compile_args"]["nvcc"] = ["-O3", "-std=c++20", "-DUSE_CUDA", "--fmad=false", STABLE_ABI]
        module = CUDAExtension(sources=sources + cuda_sources, **arguments)
    else:
        module = CppExtension(sources=sources, **arguments)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildOrContinue.with_options(no_python_abi_suffix=True)}}


setup(**extension())

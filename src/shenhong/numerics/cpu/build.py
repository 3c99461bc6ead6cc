"""Compile the C++ kernels with the system's g++ into one shared library in the user's cache folder.

The file name holds a hash of everything the result depends on, so a cached library is never stale. The library is
linked to the OpenMP runtime that torch itself loaded: two runtimes would mean two thread pools fighting for the cores.

``python -m shenhong.numerics.cpu.build`` builds at once and prints where the library is.
Settings: SHENHONG_KERNEL_FLAGS replaces the optimisation flags, CXX the compiler, XDG_CACHE_HOME the cache folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
FLAGS = "-O3 -march=native"


class BuildError(Exception):
    """The kernels could not be built; the PyTorch path serves instead, so nobody needs to see more than a line."""


def _cpu() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "".join(
        sorted({line for line in info.read_text().splitlines() if line.startswith(wanted)})
    )


def _openmp() -> Path:
    """The OpenMP runtime inside torch."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    found += sorted((Path(torch.__file__).parents[1] / "torch.libs").glob("libgomp*.so*"))
    if not found:
        raise BuildError("torch brings no libgomp")
    return found[0]


def _run(commands: list[list[str]]) -> None:
    """Run the commands side by side; the first failure's message is the error."""
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        if process.returncode:
            raise BuildError(f"g++ failed: {output.strip().splitlines()[0] if output else '?'}")


def build() -> Path:
    """The library's path, compiled first if the cache does not hold it. Raises BuildError."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("no g++ on this machine")
    flags = os.environ.get("SHENHONG_KERNEL_FLAGS", FLAGS).split()
    sources = sorted(SOURCES.glob("*.cpp"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [version, " ".join(flags), _cpu(), torch.__version__]
    parts += [path.read_text() for path in (*sorted(SOURCES.glob("*.h")), *sources)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shenhong"
    target = cache / f"kernels-{digest}.so"
    if target.exists():
        return target
    openmp = _openmp()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            folder = Path(name)
            common = [compiler, "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", *flags]
            objects = [folder / f"{path.stem}.o" for path in sources]
            _run(
                [
                    [*common, "-c", str(source), "-o", str(out)]
                    for source, out in zip(sources, objects, strict=True)
                ]
            )
            # -fopenmp is left out here: it would link the compiler's own runtime beside torch's.
            library = folder / "kernels.so"
            _run([[compiler, "-shared", *map(str, objects), str(openmp), "-o", str(library)]])
            os.replace(library, target)
    except OSError as error:
        raise BuildError(str(error)) from error
    return target


def main() -> None:
    """Build at set-up time. Without a compiler that is no failure: PyTorch serves instead."""
    try:
        print(f"kernels: {build()}")
    except BuildError as error:
        print(f"no fused kernels ({error}): training runs in PyTorch, slower")


if __name__ == "__main__":
    main()

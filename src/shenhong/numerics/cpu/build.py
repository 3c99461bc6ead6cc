"""Compile the C++ kernels with the system's g++ into one shared library in the user's cache folder.

The file name holds a hash of everything the result depends on, so a cached library is never stale. The library is
linked to the OpenMP runtime that torch itself loaded: two runtimes would mean two thread pools fighting for the cores.

Whoever can put a file under that name has us run his code, so the folder must be one into which nobody else can write;
where it is not, the library is built anew in a folder of this process alone.

``python -m shenhong.numerics.cpu.build`` builds at once and prints where the library is.
Settings: SHENHONG_KERNEL_FLAGS replaces the optimisation flags, CXX the compiler, XDG_CACHE_HOME the cache folder.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
FLAGS = "-O3 -march=native"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger("shenhong.numerics")


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


def _cache() -> Path:
    """The user's cache folder where nobody else can write into it, else one that ends with this process."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = (
        Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    )  # as its specification says
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache = base.resolve() / "shenhong"
    with contextlib.suppress(FileExistsError):
        cache.mkdir(mode=0o700)
    if _ours_alone(cache) and all(map(_safe, cache.parents)):
        return cache
    log.warning(
        "others may write into %s or above it, so the kernels are compiled anew each time; chmod go-w, or set XDG_CACHE_HOME",
        cache,
    )
    private = tempfile.mkdtemp(prefix="shenhong-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return Path(private)


def _ours_alone(path: Path) -> bool:
    """Whether a file or folder is this user's, no link, and nobody else's to write."""
    seen = path.lstat()
    kind = stat.S_ISREG(seen.st_mode) or stat.S_ISDIR(seen.st_mode)
    return kind and seen.st_uid == os.geteuid() and not seen.st_mode & _OTHERS_WRITE


def _safe(folder: Path) -> bool:
    """Whether nobody else can put another folder in the place of one of ours in it: as in /tmp, by its sticky bit."""
    seen = folder.lstat()
    guarded = not seen.st_mode & _OTHERS_WRITE or seen.st_mode & stat.S_ISVTX
    return bool(guarded) and seen.st_uid in (0, os.geteuid())


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
    try:
        cache = _cache()
        target = cache / f"kernels-{digest}.so"
        if target.exists() and _ours_alone(target):
            return target
        openmp = _openmp()
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
            library.chmod(0o700)
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

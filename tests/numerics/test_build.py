"""Where the compiled kernels are kept: nobody else's file is ever loaded in their place."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from shenhong.numerics.cpu import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and one small source in place of all: what is compiled does not matter here."""
    source = tmp_path / "csrc"
    source.mkdir()
    shown = 'extern "C" __attribute__((visibility("default")))'
    (source / "one.cpp").write_text(f"{shown} int one() {{ return 1; }}\n")
    monkeypatch.setattr(build, "SOURCES", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SHENHONG_KERNEL_FLAGS", "-O0")
    return tmp_path / "cache" / "shenhong"


def _one(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).one())


def _plant(library: Path) -> None:
    """Another file under the name that was built."""
    library.unlink()
    library.write_bytes(b"planted")


def test_the_folder_and_the_library_are_of_one_user_alone(cache: Path) -> None:
    old = os.umask(0o002)
    try:
        library = build.build()
    finally:
        os.umask(old)
    assert library.parent == cache and _one(library) == 1
    assert [path.stat().st_mode & 0o777 for path in (cache.parent, cache, library)] == [0o700] * 3
    before = library.stat().st_ino
    assert build.build().stat().st_ino == before  # and it is used again


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
@pytest.mark.parametrize("place", [".", ".."])
def test_a_folder_that_others_may_write_to_is_not_loaded_from(
    cache: Path, mode: int, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    planted = build.build()
    _plant(planted)
    (cache / place).chmod(mode)
    library = build.build()
    assert library.parent != cache and library.parent.stat().st_mode & 0o777 == 0o700
    assert _one(library) == 1 and planted.read_bytes() == b"planted"
    assert "chmod go-w" in caplog.text


def test_a_file_that_others_may_write_is_built_anew(cache: Path) -> None:
    library = build.build()
    _plant(library)
    library.chmod(0o666)
    assert _one(build.build()) == 1
    library.unlink()
    planted = cache.parent / "planted"
    planted.write_bytes(b"planted")
    library.symlink_to(planted)
    assert _one(build.build()) == 1 and planted.read_bytes() == b"planted"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_another_user_owns_is_not_loaded(cache: Path) -> None:
    library = build.build()
    _plant(library)
    os.chown(library, 12345, 12345)
    assert _one(build.build()) == 1
    os.chown(cache, 12345, 12345)
    assert build.build().parent != cache


def test_a_relative_cache_home_is_ignored(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.build().is_relative_to(tmp_path / "home" / ".cache")
    assert not (tmp_path / "here").exists()

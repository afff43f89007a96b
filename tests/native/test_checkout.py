"""A checkout builds its kernels again when csrc/ has changed, and goes on with the older ones where it cannot."""

import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from entrenar.native import checkout

NAME = "libkernels.so"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one source, written at second 2000, and one cmake, which copies it."""
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setattr(checkout, "BUILD", tmp_path / "build")
    (tmp_path / "csrc" / "abi").mkdir(parents=True)
    (tmp_path / "CMakeLists.txt").touch()
    os.utime(tmp_path / "CMakeLists.txt", (1000, 1000))
    write(tmp_path, "first", 2000)
    cmake(tmp_path, monkeypatch, f"cp {source(tmp_path)} {tmp_path}/build/{NAME}")
    return tmp_path


def cmake(root: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """From now on cmake counts its calls and runs a line of shell; only it is on PATH."""
    tool = root / "bin" / "cmake"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\necho $1 >> {root}/calls\n{line}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(root / "bin" / "python"))
    monkeypatch.setenv("PATH", "")


def source(root: Path) -> Path:
    return root / "csrc" / "abi" / "abi.h"


def write(root: Path, text: str, second: int) -> None:
    source(root).write_text(text)
    os.utime(source(root), (second, second))


def install(root: Path, second: int) -> Path:
    library = root / NAME
    library.write_text("installed")
    os.utime(library, (second, second))
    return library


def builds(root: Path) -> int:
    calls = root / "calls"
    return calls.read_text().count("--build") if calls.exists() else 0


def test_an_installed_library_that_is_newer_than_the_sources_serves(root: Path) -> None:
    installed = install(root, 2500)
    assert checkout.current_library(installed, NAME) == installed
    assert builds(root) == 0


def test_an_edit_is_followed_by_one_build_and_an_install_by_its_library(root: Path) -> None:
    installed = install(root, 1500)
    for text, second, count in (("first", 2000, 1), ("second", 2001, 2)):
        write(root, text, second)
        for _ in range(2):
            library = checkout.current_library(installed, NAME)
            assert library is not None
            assert library.read_text() == text
            assert builds(root) == count
    installed = install(root, 3000)
    assert checkout.current_library(installed, NAME) == installed


def test_a_source_from_the_future_is_built_once(root: Path) -> None:
    write(root, "later", 4_000_000_000)
    for _ in range(2):
        checkout.current_library(install(root, 1500), NAME)
    assert builds(root) == 1


def test_an_edit_during_a_build_is_followed_by_another(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = install(root, 1500)
    cmake(root, monkeypatch, f"cp {source(root)} {root}/build/{NAME}; echo -n edited > {source(root)}")
    for count in (1, 2):
        library = checkout.current_library(installed, NAME)
        assert builds(root) == count
    assert library is not None
    assert library.read_text() == "edited"


def test_of_several_at_once_one_builds_and_none_sees_half_a_library(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, half = install(root, 1500), f"{root}/build/{NAME}"
    cmake(root, monkeypatch, f"echo half > {half}; sleep 0.2; cp {source(root)} {half}")
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: checkout.current_library(installed, NAME), range(4)))
    assert [library and library.read_text() for library in libraries] == ["first"] * 4
    assert builds(root) == 1


def test_where_nothing_can_be_built_the_older_library_serves_and_a_line_says_why(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed = install(root, 1500)
    cmake(root, monkeypatch, "exit 1")
    assert checkout.current_library(installed, NAME) == installed
    assert "build.log says why" in caplog.messages[-1]
    (root / "bin" / "cmake").unlink()
    assert checkout.current_library(installed, NAME) == installed
    assert "there is no cmake" in caplog.messages[-1]
    monkeypatch.setattr(checkout, "BUILD", source(root) / "build")  # nowhere to write
    with caplog.at_level(logging.WARNING):
        assert checkout.current_library(installed, NAME) == installed
    assert "the older ones serve" in caplog.messages[-1]


def test_where_nothing_is_installed_or_this_is_no_checkout_nothing_is_built(root: Path) -> None:
    assert checkout.current_library(None, NAME) is None
    source(root).unlink()
    assert checkout.current_library(install(root, 1), NAME) == root / NAME
    assert builds(root) == 0

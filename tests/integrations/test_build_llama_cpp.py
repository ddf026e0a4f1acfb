"""`gdn2-edge llama-cpp build` up to where it would fetch and compile; test_llama_cpp.py runs what it makes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

import gdn2_edge
from gdn2_edge import cli
from gdn2_edge.errors import BackendError
from gdn2_edge.integrations import build_llama_cpp as building


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gdn2-edge", "llama-cpp", "build", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_missing_compiler_is_told_before_anything_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(building, "_visual_studio", lambda: None)
    assert run(monkeypatch) == 1
    assert "no C++ compiler is found" in capsys.readouterr().err
    assert not cache.exists()


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -std=c++17")
    assert run(monkeypatch) == 1
    assert "no-such-compiler" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "status"), [("-DGGML_CUDA", 2), ("-D=ON", 2), ("-DGGML CUDA=ON", 1)])
def test_options_for_cmake_have_a_name_and_a_value(
    option: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, option) == status
    assert option.removeprefix("-D").partition("=")[0] in capsys.readouterr().err


def test_the_patch_lies_in_the_package() -> None:
    assert building.PATCH.is_relative_to(Path(gdn2_edge.__file__).parent)
    assert building.PATCHED_VERSION.startswith(f"{building.VERSION}+gdn2.")


def test_what_failed_is_said(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "print('[1/2] a.cpp'); print('a.cpp:1: error: no such thing'); raise SystemExit(3)",
    ]
    lines: list[str] = []
    with pytest.raises(BackendError, match=r"could not be built \(a\.cpp:1: error: no such thing\): .*build\.log"):
        building._run(command, tmp_path / "build.log", "could not be built", lines.append)
    assert lines[0] == "[1/2] a.cpp\n"


@pytest.mark.skipif(os.name != "posix", reason="finds processes by their group")
def test_ctrl_c_ends_all_that_was_started(tmp_path: Path) -> None:
    child = "import os, subprocess, sys, time; print(os.getpid(), flush=True); subprocess.run(['sleep', '60'])"
    started: list[int] = []

    def stop(line: str) -> None:
        started.append(int(line))
        time.sleep(0.2)  # until it has started the next one
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        building._run([sys.executable, "-c", child], tmp_path / "log", "could not be built", stop)
    assert time.monotonic() - begin < 30
    for _ in range(100):
        try:
            os.killpg(started[0], 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process is left")

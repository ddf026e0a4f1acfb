"""The chat in a real terminal: line editing, commands, Ctrl-C, a session that goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect", reason="pexpect needs a POSIX terminal")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a POSIX terminal")

STATS = r"tokens fed, state 0\.9 MB\]"
EDITOR_ON, EDITOR_OFF = "\x1b[?2004h", "\x1b[?2004l"  # bracketed paste: the line editor has come or gone


def open_chat(folder: Path, *arguments: str):
    environment = {
        "PATH": "",
        "TERM": "xterm",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    command = ["-m", "gdn2_edge", "chat", *arguments]
    child = pexpect.spawn(
        sys.executable, command, cwd=str(folder), env=environment, encoding="utf-8", timeout=60, dimensions=(40, 120)
    )
    child.expect("/help lists the commands")
    return child


def test_a_talk_with_commands(tmp_path: Path) -> None:
    child = open_chat(tmp_path, "--session", "talk.session")
    child.sendline("Remember that my door code is 418.")
    child.expect(STATS)
    child.sendline("/undo")
    child.expect("The memory is empty")
    child.sendline("Remember that my door code is 773.")
    child.expect(STATS)
    child.sendline("/save other.session")
    child.expect(r"other\.session: \d+ tokens")
    child.sendline("/save other.session")
    child.expect("other.session: ")
    child.sendline("/load nowhere.session")
    child.expect("no such session file")
    child.sendline("/load nowhere.session")
    child.expect("no such session file")
    child.sendline("/load talk.session")
    child.expect("Going on at")
    child.sendline("/load ./other.session")
    child.expect("Going on at")
    child.sendline("/nonsense")
    child.expect("error: /nonsense is no command")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    again = open_chat(tmp_path, "--session", "other.session")
    again.sendline("What is my door code?")
    again.expect("773")
    again.expect(STATS)
    again.expect_exact(EDITOR_ON)  # Ctrl-D before the next prompt would be the terminal's, not the line editor's
    again.sendcontrol("d")
    again.expect(pexpect.EOF)
    again.close()
    assert again.exitstatus == 0
    assert sorted(path.name for path in tmp_path.glob("*session*")) == ["other.session", "talk.session"]


def test_ctrl_c_stops_an_answer_and_keeps_the_session(tmp_path: Path) -> None:
    child = open_chat(
        tmp_path, "--session", "s", "--temperature", "2", "--top-k", "0", "--top-p", "1", "--max-tokens", "4096"
    )
    for text in ("Tell me a long story.", "What can you do?"):
        child.sendline(text)
        child.expect_exact(EDITOR_OFF)  # what came before is the echo of the line
        child.expect(r"\w+ \w+")
        child.sendintr()
        child.expect(STATS)
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    assert (tmp_path / "s").exists()


def test_a_second_process_is_told(tmp_path: Path) -> None:
    first = open_chat(tmp_path, "--session", "s")
    second = pexpect.spawn(
        sys.executable, ["-m", "gdn2_edge", "chat", "--session", "s"], cwd=str(tmp_path), encoding="utf-8", timeout=60
    )
    second.expect("error: s is in use by another process")
    second.expect(pexpect.EOF)
    second.close()
    assert second.exitstatus == 1
    first.sendline("/quit")
    first.expect(pexpect.EOF)

"""What reaches a terminal: controls shown and not obeyed, and no character that its encoding lacks."""

import io
import os
import subprocess
import sys

import pytest

from entrenar.core.terminal import PROSE, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("blk.0.attn_q.weight", "blk.0.attn_q.weight"),
        ("Süden 日本語 👍 e\u0301", "Süden 日本語 👍 e\u0301"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("good\rbad", r"good\rbad"),
        ("a\nb\tc\x7f", r"a\nb\tc\x7f"),
        ("\x9b31m", r"\x9b31m"),  # the one-byte CSI
        ("\u202edesrever\u2066x\u2069", r"\u202edesrever\u2066x\u2069"),
        ("q_\u200bproj\ufeff\u2060", r"q_\u200bproj\ufeff\u2060"),
        ("\u2028\u2029\u3164", r"\u2028\u2029\u3164"),
        ("\U000e0041tag", r"\U000e0041tag"),
        ("cut \ud83d", r"cut \ud83d"),
    ],
)
def test_what_is_obeyed_instead_of_seen_is_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_prose_keeps_its_lines_and_its_joiners_and_nothing_else() -> None:
    assert printable("a\n\tb\u200cc\u200dd\x1b\r", PROSE) == "a\n\tb\u200cc\u200dd" + r"\x1b\r"


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", b">>x<< 1 x 2 ... \\u65e5 \\ud83d S\\xfcden"),
        ("latin-1", b"\xbbx\xab 1 \xd7 2 ... \\u65e5 \\ud83d S\xfcden"),
    ],
)
def test_a_stream_without_a_character_gets_it_in_others(encoding: str, written: bytes) -> None:
    code = (
        "import sys; from entrenar.core.terminal import plain_streams; plain_streams(); "
        "sys.stdout.write('»x« 1 × 2 … 日 \\ud83d Süden')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert result.stdout == written, result.stderr


def test_streams_that_are_no_files_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from entrenar.core.terminal import plain_streams

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    plain_streams()

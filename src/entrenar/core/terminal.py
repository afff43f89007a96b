"""What is written to a terminal: text from files is shown, never obeyed, in characters that the terminal has.

A tensor's name, a row of data or a message in a file may hold anything: escape sequences that clear the screen or set
its title, a carriage return that overwrites what stands there, marks that turn the order of letters round. `printable`
makes those visible. `plain_streams` has whatever a terminal's encoding lacks written in characters that it has.
"""

import codecs
import os
import sys
import unicodedata
from typing import TextIO

# For prose (rows, prompts, answers): lines and tabs, and the joiners without which Persian or an emoji is another word.
PROSE = "\n\t\u200c\u200d"
# Controls, formats (zero-width, bidirectional, tags), halves of a surrogate pair, line and paragraph separators.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_INVISIBLE_LETTERS = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"

# What our own sentences and tables use, in ASCII; everything else is escaped.
_PLAIN = {
    "…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "·": "*", "•": "*", "»": ">>", "«": "<<", "‖": "||",
    "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≈": "~", "±": "+-", "Δ": "d", "⟨": "<", "⟩": ">", "²": "^2",
    "█": "#", "▇": "#", "▆": "#", "▅": "#", "▄": "=", "▃": "=", "▂": "-", "▁": "_", "━": "-", "╸": "-", "╺": "-",
    "─": "-", "│": "|", "‘": "'", "’": "'", "“": '"', "”": '"', "✓": "+", "✗": "x",
}  # fmt: skip


def printable(text: str, keep: str = "") -> str:
    r"""`text` with every character that is not seen but obeyed as an escape: `\x1b`, `\u202e`.

    Args:
        keep: those that stay as they are, e.g. `PROSE`; without it a newline is shown as `\n`, so the text is one line.
    """
    if text.isprintable() and not any(letter in text for letter in _INVISIBLE_LETTERS):
        return text
    return "".join(_visible(char) if _is_hidden(char) and char not in keep else char for char in text)


def write_line(text: str) -> None:
    """One line on standard output, in its own encoding (typer's echo writes UTF-8 to a stream of ASCII), at once."""
    if sys.stdout is not None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def plain_streams() -> None:
    """Let standard output and error take any text: what their encoding lacks is written in ASCII, or escaped.

    Python takes the C locale for UTF-8; a terminal that somebody has put into it is believed instead.
    """
    codecs.register_error("entrenar", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a notebook's or a test's stream has none
        if reconfigure is not None:
            reconfigure(encoding="ascii" if _is_c_terminal(stream) else stream.encoding, errors="entrenar")


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN or char in _INVISIBLE_LETTERS


def _visible(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: the characters that could not be encoded, in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(char) or _visible(char) for char in missing), error.end


def _is_c_terminal(stream: TextIO) -> bool:
    if os.environ.get("PYTHONIOENCODING") or not stream.isatty():
        return False
    asked = next(filter(None, (os.environ.get(name) for name in ("LC_ALL", "LC_CTYPE", "LANG"))), "")
    return asked in ("C", "POSIX")

"""What is to be said once although nothing is wrong: which of two files was read, what was left out of a file.

It goes to the log, which the command line shows on standard error (as logging does by itself).
"""

import logging
from functools import cache

from entrenar.core.terminal import printable

_LOG = logging.getLogger("entrenar")


@cache
def say_once(text: str) -> None:
    """Say a sentence, the first time in this process; control characters of names from files are shown, not obeyed."""
    _LOG.warning("%s", printable(text))

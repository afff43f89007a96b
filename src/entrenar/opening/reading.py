"""What transformers and other libraries raise over a model's files becomes one sentence about those files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from entrenar.core.errors import InputError, first_line


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever transformers and tokenizers raise over the files at `path` is an InputError about them."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is not a model that transformers {transformers.__version__} knows: {first_line(error)}"
        ) from None

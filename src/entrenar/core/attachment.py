"""What this program hangs on objects of other libraries, under one prefix.

A tensor or a module of another library has a `__dict__`, and now and then the cheapest place for a fact about it is
there: the fact goes when the object goes, and is copied and pickled along with a model. Every such attribute is an
`Attachment`, so that a search for that word finds all of them:

| name | on | says | file |
|---|---|---|---|
| first_keys | an attention mask | each token's first key, read once for all layers | models/acceleration/attention.py |
| recompute | a decoder layer | what it computes again in its backward | models/acceleration/layer_forward.py |
| recipe | a tensor | how to compute it again | layers/recompute.py |
| saved_whole | a module | that it is a trainable copy (`modules_to_save`) | lora/saved.py |

Forwards that are swapped for faster ones are no such attributes: `nn.Module` itself looks for `forward` on the
instance first (models/acceleration/swapped.py).
"""

from typing import Generic, TypeVar

T = TypeVar("T")


class Attachment(Generic[T]):
    """One kind of fact about objects of others.

    Args:
        name: of the fact; the attribute is called `_entrenar_NAME`.
    """

    def __init__(self, name: str) -> None:
        self._attribute = f"_entrenar_{name}"

    def of(self, host: object) -> T | None:
        """What hangs on the object; None if nothing does."""
        return vars(host).get(self._attribute)

    def hang(self, host: object, value: T) -> None:
        """Hang a value on the object, in place of an earlier one."""
        vars(host)[self._attribute] = value

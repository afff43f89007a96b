"""What planning reads of a config and of a run's plan; the sections of a config have these fields."""

from typing import Literal, Protocol


class MemorySettings(Protocol):
    """`memory`: bytes, "min" or "auto". `micro_batch`: rows, or "auto"."""

    @property
    def memory(self) -> int | Literal["auto", "min"]:
        """Bytes that may be held, or how to choose."""
        ...

    @property
    def micro_batch(self) -> int | Literal["auto"]:
        """Rows at a time."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows of an update."""
        ...


class BatchSettings(Protocol):
    """Which rows make up which batch, and how they are packed."""

    @property
    def total_steps(self) -> int:
        """Updates of the run."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows of an update."""
        ...

    @property
    def seed(self) -> int:
        """Of the order of rows."""
        ...

    @property
    def pack_to(self) -> int:
        """Tokens of a row of several documents; 0: one document a row."""
        ...


class BaseSettings(Protocol):
    """How the base model is held."""

    @property
    def path(self) -> str:
        """Directory or file."""
        ...

    @property
    def quantize(self) -> str:
        """Number format, `none` or `keep`."""
        ...

    @property
    def double_quant(self) -> bool:
        """Whether scales are quantized too."""
        ...

    @property
    def block_size(self) -> int:
        """Elements that share a scale."""
        ...

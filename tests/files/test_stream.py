"""Streaming: every sink gets every element of its own tensor, errors arrive as they are, and nothing stays behind."""

import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.files import stored_tensor
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.files.stored_tensor import ALIGNMENT, StoredTensor
from entrenar.files.stream import stream


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors come in many pieces too."""
    monkeypatch.setattr(stored_tensor, "PIECE_ELEMENTS", ALIGNMENT)


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    """No thread, no open file, and torch's own number of threads."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [link for link in links if link.endswith(".safetensors")]


class _Collector:
    """Puts the pieces together, and counts how often each element came."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.values = torch.empty(shape, dtype=dtype)
        self.times = torch.zeros(shape, dtype=torch.int64)
        self.raw: set[int] = set()

    def take(self, start: int, piece: Tensor) -> None:
        self.raw.add(piece.data_ptr())
        self.values.view(-1)[start : start + len(piece)] = piece
        self.times.view(-1)[start : start + len(piece)] += 1


def _write(path: Path, shapes: list[tuple[int, ...]]) -> tuple[list[StoredTensor], list[Tensor]]:
    tensors = {f"t{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    save_file(tensors, path)
    checkpoint = SafetensorsCheckpoint(path)
    return [checkpoint.stored(name) for name in tensors], list(tensors.values())


def _collectors(stored: list[StoredTensor]) -> list[_Collector]:
    return [_Collector(tensor.shape, tensor.dtype) for tensor in stored]


_SHAPES = st.lists(
    st.sampled_from([(), (0,), (1,), (3, 0), (7, 11), (4096,), (4097,), (3, 4096), (50, 1000)]), max_size=8
)


@given(shapes=_SHAPES, order=st.randoms())
@settings(max_examples=30, deadline=None)
def test_every_sink_gets_every_element_of_its_tensor_once(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], order: random.Random
) -> None:
    """In whatever order the tensors are asked for, the sinks come back in that order."""
    stored, tensors = _write(tmp_path_factory.getbasetemp() / "any.safetensors", shapes)
    picked = list(range(len(shapes)))
    order.shuffle(picked)
    sinks = _collectors([stored[index] for index in picked])
    assert list(stream([stored[index] for index in picked], sinks)) == sinks
    for index, sink in zip(picked, sinks, strict=True):
        assert torch.equal(sink.values, tensors[index])
        assert bool((sink.times == 1).all())


def test_shards_are_read_as_one_file_is(tmp_path: Path) -> None:
    parts = [_write(tmp_path / f"{number}.safetensors", [(9000,), (5,)]) for number in range(3)]
    stored = [tensor for number in (0, 1) for part, _ in parts for tensor in part[number : number + 1]]
    expected = [tensor for number in (0, 1) for _, part in parts for tensor in part[number : number + 1]]
    sinks = list(stream(stored, _collectors(stored)))
    assert all(torch.equal(sink.values, tensor) for sink, tensor in zip(sinks, expected, strict=True))


def test_a_buffer_a_thread_is_all_that_is_held(tmp_path: Path) -> None:
    stored, _ = _write(tmp_path / "model.safetensors", [(40 * ALIGNMENT,), (ALIGNMENT,), (3,)])
    sinks = _collectors(stored)
    list(stream(stored, sinks))
    assert len(set().union(*(sink.raw for sink in sinks))) <= torch.get_num_threads() + 1


def test_a_sink_is_made_when_its_turn_comes(tmp_path: Path) -> None:
    stored, _ = _write(tmp_path / "model.safetensors", [(100,)] * 20)
    made = 0

    def sinks() -> Iterator[_Collector]:
        nonlocal made
        for tensor in stored:
            made += 1
            yield _Collector(tensor.shape, tensor.dtype)

    for taken, _ in enumerate(stream(stored, sinks())):
        assert made <= taken + 3


def test_a_file_that_is_cut_is_an_input_error_of_its_own_tensor(tmp_path: Path) -> None:
    whole, tensors = _write(tmp_path / "whole.safetensors", [(ALIGNMENT * 4,)])
    cut, _ = _write(tmp_path / "cut.safetensors", [(ALIGNMENT * 4,), (5,)])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:20_000])
    done = []
    with (
        pytest.raises(InputError, match=r"cut\.safetensors has changed since its header was read"),
        closing(stream(whole + cut, _collectors(whole + cut))) as sinks,
    ):
        for sink in sinks:
            done.append(sink.values)
    assert [values.tolist() for values in done] == [tensors[0].tolist()]


class _Fails(_Collector):
    def take(self, start: int, piece: Tensor) -> None:
        if start:
            raise InputError("this sink is full")


def test_an_error_of_a_sink_arrives_as_it_is(tmp_path: Path) -> None:
    stored, _ = _write(tmp_path / "model.safetensors", [(ALIGNMENT * 30,)] * 3)
    with pytest.raises(InputError, match="this sink is full"):
        list(stream(stored, [_Fails(tensor.shape, tensor.dtype) for tensor in stored]))


def test_one_may_stop_early(tmp_path: Path) -> None:
    stored, _ = _write(tmp_path / "model.safetensors", [(ALIGNMENT * 30,)] * 5)
    with closing(stream(stored, _collectors(stored))) as sinks:
        next(sinks)


def test_a_sink_works_alone_in_its_thread(tmp_path: Path) -> None:
    """Several sinks work at once, so none of them may use the other cores."""
    stored, _ = _write(tmp_path / "model.safetensors", [(ALIGNMENT * 9,)])
    found: set[tuple[int, str]] = set()

    class Asks(_Collector):
        def take(self, start: int, piece: Tensor) -> None:
            found.add((torch.get_num_threads(), threading.current_thread().name[:6]))

    list(stream(stored, [Asks((1,), torch.float32)]))
    assert found == {(1, "stream")}


@pytest.mark.parametrize("inference", [False, True])
def test_the_callers_inference_mode_holds_in_the_threads(tmp_path: Path, inference: bool) -> None:
    stored, tensors = _write(tmp_path / "model.safetensors", [(ALIGNMENT * 3,)])
    with torch.inference_mode(inference):
        (sink,) = stream(stored, _collectors(stored))
    assert torch.equal(sink.values, tensors[0])

"""The executor: streamed is in memory, any threads and any interruption give the same bytes, errors leave nothing."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from entrenar.core.errors import EntrenarError, InputError
from entrenar.merging import stack
from entrenar.merging.execute import working_directory
from entrenar.merging.in_memory import merge_tensors
from entrenar.recipes.merge import merge
from tests.support.models_on_disk import tensors, write_config, write_model

METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ties", {"weight": 0.5, "density": 0.4}, {}),
    ("dare_ties", {"weight": 0.5, "density": 0.4}, {}),
    ("della", {"weight": 0.5, "density": 0.4}, {}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.4}, {}),
    ("multislerp", {"weight": 0.5}, {}),
    ("nuslerp", {"weight": 0.5}, {"nuslerp_flatten": False}),
    ("nuslerp", {"weight": 0.5}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("model_stock", {}, {"filter_wise": True}),
    ("sce", {}, {"select_topk": 0.3}),
    ("ram", {}, {}),
]


def config(
    trio: dict[str, str], method: str = "ties", each: dict[str, Any] | None = None, **shared: Any
) -> dict[str, Any]:
    each = {"weight": 0.5, "density": 0.4} if each is None else each
    models = [{"model": trio[name], "parameters": each} for name in "ab"]
    return {"merge_method": method, "base_model": trio["base"], "models": models, "parameters": shared}


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("method", "each", "shared"), METHODS)
@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_streamed_in_pieces_is_merged_in_memory(
    tmp_path: Path, trio: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    method: str, each: dict[str, Any], shared: dict[str, Any], piece: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(stack, "PIECE_ELEMENTS", piece)
    merge(config(trio, method, each, **shared), tmp_path / "out", seed=3)
    monkeypatch.undo()
    base, a, b = (tensors(i) for i in range(3))
    expected = merge_tensors(method, {trio["a"]: a, trio["b"]: b}, base, seed=3, **each, **shared)
    assert isinstance(expected, dict)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_one_model_merged_with_itself_alone_is_itself(tmp_path: Path, trio: dict[str, str]) -> None:
    models = [{"model": trio["a"], "parameters": {"weight": 0.3}}]
    merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(1).items())


def test_shards_hold_the_same_tensors(tmp_path: Path, trio: dict[str, str]) -> None:
    merge(config(trio), tmp_path / "whole")
    merge(config(trio), tmp_path / "parts", max_shard_bytes=1000)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    parts: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "parts").glob("model-*.safetensors")):
        parts |= load_file(file)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    models = [{"model": str(tmp_path / "parts"), "parameters": {"weight": 1}}]
    merge({"merge_method": "linear", "models": models}, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == whole.keys()


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_change_the_bytes(tmp_path: Path, trio: dict[str, str], threads: int) -> None:
    before = torch.get_num_threads()
    merge(config(trio, "dare_ties"), tmp_path / "one")
    torch.set_num_threads(threads)
    try:
        merge(config(trio, "dare_ties"), tmp_path / "other")
    finally:
        torch.set_num_threads(before)
    assert weights(tmp_path / "one") == weights(tmp_path / "other")


KILLED_MERGES = """
import os, random, signal, sys, time
from pathlib import Path
from entrenar.merging import execute
from entrenar.recipes.merge import merge
write = execute.OutputFiles.write
def slow(self, *arguments):
    time.sleep(0.02)
    write(self, *arguments)
execute.OutputFiles.write = slow
config, output = sys.argv[1], Path(sys.argv[2])
moments = random.Random(7)
killed = 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        merge(config, output, seed=5)
        os._exit(0)
    time.sleep(moments.uniform(0.0, 0.15))
    os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    if output.exists():
        break
print(killed)
"""


def test_killed_at_random_moments_it_finishes_to_the_same_bytes(tmp_path: Path, trio: dict[str, str]) -> None:
    path = write_config(tmp_path / "m.yaml", **config(trio, "dare_ties"))
    merge(path, tmp_path / "straight", seed=5)
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_MERGES, str(path), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1
    if not output.exists():
        merge(path, output, seed=5)
    assert weights(output) == weights(tmp_path / "straight")
    assert not working_directory(output).exists()


def test_what_is_done_is_not_done_again_and_what_was_cut_short_is(tmp_path: Path, trio: dict[str, str]) -> None:
    merge(config(trio), tmp_path / "straight")
    calls: list[tuple[int, int]] = []

    def stop(done: int, size: int) -> None:
        calls.append((done, size))
        if done * 2 > size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(config(trio), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    journal = working_directory(tmp_path / "out") / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"name": "model.norm')
    calls.clear()
    merge(config(trio), tmp_path / "out", progress=lambda done, size: calls.append((done, size)))
    assert calls[0][0] * 2 > calls[0][1]
    assert weights(tmp_path / "out") == weights(tmp_path / "straight")


def test_another_seed_or_config_starts_anew(tmp_path: Path, trio: dict[str, str]) -> None:
    def stop(_done: int, _size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(config(trio, "dare_ties"), tmp_path / "out", seed=1, progress=stop)
    merge(config(trio, "dare_ties"), tmp_path / "out", seed=2)
    merge(config(trio, "dare_ties"), tmp_path / "straight", seed=2)
    assert weights(tmp_path / "out") == weights(tmp_path / "straight")


def test_two_at_once_into_one_output_are_refused(tmp_path: Path, trio: dict[str, str]) -> None:
    def second(_done: int, _size: int) -> None:
        merge(config(trio), tmp_path / "out")

    with pytest.raises(EntrenarError, match="another process is writing"):
        merge(config(trio), tmp_path / "out", progress=second)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_in_one_parent_is_an_error_that_names_it(tmp_path: Path, trio: dict[str, str], bad: float) -> None:
    values = tensors(1)
    values["model.layers.1.mlp.down_proj.weight"][2, 3] = bad
    path = write_model(tmp_path / "broken", values)
    with pytest.raises(InputError, match=r"broken has NaN or infinite values in model\.layers\.1\.mlp\.down_proj"):
        merge(config(trio | {"a": path}), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


def test_a_result_that_does_not_fit_its_type_is_an_error(tmp_path: Path, trio: dict[str, str]) -> None:
    models = [{"model": trio["a"], "parameters": {"weight": 1e7}}]
    with pytest.raises(InputError, match="does not fit float16"):
        merge({"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "out_dtype": "float16"},
              tmp_path / "out")  # fmt: skip


def test_a_taken_output_is_refused(tmp_path: Path, trio: dict[str, str]) -> None:
    with pytest.raises(InputError, match="already exists"):
        merge(config(trio), tmp_path)


def test_a_full_disk_leaves_nothing_under_the_name_and_gives_the_space_back(
    tmp_path: Path, trio: dict[str, str]
) -> None:
    path = write_config(tmp_path / "m.yaml", **config(trio))
    result = subprocess.run(
        [sys.executable, "-m", "entrenar", "merge", str(path), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env=os.environ,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "no space left while writing" in result.stderr
    assert not (tmp_path / "out").exists()
    assert sum(file.stat().st_size for file in working_directory(tmp_path / "out").iterdir()) < 3000

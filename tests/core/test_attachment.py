"""Facts that hang on objects of others: found again, apart from each other, copied along, and nowhere else."""

import copy
import re
from pathlib import Path

import torch
from torch import nn

import entrenar
from entrenar.core import attachment
from entrenar.core.attachment import Attachment


def test_a_fact_hangs_on_tensors_and_modules() -> None:
    size, name = Attachment[int]("size"), Attachment[str]("name")
    for host in (torch.zeros(3), nn.Parameter(torch.zeros(3)), nn.Linear(2, 2)):
        assert size.of(host) is None
        size.hang(host, 3)
        name.hang(host, "x")
        assert (size.of(host), name.of(host)) == (3, "x")
        size.hang(host, 4)
        assert size.of(host) == 4


def test_it_is_copied_with_a_module_and_is_no_part_of_its_state() -> None:
    size, module = Attachment[int]("size"), nn.Linear(2, 2)
    size.hang(module, 3)
    assert size.of(copy.deepcopy(module)) == 3
    assert list(module.state_dict()) == ["weight", "bias"]


def test_all_of_them_are_listed() -> None:
    root = Path(entrenar.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    declared = {
        (name, str(path.relative_to(root)))
        for path, text in sources.items()
        for name in re.findall(r'Attachment\[.*\]\("(\w+)"\)', text)
    }
    listed = set(re.findall(r"^\| (\w+) \|.*\| (\S+\.py) \|$", attachment.__doc__ or "", re.MULTILINE))
    assert declared == listed
    assert [path for path, text in sources.items() if re.search(r'setattr\(.*"_entrenar', text)] == []

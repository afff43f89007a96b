"""Which files of a hub dataset are of a split: cards and names as they are met on the hub."""

import pytest

from entrenar.core.errors import InputError
from entrenar.data.splits import split_files

_ULTRACHAT = """---
language: [en]
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: test_sft
    path: data/test_sft-*
---
# train-like text
"""
_NAMES = [
    "README.md",
    ".gitattributes",
    "data/train_sft-00000-of-00002-x.parquet",
    "data/test_sft-00000-of-00001.parquet",
    "data/train_sft-00001-of-00002-x.parquet",
    "dataset_infos.json",
]


def _card(configs: str) -> str:
    return f"---\nconfigs:\n{configs}---\n"


def test_the_card_says_which_files_are_of_a_split() -> None:
    assert split_files("o/d", _NAMES, _ULTRACHAT, "train_sft") == [_NAMES[2], _NAMES[4]]
    assert split_files("o/d", _NAMES, _ULTRACHAT, "test_sft") == [_NAMES[3]]
    with pytest.raises(InputError, match=r"has no split 'train': it has train_sft, test_sft"):
        split_files("o/d", _NAMES, _ULTRACHAT, "train")


@pytest.mark.parametrize(
    ("configs", "split", "files"),
    [
        ("- {config_name: x, data_files: '*.csv'}\n", "train", ["c.csv"]),
        ("- {config_name: x, data_files: [a/b.csv, c.csv]}\n", "train", ["a/b.csv", "c.csv"]),
        ("- {config_name: x, data_files: '**/*.csv'}\n", "train", ["a/b.csv", "c.csv"]),
        ("- {config_name: x, data_dir: a, data_files: '*.csv'}\n", "train", ["a/b.csv"]),
        ("- {config_name: x, data_files: [{split: dev, path: [c.csv]}]}\n", "dev", ["c.csv"]),
        ("- {config_name: x, data_files: a/b.csv}\n- {config_name: default, data_files: c.csv}\n", "train", ["c.csv"]),
        ("- {config_name: x, data_files: a/b.csv}\n- {config_name: y, default: true, data_files: c.csv}\n", "train",
         ["c.csv"]),
    ],
)  # fmt: skip
def test_a_card_may_write_its_files_in_several_ways(configs: str, split: str, files: list[str]) -> None:
    assert split_files("o/d", ["c.csv", "a/b.csv", "README.md"], _card(configs), split) == files


@pytest.mark.parametrize(
    ("names", "split", "files"),
    [
        (["a.jsonl", "b.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
        (["train.jsonl", "test.jsonl", "extra.jsonl"], "train", ["train.jsonl"]),
        (["my_train_2.csv", "my_dev_2.csv"], "validation", ["my_dev_2.csv"]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "test",
         ["data/test-00000-of-00001.parquet"]),
        (["training/a.jsonl", "eval/a.jsonl"], "test", ["eval/a.jsonl"]),
        (["latest.jsonl", "trainer.jsonl"], "train", ["latest.jsonl", "trainer.jsonl"]),
        (["gold.jsonl", "train.jsonl"], "gold", ["gold.jsonl"]),
    ],
)  # fmt: skip
def test_without_a_card_names_say_it(names: list[str], split: str, files: list[str]) -> None:
    assert split_files("o/d", [*names, "README.md"], "---\nlicense: mit\n---\n", split) == files


@pytest.mark.parametrize(
    ("names", "card", "split", "sentence"),
    [
        (["train.jsonl"], "", "test", r"no data file of a split 'test': it has train\.jsonl; set split"),
        (["a.jsonl"], "", "validation", r"no data file of a split 'validation'"),
        (["audio.wav"], "", "train", r"no data file of a split 'train': it has audio\.wav"),
        ([], "", "train", r"it has no files"),
        (["a.csv"], _card("- {config_name: x, data_files: a.csv}\n- {config_name: y, data_files: a.csv}\n"), "train",
         r"subsets x, y and no default"),
        (["a.csv"], _card("- {config_name: x, data_files: b.csv}\n"), "train", r"no data file of a split"),
        (["a.csv"], "---\n[\n---\n", "train", r"head is not YAML"),
        (["train-00000-of-00003.csv", "train-00002-of-00003.csv"], "", "train",
         r"lacks train-00001-of-00003\.csv here: fetch it again"),
    ],
)  # fmt: skip
def test_a_split_that_is_not_there_is_one_sentence(names: list[str], card: str, split: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        split_files("o/d", names, card, split)
    assert "\n" not in str(caught.value)

"""A tree = its paths as rows of their own: the loss and the adapter's gradients, those by transformers alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from entrenar.data.batches import micro_batches
from entrenar.data.dataset import Dataset
from entrenar.data.encode import Example
from entrenar.data.rows import Row
from entrenar.data.tree import Path, as_tree
from entrenar.evaluation.perplexity import kl_divergence, perplexity
from entrenar.models.acceleration.activations import decoder_layers
from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from entrenar.models.isolation import isolates_branches
from tests.support.alone import CASES, gradients, make_case, separate
from tests.support.families import FAMILIES, MIXING, make_family
from tests.support.fast_models import ALIKE, adapted
from tests.support.learning import accumulated

_CAPACITY = 60


@pytest.fixture(scope="module", params=CASES)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Run by transformers' own code, and the same with our forwards."""
    plain, fast = make_case(request.param), make_case(request.param)
    use_fast_forwards(fast)
    return plain, fast


def trees(shared: list[list[int]], seed: int) -> list[Example]:
    """A tree for every list: a path that leaves the trunk after so many tokens, each with answers of a few tokens."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 96, (count,), generator=draw).tolist()

    examples = []
    for line, sizes in enumerate(shared, 1):
        trunk = tokens(20)
        paths = [Path(trunk[:size] + tokens(7), size + 2) for size in sizes]
        tree = as_tree([*paths, Path(trunk, 15)])
        examples.append(Example(line, tree.ids, tree.trained, None, tree.branches))
    return examples


@settings(deadline=None, max_examples=10)
@given(
    shared=st.lists(st.lists(st.integers(2, 18), max_size=3), min_size=1, max_size=4),
    micro_batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_those_of_expanded_rows(
    models: tuple[PreTrainedModel, PreTrainedModel], shared: list[list[int]], micro_batch: int, seed: int
) -> None:
    examples = trees(shared, seed)
    rows = [row for example in examples for row in example.expanded()]
    assert sum(map(len, rows)) >= sum(map(len, examples))
    expected_loss, expected = separate(models[0], rows)
    batches = micro_batches(examples, micro_batch, 0, _CAPACITY)
    for model in models:
        assert accumulated(model, batches) == pytest.approx(expected_loss, rel=1e-6)
        torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ALIKE)
def test_decoder_layers_in_bfloat16_take_trees(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To its rounding, and in the layers' own two calls: the class's forward is not asked."""
    exact = adapted(make_family(family))
    plain, fast = copy.deepcopy(exact).bfloat16(), copy.deepcopy(exact).bfloat16()
    assert use_fast_forwards(fast)["layers"] == 2
    examples = trees([[3, 9], [], [16]], seed=0)
    rows = [row for example in examples for row in example.expanded()]
    expected_loss, expected = separate(exact, rows)
    accumulated(plain, micro_batches(rows, 1, 0))
    theirs = _distance(gradients(plain), expected)
    monkeypatch.setattr(type(decoder_layers(fast)[0]), "forward", None)
    assert accumulated(fast, micro_batches(examples, 2, 0, _CAPACITY)) == pytest.approx(expected_loss, rel=0.02)
    assert _distance(gradients(fast), expected) < max(0.05, 1.5 * theirs)  # no less exact than PyTorch's layers


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    one_flat, other_flat = (torch.cat([part.flatten().float() for part in parts]) for parts in (one, other))
    return ((one_flat - other_flat).norm() / other_flat.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_that_keep_branches_apart_are_recognised(family: str, dtype: torch.dtype) -> None:
    model = make_family(family, dtype)
    assert isolates_branches(model)
    use_fast_forwards(model)
    assert isolates_branches(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_keeps_them_apart_too(family: str) -> None:
    assert isolates_branches(make_family(family, attn_implementation="eager"))


@pytest.mark.parametrize("name", MIXING)
def test_architectures_that_mix_them_are_too(name: str) -> None:
    """OPT takes a mask as it is, though it makes none of its own by positions."""
    assert isolates_branches(make_family(name)) == (name == "opt")


@pytest.mark.parametrize("name", ["jamba", "llama"])
def test_perplexity_and_kl_are_those_of_expanded_rows_in_models_that_mix_and_in_others(name: str) -> None:
    model, other = make_family(name), make_family(name)
    torch.nn.init.normal_(next(other.parameters()), std=0.1)
    examples = trees([[3, 9], [], [16]], seed=0)
    tree = Dataset(examples, [Row(example.line) for example in examples])
    rows = [Dataset([example], [Row(0)]) for example in tree.expanded().examples]
    alone = [perplexity(model, row, 1, 0) for row in rows if any(row.examples[0].trained[1:])]
    loss = sum(one.loss * one.tokens for one in alone) / sum(one.tokens for one in alone)
    assert perplexity(model, tree, 2, 0).loss == pytest.approx(loss, rel=1e-6)
    expected = kl_divergence(model, other, tree.expanded(), 1, 0)
    assert kl_divergence(model, other, tree, 2, 0) == pytest.approx(expected, rel=1e-5)

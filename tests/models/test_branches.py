"""What a branch of a tree sees, said token by token, and how models take it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from entrenar.models.acceleration.attention import first_keys
from entrenar.models.branches import branch_mask, branch_masks, has_branches
from entrenar.ops.attention import attention_mask
from tests.support.families import make_family

# Of documents: tokens of the trunk, and branches as (tokens shared, tokens of their own).
_BRANCHES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), max_size=3)
_DOCUMENTS = st.lists(st.tuples(st.integers(6, 9), _BRANCHES), min_size=1, max_size=3)


@given(documents=_DOCUMENTS, window=st.none() | st.integers(1, 8))
def test_a_branch_sees_what_leads_to_it_and_itself(
    documents: list[tuple[int, list[tuple[int, int]]]], window: int | None
) -> None:
    positions, owners = list[int](), list[tuple[int, int, int]]()  # document, run, tokens of the trunk that it follows
    for number, (size, branches) in enumerate(documents):
        positions += range(size)
        owners += [(number, 0, 0)] * size
        for run, (shared, count) in enumerate(sorted(branches, reverse=True), 1):
            positions += range(shared, shared + count)
            owners += [(number, run, shared)] * count
    expected = torch.zeros(len(positions), len(positions), dtype=torch.bool)
    for token, (document, run, shared) in enumerate(owners):
        for key in range(token + 1):
            own = owners[key][:2] == (document, run)
            leads = owners[key][:2] == (document, 0) and positions[key] < shared
            near = window is None or positions[token] - positions[key] < window
            expected[token, key] = (own or leads) and near
    at = torch.tensor([positions])
    mask = branch_mask(at, window)
    assert torch.equal(mask[0, 0], expected)
    assert has_branches(at) == any(branches for _, branches in documents)
    keys = first_keys(mask)
    assert keys is not None
    assert torch.equal(attention_mask(keys)[0], expected)


def test_layers_of_two_kinds_get_a_mask_each() -> None:
    positions = torch.tensor([[*range(8), *range(4, 9)]])
    masks = branch_masks(make_family("gemma3_text", layer_types=["sliding_attention", "full_attention"]), positions)
    assert torch.equal(masks["full_attention"], branch_mask(positions))
    assert torch.equal(masks["sliding_attention"], branch_mask(positions, 5))
    eager = branch_masks(make_family("llama", attn_implementation="eager"), positions)
    assert torch.equal(eager == 0, branch_mask(positions))

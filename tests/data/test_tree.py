"""A tree holds what its paths hold: each token once, trained where a path trains it."""

from hypothesis import given
from hypothesis import strategies as st

from entrenar.data.encode import Example
from entrenar.data.tree import Path, as_tree
from tests.support.trees import paths_of

_IDS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
_PATHS = st.lists(
    _IDS.flatmap(lambda ids: st.builds(Path, st.just(ids), st.integers(0, len(ids)))), min_size=1, max_size=5
)


@given(paths=_PATHS, rest=_IDS)
def test_every_path_is_in_the_tree_and_every_trained_token_is(paths: list[Path], rest: list[int]) -> None:
    tree = as_tree(paths, rest)
    example = Example(1, tree.ids, tree.trained, branches=tree.branches)
    read = paths_of(example)
    trunk = read.pop()
    assert trunk[0] == paths[-1].ids + rest
    sequences = [*(ids for ids, _ in read), paths[-1].ids]
    assert all(any(ids[: len(path.ids)] == path.ids for ids in sequences) for path in paths)
    assert all(any(path.ids == ids for path in paths) for ids in sequences)
    wanted = {tuple(path.ids[: index + 1]) for path in paths for index in range(path.start, len(path.ids))}
    trained = {
        tuple(ids[: index + 1]) for ids, flags in [*read, trunk] for index, flag in enumerate(flags) if flag
    }  # fmt: skip
    assert trained == wanted
    ends = [first + end - start for start, end, first in example.runs()]
    assert all(first < end for (_, first), end in zip(example.branches, ends, strict=False)), (
        "positions tell runs apart"
    )
    if sum(len(path.ids) - path.start for path in paths) == len(wanted):  # no two answers begin alike in one place
        assert sum(tree.trained) == len(wanted), "each token once"


def test_a_branch_begins_with_the_last_token_that_it_shares() -> None:
    tree = as_tree([Path([1, 2, 3, 4], 2), Path([1, 2, 5, 6], 3)])
    assert tree.ids == [1, 2, 5, 6, 2, 3, 4]
    assert tree.trained == [False, False, False, True, False, True, True]
    assert tree.branches == ((4, 1),)


def test_paths_that_go_on_from_each_other_are_one_sequence() -> None:
    tree = as_tree([Path([1, 2], 1), Path([1, 2, 3, 4], 3)], [9])
    assert (tree.ids, tree.trained, tree.branches) == ([1, 2, 3, 4, 9], [False, True, False, True, False], ())


def test_a_tree_is_cut_at_a_position() -> None:
    tree = as_tree([Path([1, 2, 3, 4, 7], 2), Path([1, 2, 5, 6], 3)])
    example = Example(1, tree.ids, tree.trained, (3, 4), tree.branches)
    assert example.longest == 5
    assert example.cut(4) == Example(
        1, [1, 2, 5, 6, 2, 3, 4], [False, False, False, True, False, True, True], (3, 4), ((4, 1),)
    )
    assert example.cut(2) == Example(1, [1, 2], [False, False], None)
    assert example.cut(9) == example

"""A tree of sequences read back by its positions: every token, with all that it may see. The oracle of data/tree.py."""

from entrenar.data.encode import Example


def paths_of(example: Example) -> list[tuple[list[int], list[bool]]]:
    """Token ids and trained flags of each branch with what it shares before it, in the order of the answers, and of the
    trunk at the end."""
    ends = [*(start for start, _ in example.branches), len(example)]
    trunk = (example.ids[: ends[0]], example.trained[: ends[0]])
    paths = []
    for (start, first), end in zip(example.branches, ends[1:], strict=True):
        ids = trunk[0][:first] + example.ids[start:end]
        repeats = trunk[0][first] == example.ids[start]  # else they share nothing
        flag = trunk[1][first] if repeats else example.trained[start]
        paths.append((ids, [*trunk[1][:first], flag, *example.trained[start + 1 : end]]))
    return [*paths, trunk]

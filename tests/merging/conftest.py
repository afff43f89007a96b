"""Three models near each other, on disk; read only."""

import pytest

from tests.support.models_on_disk import tensors, write_model


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name (base, a, b) → directory; a is in shards."""
    root = tmp_path_factory.mktemp("trio")
    names = ("base", "a", "b")
    return {name: write_model(root / name, tensors(i), shards=name == "a") for i, name in enumerate(names)}

"""Every test of this room that asks for `kernel_path` runs once on each path this machine has."""

from collections.abc import Iterator

import pytest

from entrenar import native

PATHS = native.supported_paths()


@pytest.fixture(params=PATHS, scope="module")
def kernel_path(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.using(request.param):
        yield request.param

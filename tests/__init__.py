"""Tests are a package, so that they import `tests.support` wherever pytest is started from."""

import pytest

pytest.register_assert_rewrite("tests.support")

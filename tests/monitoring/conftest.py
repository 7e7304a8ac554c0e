"""Reports are what these tests are about."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def draws_figures() -> None:
    """Reports have their figures."""

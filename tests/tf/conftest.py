"""Fixtures of the Keras tests."""

import pytest


@pytest.fixture(scope="module")
def model():
    """An OLMo 2 in float64; tests do not change it."""
    from tests.helpers.keras_models import olmo2

    return olmo2("float64")

"""Dtypes, lazy tensors and aligned copies."""

import pytest

from olmozoo.checkpoint.tensors import dtype_of, widest


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float16", "bfloat16"], "float32"),
        (["bfloat16"], "bfloat16"),
        (["float16", "float32", "bfloat16"], "float32"),
        (["float64", "bfloat16"], "float64"),
        ([], "float32"),
    ],
)
def test_the_widest_dtype_holds_the_values_of_all(dtypes, expected):
    assert widest(map(dtype_of, dtypes)) == expected

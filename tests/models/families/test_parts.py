"""What families share."""

import math

from zoo.models.families import parts


def test_a_factor_comes_back_as_it_was_written():
    """Granite's logits_scaling and Falcon-H1's key_multiplier, of which we hold functions."""
    written = [i / 100 for i in range(1, 2000)]
    for head_dim in (6, 10, 64, 80, 128):
        root = head_dim**-0.5
        assert written == [parts.solve(lambda x: x * root, x * root, x * root / root) for x in written]  # noqa: B023
    assert written == [parts.solve(lambda x: 1 / x, 1 / x, 1 / (1 / x)) for x in written]
    assert written != [x * 80**-0.5 / 80**-0.5 for x in written] and written != [1 / (1 / x) for x in written]


def test_a_factor_of_many_digits_has_the_same_function():
    root = 128**-0.5
    for i in range(1, 2000):
        scale = math.sqrt(i) * root
        assert parts.solve(lambda x: x * root, scale, scale / root) * root == scale

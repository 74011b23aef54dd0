from __future__ import annotations

import pytest

from raytune_llm.byte_size import in_units


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (300 * 2**20, "300.0 MiB"),
        (2**30, "1.0 GiB"),
        (2**42, "4096.0 GiB"),
    ],
)
def test_a_size_is_said_in_a_unit_that_it_has(num_bytes, said):
    assert in_units(num_bytes) == said


def test_digits_are_asked_for():
    assert in_units(1.256 * 2**30, 2) == "1.26 GiB" and in_units(24 * 2**30, 0) == "24 GiB"

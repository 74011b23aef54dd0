"""Steps of static shapes, as they are captured on a GPU, give on any device what steps of their own shapes give."""

from __future__ import annotations

import pytest
import torch

from raytune_llm.engines.native.static_steps import shapes
from tests.invariant.test_served_equals_trained import asked, engine_of, expected, folders, prompts, without_end  # noqa: F401


@pytest.mark.parametrize(("max_rows", "last"), [(1, (1,)), (6, (1, 2, 4, 6)), (33, (24, 32, 33)), (64, (32, 48, 64))])
def test_shapes_ascend_to_the_number_of_rows(max_rows: int, last: tuple[int, ...]) -> None:
    assert shapes(max_rows)[-len(last) :] == last
    assert list(shapes(max_rows)) == sorted(set(shapes(max_rows)))


def test_rows_of_several_adapters_that_come_and_go_get_the_answers_of_peft(engine_of, expected):  # noqa: F811
    engine = engine_of(decode_rows=6, max_rows=6)
    given = [
        (prompt, adapter, 5 + 3 * number) for number, (prompt, adapter) in enumerate(zip(prompts(7), "abcdeca", strict=True))
    ]
    given.append((prompts(1, seed=5)[0], None, 12))
    answers = [list(answer.ids) for answer in engine.generate([asked(*one) for one in given])]
    wanted = [expected(adapter, prompt, tokens) for prompt, adapter, tokens in given]
    whole = [(mine, plain) for mine, plain in zip(answers, wanted, strict=True) if without_end(plain)]
    assert len(whole) > 3 and all(mine == plain for mine, plain in whole)


def test_rows_of_the_base_alone_need_no_adapters_products(engine_of, expected):  # noqa: F811
    engine = engine_of(decode_rows=4, max_rows=4)
    given = prompts(3, seed=2)
    answers = engine.generate([asked(prompt, None, 8) for prompt in given])
    wanted = [expected(None, prompt, 8) for prompt in given]
    whole = [(list(mine.ids), plain) for mine, plain in zip(answers, wanted, strict=True) if without_end(plain)]
    assert whole and all(mine == plain for mine, plain in whole)


def test_a_row_that_fills_up_writes_to_no_row(engine_of):  # noqa: F811
    """Every block is a row's: the cache has one more for rows that nobody reads."""
    engine = engine_of(decode_rows=4, max_rows=4, num_blocks=9)
    three = prompts(3, seed=3, longest=16)
    together = engine.generate([asked(prompt, None, 8) for prompt in three])
    alone = [engine.generate([asked(prompt, None, 8)])[0] for prompt in three]
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert torch.isfinite(engine._runner._cache.layers[0][0]).all()

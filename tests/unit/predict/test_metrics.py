from __future__ import annotations

import pytest

from raytune_llm.errors import ConfigError
from raytune_llm.predict.metrics import METRICS, metrics_of
from raytune_llm.predict.metrics.words import words


def numbers(name: str, answers: list[str], references: list[str]) -> dict:
    return dict(METRICS[name](answers, references, [{}] * len(answers)))


def test_words_are_runs_of_letters_and_single_chinese_characters():
    assert words("Don't stop, 北京 2nd!") == ["don", "t", "stop", "北", "京", "2nd"]


def test_exact_match_ignores_outer_white_space_alone():
    assert numbers("exact_match", [" a b\n", "A b"], ["a b", "a b"]) == {"exact_match": 0.5}


def test_f1_of_two_of_three_words_is_known_by_hand():
    # precision 2/2, recall 2/3
    assert numbers("f1", ["the cat"], ["the black cat"]) == {"f1": pytest.approx(0.8)}
    assert numbers("f1", ["", ""], ["", "a"]) == {"f1": 0.5}


def test_bleu_says_how_it_was_computed():
    assert numbers("bleu", ["the cat sat on the mat"], ["the cat sat on the mat"])["bleu"] == pytest.approx(100)
    assert "tok:13a" in numbers("bleu", ["a cat"], ["a dog"])["bleu_signature"]
    chinese = numbers("bleu", ["今天天气很好"], ["今天天气很好"])
    assert "tok:zh" in chinese["bleu_signature"] and chinese["bleu"] == pytest.approx(100)


def test_rouge_counts_chinese_characters():
    found = numbers("rouge", ["今天很好"], ["今天天气很好"])
    assert found["rouge1"] == pytest.approx(2 * 4 / (4 + 6))
    assert found["rougeL"] == pytest.approx(2 * 4 / (4 + 6))


def test_llamafactory_s_numbers_are_those_of_its_formula():
    """A perfect answer of one word has no bigrams, so its ROUGE-2 is 0; nothing said counts 0; rows are averaged."""
    assert numbers("llamafactory", ["hello"], ["hello"]) == {
        "predict_bleu-4": 100.0,
        "predict_rouge-1": pytest.approx(100, abs=1e-3),
        "predict_rouge-2": 0.0,
        "predict_rouge-l": pytest.approx(100, abs=1e-3),
    }
    half = numbers("llamafactory", ["hello", ""], ["hello", "hello"])
    assert half["predict_rouge-1"] == pytest.approx(50, abs=1e-3) and half["predict_bleu-4"] == 50.0


def test_a_metric_of_one_s_own_gets_answers_references_and_rows(tmp_path):
    file = tmp_path / "mine.py"
    body = "return {'up': sum(a.isupper() for a in answers), 'n': len(rows)}"
    file.write_text(f"def shout(answers, references, rows):\n    {body}\n")
    (metric,) = metrics_of([f"{file}:shout"])
    assert metric(["A", "b"], ["a", "b"], [{}, {}]) == {"up": 1, "n": 2}
    with pytest.raises(ConfigError, match="can be imported"):
        metrics_of([f"{file}:whisper"])

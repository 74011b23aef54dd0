from __future__ import annotations

import json

import pytest

from raytune_llm.errors import ConfigError
from raytune_llm.predict.metrics import METRICS, metrics_of
from raytune_llm.predict.metrics.words import words
from raytune_llm.predict.run import _measured


def numbers(name: str, answers: list[str], references: list[str]) -> dict:
    return dict(METRICS[name](answers, references, [{}] * len(answers)))


def test_words_are_runs_of_letters_and_single_chinese_characters():
    assert words("Don't stop, 北京 2nd!") == ["don", "t", "stop", "北", "京", "2nd"]
    assert words("佐々木\U00020bb7野家") == ["佐", "々", "木", "\U00020bb7", "野", "家"]


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


def test_bleu_makes_words_of_kana_too():
    found = numbers("bleu", ["きのうはすしをたべた"], ["きのうはそばをたべた"])
    assert "tok:char" in found["bleu_signature"] and 0 < found["bleu"] < 100
    assert "tok:zh" in numbers("bleu", ["今天"], ["今天去吃カレー了，天气很好，我们都很高兴"])["bleu_signature"]


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


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return {2: 3.0}", "a name is 2"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return None", "f is None"),
        ("return {'x': float('nan')}", "x is nan"),
    ],
)
def test_a_metric_of_one_s_own_that_gives_no_numbers_is_an_error_that_keeps_the_answers(tmp_path, body, said):
    (tmp_path / "mine.py").write_text(f"def f(answers, references, rows):\n    {body}\n")
    (metric,) = metrics_of([f"{tmp_path / 'mine.py'}:f"])
    with pytest.raises(ConfigError, match=f"{said}.*the answers are kept"):
        metric(["a"], ["a"], [{}])


def test_a_script_that_ends_the_process_is_no_metric(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match="can be imported"):
        metrics_of([f"{tmp_path / 'mine.py'}:f"])


def test_two_metrics_that_give_a_number_of_one_name_are_refused(tmp_path):
    line = json.dumps({"row": 1, "model": "base", "prompt": "p", "predict": "a", "label": "a"})
    (tmp_path / "predictions.jsonl").write_text(f"{line}\n")
    mine = [metrics_of(["exact_match"])[0], lambda answers, references, rows: {"exact_match": 3.0}]
    with pytest.raises(ConfigError, match=r"must give each number a name of its own, got \['exact_match'\]"):
        _measured(tmp_path, None, mine)

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llm.__main__ import main
from raytune_llm.data import pipeline
from raytune_llm.data.dropped import BadRow
from raytune_llm.data.overlong import _cap
from raytune_llm.data.store import Store
from raytune_llm.records import Conversation, Labeled, Message, Pair
from tests.parity.llamafactory import recipe, rows_of

MARKS = re.compile(r"<\|im_start\|>(user|assistant|system)\n|<\|im_end\|>")


def texts_of(text):
    """What stands in each turn, by its role; an assertion fails where a turn has no end, or text stands outside of turns."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n?", text, re.DOTALL)
    assert "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns).strip() == text.strip()
    return turns


def trained_text(making, row):
    return [making.text(row.ids[start:end]) for start, end in np.reshape(row.spans, (-1, 2)).tolist()]


def test_a_long_question_loses_its_end_and_the_answer_stays_whole(making, talk):
    row = making.row("conversations", talk("q" * 200, "yes"), max_length=100)
    (_, question), (_, answer) = texts_of(making.text(row.ids))
    assert len(row.ids) == 100 and set(question) == {"q"} and len(question) > 40
    assert answer == "yes"
    assert trained_text(making, row) == ["yes<|im_end|>"]


def test_after_an_answer_that_lost_its_end_nothing_is_trained(making, talk):
    row = making.row("conversations", talk("why?", "a" * 200), max_length=100)
    (_, question), (_, answer) = texts_of(making.text(row.ids))
    assert question == "why?" and len(row.ids) == 100
    assert trained_text(making, row) == [answer]
    everything = making.row("conversations", talk("why?", "a" * 200), max_length=100, train_on_prompt=True)
    assert everything.spans[0] == 0 and making.text(everything.ids[: everything.spans[1]]).endswith(answer)


def test_the_system_message_keeps_its_place(making):
    messages = [Message("system", "Be brief."), Message("user", "q" * 90), Message("assistant", "a" * 300, trained=True)]
    row = making.row("conversations", Conversation(tuple(messages)), max_length=160)
    assert [role for role, _ in texts_of(making.text(row.ids))] == ["system", "user", "assistant"]


def test_whole_turns_go_first_the_later_ones_where_all_are_trained(making, talk):
    texts = [f"{kind}{number}" * 5 for number in range(6) for kind in ("q", "a")]
    whole = making.row("conversations", talk(*texts))
    row = making.row("conversations", talk(*texts), max_length=len(whole.ids) - 1)
    assert [text for _, text in texts_of(making.text(row.ids))] == texts[:-2]
    assert trained_text(making, row) == [f"a{number}" * 5 + "<|im_end|>" for number in range(5)]


def test_whole_turns_go_first_the_earlier_ones_where_the_last_answer_counts(making, talk):
    texts = [f"{kind}{number}" * 5 for number in range(6) for kind in ("q", "a")]
    system = Message("system", "Be brief.")
    record = talk(*texts)
    record = replace(record, messages=(system, *record.messages))
    whole = making.row("conversations", record)
    kept = [system.content, *texts[4:]]
    length = len(whole.ids) - 60
    row = making.row("conversations", record, max_length=length, mask_history=True)
    assert [text for _, text in texts_of(making.text(row.ids))] == kept
    labeled = making.row("labeled", Labeled(record, desirable=True), max_length=length)
    assert [text for _, text in texts_of(making.text([*labeled.prompt_ids, *labeled.answer_ids]))] == kept


def test_a_turn_that_is_trained_is_never_left_out_for_one_that_is_not(making, talk):
    first, *rest = talk("q" * 50, "a" * 50, "why?", "so").messages
    record = Conversation((first, replace(rest[0], trained=False), *rest[1:]))
    row = making.row("conversations", record, max_length=60)
    assert [text for _, text in texts_of(making.text(row.ids))] == ["why?", "so"]


def test_both_sides_of_a_pair_keep_the_prompt_and_its_header(making, talk):
    chosen, rejected = ((Message("assistant", text, trained=True),) for text in ("a" * 90, "no"))
    row = making.row("pairs", Pair(talk("q" * 90), chosen, rejected), max_length=120)
    prompt = making.text(row.prompt_ids)
    assert prompt.startswith("<|im_start|>user\nqqq") and prompt.endswith("q<|im_end|>\n<|im_start|>assistant\n")
    assert set(making.text(row.chosen_ids)) == {"a"}
    assert making.text(row.rejected_ids) == "no<|im_end|>"
    assert len(row.prompt_ids) + len(row.chosen_ids) in (119, 120)


def test_a_prompt_of_a_pair_is_cut_by_its_own_texts(making, talk):
    chosen, rejected = ((Message("assistant", text, trained=True),) for text in ("a" * 9000, "no"))
    row = making.row("prompts", Pair(talk("q" * 200), chosen, rejected), max_length=100)
    (_, question), _ = texts_of(making.text([*row.prompt_ids, *row.answer_ids]))
    assert set(question) == {"q"} and len(row.prompt_ids) + len(row.answer_ids) in (99, 100)


def test_a_thought_is_cut_with_all_that_comes_after_it(making):
    answer = Message("assistant", "So.", trained=True, reasoning="t" * 200)
    qwen = recipe("sft", template="qwen3", max_length=40, overlong="truncate")
    (row,) = rows_of(qwen, [Conversation((Message("user", "why?"), answer))])
    assert not isinstance(row, BadRow)
    assert len(row.ids) <= 40 and row.spans[-1] < len(row.ids)


def test_calls_and_tools_are_never_cut(making, talk):
    call = {"name": "weather", "arguments": {"city": "Oslo" * 50}}
    record = Conversation(
        (Message("user", "hm"), Message("assistant", "", trained=True, tool_calls=(call,))), ({"name": "weather"},)
    )
    (row,) = rows_of(recipe("sft", template="qwen", max_length=80, overlong="truncate"), [record])
    assert isinstance(row, BadRow) and "no trained token is left" in row.reason


words = st.text(st.sampled_from("ab .,\né日\t"), max_size=120)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(turns=turns, max_length=st.integers(30, 200), last=st.booleans(), system=words | st.none())
def test_any_row_that_is_shortened_is_a_conversation_of_beginnings(making, turns, max_length, last, system):
    messages = [Message("system", system)] if system is not None else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer, trained=True)]
    try:
        row = making.row("conversations", Conversation(tuple(messages)), max_length=max_length, mask_history=last)
    except BadRow:
        return
    assert len(row.ids) <= max_length
    kept = texts_of(making.text(row.ids))
    whole = [(message.role, message.content) for message in messages]
    if len(kept) < len(whole):
        head = [whole[0]] if system is not None else []
        rest = len(kept) - len(head)
        whole = [*head, *(whole[-rest:] if last else whole[len(head) : len(kept)])]
    assert [role for role, _ in kept] == [role for role, _ in whole]
    assert all(text.startswith(said.rstrip("\ufffd")) for (_, said), (_, text) in zip(kept, whole, strict=True))


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 500))
def test_the_cap_is_the_most_that_fits(counts, budget):
    cap = _cap(counts, budget)
    assert sum(min(count, cap) for count in counts) <= budget
    assert cap == max(counts) or sum(min(count, cap + 1) for count in counts) > budget


def test_rows_that_are_shortened_are_counted_and_those_left_out_on_purpose_are_not_bad(jsonl, prepare_run):
    rows = [{"messages": [{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "a"}]} for n in (5, 500, 600)]
    path = jsonl(rows)

    def store(*overrides) -> Store:
        run = prepare_run(path, "data.max_length=120", *overrides)
        return pipeline.prepare(run.model, run.data, run.resources).store

    shortened = store().shortened
    assert shortened.counts == {"its longest texts are cut": 2}
    assert "row 2: " in shortened.examples["its longest texts are cut"][0]
    assert store("data.overlong=llamafactory").shortened.counts == {"its tokens are cut": 2}
    left = store("data.overlong=drop")
    assert (len(left), left.dropped.total, left.dropped.num_bad) == (1, 2, 0)


def test_prepare_says_how_many_rows_are_shortened(jsonl, tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": "q " * 500}, {"role": "assistant", "content": "a"}]}]
    path = jsonl(rows)
    arguments = ["prepare", "model=tiny_random", "resources=inline", f"data.path={path}", "data.max_length=100"]
    assert main([*arguments, f"data.cache={tmp_path / 'cache'}"]) == 0
    assert "1: its longest texts are cut" in " ".join(capsys.readouterr().out.split())


def test_prepare_shows_what_a_row_holds_as_it_is(jsonl, tmp_path, capsys):
    """Rich would take [/b] for markup that closes nothing, and end in a traceback."""
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = jsonl([row] * 3 + [{"messages": "[/b] [red]not a list"}])
    arguments = ["prepare", "model=tiny_random", "resources=inline", f"data.path={path}", "data.max_bad_fraction=0.5"]
    assert main([*arguments, f"data.cache={tmp_path / 'cache'}"]) == 0
    assert "[/b] [red]not a list" in capsys.readouterr().out

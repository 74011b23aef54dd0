from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raytune_llm.engines.hf import HFEngine, end_ids, pad_left
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.records import Conversation, Message

END, WORDS = 1, 40
SHORT, LONG = (5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15, 16)
EIGHT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<end>": 1, "<unk>": 2, "user": 3, "assistant": 4} | {f"w{n}": n for n in range(5, WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    return tokenizer


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def with_lora(model, seed):
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return peft


@pytest.fixture(scope="module")
def adapter_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed in (1, 2):
        with_lora(tiny_llama(), seed).save_pretrained(folder / str(seed))
    return folder


def answers(engine, *requests):
    return [completion.ids for completion in engine.generate(requests)]


def greedy_by_hand(model, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == END:
            break
        ids.append(token)
    return tuple(ids[len(prompt) :])


def test_padding_puts_every_last_token_in_the_last_column():
    ids_BT, mask_BT = pad_left([[5], [6, 7, 8]], pad_id=0)
    assert ids_BT.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask_BT.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.filterwarnings("error")
def test_read_only_ids_of_a_token_store_are_taken_as_they_are():
    ids = np.arange(3, dtype=np.int32)
    ids.flags.writeable = False
    assert pad_left([ids], pad_id=0)[0].tolist() == [[0, 1, 2]]


def test_a_batch_of_uneven_prompts_answers_each_as_if_alone(tokenizer):
    model = tiny_llama().eval()
    got = answers(HFEngine(model, tokenizer), *(Request(prompt_ids=p, sampling=EIGHT) for p in (LONG, SHORT, (20,))))
    assert got == [greedy_by_hand(model, p, 8) for p in (LONG, SHORT, (20,))]
    assert len(set(got)) == 3


def test_completions_come_in_the_order_of_their_requests_over_batches(tokenizer):
    requests = [Request(prompt_ids=(5 + n % 30, *range(5, 5 + n % 7)), sampling=EIGHT) for n in range(20)]
    together = answers(HFEngine(tiny_llama(), tokenizer, batch_size=3), *requests)
    assert together == [answers(HFEngine(tiny_llama(), tokenizer), request)[0] for request in requests]


def test_an_answer_stops_before_an_end_token_and_says_why(tokenizer):
    model = tiny_llama()
    engine = HFEngine(model, tokenizer)
    [unbounded] = engine.generate([Request(prompt_ids=SHORT, sampling=EIGHT)])
    assert (unbounded.finish, len(unbounded.ids), unbounded.prompt_tokens) == ("length", 8, 3)

    model.generation_config.eos_token_id = [unbounded.ids[3]]
    [bounded] = HFEngine(model, tokenizer).generate([Request(prompt_ids=SHORT, sampling=EIGHT)])
    first_seen = unbounded.ids.index(unbounded.ids[3])
    assert (bounded.finish, bounded.ids) == ("stop", unbounded.ids[:first_seen])


def test_end_tokens_are_the_tokenizers_and_the_generation_configs(tokenizer):
    model = tiny_llama()
    model.generation_config.eos_token_id = [7, END]
    assert end_ids(model, tokenizer) == (END, 7)


def test_a_conversation_is_rendered_up_to_the_start_of_the_answer(tokenizer):
    engine = HFEngine(tiny_llama(), tokenizer)
    by_hand = tokenizer.convert_tokens_to_ids(["user", "w5", "w6", "<end>", "assistant"])
    from_conversation = engine.generate([Request(conversation=Conversation((Message("user", "w5 w6"),)), sampling=EIGHT)])
    assert from_conversation == engine.generate([Request(prompt_ids=by_hand, sampling=EIGHT)])
    assert from_conversation[0].prompt_tokens == 5


def test_drawn_answers_follow_the_seed_and_leave_the_global_random_state_alone(tokenizer):
    engine = HFEngine(tiny_llama(), tokenizer)

    def draw(seed):
        return answers(engine, Request(prompt_ids=SHORT, sampling=Sampling(max_new_tokens=12, temperature=1.5, seed=seed)))

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_generation_config_of_the_model_does_not_change_greedy_answers(tokenizer):
    model = tiny_llama()
    plain = answers(HFEngine(model, tokenizer), Request(prompt_ids=SHORT, sampling=EIGHT))
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=5.0, num_beams=3)
    assert answers(HFEngine(model, tokenizer), Request(prompt_ids=SHORT, sampling=EIGHT)) == plain


def test_each_request_is_answered_by_its_own_adapter(tokenizer, adapter_folders):
    engine = HFEngine(tiny_llama(), tokenizer)
    base = answers(engine, Request(prompt_ids=LONG, sampling=EIGHT))[0]
    engine.add_adapter("sql-v1.0", adapter_folders / "1")
    engine.add_adapter("sql-v1.1", adapter_folders / "2")
    got = answers(engine, *(Request(prompt_ids=LONG, sampling=EIGHT, adapter=a) for a in ("sql-v1.1", None, "sql-v1.0")))
    by_hand = [greedy_by_hand(with_lora(tiny_llama(), seed).eval(), LONG, 8) for seed in (2, 1)]
    assert got == [by_hand[0], base, by_hand[1]]
    assert len(set(got)) == 3


def test_adapters_come_off_without_a_trace(tokenizer, adapter_folders):
    engine = HFEngine(tiny_llama(), tokenizer)
    request = Request(prompt_ids=LONG, sampling=EIGHT)
    base = answers(engine, request)
    for _ in range(2):
        engine.add_adapter("one", adapter_folders / "1")
        engine.remove_adapter("one")
        assert answers(engine, request) == base
    with pytest.raises(KeyError):
        engine.generate([Request(prompt_ids=LONG, adapter="one")])


def test_a_model_in_training_answers_with_its_own_adapter_and_trains_on(tokenizer, adapter_folders):
    model = with_lora(tiny_llama(), seed=1).train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    engine = HFEngine(model, tokenizer)
    engine.add_adapter("other", adapter_folders / "2")
    own, _ = answers(engine, *(Request(prompt_ids=LONG, sampling=EIGHT, adapter=adapter) for adapter in (None, "other")))
    engine.close()
    assert own == greedy_by_hand(with_lora(tiny_llama(), seed=1).eval(), LONG, 8)
    assert model.training
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_an_engine_loads_from_folders(tokenizer, adapter_folders, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = HFEngine.load(tmp_path, adapters={"one": adapter_folders / "1"})
    got = answers(engine, *(Request(prompt_ids=LONG, sampling=EIGHT, adapter=adapter) for adapter in (None, "one")))
    assert got == [greedy_by_hand(model.eval(), LONG, 8), greedy_by_hand(with_lora(tiny_llama(), seed=1).eval(), LONG, 8)]


def test_a_request_has_one_prompt():
    with pytest.raises(AssertionError):
        Request()

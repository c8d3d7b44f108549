"""What every template must give: prompts that are prefixes, one BOS, an end to each turn."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from data_tokenizers import (
    CHANNELS,
    CHATML,
    DATED,
    ENDLESS,
    GEMMA,
    LLAMA2,
    OPENED,
    THINKING,
    TOOLS,
    byte_level,
    sentencepiece_like,
)

from qaroma.data.forms import BadRow, Message
from qaroma.data.templates import Template
from qaroma.data.tokens import tokenize, tokenize_continuation
from qaroma.errors import QaromaError

SYSTEM = Message("system", "Be kind.")
ONE, TWO = Message("user", "One?"), Message("user", "Two <|im_end|></s>?")
FIRST, SECOND = Message("assistant", "1st"), Message("assistant", "2nd")
DIALOGUE = [SYSTEM, ONE, FIRST, TWO, SECOND]
THOUGHT = Message("assistant", "<think>\nhm\n</think>\n\n1st")


def test_auto_takes_the_chat_template_where_there_is_one() -> None:
    assert Template.choose(byte_level(CHATML)).kind == "chat"
    assert Template.choose(byte_level(None)).kind == "plain"
    assert Template.choose(byte_level(CHATML), "none").kind == "none"
    with pytest.raises(QaromaError, match=r"no chat template; type --set data\.template=plain"):
        Template.choose(byte_level(None), "chat")
    with pytest.raises(QaromaError, match="got the template 'jinja'"):
        Template.choose(byte_level(None), "jinja")


def test_chat_renders_as_transformers_does() -> None:
    tokenizer = byte_level(CHATML)
    template = Template.choose(tokenizer)
    turns = [{"role": message.role, "content": message.content} for message in DIALOGUE]
    assert template.render(DIALOGUE) == tokenizer.apply_chat_template(turns, tokenize=False)
    expected = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert template.encode_prompt(tokenizer, DIALOGUE) == expected
    assert template.encode_prompt(tokenizer, DIALOGUE[:-1]) == expected


def test_plain_is_as_documented() -> None:
    template = Template.choose(byte_level(None, eos="<|endoftext|>"))
    assert template.render(DIALOGUE) == (
        "Be kind.\n\n"
        "### Instruction:\nOne?\n\n### Response:\n1st<|endoftext|>\n\n"
        "### Instruction:\nTwo <|im_end|></s>?\n\n### Response:\n2nd<|endoftext|>"
    )
    assert template.render_prompt([ONE]) == "### Instruction:\nOne?\n\n### Response:\n"


def test_plain_and_none_use_no_special_token_but_eos() -> None:
    tokenizer = byte_level(None, eos="<|endoftext|>")
    for kind in ("plain", "none"):
        template = Template.choose(tokenizer, kind)
        ids = tokenize(tokenizer, [template.render([SYSTEM, ONE, FIRST])])[0]
        assert set(ids) & set(tokenizer.all_special_ids) == {tokenizer.eos_token_id}
        assert template.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_none_joins_prompt_and_completion_as_they_are() -> None:
    template = Template.choose(byte_level(None), "none")
    (turn,) = template.turns([Message("user", "Q: "), Message("assistant", "\n yes ")])
    assert (turn.prompt, turn.answer) == ("Q: ", "\n yes <|im_end|>")


CASES = {
    "chatml": (byte_level(CHATML), "<|im_end|>"),
    "chatml with bos": (byte_level(CHATML, bos=True, eos="</s>"), "<|im_end|>"),
    "gemma": (byte_level(GEMMA, bos=True, eos="</s>"), "<end_of_turn>"),
    "llama 2": (sentencepiece_like(LLAMA2), "</s>"),
    "thinking": (byte_level(THINKING), "<|im_end|>"),
    "opened thought": (byte_level(OPENED), "<|im_end|>"),
    "endless": (byte_level(ENDLESS, bos=True, eos="</s>"), "</s>"),
    "no header": (byte_level(DATED), "<|im_end|>"),
    "plain": (byte_level(None), "<|im_end|>"),
    "plain, sentencepiece": (sentencepiece_like(None), "</s>"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_turn_ends_with_its_stop_token_and_answers_its_prompt(case: str) -> None:
    tokenizer, end = CASES[case]
    template = Template.choose(tokenizer)
    for index, turn in zip((2, 4), template.turns(DIALOGUE), strict=True):
        assert turn.prompt == template.render_prompt(DIALOGUE[:index])
        assert turn.answer.strip() == DIALOGUE[index].content + template.turn_end
        assert turn.answer.endswith(end)
        assert "Be kind." in turn.prompt
    assert tokenizer.convert_tokens_to_ids(end) in template.stop_token_ids(tokenizer)
    assert tokenizer.eos_token_id in template.stop_token_ids(tokenizer)


@pytest.mark.parametrize("case", CASES)
def test_exactly_one_bos(case: str) -> None:
    tokenizer, _ = CASES[case]
    ids = Template.choose(tokenizer).encode_prompt(tokenizer, [ONE])
    if tokenizer.bos_token_id is None:
        assert ids[0] != tokenizer.convert_tokens_to_ids("<s>")
    else:
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("case", CASES)
def test_the_saved_template_renders_alike(case: str) -> None:
    tokenizer, _ = CASES[case]
    template = Template.choose(tokenizer)
    loaded = Template.from_json(json.loads(json.dumps(template.to_json())))
    assert loaded == template
    assert loaded.turns(DIALOGUE) == template.turns(DIALOGUE)


def test_saved_template_of_another_version() -> None:
    with pytest.raises(QaromaError, match="saved template"):
        Template.from_json({"kind": "chat", "text": "", "colour": "red"})


def test_a_named_bos_that_the_tokenizer_does_not_add_is_not_added() -> None:
    tokenizer = byte_level(None)
    tokenizer.bos_token = "<|im_start|>"
    assert Template.choose(tokenizer).encode_prompt(tokenizer, [ONE])[0] != tokenizer.bos_token_id


def test_system_text_is_folded_where_the_template_has_no_system_turn() -> None:
    template = Template.choose(byte_level(GEMMA, bos=True))
    assert template.fold_system
    assert template.render([SYSTEM, ONE]) == "<s><start_of_turn>user\nBe kind.\n\nOne?<end_of_turn>\n"
    late = template.render([ONE, SYSTEM, FIRST])
    assert late.startswith("<s><start_of_turn>user\nOne?\n\nBe kind.<end_of_turn>")
    silent = byte_level(CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"))
    assert Template.choose(silent).fold_system
    assert not Template.choose(byte_level(CHATML)).fold_system


def test_a_refused_conversation_is_a_bad_row() -> None:
    template = Template.choose(byte_level(GEMMA, bos=True))
    with pytest.raises(BadRow, match="template refuses the conversation: Conversation roles must alternate"):
        template.turns([ONE, TWO, FIRST])


def test_templates_that_cannot_be_used_say_what_to_type() -> None:
    with pytest.raises(QaromaError, match=r"broken\. Type --set data\.template=plain"):
        Template.choose(byte_level("{{ raise_exception('broken') }}"))
    with pytest.raises(QaromaError, match="leaves out plain text"):
        Template.choose(byte_level("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"))
    no_end = byte_level(None)
    no_end.eos_token = None
    with pytest.raises(QaromaError, match="no end-of-text token"):
        Template.choose(no_end)


def test_dates_are_fixed() -> None:
    template = Template.choose(byte_level(DATED))
    assert "strftime_now" not in template.text
    assert template.render([ONE]).startswith("<|im_start|>system\nToday is 26 Jul 2024<|im_end|>")


def test_a_header_missing_from_the_generation_prompt_is_added() -> None:
    template = Template.choose(byte_level(DATED))
    assert template.render_prompt([ONE]).endswith("One?<|im_end|>\n<|im_start|>assistant\n")
    assert template.turns([ONE, FIRST])[0].answer == "1st<|im_end|>"


@pytest.mark.parametrize("text", [THINKING, OPENED])
def test_thinking_models_follow_the_data(text: str) -> None:
    template = Template.choose(byte_level(text))
    (turn,) = template.turns([ONE, FIRST])
    assert turn.prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    assert turn.answer == "1st<|im_end|>"
    assert template.fitted([[ONE, FIRST]]) == template

    thinking = template.fitted([[ONE, FIRST], [ONE, THOUGHT]])
    (turn,) = thinking.turns([ONE, THOUGHT])
    assert turn.prompt + turn.answer == thinking.render([ONE]) + (
        "<|im_start|>assistant\n<think>\nhm\n</think>\n\n1st<|im_end|>"
    )
    assert "hm" in turn.answer
    (turn,) = thinking.turns([ONE, FIRST])
    assert (turn.prompt + turn.answer).endswith("assistant\n<think>\n\n</think>\n\n1st<|im_end|>")


def test_a_continuation_gets_no_space_that_nobody_wrote() -> None:
    tokenizer = sentencepiece_like(None)
    alone = tokenizer("answer", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁"), "the tokenizer must be of the kind this tests"
    for text in ("answer", " answer", "\n\nanswer", "日", "x: y"):
        prompt = tokenizer("the", add_special_tokens=False).input_ids
        joined = tokenizer.decode(prompt + tokenize_continuation(tokenizer, text), clean_up_tokenization_spaces=False)
        assert joined == "the" + text


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
CALLED = Message("assistant", "", calls=(CALL,))
RESULT = Message("tool", "7", name="f", call_id="c")
OFFERED = Message("system", "", tools=({"type": "function", "function": {"name": "f", "description": "d"}},))
# As DeepSeek V3's: arguments are joined as text, so that an object is an error.
TEXT_ARGUMENTS = TOOLS.replace("{{ c['function'] | tojson }}", "{{ c.function.name + c.function.arguments }}")
# As Llama 3.1's: a turn with calls loses its words.
WORDS_LOST = TOOLS.replace("{{ m['content'] }}", "{% if not m['tool_calls'] %}{{ m['content'] }}{% endif %}")


def test_calls_are_trained_and_results_are_not() -> None:
    template = Template.choose(byte_level(TOOLS))
    first, second = template.turns([OFFERED, ONE, CALLED, RESULT, FIRST])
    assert first.prompt.startswith('<|im_start|>tools\n[{"name": "f", "description": "d"}]<|im_end|>\n<|im_start|>user')
    assert first.answer == '<call>{"name": "f", "arguments": {"x": "é"}}</call><|im_end|>'
    assert second.prompt.endswith("<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n")
    assert second.answer == "1st<|im_end|>"


def test_arguments_are_text_where_the_template_joins_them_as_text() -> None:
    (turn,) = Template.choose(byte_level(TEXT_ARGUMENTS)).turns([ONE, CALLED])
    assert turn.answer == '<call>f{"x": "é"}</call><|im_end|>'


@pytest.mark.parametrize(("text", "kind"), [(CHATML, "chat"), (GEMMA, "chat"), (LLAMA2, "chat"), (None, "plain")])
def test_a_template_without_tools_refuses_them_or_writes_json(text: str | None, kind: str) -> None:
    tokenizer = byte_level(text, bos=True, eos="</s>")
    talk = [OFFERED, ONE, CALLED, RESULT, FIRST]
    with pytest.raises(BadRow, match=r"does not render functions \(tools\) and calls.*; type --tools text"):
        Template.choose(tokenizer).turns(talk)
    template = Template.choose(tokenizer, tools="text")
    first, second = template.turns(talk)
    assert template.kind == kind
    assert 'Tools: [{"name": "f", "description": "d"}]' in first.prompt
    assert first.answer.strip().startswith('{"name": "f", "arguments": {"x": "é"}}')
    assert "7" in second.prompt
    assert second.answer.strip().startswith("1st")
    assert Template.from_json(json.loads(json.dumps(template.to_json()))).turns(talk) == [first, second]
    with pytest.raises(QaromaError, match="got tools 'xml'; expected template or text"):
        Template.choose(tokenizer, tools="xml")


def test_words_beside_calls_are_not_lost() -> None:
    spoken = replace(CALLED, content="Let me add.")
    assert "Let me add.<call>" in Template.choose(byte_level(TOOLS)).turns([ONE, spoken])[0].answer
    with pytest.raises(BadRow, match=r"leaves out 'Let me add\.' of a turn with calls; type --tools text"):
        Template.choose(byte_level(WORDS_LOST)).turns([ONE, spoken])


def test_thoughts_are_the_templates_or_tags() -> None:
    thought = Message("assistant", "1st", thought="hm")
    assert Template.choose(byte_level(TOOLS)).turns([ONE, thought])[0].answer == "[hm]1st<|im_end|>"
    for text in (CHATML, THINKING, OPENED):
        template = Template.choose(byte_level(text)).fitted([[ONE, thought]])
        (turn,) = template.turns([ONE, thought])
        assert (turn.prompt + turn.answer).endswith("assistant\n<think>\nhm\n</think>\n\n1st<|im_end|>")
        assert "hm" in turn.answer


def test_prompts_end_before_the_channel_where_thoughts_or_calls_have_their_own() -> None:
    template = Template.choose(byte_level(CHANNELS))
    assert template.render_prompt([ONE]).endswith("<|im_start|>assistant say\n")
    assert template.fitted([[ONE, FIRST]]) == template
    thinking, closing = replace(CALLED, thought="hm"), Message("assistant", "1st", thought="so")
    talk = [ONE, thinking, RESULT, closing]
    fitted = template.fitted([[ONE, FIRST], talk])
    called, said = fitted.turns(talk)
    assert called.prompt.endswith("One?<|im_end|><|im_start|>assistant")
    assert called.answer.startswith(" think\nhm<|im_end|><|im_start|>assistant call\n{")
    assert called.answer.endswith("}</s>"), "a call ends with the token that the template ends it with"
    tokenizer = byte_level(CHANNELS)
    assert set(tokenizer.convert_ids_to_tokens(template.stop_token_ids(tokenizer))) == {"<|im_end|>", "</s>"}
    assert said.answer == " think\nso<|im_end|><|im_start|>assistant say\n1st<|im_end|>"
    assert fitted.turns([ONE, FIRST])[0].answer == " say\n1st<|im_end|>"


def test_an_empty_thought_that_the_template_spells_otherwise_is_left_out_of_calls() -> None:
    empty = "{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
    spelt = TOOLS.replace("{{ m['content'] }}", empty + "{{ m['content'] }}")
    opens = spelt.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    (turn,) = Template.choose(byte_level(opens)).turns([ONE, CALLED])
    assert turn.prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    assert turn.answer == '<call>{"name": "f", "arguments": {"x": "é"}}</call><|im_end|>'


def test_a_template_that_forbids_thoughts_refuses_them() -> None:
    header = "<|im_start|>assistant\n"
    closed = CHATML.replace(header, header + "<think>\n\n</think>\n\n")
    with pytest.raises(BadRow, match="asks for an answer without a thought"):
        Template.choose(byte_level(closed)).turns([ONE, Message("assistant", "1st", thought="hm")])


def test_the_assistant_may_begin_where_the_template_renders_it() -> None:
    turns = Template.choose(byte_level(CHATML)).turns([SYSTEM, FIRST, ONE, SECOND])
    assert [turn.answer for turn in turns] == ["1st<|im_end|>", "2nd<|im_end|>"]
    assert turns[0].prompt.endswith("Be kind.<|im_end|>\n<|im_start|>assistant\n")
    needs_first = CHATML.replace("{% for m", "{% if messages[0]['role'] == 'x' %}{% endif %}{% for m")
    assert Template.choose(byte_level(needs_first)).turns([FIRST, ONE, SECOND])[0].answer == "1st<|im_end|>"
    with pytest.raises(BadRow, match="must alternate"):
        Template.choose(byte_level(GEMMA, bos=True)).turns([FIRST, ONE, SECOND])


def test_two_answers_in_a_row_are_trained_without_the_header_between() -> None:
    turns = Template.choose(byte_level(CHATML)).turns([ONE, FIRST, SECOND])
    assert [turn.answer for turn in turns] == ["1st<|im_end|>", "2nd<|im_end|>"]


def test_a_later_system_turn_is_not_lost() -> None:
    skips = "{% if m['role'] == 'system' and not loop.first %}{% continue %}{% endif %}"
    first_only = CHATML.replace("{% for m in messages %}", "{% for m in messages %}" + skips)
    talk = [ONE, FIRST, Message("system", "Now in French."), TWO, SECOND]
    with pytest.raises(BadRow, match=r"leaves out a later system turn \('Now in French\.'\)"):
        Template.choose(byte_level(first_only)).turns(talk)
    assert len(Template.choose(byte_level(CHATML)).turns(talk)) == 2

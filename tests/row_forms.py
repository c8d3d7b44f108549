"""The public forms of rows: one row of each, and what is trained of it or what is said.

``examples/rows.md`` is made of this list: ``python tests/row_forms.py``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[1] / "examples" / "rows.md"

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RowForm:
    """One public form.

    Attributes:
        name: of the form.
        source: where it is documented, or a data set that has it.
        row: a row of it.
        turns: what it means: pairs of a role and a text, ``assistant*`` where the turn is trained.
        refused: the sentence where it is refused; then ``turns`` is what it means with ``option``.
        option: what is typed besides.
        ignored: the keys that are named as ignored.
        template: chatml, or tools: one that renders functions, calls, results and thoughts.
        rejected: the worse answer of a preference, which ``--task preference`` trains against the last turn.
    """

    name: str
    source: str
    row: dict[str, Any]
    turns: Turns = ()
    refused: str = ""
    option: dict[str, Any] = field(default_factory=dict)
    ignored: str = ""
    template: str = "chatml"
    rejected: str = ""


ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
ADD_TEXT = json.dumps([ADD])
CALL = {"name": "add", "arguments": {"a": 2}}
CALL_TEXT = f"<call>{json.dumps(CALL)}</call>"
CALLS = [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]
ASK = {"role": "user", "content": "2+2?"}
SAY = {"role": "assistant", "content": "4"}
PLAIN: Turns = (("user", "2+2?"), ("assistant*", "4"))
WITH_SYSTEM: Turns = (("system", "Be brief."), *PLAIN)
WITH_TOOLS: Turns = (
    ("tools", ADD_TEXT),
    ("user", "2+2?"),
    ("assistant*", CALL_TEXT),
    ("tool", "4"),
    ("assistant*", "4"),
)
LLAMA_FACTORY, TRL = "LLaMA-Factory data/README.md", "TRL, Dataset formats"
PREFERENCE = "two answers, chosen and rejected (preferences)"
KTO = "a label that says whether the answer is good (KTO)"
GOOD = {"feedback": "good"}

FORMS = (
    RowForm("alpaca", "tatsu-lab/alpaca", {"instruction": "Add.", "input": "2+2?", "output": "4"},
            (("user", "Add.\n\n2+2?"), ("assistant*", "4"))),
    RowForm("alpaca with system and history", LLAMA_FACTORY,
            {"instruction": "2+2?", "output": "4", "system": "Be brief.", "history": [["1+1?", "2"]]},
            (("system", "Be brief."), ("user", "1+1?"), ("assistant*", "2"), ("user", "2+2?"), ("assistant*", "4"))),
    RowForm("Dolly", "databricks/databricks-dolly-15k",
            {"instruction": "When?", "context": "It began in 2000.", "response": "2000", "category": "closed_qa"},
            (("user", "When?\n\nIt began in 2000."), ("assistant*", "2000")), ignored="category"),
    RowForm("OpenOrca", "Open-Orca/OpenOrca",
            {"id": "1", "system_prompt": "Be brief.", "question": "2+2?", "response": "4"}, WITH_SYSTEM, ignored="id"),
    RowForm("question and answer", "openai/gsm8k", {"question": "2+2?", "answer": "4"}, PLAIN),
    RowForm("query and response", "meta-math/MetaMathQA",
            {"query": "2+2?", "response": "4", "type": "GSM_Rephrased"}, PLAIN, ignored="type"),
    RowForm("query and response with history", "ms-swift, Custom dataset",
            {"system": "Be brief.", "query": "2+2?", "response": "4", "history": []}, WITH_SYSTEM),
    RowForm("input and output", "NeMo, prompt templates", {"input": "2+2?", "output": "4"}, PLAIN),
    RowForm("prompt and completion", TRL, {"prompt": "2+2?", "completion": "4"}, PLAIN),
    RowForm("prompt and completion of turns", TRL, {"prompt": [ASK], "completion": [SAY]}, PLAIN),
    RowForm("prompt and completion with a system text", "Axolotl, Instruction tuning",
            {"system": "Be brief.", "prompt": "2+2?", "completion": "4"}, WITH_SYSTEM),
    RowForm("other keys", "any table", {"asked": "2+2?", "said": "4", "rule": "Be brief."}, WITH_SYSTEM,
            refused="the keys (asked, said, rule) fit no known form",
            option={"columns": {"prompt": "asked", "completion": "said", "system": "rule"}}),
    RowForm("messages", "OpenAI, Supervised fine-tuning",
            {"messages": [{"role": "system", "content": "Be brief."}, ASK, SAY]}, WITH_SYSTEM),
    RowForm("messages with weights", "OpenAI, Supervised fine-tuning",
            {"messages": [ASK, {**SAY, "content": "5", "weight": 0}, {**ASK, "content": "No."}, {**SAY, "weight": 1}]},
            (("user", "2+2?"), ("assistant", "5"), ("user", "No."), ("assistant*", "4"))),
    RowForm("messages with train", "Axolotl, Conversation",
            {"messages": [ASK, {**SAY, "content": "5", "train": False}, {**ASK, "content": "No."}, SAY]},
            (("user", "2+2?"), ("assistant", "5"), ("user", "No."), ("assistant*", "4"))),
    RowForm("messages with loss", "ms-swift, Custom dataset",
            {"messages": [ASK, {**SAY, "content": "5", "loss": False}, {**ASK, "content": "No."}, SAY]},
            (("user", "2+2?"), ("assistant", "5"), ("user", "No."), ("assistant*", "4"))),
    RowForm("messages in parts", "OpenAI, Chat completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, SAY]}, PLAIN),
    RowForm("parts with value, reasoning and loss_weight", "LLaMA-Factory v1, Data format",
            {"messages": [
                {"role": "user", "content": [{"type": "text", "value": "2+2?"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "reasoning", "value": "Two twos."},
                                                  {"type": "text", "value": "4"}], "loss_weight": 1.0}]},
            (("user", "2+2?"), ("assistant*", "[Two twos.]4")), template="tools"),
    RowForm("reasoning_content", "DeepSeek API, Reasoning model",
            {"messages": [ASK, {**SAY, "reasoning_content": "Two twos."}]},
            (("user", "2+2?"), ("assistant*", "<think>\nTwo twos.\n</think>\n\n4"))),
    RowForm("thinking", "HuggingFaceH4/Multilingual-Thinking",
            {"messages": [{**ASK, "thinking": None}, {**SAY, "thinking": "Two twos."}]},
            (("user", "2+2?"), ("assistant*", "[Two twos.]4")), template="tools"),
    RowForm("tools and tool_calls", "OpenAI, Function calling",
            {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": CALLS},
                          {"role": "tool", "tool_call_id": "call_1", "content": "4"}, SAY],
             "tools": [{"type": "function", "function": ADD}]}, WITH_TOOLS, template="tools"),
    RowForm("tools with a template that has none", "OpenAI, Function calling",
            {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": CALLS},
                          {"role": "tool", "tool_call_id": "call_1", "content": "4"}, SAY],
             "tools": [{"type": "function", "function": ADD}]},
            (("system", "Tools: " + ADD_TEXT), ("user", "2+2?"), ("assistant*", json.dumps(CALL)), ("user", "4"),
             ("assistant*", "4")),
            refused="the chat template does not render functions (tools) and calls; type --tools text",
            option={"tools": "text"}),
    RowForm("functions and function_call", "OpenAI, Chat completions (older)",
            {"messages": [ASK, {"role": "assistant", "content": None, "function_call": CALLS[0]["function"]},
                          {"role": "function", "name": "add", "content": "4"}, SAY], "functions": [ADD]},
            WITH_TOOLS, template="tools"),
    RowForm("function_call and observation (glaive)", LLAMA_FACTORY,
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "function_call", "value": json.dumps(CALL)},
                               {"from": "observation", "value": "4"}, {"from": "gpt", "value": "4"}],
             "tools": ADD_TEXT}, WITH_TOOLS, template="tools"),
    RowForm("one text with functions (glaive)", "glaiveai/glaive-function-calling-v2",
            {"system": "SYSTEM: Be brief. Use functions -\n" + json.dumps(ADD, indent=1),
             "chat": "USER: 2+2?\n\n\nASSISTANT: <functioncall> {\"name\": \"add\", \"arguments\": '{\"a\": 2}'} "
                     "<|endoftext|>\n\n\nFUNCTION RESPONSE: 4\n\n\nASSISTANT: 4 <|endoftext|>\n\n\n"},
            (WITH_TOOLS[0], ("system", "Be brief. Use functions"), *WITH_TOOLS[1:]), template="tools"),
    RowForm("tool_call and tool_response", "ms-swift, Agent support",
            {"tools": ADD_TEXT, "messages": [ASK, {"role": "tool_call", "content": json.dumps(CALL)},
                                             {"role": "tool_response", "content": "4"}, SAY]},
            WITH_TOOLS, template="tools"),
    RowForm("tool_use and tool_result", "Anthropic, Tool use",
            {"messages": [ASK, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "add",
                                                                  "input": {"a": 2}}]},
                          {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "4"}]},
                          SAY],
             "tools": [{"name": "add", "description": "Adds.", "input_schema": ADD["parameters"]}]},
            WITH_TOOLS, template="tools"),
    RowForm("query, tools and answers", "Salesforce/xlam-function-calling-60k",
            {"query": "2+2?", "tools": ADD_TEXT, "answers": json.dumps([CALL])}, WITH_TOOLS[:3], template="tools"),
    RowForm("calls as text, role tool", "NousResearch/hermes-function-calling-v1",
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "<tool_call>\n{}"},
                               {"from": "tool", "value": "4"}, {"from": "gpt", "value": "4"}]},
            (("user", "2+2?"), ("assistant*", "<tool_call>\n{}"), ("tool", "4"), ("assistant*", "4"))),
    RowForm("ShareGPT", LLAMA_FACTORY,
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
             "system": "Be brief."}, WITH_SYSTEM),
    RowForm("ShareGPT that the assistant begins", "roleplay sets",
            {"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "2+2?"},
                               {"from": "gpt", "value": "4"}]},
            (("assistant*", "Hello!"), *PLAIN)),
    RowForm("ShareGPT with two systems", "merged sets",
            {"system": "Be kind.",
             "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+2?"},
                               {"from": "gpt", "value": "4"}]},
            (("system", "Be kind.\n\nBe brief."), *PLAIN)),
    RowForm("conversation of input and output", "XTuner, Single-turn conversation",
            {"conversation": [{"system": "Be brief.", "input": "2+2?", "output": "4"}]}, WITH_SYSTEM),
    RowForm("contents of parts", "Gemini on Vertex AI, Supervised tuning",
            {"systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
             "contents": [{"role": "user", "parts": [{"text": "2+2?"}]}, {"role": "model", "parts": [{"text": "4"}]}]},
            WITH_SYSTEM),
    RowForm("text", TRL, {"text": "2+2 is 4.", "url": "x"}, (("*", "2+2 is 4."),), ignored="url"),
    RowForm("prompt, chosen, rejected", TRL, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, PLAIN,
            refused=PREFERENCE, option=GOOD, rejected="5"),
    RowForm("chosen, rejected of turns", TRL,
            {"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "5"}]}, PLAIN,
            refused=PREFERENCE, option=GOOD, rejected="5"),
    RowForm("prompt and whole chosen, rejected", "HuggingFaceH4/ultrafeedback_binarized",
            {"prompt": "2+2?", "chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "5"}], "score_chosen": 9.0},
            PLAIN, refused=PREFERENCE, option=GOOD, rejected="5", ignored="score_chosen"),
    RowForm("chosen, rejected as a dialogue", "Anthropic/hh-rlhf",
            {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"}, PLAIN,
            refused=PREFERENCE, option=GOOD, rejected="5"),
    RowForm("instruction, chosen, rejected", LLAMA_FACTORY,
            {"instruction": "Add.", "input": "2+2?", "chosen": "4", "rejected": "5"},
            (("user", "Add.\n\n2+2?"), ("assistant*", "4")), refused=PREFERENCE, option=GOOD, rejected="5"),
    RowForm("conversations, chosen, rejected", LLAMA_FACTORY,
            {"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"},
             "rejected": {"from": "gpt", "value": "5"}}, PLAIN, refused=PREFERENCE, option=GOOD, rejected="5"),
    RowForm("system, question, chosen, rejected", "Intel/orca_dpo_pairs",
            {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"}, WITH_SYSTEM,
            refused=PREFERENCE, option=GOOD, rejected="5"),
    RowForm("preferred_output", "OpenAI, Direct preference optimization",
            {"input": {"messages": [ASK]}, "preferred_output": [SAY],
             "non_preferred_output": [{**SAY, "content": "5"}]},
            PLAIN, refused=PREFERENCE, option=GOOD, rejected="5"),
    RowForm("chosen, rejected that begin alike", TRL, {"chosen": "2 and 2 is 4", "rejected": "2 and 2 is 5"},
            (("user", "2 and 2 is"), ("assistant*", " 4")), refused=PREFERENCE, option=GOOD, rejected=" 5"),
    RowForm("messages, rejected_response", "ms-swift, Custom dataset",
            {"messages": [ASK, SAY], "rejected_response": "5"}, PLAIN,
            refused=PREFERENCE, option=GOOD, rejected="5"),
    RowForm("messages, rejected_messages", "ms-swift, Custom dataset",
            {"messages": [ASK, SAY], "rejected_messages": [ASK, {**SAY, "content": "5"}]}, PLAIN,
            refused=PREFERENCE, option=GOOD, rejected="5"),
    RowForm("chosen, rejected under other keys", "any table", {"asked": "2+2?", "good": "4", "bad": "5"}, PLAIN,
            refused="the keys (asked, good, bad) fit no known form",
            option={"feedback": "good", "columns": {"prompt": "asked", "chosen": "good", "rejected": "bad"}},
            rejected="5"),
    RowForm("prompt, completion, label", TRL, {"prompt": "2+2?", "completion": "4", "label": True}, PLAIN,
            refused=KTO, option=GOOD),
    RowForm("messages, kto_tag", LLAMA_FACTORY, {"messages": [ASK, SAY], "kto_tag": True}, PLAIN,
            refused=KTO, option=GOOD),
    RowForm("prompt, completions, labels", TRL, {"prompt": "2+2?", "completions": ["2+2 is", "4"],
            "labels": [True, True]}, refused="steps with a label each (stepwise supervision)"),
    RowForm("prompt alone", TRL, {"prompt": "2+2?"}, refused="a question without an answer"),
    RowForm("segments", "Axolotl, Template-free", {"segments": [{"label": True, "text": "4"}]},
            refused="segments of rendered text (Axolotl's input_output)"),
    RowForm("images beside the turns", LLAMA_FACTORY,
            {"messages": [{**ASK, "content": "<image>Who?"}, SAY], "images": ["a.jpg"]},
            refused="the row has images, which a text run does not see"),
    RowForm("image_url part", "OpenAI, Vision fine-tuning",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAY]},
            refused="turn 1 has a part that is not text (of type image_url)"),
    RowForm("answers with their places", "rajpurkar/squad",
            {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}},
            refused="a question without an answer that is text"),
)  # fmt: skip


def table() -> str:
    """The list as Markdown."""
    lines = [
        "# What a row means",
        "",
        f"{len(FORMS)} public forms of rows: what is trained of one row of each, or what is said of it. Trained text",
        "is bold; the end of its turn is trained too, and the rest is context. Where a form is refused and an option",
        "is named, the turns are what the option makes of it. `qaroma data preview` shows the same of your rows. Made",
        "by `python tests/row_forms.py`; each line is a test (`tests/test_row_forms.py`).",
        "",
        "| form | documented in | a row | what it means |",
        "|---|---|---|---|",
    ]
    for form in FORMS:
        row = json.dumps(form.row, ensure_ascii=False)
        lines.append(f"| {form.name} | {form.source} | {_code(row)} | {_meaning(form)} |")
    return "\n".join(lines) + "\n"


def _meaning(form: RowForm) -> str:
    parts = []
    if form.refused:
        parts.append(f"refused: {form.refused}")
    if form.option:
        typed = {"columns": "--columns " + ",".join(f"{k}={v}" for k, v in form.option.get("columns", {}).items())}
        parts.append("with " + _code(" ".join(typed.get(key, f"--{key} {form.option[key]}") for key in form.option)))
    for role, text in form.turns:
        shown = _code(text)
        parts.append(f"{role.rstrip('*')}: **{shown}**" if role.endswith("*") else f"{role}: {shown}")
    if form.rejected:
        parts.append(f"with {_code('--task preference')} against: **{_code(form.rejected)}**")
    if form.ignored:
        parts.append(f"ignored keys: {form.ignored}")
    return "<br>".join(part.removeprefix(": ") for part in parts)


def _code(text: str) -> str:
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8", newline="\n")

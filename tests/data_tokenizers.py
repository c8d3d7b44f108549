"""Small tokenizers of the kinds that bases come with, made on the spot for the data tests."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes the BOS itself, trims, knows no system turn and wants user and assistant to alternate.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As Llama 2's, without a header of the assistant's; the template writes the BOS.
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}{% endif %}{% endfor %}"
)
# As Qwen3's: an empty thought before the last answer, thoughts taken out of earlier ones.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set c = m['content'] %}{% set t = '' %}"
    "{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n' + t + '\n</think>\n\n' }}{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek R1's: the prompt opens a thought, the conversation as rendered has none.
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Writes no token at the end of a turn, as some early chat models.
ENDLESS = (
    "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Today's date in the system turn, and no header in the generation prompt.
DATED = (
    "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
# Functions, calls, their results and thoughts by means of its own, as Qwen3's has them.
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | map(attribute='function') | list | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] %}[{{ m['reasoning_content'] }}]{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As gpt-oss's: thoughts, calls and answers begin in channels of their own, and earlier thoughts are taken out.
CHANNELS = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>"
    "{% else %}{% if m['reasoning_content'] and (loop.last or m['tool_calls'] and messages[-1]['role'] == 'tool') %}"
    "<|im_start|>assistant think\n{{ m['reasoning_content'] }}<|im_end|>{% endif %}"
    "{% if m['tool_calls'] %}<|im_start|>assistant call\n{{ m['tool_calls'][0]['function'] | tojson }}</s>"
    "{% else %}<|im_start|>assistant say\n{{ m['content'] }}<|im_end|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)

_SPECIAL = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
_CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "### Instruction:\nList three colours.\n\n### Response:\nRed, green and blue.",
    "user assistant system model the answer to the question is a word",
    "Please choose the correct answer: answer1 answer2 answer3 answer4",
] * 4


def byte_level(
    template: str | None = CHATML, *, bos: bool = False, eos: str = "<|im_end|>", vocab: int = 420
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2, Llama 3 and Qwen have, pad equal to eos; with ``bos`` it adds one."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return _wrapped(raw, template, bos, eos)


def sentencepiece_like(template: str | None = LLAMA2) -> PreTrainedTokenizerFast:
    """BPE with byte fallback and a space put before every piece of text, as Llama 2 has; it adds a BOS."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    raw.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=_SPECIAL, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    for byte in range(256):
        model["vocab"][f"<0x{byte:02X}>"] = len(model["vocab"])
    merges = [tuple(merge) for merge in model["merges"]]
    raw.model = models.BPE(vocab=model["vocab"], merges=merges, byte_fallback=True, fuse_unk=True)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(raw, template, True, "</s>")


def _wrapped(raw: Tokenizer, template: str | None, bos: bool, eos: str) -> PreTrainedTokenizerFast:
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>" if bos else None,
        eos_token=eos,
        pad_token=eos,
        chat_template=template,
    )

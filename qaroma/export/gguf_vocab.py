"""A tokenizer as GGUF's metadata: byte-level BPE here, SentencePiece vocabularies in ``gguf_pieces``.

llama.cpp does not read a tokenizer's regular expressions: it has its own, under a name. The name is
found by comparing the tokenizer's way of cutting text with those that are known to be the same.
"""

from __future__ import annotations

import json
from typing import Any

from qaroma.data.forms import Message
from qaroma.data.templates import Template
from qaroma.data.tokens import added_bos
from qaroma.errors import QaromaError
from qaroma.export.chat_template import complete_jinja
from qaroma.export.gguf_pieces import add_pieces, is_pieces, space_before

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Steps of the pre-tokenizer, in words -> llama.cpp's name (tokenizer.ggml.pre).
_NAMES = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
    (_LLAMA3,): "smaug-bpe",
    (_QWEN2,): "qwen2",
}
# The same, where whole words of the vocabulary are taken before merging (ignore_merges).
_WHOLE_WORDS_FIRST = {"smaug-bpe": "llama-bpe"}


def check_vocabulary(tokenizer: Any, template: Template) -> None:
    """Refuse a tokenizer that GGUF's metadata cannot describe.

    Args:
        tokenizer: transformers' fast tokenizer.
        template: of the run.

    Raises:
        QaromaError: neither byte-level BPE that is cut in a way known here, nor a SentencePiece vocabulary.
    """
    state = _state(tokenizer)
    if is_pieces(state):
        space_before(state, _prompt(tokenizer, template))
    else:
        pre_tokenizer_name(tokenizer)


def _state(tokenizer: Any) -> dict[str, Any]:
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise QaromaError("the base's tokenizer has no tokenizer.json; type: --format gguf-adapter, or --format merged")
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return state


def _prompt(tokenizer: Any, template: Template) -> str:
    """A prompt as llama.cpp is given it: without the BOS that it adds by itself."""
    text = template.render_prompt([Message("user", "a")])
    return text if added_bos(tokenizer) is None else text.removeprefix(tokenizer.bos_token)


def pre_tokenizer_name(tokenizer: Any) -> str:
    """llama.cpp's name of the way a tokenizer cuts text before merging.

    Args:
        tokenizer: transformers' fast tokenizer.

    Raises:
        QaromaError: not a BPE tokenizer, or one that cuts in a way not known here.
    """
    state = _state(tokenizer)
    if state["model"]["type"] != "BPE":
        raise QaromaError(
            f"the base's tokenizer is of the kind {state['model']['type']}; GGUF model files are written for BPE only. "
            "Type: --format gguf-adapter, or --format merged"
        )
    steps = _steps(state["pre_tokenizer"])
    normaliser = state.get("normalizer")
    if normaliser is not None and normaliser["type"] != "NFC":  # composed characters are what people type anyway
        steps.insert(0, f"the normaliser {normaliser['type']}")
    name = _NAMES.get(tuple(steps))
    if name is not None and state["model"].get("ignore_merges"):
        name = _WHOLE_WORDS_FIRST.get(name)
    if name is None:
        raise QaromaError(
            "the base's tokenizer cuts text in a way that has no name known here for llama.cpp "
            f"({' then '.join(steps)}); type: --format gguf-adapter, or --format merged"
        )
    return name


def _steps(node: Any) -> list[str]:
    """A pre-tokenizer's steps in words: regular expressions as they are."""
    if node is None:
        return ["none"]
    kind = node["type"]
    if kind == "Sequence":
        return [step for inner in node["pretokenizers"] for step in _steps(inner)]
    if kind == "ByteLevel":
        if node.get("add_prefix_space"):
            return ["a space before the text"]
        return [_GPT2] if node.get("use_regex", True) else []
    if kind == "Digits" and node.get("individual_digits"):
        return ["digits"]
    if kind == "Split" and node.get("behavior") == "Isolated" and not node.get("invert"):
        return [str(node["pattern"].get("Regex", node["pattern"]))]
    return [kind]


def add_vocabulary(writer: Any, tokenizer: Any, template: Template, size: int) -> None:
    """Write tokens, merges, special tokens and the chat template into GGUF's metadata.

    Args:
        writer: gguf's writer.
        tokenizer: transformers' fast tokenizer.
        template: what the adapter was trained with; its text becomes the file's chat template.
        size: rows of the embeddings; tokens that the tokenizer lacks are marked unused.

    Raises:
        QaromaError: a tokenizer that GGUF's metadata cannot describe.
    """
    state = _state(tokenizer)
    tokens, types = _tokens(tokenizer, state, size)
    if is_pieces(state):
        add_pieces(writer, state, tokens, types, _prompt(tokenizer, template))
    else:
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(int(token))
    ends = template.stop_token_ids(tokenizer)
    turn_ends = [token for token in ends if token != tokenizer.eos_token_id]
    if turn_ends:
        writer.add_eot_token_id(turn_ends[0])
    writer.add_add_bos_token(added_bos(tokenizer) is not None)
    writer.add_add_eos_token(False)
    writer.add_chat_template(complete_jinja(template))


def _tokens(tokenizer: Any, state: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    vocabulary: dict[str, int] = state["model"]["vocab"]
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    largest = max([*vocabulary.values(), *added])
    if largest >= size:
        raise QaromaError(
            f"the tokenizer has the token {largest}, but the base's embeddings have {size} rows; "
            "give the tokenizer that belongs to the base"
        )
    tokens, types = [f"[PAD{index}]" for index in range(size)], [int(TokenType.UNUSED)] * size
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, int(TokenType.NORMAL)
    for index, entry in added.items():
        tokens[index] = entry["content"]
        types[index] = int(TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED)
    return tokens, types

"""Score a GGUF model of the demo, with the package xllamacpp: python gguf_score.py MODEL.gguf

It prints the loss of the demo's validation rows, with the file's own tensors in fp32 arithmetic, and how many of the
demo's held-out requests llama.cpp answers exactly.
"""

import sys

import torch
import xllamacpp

from qaroma import load_base, load_tokenizer
from qaroma.data.demo import TEST_ROWS, rows
from qaroma.data.encode import encode_rows
from qaroma.data.sources import read_rows
from qaroma.data.split import split_validation
from qaroma.data.templates import Template
from qaroma.tasks.causal_lm import CausalLM


def validation_loss(file: str) -> tuple[int, float]:
    """The number of the rows that `qaroma demo` validates on, and the loss of a token of their answers."""
    tokenizer = load_tokenizer(file)
    model = load_base(file, quantization="none", compute_dtype=torch.float32)
    encoded = encode_rows(read_rows([("demo:calendar", 1.0)]), tokenizer, Template.choose(tokenizer))
    examples = split_validation(encoded)[1].examples
    task = CausalLM(tokenizer.pad_token_id or 0)
    figures = task.evaluate(model, [task.collate(examples)], model.device)
    return len(examples), figures["loss"]


def right_answers(file: str) -> int:
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = 1024
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    right = 0
    for row in rows("test", TEST_ROWS, seed=0):
        question = {"role": "user", "content": row["instruction"]}
        told = server.handle_chat_completions({"messages": [question], "temperature": 0, "max_tokens": 64})
        right += told["choices"][0]["message"]["content"].strip() == row["output"]
    return right


if __name__ == "__main__":
    count, loss = validation_loss(sys.argv[1])
    print(f"loss of {count} validation rows: {loss:.5f}")
    print(f"exact answers: {right_answers(sys.argv[1])} of {TEST_ROWS}")

"""The formats of an export, one row each: what can be said of one without writing it, and without torch.

A new format is a row of this table, and one of :data:`qaroma.export.formats.FORMATS`, which writes and tests it.
"""

from __future__ import annotations

from typing import NamedTuple


class FormatFacts(NamedTuple):
    """What is known of a format before it is written.

    Attributes:
        audience: what it is and who reads it, for ``--help``.
        library: as the hub calls what loads it.
        use: the command that uses it, in which the braces are filled in.
        loading: how each engine loads it, for the card, which fills in the braces, ``use`` among them.
    """

    audience: str
    library: str
    use: str
    loading: str


class OutType(NamedTuple):
    """What the matrices of a GGUF model are stored in.

    Attributes:
        kind: ggml's type of most of them.
        file: what llama.cpp calls such a file.
        tolerance: the key of :data:`qaroma.export.selftest.LOGIT_TOLERANCE` that an engine's answers are held to.
    """

    kind: str
    file: str
    tolerance: str


OUTTYPES = {
    "f32": OutType("F32", "ALL_F32", "fp32"),
    "f16": OutType("F16", "MOSTLY_F16", "fp16"),
    "bf16": OutType("BF16", "MOSTLY_BF16", "bf16"),
    "q8_0": OutType("Q8_0", "MOSTLY_Q8_0", "q8_0"),
    "q6_k": OutType("Q6_K", "MOSTLY_Q6_K", "q6_k"),
    "q5_k_m": OutType("Q5_K", "MOSTLY_Q5_K_M", "q5_k"),
    "q4_k_m": OutType("Q4_K", "MOSTLY_Q4_K_M", "q4_k"),
    "q4_0": OutType("Q4_0", "MOSTLY_Q4_0", "q4_0"),
}
# Fewer than 8: the share of the update that arrived is then told of all modules together, see ``share_arrived``.
FEW_BITS = ("q6_k", "q5_k_m", "q4_k_m", "q4_0")

FORMAT_FACTS = {
    "peft": FormatFacts(
        "a rank for each module: PEFT, transformers",
        "peft",
        "qaroma chat {place}",
        """In PEFT (`pip install peft`):

    {in_peft}

In qaroma: {in_qaroma}. Other engines ignore the rank of each module and scale
it wrongly: give them the format `padded`.""",
    ),
    "padded": FormatFacts(
        "one rank, zero-padded: vLLM, SGLang, Ollama",
        "peft",
        "vllm serve {base} --enable-lora --max-lora-rank {max_lora_rank} --lora-modules tuned={place}",
        """In vLLM:

    {use}

In SGLang:

    python -m sglang.launch_server --model-path {base} --lora-paths tuned={place}

In Ollama: a Modelfile with `FROM` the base and `ADAPTER {place}`. In PEFT: as any LoRA, with
`PeftModel.from_pretrained(base, "{place}")`.""",
    ),
    "gguf-adapter": FormatFacts(
        "llama.cpp, LM Studio",
        "gguf",
        "llama-cli -m base.gguf --lora {place}/adapter.gguf",
        """In llama.cpp, on a GGUF of the base:

    {use}

In LM Studio and Ollama: beside the base's GGUF (Ollama: `ADAPTER ./adapter.gguf` in a Modelfile).""",
    ),
    "mlx": FormatFacts(
        "Apple's chips: mlx-lm",
        "mlx",
        'mlx_lm.generate --model {base} --adapter-path {place} --prompt "a prompt"',
        """In mlx-lm (`pip install mlx-lm`):

    {use}

`mlx_lm.fuse` makes one model of the base and this.""",
    ),
    "merged": FormatFacts(
        "an ordinary checkpoint: anything",
        "transformers",
        "vllm serve {place}",
        """In transformers, vLLM, SGLang or anything else that reads a checkpoint:

    model = AutoModelForCausalLM.from_pretrained("{place}"{options})

In mlx-lm: `mlx_lm.generate --model {place} --prompt "a prompt"`, or in 4 bits after
`mlx_lm.convert --hf-path {place} -q`.""",
    ),
    "gguf": FormatFacts(
        "a model file with an Ollama Modelfile: llama.cpp, Ollama",
        "gguf",
        "ollama create {name} -f {place}/Modelfile && ollama run {name}",
        """In Ollama:

    {use}

In llama.cpp: `llama-cli -m {place}/model.gguf`. In LM Studio: open `model.gguf`.""",
    ),
}

"""Running what was exported by ways that are not ours: PEFT, transformers' own loaders, llama.cpp."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.engine.placement import compute_device
from qaroma.errors import QaromaError
from qaroma.method.factors import Update
from qaroma.model.gguf import metadata_string, read_dense

# (token ids, first position wanted) -> logits (positions, vocabulary), fp32 on the CPU.
Logits = Callable[[Sequence[int], int], Tensor]


def installed(package: str) -> bool:
    """Whether an optional package can be imported."""
    return importlib.util.find_spec(package) is not None


def model_logits(model: Any) -> Logits:
    """Logits of a transformers model, the vocabulary applied to the wanted positions only."""

    @torch.no_grad()
    def logits(ids: Sequence[int], start: int) -> Tensor:
        device = compute_device(model)
        output = model(input_ids=torch.tensor([list(ids)], device=device), logits_to_keep=len(ids) - start)
        found: Tensor = output.logits[0].float().cpu()
        return found

    return logits


@contextmanager
def on_hooks(model: nn.Module, update: Update) -> Iterator[None]:
    """A model whose layers give y + x A^T B inside the block, in plain torch and with none of our layers.

    Args:
        model: without an adapter.
        update: the update, as it was read back from a file.
    """
    handles = []
    for name, factors in update.items():
        layer = model.get_submodule(name)
        device: Any = next(layer.parameters()).device
        A, B = factors.A.to(device), factors.B.to(device)

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            return output + (inputs[0].float() @ A.T @ B).to(output.dtype)

        handles.append(layer.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_peft(model: Any, folder: Path) -> Iterator[Any]:
    """The model as ``PeftModel.from_pretrained`` makes it; taken off again afterwards."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers about a name that peft uses
        wrapped = PeftModel.from_pretrained(model, str(folder)).eval()
    try:
        yield wrapped
    finally:
        wrapped.unload()


def load_merged(folder: Path, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """A merged checkpoint as transformers loads it by itself."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, device_map={"": device}, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return model.eval()


def load_gguf_model(path: Path, device: torch.device) -> Any:
    """A GGUF model as transformers' own reader dequantises it, in fp32.

    Raises:
        QaromaError: a family that transformers does not read from GGUF.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    family = metadata_string(path, "general.architecture")
    if family not in (name.replace("_", "") for name in GGUF_SUPPORTED_ARCHITECTURES):
        raise QaromaError(
            f"transformers does not read {family} from GGUF, so that the self-test wants llama.cpp; "
            "type: pip install xllamacpp, or add --no-self-test"
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        dtype=torch.float32,
        device_map={"": device},
        **read_dense(),
    )
    return model.eval()


@dataclass(frozen=True)
class LlamaCppAnswer:
    """What llama.cpp's server tells of one answer.

    Attributes:
        prompt_tokens: how many tokens the prompt was cut into.
        text: the answer.
        tokens: of the answer, but for those that end within a character.
        log_probabilities: of the likeliest tokens in the place of each of ``tokens``.
    """

    prompt_tokens: int
    text: str
    tokens: list[int]
    log_probabilities: list[dict[int, float]]


class LlamaCpp:
    """llama.cpp, from the package ``xllamacpp``, on a GGUF file with or without an adapter.

    Args:
        model: the GGUF file.
        adapter: a GGUF adapter, or None.
        context: longest prompt and answer together, in tokens.
    """

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        *,
        context: int = 1024,
    ) -> None:
        library = importlib.import_module("xllamacpp")
        params = library.CommonParams()
        params.model.path = str(model)
        params.n_ctx = max(256, math.ceil(context / 256) * 256)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = 0
        params.special = True  # text with its special tokens: an answer's end is compared too
        # An fp32 key-value cache: the default of fp16 alone moves SmolLM2's logits by 0.02.
        params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            params.lora_adapters = [library.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = library.Server(params)

    def answer(self, prompt: Sequence[int] | str, tokens: int, *, top: int = 20) -> LlamaCppAnswer:
        """Greedy tokens and, for each, the log-probabilities of the ``top`` likeliest.

        Args:
            prompt: token ids, or text for llama.cpp's own tokenizer, which adds a BOS by itself.
            tokens: at most so many; the end of the text ends the answer sooner.
            top: how many log-probabilities.
        """
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": tokens, "logprobs": top, "cache_prompt": False,
            "temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0,
        }  # fmt: skip
        told = self._server.handle_completions(request)
        if "choices" not in told:
            raise RuntimeError(f"llama.cpp answers {told}")
        content = told["choices"][0]["logprobs"]["content"]
        return LlamaCppAnswer(
            prompt_tokens=told["usage"]["prompt_tokens"],
            text=told["choices"][0]["text"],
            tokens=[entry["id"] for entry in content],
            log_probabilities=[{one["id"]: one["logprob"] for one in entry["top_logprobs"]} for entry in content],
        )

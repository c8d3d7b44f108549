"""Reading a GGUF file as a transformers model, one tensor at a time.

transformers' own reader dequantises the whole file into memory before it fills the model. For the
commonest architectures the tensors are handed to it lazily here instead, so that the loader asks for
one, quantises it to 4 bits and lets it go: the memory is that of a safetensors folder. Other
architectures take transformers' reader and are quantised layer by layer afterwards; that peaks at
the whole model in the compute dtype.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from qaroma.method.linear import uncalled_layers
from qaroma.model.devices import matrix_to_host, move_all_but_layers

# Architectures whose tensors are those of transformers but for their names (gguf's own table) and the order of
# llama's query and key rows. Experts are fused in the file: a name is then missing, and transformers' reader is taken.
_STREAMED = frozenset({"llama", "qwen2", "qwen3"})
_CHUNK_ELEMENTS = 1 << 22
_UINT32, _STRING = 4, 8  # types of the format's metadata
# transformers' name of a special token, and llama.cpp's.
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


class LazyTensor:
    """One tensor of the file, dequantised when the loader indexes it.

    Args:
        stored: gguf's ReaderTensor: its `data` are rows of the mapped file.
        dtype: what it is dequantised to.
        heads: undo llama.cpp's reordering of the rows of a rotary projection with so many heads; None: leave.
    """

    def __init__(self, stored: Any, dtype: torch.dtype, heads: int | None = None) -> None:
        self._stored = stored
        self._dtype = dtype
        self._heads = heads

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as torch has it (gguf lists the fastest dimension first)."""
        return tuple(int(size) for size in reversed(self._stored.shape))

    def __getitem__(self, index: Any) -> Tensor:
        """Dequantise in slices of rows, since gguf's fp32 copy of a whole embedding is gigabytes."""
        from gguf import dequantize

        out = torch.empty(self.shape, dtype=self._dtype)
        data, kind = self._stored.data, self._stored.tensor_type
        rows = max(1, _CHUNK_ELEMENTS // max(1, out[0].numel()))
        for start in range(0, out.shape[0], rows):
            out[start : start + rows] = torch.from_numpy(dequantize(data[start : start + rows], kind).copy())
        if self._heads is not None:
            # llama.cpp stores the halves of each head's rotary rows interleaved (convert_hf_to_gguf.py, permute).
            halves = out.view(self._heads, out.shape[0] // self._heads // 2, 2, *self.shape[1:])
            out = halves.transpose(1, 2).reshape(self.shape)
        return out[index]


def lazy_state_dict(path: Path, model_class: Any, config: Any, dtype: torch.dtype) -> dict[str, LazyTensor] | None:
    """List a GGUF file's tensors under transformers' names.

    Args:
        path: the .gguf file.
        model_class: the transformers class that will hold them.
        config: its configuration, as transformers read it from the file.
        dtype: what the tensors are dequantised to.

    Returns:
        Parameter name to tensor; None where the file cannot be mapped one to one.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    reader = GGUFReader(path)
    field = reader.fields.get("general.architecture")
    name = field.contents() if field is not None else None
    architecture = next((key for key, value in MODEL_ARCH_NAMES.items() if value == name), None)
    if name not in _STREAMED or architecture is None:
        return None
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    with torch.device("meta"):
        wanted = list(model_class(config).state_dict())
    found: dict[str, LazyTensor] = {}
    for wanted_name in wanted:
        tensor = stored.get(names.get_name(wanted_name, try_suffixes=(".weight", ".bias")))
        if tensor is not None:
            heads = _rotary_heads(tensor.name, config) if name == "llama" else None
            found[wanted_name] = LazyTensor(tensor, dtype, heads)
        elif not (config.tie_word_embeddings and wanted_name.startswith("lm_head.")):
            return None
    return found


def _rotary_heads(name: str, config: Any) -> int | None:
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    if ".attn_k." in name:
        return int(config.num_key_value_heads)
    return None


def load_gguf(
    folder: str,
    file: str,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    bnb_config: Any,
    host_layers: bool = False,
) -> tuple[Any, Mapping[str, Any]]:
    """Load a causal language model from a GGUF file.

    Args:
        folder: where the file lies.
        file: its name.
        config: the configuration read from it.
        dtype: compute dtype of everything that is not quantised.
        device: where the model goes.
        attention: transformers' attention implementation; None leaves the choice to it.
        bnb_config: transformers' BitsAndBytesConfig, or None for a dense model.
        host_layers: leave the matrices of the layers in host memory.

    Returns:
        The model, and transformers' loading information.
    """
    import transformers

    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "output_loading_info": True}
    lazy = lazy_state_dict(Path(folder) / file, model_class, config, dtype)
    if lazy is not None:
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=lazy, device_map={"": device}, quantization_config=bnb_config, **settings
        )
    else:
        model, info = model_class.from_pretrained(
            folder,
            gguf_file=file,
            config=config,
            device_map={"": "cpu"},
            **read_dense(),
            **settings,
        )
        _leave_gguf(model)
        if bnb_config is not None:
            quantise_linears(model, bnb_config, device, host_layers=host_layers)
        if host_layers:
            move_all_but_layers(model.requires_grad_(False), device)
        else:
            model.to(device)
    model.config.name_or_path = str(Path(folder) / file)
    return model, info


def read_dense() -> dict[str, Any]:
    """Options of ``from_pretrained`` that have transformers dequantise a GGUF file; before it knew others it always
    did."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _leave_gguf(model: Any) -> None:
    """Take off transformers' marks of a quantised model: the weights are plain from here on."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False


def quantise_linears(model: Any, bnb_config: Any, device: torch.device, *, host_layers: bool = False) -> None:
    """Put bitsandbytes' 4-bit layers in the place of a dense model's linear layers, one after another.

    Args:
        model: a transformers model on the host; its output head stays as it is.
        bnb_config: transformers' BitsAndBytesConfig.
        device: where the weights are quantised and stay.
        host_layers: bring them back to the host.
    """
    from qaroma.model.bnb import bnb

    head, uncalled = model.get_output_embeddings(), uncalled_layers(model)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head or name in uncalled:
            continue
        with torch.device("meta"):
            new = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=bnb_config.bnb_4bit_compute_dtype,
                compress_statistics=bnb_config.bnb_4bit_use_double_quant,
                quant_type=bnb_config.bnb_4bit_quant_type,
            )
        settings = new.weight.__dict__
        new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **settings).to(device)
        new.bias = module.bias
        if host_layers:
            matrix_to_host(new, "weight")
        model.set_submodule(name, new)
        del module  # the dense weight goes before the next one is quantised
    model.config.quantization_config = bnb_config
    model.is_loaded_in_4bit = True


def load_gguf_tokenizer(folder: str, file: str) -> Any:
    """Load the tokenizer that a GGUF file carries, with its special tokens and the digits of SmolLM's put right.

    transformers before 5.18 takes the token that ends an answer from the key of the one that begins a text. No version
    follows `tokenizer.ggml.pre` of the files that it converts as GPT-2's: SmolLM's tokenizer cuts digits off before all
    else ('smollm' in llama.cpp), which decides how white space before a number is cut.

    Args:
        folder: where the file lies.
        file: its name.

    Returns:
        The tokenizer, as transformers has it.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with _alone(Path(folder) / file) as apart:
        tokenizer = AutoTokenizer.from_pretrained(apart, gguf_file=file)
    tokenizer.name_or_path = folder
    for name, key in _SPECIAL_TOKENS.items():
        number = metadata_number(Path(folder) / file, f"tokenizer.ggml.{key}_token_id")
        if number is not None and number != getattr(tokenizer, f"{name}_id"):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    if metadata_string(Path(folder) / file, "tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A folder that holds a file and nothing beside it, by a link.

    Where a tokenizer.json lies beside a GGUF file, as in every export, transformers takes its vocabulary and no
    special token from anywhere.
    """
    with TemporaryDirectory() as folder:
        try:
            (Path(folder) / path.name).symlink_to(path.resolve())
        except OSError:  # Windows has links for some users only
            yield path.parent
        else:
            yield Path(folder)


def metadata_string(path: Path, key: str) -> str | None:
    """Read one string of a GGUF file's metadata, without gguf's reader, which takes seconds for the vocabulary.

    Args:
        path: the .gguf file.
        key: name of a string in its metadata.

    Returns:
        The string, or None where there is none under that key.
    """
    found = _metadata(path, key, _STRING, lambda content, at: (at + 8, *struct.unpack_from("<Q", content, at)))
    return None if found is None else found.decode()


def metadata_number(path: Path, key: str) -> int | None:
    """Read one number of a GGUF file's metadata, as :func:`metadata_string` does; None where there is none."""
    found = _metadata(path, key, _UINT32, lambda content, at: (at, 4))
    return None if found is None else int.from_bytes(found, "little")


def _metadata(path: Path, key: str, kind: int, place: Callable[[Any, int], tuple[int, int]]) -> bytes | None:
    """The value of a key; as the format has it: length of the key, key, type, value. ``place`` finds it from there."""
    name = key.encode()
    entry = struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(entry)
        if at < 0:
            return None
        start, length = place(content, at + len(entry))
        return content[start : start + length]

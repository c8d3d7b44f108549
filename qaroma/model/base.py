"""Loading a base model so that its linear layers lie in 4 bits and everything else in the compute dtype.

Legend: M out-features, N in-features of a linear layer, whose weight W is (M, N).

The weights come parameter by parameter from the mapped files: one tensor is read, quantised on its
device and let go before the next, so that the host needs the quantised model and a tensor or two.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qaroma.errors import QaromaError
from qaroma.method.head import classifier_around, classifier_head, unsaid_about_the_head
from qaroma.method.linear import is_linear, uncalled_layers
from qaroma.model.attention import repeat_keys, wants_repeated_keys
from qaroma.model.bnb import bnb
from qaroma.model.builtin import ResolvedModel, resolve_model
from qaroma.model.complete import require_complete, require_shapes
from qaroma.model.devices import device_map, layers_go_to_host, without_hooks
from qaroma.model.failures import explained, readable
from qaroma.model.found import FoundModel, find_model, loader_keywords, stored_quantization
from qaroma.model.gguf import load_gguf, load_gguf_tokenizer
from qaroma.model.hostmemory import FreedMemoryGoesBack
from qaroma.model.norms import use_torchs_norms
from qaroma.model.positions import refuse_longer
from qaroma.model.precision import resolve_dtype
from qaroma.model.skeleton import skeleton
from qaroma.model.tokenizer_file import require_bounded
from qaroma.model.weight_files import require_safetensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SAMPLES = 4096
_REMOTE = "transformers_modules"  # the package under which transformers imports code of models
_NO_LIMIT = 10**9


def resolve_device(name: str | torch.device | None) -> torch.device:
    """Turn the name of a device into a device that exists.

    Args:
        name: 'auto' or None (CUDA where there is one), 'cpu', 'cuda', 'cuda:1', or a device.

    Returns:
        The device; a CUDA device always with its index.

    Raises:
        QaromaError: CUDA was asked for and there is none.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise QaromaError("got device cuda, but torch sees no CUDA device. Type: --device cpu")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def device_name(device: torch.device) -> str:
    """What a device is called: the GPU's own name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def load_model_config(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Load a model's configuration alone, for what must be known before any weight is read.

    Args:
        model: 'smollm2-135m', a folder, a .gguf file, or a hub id.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        transformers' configuration.

    Raises:
        QaromaError: no such model, no network, or one that cannot be read; the sentence says what to do.
    """
    return find_model(model, revision=revision, trust_remote_code=trust_remote_code).config


def load_tokenizer(
    model: str | Path | FoundModel, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        model: 'smollm2-135m', a folder, a .gguf file, or a hub id; or what :func:`find_model` found.
        revision: branch, tag or commit on the hub; of a found model, its own.
        trust_remote_code: run Python code that comes with the model; of a found model, its own.

    Returns:
        transformers' tokenizer.

    Raises:
        QaromaError: as :func:`load_model_config`, and a model that brings no tokenizer.
    """
    from transformers import AutoTokenizer

    if isinstance(model, FoundModel):
        place = model.place
        where = {**model.keywords(), "config": model.config}  # or transformers reads it again
    else:
        place = resolve_model(model)
        where = loader_keywords(place, revision, trust_remote_code)
    name = model.name if isinstance(model, FoundModel) else str(model)
    with readable(name, "tokenizer", gguf=place.gguf_file is not None):
        if place.gguf_file is not None:
            tokenizer = load_gguf_tokenizer(place.folder_or_id, place.gguf_file)
        else:
            _require_tokenizer(name, place)
            require_bounded(lambda file: place.file(file, revision=where.get("revision")))
            tokenizer = AutoTokenizer.from_pretrained(place.folder_or_id, **where)
    if tokenizer.model_max_length > _NO_LIMIT:
        if not isinstance(model, FoundModel):
            model = find_model(model, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer.model_max_length = model.longest_input or tokenizer.model_max_length
    return tokenizer


def _require_tokenizer(model: str, place: ResolvedModel) -> None:
    """A folder without tokenizer files makes transformers build an empty one for some models."""
    folder = Path(place.folder_or_id)
    patterns = ("tokenizer*", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in patterns):
        raise QaromaError(
            f"'{model}' has no tokenizer files; expected tokenizer.json. Copy them from the original model"
        )


def load_base(
    model: str | Path | FoundModel,
    *,
    quantization: str = "nf4",
    double_quantization: bool = True,
    quantize_head: bool = False,
    compute_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
    num_labels: int | None = None,
    host_embeddings: bool = False,
    host_layers: bool = False,
) -> PreTrainedModel:
    """Load a language model, frozen, its linear layers in 4 bits but for the output head.

    A checkpoint that bitsandbytes quantised to 4 bits before is loaded as it is, byte for byte.

    Args:
        model: 'smollm2-135m', a folder, a .gguf file, or a hub id; or what :func:`find_model` found.
        quantization: 'nf4', 'fp4', or 'none' for the compute dtype throughout.
        double_quantization: quantise the quantisation constants too.
        quantize_head: the output head in 4 bits too, unless it shares its table with the embeddings.
        compute_dtype: dtype of embeddings, norms, head and arithmetic; None is what
            :func:`~qaroma.model.precision.resolve_dtype` makes of ``auto``.
        device: 'cuda', 'cpu' or a device; None is CUDA where there is one.
        attention: 'sdpa', 'eager' or 'flash_attention_2'.
        revision: branch, tag or commit on the hub; of a found model, its own.
        trust_remote_code: run Python code that comes with the model; of a found model, its own.
        num_labels: None for a causal language model; else one for sequence classification with so many
            outputs, whose new head (:func:`qaroma.method.head.head_names`) ``new_parameters`` names.
        host_embeddings: leave a causal model's input embeddings in host memory, for memory levels that keep
            them there, so that they never take the device's. Not done where the head shares their table, nor
            with a GGUF file or a checkpoint that is stored in 4 bits.
        host_layers: leave the matrices of all layers in host memory, each quantised on the device, for
            :func:`qaroma.engine.streaming.stream_layers`: they cannot compute before.

    Returns:
        The model in eval mode; no parameter requires a gradient.

    Raises:
        QaromaError: a model that is missing, gated, damaged, incomplete, quantised in another way, or
            needs remote code that was not allowed; the sentence says what to do.
    """
    if quantization not in ("nf4", "fp4", "none"):
        raise QaromaError(f"got quantization '{quantization}'; expected nf4, fp4 or none")
    target = resolve_device(device)
    if not isinstance(model, FoundModel):
        model = find_model(model, revision=revision, trust_remote_code=trust_remote_code)
    dtype = compute_dtype if compute_dtype is not None else resolve_dtype("auto", target, model.config)
    config, classifier = copy.deepcopy(model.config), num_labels is not None
    if classifier:
        config.num_labels = num_labels
    # Read as the usual arithmetic reads it: the same packed bytes, and a fingerprint that fp16's short range spares.
    read_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    stored = stored_quantization(config, model.name)
    bnb_config = None
    if stored is not None:
        _tell_stored(model.name, stored, quantization, double_quantization)
    elif quantization != "none":
        with explained(model.name, gguf=model.place.gguf_file is not None):
            dense = _left_dense(model, config, quantize_head, classifier)
        bnb_config = _bnb_config(quantization, double_quantization, read_dtype, dense)
    apart = host_embeddings and not classifier and stored is None and model.place.gguf_file is None
    network, info = _read(
        model, config, bnb_config, read_dtype, target, _implementation(attention),
        classifier=classifier, host_embeddings=apart, host_layers=host_layers,
    )  # fmt: skip
    require_complete(model.name, network, info["missing_keys"], classifier=classifier)
    require_shapes(model.name, network)
    refuse_longer(model.name, network)
    _settle(network, dtype)
    if attention == "sdpa" and wants_repeated_keys(config, target, dtype):
        repeat_keys(network)
    if target.type == "cuda":
        use_torchs_norms(network)
    return network


def _bnb_config(quantization: str, double_quantization: bool, dtype: torch.dtype, dense: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=dense,
    )


def _left_dense(found: FoundModel, config: Any, quantize_head: bool, classifier: bool) -> list[str]:
    """Modules that stay dense: the head, layers whose weights the model's own code multiplies by, and those of a
    subclass of ``nn.Linear`` that do more than multiply (Llama 4's router), which transformers 5.4 would replace."""
    from transformers.quantizers.base import get_keys_to_not_convert

    network = skeleton(config, trust_remote_code=found.trust_remote_code, classifier=classifier)
    subclasses = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear}
    inside = sorted(uncalled_layers(network)) + [name for name, module in subclasses.items() if not is_linear(module)]
    if classifier:
        return [*classifier_head(config), "pooler", *inside]
    packed_head = quantize_head and not config.get_text_config().tie_word_embeddings
    return inside if packed_head else [*get_keys_to_not_convert(network), *inside]


def _read(
    found: FoundModel, config: Any, bnb_config: Any, dtype: torch.dtype, target: torch.device,
    attention: str | None, *, classifier: bool, host_embeddings: bool, host_layers: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """The model with its weights, and what transformers tells of reading them."""
    place = found.place
    staying = layers_go_to_host(target) if host_layers else nullcontext()
    with explained(found.name, gguf=place.gguf_file is not None), FreedMemoryGoesBack(), staying:
        if place.gguf_file is not None:
            network, info = load_gguf(
                place.folder_or_id, place.gguf_file, config,
                dtype=dtype, device=target, attention=attention, bnb_config=bnb_config, host_layers=host_layers,
            )  # fmt: skip
            return (classifier_around(network, config, target), info) if classifier else (network, info)
        devices = device_map(config, target, host_embeddings=host_embeddings, trust_remote_code=found.trust_remote_code)
        if bnb_config is not None:
            bnb_config.llm_int8_enable_fp32_cpu_offload = len(devices) > 1  # or any part on the CPU is refused
        return _read_checkpoint(found, config, bnb_config, dtype, devices, attention, classifier=classifier)


def _read_checkpoint(
    found: FoundModel, config: Any, bnb_config: Any, dtype: torch.dtype, devices: dict[str, Any],
    attention: str | None, *, classifier: bool,
) -> tuple[Any, Any]:  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    place = found.place
    require_safetensors(found.name, Path(place.folder_or_id))
    # A checkpoint of a classifier with other labels keeps its backbone.
    options: dict[str, Any] = {"ignore_mismatched_sizes": True} if classifier else {}
    loader = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with without_hooks(devices), unsaid_about_the_head(classifier):
        loaded: tuple[Any, Any] = loader.from_pretrained(
            place.folder_or_id,
            dtype=dtype,
            use_safetensors=True,  # a pickle can run any program
            device_map=devices,
            attn_implementation=attention,
            output_loading_info=True,
            # Given as None, it would overwrite what a quantised checkpoint says of itself.
            **({} if bnb_config is None else {"quantization_config": bnb_config}),
            config=config,
            **options,
            **found.keywords(),
        )
    return loaded


def _implementation(attention: str) -> str | None:
    """transformers' name of an attention; None for SDPA lets it take eager where a family has no SDPA (Gemma 2)."""
    return None if attention == "sdpa" else attention


def _tell_stored(model: str, stored: dict[str, Any], quantization: str, double_quantization: bool) -> None:
    kind, double = stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant", False))
    if kind != quantization or double != double_quantization:
        asked = quantization + (" with double quantisation" if double_quantization and quantization != "none" else "")
        has = kind + (" with double quantisation" if double else " without double quantisation")
        logger.warning("'%s' is stored in %s and is used so, though %s was asked for.", model, has, asked)


def _settle(network: Any, dtype: torch.dtype) -> None:
    for module in network.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On CPUs with AVX512-BF16 an eval forward would repack the weight in place into a form that has no
            # backward: training after it would get no gradient through the base.
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype  # a stored checkpoint brings its own
            module.compute_type_is_set = True
    if dtype == torch.float16:
        network.identity = fingerprint(network)
        _to_fp16(network)
    network.requires_grad_(False)
    network.eval()


def _to_fp16(network: Any) -> None:
    """Turn what lies in bf16 into fp16, a tensor at a time; what a family keeps in fp32 stays."""
    for tensor in (*network.parameters(), *network.buffers()):
        packed = getattr(tensor, "quant_state", None)
        if packed is not None:
            packed.dtype = torch.float16  # is dequantised to it at once
        elif tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.to(torch.float16)
    network.config.dtype = torch.float16


def fingerprint(model: Any) -> str:
    """Name a base by what no quantisation, device, compute dtype or adapter changes.

    A hash of its architecture and of samples, rounded to bf16, of its embeddings and norms. Linear
    layers are not looked at, since 4 bits do not give them back: two bases that differ in nothing
    else have one fingerprint.

    Args:
        model: a model from :func:`load_base`, or one that wraps it.

    Returns:
        32 hexadecimal digits.
    """
    known: str | None = getattr(model, "identity", None)  # of a model whose values the compute dtype rounded since
    if known is not None:
        return known
    config = model.config.get_text_config()
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    digest = hashlib.sha256(json.dumps({name: getattr(config, name, None) for name in names}).encode())
    digest.update(_sample(model.get_input_embeddings().weight, _SAMPLES))
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for parameter in module.parameters(recurse=False):
                digest.update(_sample(parameter, _SAMPLES // 64))
    return digest.hexdigest()[:32]


def uses_remote_code(model: Any) -> bool:
    """Whether Python code that came with the model runs in it, which ``trust_remote_code`` had to allow.

    Args:
        model: a model from :func:`load_base`.
    """
    return any(type(part).__module__.partition(".")[0] == _REMOTE for part in (model, model.config))


def _sample(parameter: Tensor, count: int) -> bytes:
    flat = parameter.detach().reshape(-1)
    # An odd stride visits all columns of a matrix whose width is a power of two.
    stride = max(1, flat.numel() // count) | 1
    picked = flat[::stride].to(torch.bfloat16).cpu().contiguous()
    return picked.view(torch.int16).numpy().astype("<i2").tobytes()

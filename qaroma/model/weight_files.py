"""The files of a checkpoint in a folder: safetensors alone, and none outside the folder."""

from __future__ import annotations

from pathlib import Path

from qaroma.errors import QaromaError
from qaroma.text.json_text import parse_json
from qaroma.text.paths import inside

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one checkpoint; a hub folder may hold others of the same weights.

    Args:
        folder: of a model.

    Returns:
        Those that the index names, or the single one; empty where there is neither.

    Raises:
        QaromaError: an index that cannot be read, or that names a file outside the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / SINGLE
        return [single] if single.is_file() else []
    return [folder / name for name in names_in(index)]


def names_in(index: Path) -> list[str]:
    """The files that the index of a checkpoint names, in their order.

    Raises:
        QaromaError: an index that cannot be read, or that names a file outside its folder.
    """
    try:
        unique = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not unique:
            raise ValueError("it names no weights")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise QaromaError(f"{index} cannot be read ({error}); copy the model again") from error
    outside = [name for name in unique if not inside(name)]
    if outside:
        raise QaromaError(
            f"{index} names the weights '{str(outside[0])[:120]}', which lie outside its folder; "
            "expected files beside it. Do not use that model"
        )
    return unique


def require_safetensors(model: str, folder: Path) -> None:
    """See to it that a local model's weights are safetensors beside its configuration.

    Args:
        model: the name that the user gave.
        folder: where it lies; one that is not there is a model of the hub.

    Raises:
        QaromaError: weights in a pickle, or outside the folder.
    """
    if folder.is_dir() and not weight_files(folder) and any(any(folder.glob(kind)) for kind in _PICKLES):
        raise QaromaError(pickled(model))


def pickled(model: str) -> str:
    """What to tell of a model whose weights are a pickle."""
    return (
        f"'{model}' has its weights in a pickle (pytorch_model.bin), which can run any program when it is opened; "
        'expected model.safetensors. Where you trust it, convert it once: python -c "from transformers import '
        f"AutoModelForCausalLM as M, AutoTokenizer as T; M.from_pretrained('{model}', use_safetensors=False)"
        f".save_pretrained('converted'); T.from_pretrained('{model}').save_pretrained('converted')\", "
        "then: --model converted"
    )

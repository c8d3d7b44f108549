"""What the libraries below say when a model cannot be loaded, as one sentence that can be acted on."""

from __future__ import annotations

import difflib
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qaroma.errors import QaromaError
from qaroma.model.builtin import SMOLLM2_NAME
from qaroma.text.bounded_calls import panicked

# Tried in this order on the whole chain of an exception, by the name of its class: transformers wraps the hub's
# errors in OSError, and their classes come from different modules in different versions.
_BY_CLASS: tuple[tuple[str, str], ...] = (
    (
        "OutOfMemoryError",
        "'{model}' does not fit in the memory that is free on the GPU ({detail}). Nothing is lost. See which programs "
        "hold the card with nvidia-smi, close them, and type the same command again",
    ),
    (
        "GatedRepoError",
        "'{model}' is gated: expected an account that has accepted its terms. "
        "Accept them at https://huggingface.co/{model}, then type: hf auth login",
    ),
    (
        "RevisionNotFoundError",
        "'{model}' has no such revision on the hub; expected one of its branches, tags or commits. "
        "Leave --set model.revision out for the newest",
    ),
    (
        "RepositoryNotFoundError",
        "'{model}' is neither a folder here nor a model on the hub that this account may see. "
        "Check the spelling; for a private or gated model type: hf auth login",
    ),
    (
        "RemoteEntryNotFoundError",
        "'{model}' on the hub lacks a file that a transformers model has ({detail}). Name another with --model",
    ),
    (
        "OfflineModeIsEnabled",
        "'{model}' is not in the local cache and HF_HUB_OFFLINE forbids to fetch it. "
        "Unset HF_HUB_OFFLINE, or give a local folder: --model FOLDER",
    ),
)
_NOT_FOUND = frozenset({"RepositoryNotFoundError", "OfflineModeIsEnabled"})
_UNREACHABLE = (
    "'{model}' is not a folder here and the hub cannot be reached to fetch it. "
    "Check the network and HF_HUB_OFFLINE, or give a local folder or .gguf file: --model FOLDER"
)
_UNREADABLE_GGUF = (
    "The GGUF file of '{model}' cannot be read ({detail}). Expected a whole file of an architecture that transformers "
    "reads. Download or copy it again, or name the original model"
)
_UNREACHABLE_CLASSES = frozenset(
    {"LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError", "ProxyError"}
)
# Then by what the message says (transformers raises OSError, ValueError and ImportError for all of these).
_BY_TEXT: tuple[tuple[str, str], ...] = (
    (r"couldn't connect to|offline mode", _UNREACHABLE),
    (
        r"trust_remote_code",
        "'{model}' brings Python code of its own, which is not run unless you say so. "
        "Read that code, then add: --trust-remote-code",
    ),
    (
        r"but Transformers does not recognize|Unrecognized model in|should have a `model_type`",
        "'{model}' is of a kind that the installed transformers does not know ({detail}). "
        "Type: pip install -U transformers",
    ),
    (
        r"Unrecognized configuration class",
        "'{model}' is not a causal language model; expected one that generates text. Name another with --model",
    ),
    (
        r"not a valid JSON|Expecting (value|property name|.* delimiter)|Unterminated string|EOF while parsing",
        "'{model}' has a damaged JSON file ({detail}). Download or copy it again",
    ),
    (
        r"(no file named|not appear to have a file named) .*(safetensors|pytorch_model)",
        "'{model}' has no weights; expected model.safetensors or its shards. Download or copy it again (those in "
        "pytorch_model.bin are not opened: a pickle can run any program)",
    ),
    (
        r"size mismatch|mismatched sizes|ignore_mismatched_sizes",
        "The weights of '{model}' do not have the shapes that its config.json says. Download or copy it again",
    ),
    (
        r"[Ff]lash[ _-]?[Aa]ttention",
        "'{model}' cannot use flash attention here ({detail}). Type: --set model.attention=sdpa",
    ),
    (r"does not support an attention implementation", "{detail} Type: --set model.attention=eager"),
)


# What a wrong byte of a GGUF file leads its readers to.
_OF_GGUF = (
    ValueError, LookupError, OSError, NotImplementedError, TypeError, AttributeError, ArithmeticError, MemoryError,
    RecursionError, struct.error,
)  # fmt: skip
_LFS = b"version https://git-lfs"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _first_sentence(error: BaseException) -> str:
    text = without_token(" ".join(str(error).split()))
    return re.split(r"(?<=[.!?]) ", text)[0][:200].rstrip(".") or type(error).__name__


def without_token(text: str) -> str:
    """A text that a hub or a proxy sent, without the account's token, which some repeat."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "(token)")
    return re.sub(r"\bhf_\w{4,}|(?<=[Bb]earer )\S+", "(token)", text)


def damaged_weights(folder: Path) -> str | None:
    """Name the first weight file of a folder that safetensors cannot open.

    Args:
        folder: a model folder; anything else has no such file.

    Returns:
        The file's name and what is wrong with it, or None where all open.
    """
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name}: {_first_sentence(error)}"
    return None


def unfinished_download(model: str) -> str | None:
    """Tell a model that has only half arrived.

    Args:
        model: a folder, or the hub id of one in the local cache.

    Returns:
        A sentence on what is missing and how to go on; None where nothing says so.
    """
    from huggingface_hub import constants

    folder = Path(model)
    cached = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "blobs"
    if any(folder.glob(".cache/huggingface/download/**/*.incomplete")):
        return (
            f"'{model}' is not downloaded whole. What is there is kept: type the same hf download command again, "
            "it goes on where it stopped"
        )
    if not folder.exists() and any(cached.glob("*.incomplete")):
        return (
            f"'{model}' is not downloaded whole. What is there is kept: with the network there and HF_HUB_OFFLINE "
            "unset, type the same command again, it goes on where it stopped"
        )
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                return (
                    f"{path.name} of '{model}' is a pointer of git-lfs, not weights. Type in that folder: git lfs pull"
                )
    return None


def _near(model: str) -> str:
    """What a name without an owner may be a misspelling of: the built-in model, or a model's folder here."""
    folders = [file.parent.name for file in Path().glob("*/config.json")]
    close = difflib.get_close_matches(model.lower(), [SMOLLM2_NAME, *folders], n=1, cutoff=0.7)
    return f". Did you mean {close[0]}?" if close and "/" not in model else ""


def explain(error: Exception, model: str, *, gguf: bool = False) -> QaromaError | None:
    """Translate an exception of transformers, huggingface_hub or safetensors.

    Args:
        error: what was raised; its causes are looked at too.
        model: the name that the user gave.
        gguf: it is a GGUF file, whose readers raise whatever a wrong byte leads to.

    Returns:
        The error to raise instead, or None where the exception is not known: then it is better
        seen whole than guessed at.
    """
    chain = list(_chain(error))
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    for name, sentence in _BY_CLASS:
        if name in names:
            near = _near(model) if name in _NOT_FOUND else ""
            return QaromaError(sentence.format(model=model, detail=_first_sentence(chain[-1])) + near)
    unfinished = unfinished_download(model)
    if unfinished is not None:
        return QaromaError(unfinished)
    if names & _UNREACHABLE_CLASSES:
        return QaromaError(_UNREACHABLE.format(model=model) + _near(model))
    if "SafetensorError" in names:
        where = damaged_weights(Path(model)) or _first_sentence(error)
        return QaromaError(f"The weights of '{model}' are damaged ({where}). Download or copy that file again")
    for link in chain:
        for pattern, sentence in _BY_TEXT:
            if re.search(pattern, str(link)):
                return QaromaError(sentence.format(model=model, detail=_first_sentence(link)))
    if gguf and isinstance(error, _OF_GGUF):
        return QaromaError(_UNREADABLE_GGUF.format(model=model, detail=_first_sentence(error)))
    missing = next((link for link in chain if isinstance(link, FileNotFoundError)), None)
    if missing is not None:
        return QaromaError(f"'{model}' lacks a file ({_first_sentence(missing)}). Download or copy it again")
    return None


@contextmanager
def explained(model: str, *, gguf: bool = False) -> Iterator[None]:
    """Raise :class:`QaromaError` instead of the known exceptions of the libraries below.

    Args:
        model: the name that the user gave, for the sentence.
        gguf: it is a GGUF file.

    Raises:
        QaromaError: where :func:`explain` knows the exception; others pass unchanged.
    """
    try:
        yield
    except QaromaError:
        raise
    except Exception as error:
        told = explain(error, model, gguf=gguf)
        if told is None:
            raise
        raise told from error


@contextmanager
def readable(model: str, what: str, *, gguf: bool = False) -> Iterator[None]:
    """As :func:`explained`, for the small files of a model, whose readers raise whatever a wrong value leads to.

    Args:
        model: the name that the user gave.
        what: is read, for the sentence: its configuration or its tokenizer.
        gguf: it is a GGUF file.

    Raises:
        QaromaError: whatever is raised inside.
    """
    try:
        with explained(model, gguf=gguf):
            yield
    except QaromaError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not panicked(error):
            raise
        raise QaromaError(
            f"the {what} of '{model}' cannot be read ({type(error).__name__}: {_first_sentence(error)}). "
            "Download or copy the model again"
        ) from error

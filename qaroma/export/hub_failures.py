"""What the hub refuses while something is pushed to it, as one sentence that can be acted on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qaroma.errors import QaromaError
from qaroma.model.failures import without_token

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_UNREACHABLE = frozenset(
    {"ConnectError", "ConnectTimeout", "ReadTimeout", "WriteTimeout", "ReadError", "WriteError", "ProxyError",
     "RemoteProtocolError", "ConnectionError"}
)  # fmt: skip


@contextmanager
def explained(repo_id: str, *, created: bool = False) -> Iterator[None]:
    """Raise :class:`QaromaError` for what the hub or the network refuses; other exceptions pass unchanged.

    Args:
        repo_id: the repository that is pushed to.
        created: it was made just now, and is empty.
    """
    try:
        yield
    except QaromaError:
        raise
    except Exception as error:
        told = _sentence(error, repo_id)
        if told is None:
            raise
        left = f" {repo_id} has been made and is empty; the same command fills it." if created else ""
        raise QaromaError(f"{told}.{left}") from error


def _sentence(error: BaseException, repo_id: str) -> str | None:
    """What went wrong and what to do, from the first exception of the chain that is known."""
    from huggingface_hub.errors import HfHubHTTPError

    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        names = {cls.__name__ for cls in type(link).__mro__}
        if "HFValidationError" in names:
            return (
                f"'{repo_id}' is no name of a repository: expected NAMESPACE/NAME, or NAME, of letters, digits, "
                "'-', '_' and '.', at most 96 long"
            )
        if isinstance(link, HfHubHTTPError):
            return _refusal(link, names, repo_id)
        if names & _UNREACHABLE:
            return "the hub cannot be reached, so nothing was published; check the network and try again"
        if isinstance(link, json.JSONDecodeError):
            return (
                "the hub's address answers with something other than the hub does (no JSON), so nothing was published; "
                "see whether a proxy or a login page stands between, and what HF_ENDPOINT says"
            )
        if isinstance(link, ValueError) and "README.md" in str(link):
            return f"the hub refuses the model card: {without_token(' '.join(str(link).split()))}"
        link = link.__cause__ or link.__context__
    return None


def _refusal(error: Any, names: set[str], repo_id: str) -> str:
    """An HTTP status as a sentence."""
    status = error.response.status_code
    said = without_token(" ".join((error.server_message or "").split()))[:200]
    detail = f" ({said})" if said else ""
    if "RevisionNotFoundError" in names:
        return f"'{repo_id}' has no such branch; leave --revision out for main"
    if status == 401:
        return (
            f"the hub does not accept the login{detail}: the token is wrong or has expired. "
            "Type: hf auth login --force; HF_TOKEN goes before it where it is set"
        )
    if status == 403:
        return (
            f"this account may not write to '{repo_id}'{detail}. Choose a name in a namespace of your own, or take a "
            f"token with write access ({TOKENS_PAGE})"
        )
    if status == 404:
        return f"the hub knows no repository '{repo_id}' that this account may see; check the spelling"
    if status == 409:
        return f"'{repo_id}' was changed by someone else meanwhile{detail}; try again"
    if status == 429:
        return f"the hub asks to wait: too many requests{detail}; try again in a few minutes"
    if status >= 500:
        return f"the hub has a problem of its own (status {status}){detail}; try again later"
    return f"the hub refuses (status {status}){detail}"

"""YAML that ends in plain values or in a :class:`yaml.YAMLError`, within a second.

PyYAML's safe loader runs no code, but it raises whatever a bad date, number or tag leads to, recurses as deep as the
text does, builds values that hold themselves, and lets a page of aliases grow to gigabytes.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.constructor import ConstructorError

from qaroma.text.characters import is_unicode

_MOST_CHARACTERS = 1 << 17
_MOST_NODES = 100_000  # with every alias counted as what it stands for
_DEEPEST = 50


# libyaml's parser is ten times as fast; the wheels of PyYAML bring it.
_SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SAFE):  # type: ignore[misc]
    """Safe values without dates: a date is text here, since no setting is one."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # int, float, bool, binascii and datetime each have their own
            shown = node.value[:40] if isinstance(node, yaml.ScalarNode) else "this"
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"{shown!r} is no {kind}", node.start_mark) from error


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The values of one YAML document, and the nodes that say on which line each stands.

    Args:
        text: the document.

    Returns:
        Mappings, lists, texts, numbers, truth values and None; and the document's root node.

    Raises:
        yaml.YAMLError: no YAML, a value that its tag does not allow, or a document beyond the bounds above.
    """
    if len(text) > _MOST_CHARACTERS:
        raise yaml.YAMLError(f"it is longer than {_MOST_CHARACTERS:,} characters")
    if not is_unicode(text):
        raise yaml.YAMLError("half of a surrogate pair, which is no character")
    _check_depth(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _check_size(node)
        return _plain(loader.construct_document(node)), node
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    """Look how deep a text is nested, which nothing but composing it is harmed by."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ConstructorError(None, None, f"nested deeper than {_DEEPEST} levels", event.start_mark)  # type: ignore[arg-type]


def _check_size(root: yaml.Node) -> None:
    """Count nodes with aliases written out, from the leaves up; an alias of what it stands in has no end."""
    counts: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        known = counts.get(id(node))
        if known == 0:
            raise ConstructorError(None, None, "an alias of what it stands in", node.start_mark)
        if known is None:
            counts[id(node)] = 0
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
            known = counts[id(node)] = 1 + sum(map(count, parts))
            if known > _MOST_NODES:
                raise ConstructorError(None, None, f"aliases of more than {_MOST_NODES:,} values", node.start_mark)
        return known

    count(root)


def _plain(value: Any) -> Any:
    """The value without what only tags make (sets, pairs, bytes, dates), and with every alias a value of its own.

    Raises:
        yaml.YAMLError: one of those, or text that is no Unicode.
    """
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        if not is_unicode(value):
            raise yaml.YAMLError("half of a surrogate pair, which is no character")
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, tuple):  # a key such as [a, b]
        return str(value)
    raise yaml.YAMLError(f"a value of the kind {type(value).__name__}, which no setting takes")

"""Chat templates that end: a template is a program of somebody's, and nested loops of one take for ever.

Jinja's sandbox keeps a template from the machine but not from its time and memory. So the program is changed before it
is compiled: each turn of a loop begins with a look at the clock, and what sums and products come to is measured.
That needs no signal and no other process, and holds on every system.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes

_SECONDS = 5.0
_LARGEST = 1 << 26  # characters of a text, items of a list, bits of a number
_MOST_BITS = 1 << 16  # of a power, which takes more than linear time
_CLOCK, _SUM, _JOINED = "qaroma_clock", "qaroma_sum", "qaroma_joined"
_PRODUCT, _POWER = "qaroma_product", "qaroma_power"


def render_bounded(text: str, **values: Any) -> str:
    """The text that a chat template makes of a conversation, in transformers' environment.

    Args:
        text: the template.
        values: what it may name.

    Raises:
        jinja2.TemplateError: it takes too long or too much; templates raise whatever else Jinja and Python do.
    """
    end = time.monotonic() + _SECONDS

    def clock() -> str:
        if time.monotonic() > end:
            raise TemplateError(f"it takes more than {_SECONDS:g} seconds for one conversation")
        return ""

    rendered: str = _compiled(text).render(**values, **{_CLOCK: clock, **_OPERATORS})
    return rendered


@lru_cache(maxsize=16)
def _compiled(text: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # Of an empty template: compiling this one as it stands would work out 9**9**9 then and there.
    environment = _compile_jinja_template("").environment
    return environment.from_string(_with_bounds(environment.parse(text)))


def _with_bounds(tree: nodes.Template) -> nodes.Template:
    """Put the looks into a template's program."""
    for node in [*reversed(list(tree.find_all(nodes.Node))), tree]:  # from the leaves up
        if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
            look = nodes.ExprStmt(_call(_CLOCK, [], node.lineno), lineno=node.lineno)
            node.body = [look, *node.body]
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Node):
                setattr(node, field, _sized(value))
            elif isinstance(value, list):
                setattr(node, field, [_sized(item) if isinstance(item, nodes.Node) else item for item in value])
    return tree


def _sized(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Add):
        # What stands on the left is bounded already; one call does for a whole chain of sums.
        left = node.left
        chain = left.args if isinstance(left, nodes.Call) and getattr(left.node, "name", None) == _SUM else [left]
        return _call(_SUM, [*chain, node.right], node.lineno)
    if isinstance(node, nodes.Concat):
        return _call(_JOINED, node.nodes, node.lineno)
    if isinstance(node, (nodes.Mul, nodes.Pow)):
        return _call(_PRODUCT if isinstance(node, nodes.Mul) else _POWER, [node.left, node.right], node.lineno)
    return node


def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load", lineno=lineno), arguments, [], None, None, lineno=lineno)


def _sum(first: Any, *others: Any) -> Any:
    for other in others:
        first = first + other
        if isinstance(first, (str, list, tuple)) and len(first) > _LARGEST:
            raise _too_large()
    return first


def _joined(*parts: Any) -> str:
    return str(_sum(*map(str, parts)))


def _product(left: Any, right: Any) -> Any:
    for one, times in ((left, right), (right, left)):
        if isinstance(one, (str, list, tuple)) and isinstance(times, int) and len(one) * times > _LARGEST:
            raise _too_large()
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MOST_BITS:
        raise _too_large()
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and base.bit_length() * abs(exponent) > _MOST_BITS:
        raise _too_large()
    return base**exponent


def _too_large() -> TemplateError:
    return TemplateError("it makes a text or a number that is larger than any conversation")


_OPERATORS = {_SUM: _sum, _JOINED: _joined, _PRODUCT: _product, _POWER: _power}

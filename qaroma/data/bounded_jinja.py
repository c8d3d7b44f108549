"""Chat templates that end: a template is a program of somebody's, and may take for ever or all the memory.

Jinja's sandbox keeps a template from the machine but not from its time and memory. So the program is changed before it
is compiled: each turn of a loop begins with a look at the clock, and what filters, methods, sums, products and slices
come to is measured, where it can be much from little before it is made. That needs no signal and no other process, and
holds on every system.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

from jinja2 import TemplateError, nodes, pass_context

from qaroma.data.jinja_sizes import LARGEST, of_filter, of_method, of_percent
from qaroma.text.characters import weight

_SECONDS = 5.0
_MOST = 1 << 29  # characters of all that one rendering makes, each item of a list counted as:
_ITEM = 64
_MOST_BITS = 1 << 16  # of a power, which takes more than linear time

# What no chat template needs, and would have to be bounded too.
_LEFT_OUT = (
    "batch", "filesizeformat", "forceescape", "pprint", "random", "slice", "striptags", "urlencode", "urlize",
    "wordwrap", "xmlattr", "lipsum",
)  # fmt: skip


class _Budget:
    """What is left to one rendering."""

    def __init__(self) -> None:
        self.end, self.left = time.monotonic() + _SECONDS, _MOST

    def look(self, made: int = 0) -> None:
        """See to it that there is time left, and room for so many characters."""
        self.left -= made
        if time.monotonic() > self.end:
            raise TemplateError(f"it takes more than {_SECONDS:g} seconds for one conversation")
        if self.left < 0:
            raise _too_large()


_BUDGET: ContextVar[_Budget] = ContextVar("qaroma_template_budget")


def render_bounded(text: str, **values: Any) -> str:
    """The text that a chat template makes of a conversation, in transformers' environment.

    Args:
        text: the template.
        values: what it may name.

    Raises:
        jinja2.TemplateError: it takes too long or too much; templates raise whatever else Jinja and Python do.
    """
    before = _BUDGET.set(_Budget())
    try:
        rendered: str = _compiled(text).render(**values)
    finally:
        _BUDGET.reset(before)
    return rendered


@lru_cache(maxsize=16)
def _compiled(text: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # Of an empty template: compiling this one as it stands would work out 9**9**9 then and there.
    environment = _compile_jinja_template("").environment.overlay()
    environment.filters = {n: _bounded(n, f) for n, f in environment.filters.items() if n not in _LEFT_OUT}
    environment.tests = {n: _bounded("", t) for n, t in environment.tests.items()}
    environment.globals = {n: v for n, v in environment.globals.items() if n not in _LEFT_OUT} | _OPERATORS
    environment.globals["strftime_now"] = _bounded("strftime_now", environment.globals["strftime_now"])
    environment.finalize = _shown
    return environment.from_string(_with_bounds(environment.parse(text)))


def _bounded(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that is measured."""
    first = int(hasattr(work, "jinja_pass_arg"))  # the environment or context comes before the values

    @wraps(work)
    def bounded(*values: Any, **options: Any) -> Any:
        given, values = values[:first], values[first:]
        if name in ("join", "sum") and values and isinstance(values[0], Iterator):
            values = (list(values[0]), *values[1:])
        _require(of_filter(name, *values, **options))
        return _made(work(*given, *values, **options))

    return bounded


def _with_bounds(tree: nodes.Template) -> nodes.Template:
    """Put the looks into a template's program."""
    for node in [*reversed(list(tree.find_all(nodes.Node))), tree]:  # from the leaves up
        if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
            words = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            look = nodes.ExprStmt(_call(_look, [nodes.Const(words)], node.lineno), lineno=node.lineno)
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
        chain = left.args if isinstance(left, nodes.Call) and _is(left.node, _sum) else [left]
        return _call(_sum, [*chain, node.right], node.lineno)
    if isinstance(node, nodes.Concat):
        return _call(_joined, node.nodes, node.lineno)
    if type(node) in _BINARY:
        return _call(_BINARY[type(node)], [node.left, node.right], node.lineno)  # type: ignore[attr-defined]
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _call(_made, [node], node.lineno)
    if isinstance(node, nodes.Call) and not any(_is(node.node, ours) for ours in _OURS):
        node.args = [node.node, *node.args]
        node.node = nodes.Name(_name(_called), "load", lineno=node.lineno)
    return node


def _call(work: Callable[..., Any], arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    return nodes.Call(nodes.Name(_name(work), "load", lineno=lineno), arguments, [], None, None, lineno=lineno)


def _name(work: Callable[..., Any]) -> str:
    """The name in a template of a function of this file."""
    return f"qaroma{work.__name__}"


def _is(node: nodes.Node, work: Callable[..., Any]) -> bool:
    return isinstance(node, nodes.Name) and node.name == _name(work)


def _look(words: int) -> str:
    _BUDGET.get().look(words)
    return ""


def _require(size: int) -> None:
    """See to it that what is about to be made is no larger than any conversation."""
    if size > LARGEST:
        raise _too_large()
    _BUDGET.get().look()


def _made(value: Any) -> Any:
    """A value that was made, measured."""
    if isinstance(value, (str, bytes)):
        _require(len(value))
        _BUDGET.get().look(len(value))
    elif isinstance(value, (list, tuple, dict)):
        _BUDGET.get().look(_ITEM * len(value))
    return value


def _shown(value: Any) -> Any:
    """A value that is written into the text."""
    size = weight(value)
    _require(size)
    _BUDGET.get().look(size)
    return value


@pass_context
def _called(context: Any, work: Any, *values: Any, **options: Any) -> Any:
    whole = getattr(work, "__wrapped__", work)  # the sandbox has a str.format of its own
    owner = getattr(whole, "__self__", None)
    if isinstance(owner, (str, bytes, int, float)):
        _require(of_method(owner, whole.__name__, *values, **options))
    return _made(context.environment.call(context, work, *values, **options))


def _sum(first: Any, *others: Any) -> Any:
    for other in others:
        first = _made(first + other)
    return first


def _joined(*parts: Any) -> str:
    _require(sum(map(weight, parts)))
    return str(_made("".join(map(str, parts))))


def _product(left: Any, right: Any) -> Any:
    for one, times in ((left, right), (right, left)):
        if isinstance(one, (str, bytes)) and isinstance(times, int):
            _require(len(one) * times)
        if isinstance(one, (list, tuple)) and isinstance(times, int):
            _require(_ITEM * len(one) * times)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MOST_BITS:
        raise _too_large()
    return _made(left * right)


def _power(base: Any, exponent: Any) -> Any:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and base.bit_length() * abs(exponent) > _MOST_BITS:
        raise _too_large()
    return base**exponent


def _remainder(left: Any, right: Any) -> Any:
    if isinstance(left, (str, bytes)):
        _require(of_percent(str(left), right))
    return _made(left % right)


def _too_large() -> TemplateError:
    return TemplateError("it makes a text or a number that is larger than any conversation")


_BINARY: dict[type[nodes.Node], Callable[..., Any]] = {
    nodes.Mul: _product, nodes.Pow: _power, nodes.Mod: _remainder,
}  # fmt: skip
_OURS = (_look, _made, _called, _sum, _joined, _product, _power, _remainder)
_OPERATORS = {_name(work): work for work in _OURS}

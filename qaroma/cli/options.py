"""Command-line options made from the fields of the configuration.

Type, bounds, default and help text of such an option come from the field, so that none of them is
written twice.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from qaroma.config.load import config_fields, option_name, read_settings
from qaroma.config.schema import LARGEST, Config

_Function = TypeVar("_Function", bound=Callable[..., Any])
_FIELDS = config_fields()
_SEPARATOR = "__"

CONFIG_OPTION = click.option("--config", metavar="FILE", help="YAML file, or the name of one that comes with qaroma.")
SET_OPTION = click.option(
    "--set", "sets", metavar="KEY=VALUE", multiple=True, help="Any setting, as growth.eps_out=1e-3. Repeatable."
)


class _Integer(click.IntRange):
    name = "integer"  # "is not a valid integer range" says nothing to who typed a word


class _Number(click.FloatRange):
    name = "number"


def count(least: int = 1, most: int = LARGEST) -> click.IntRange:
    """The type of an option that counts something."""
    return _Integer(least, most)


def number(least: float, most: float, *, min_open: bool = False, max_open: bool = False) -> click.FloatRange:
    """The type of an option that takes a number between two, without those that are open."""
    return _Number(least, most, min_open=min_open, max_open=max_open)


def config_option(key: str, *, text: str | None = None) -> Callable[[_Function], _Function]:
    """The click option of one configuration field.

    Its value arrives under a parameter name that :func:`read_config` understands. It has no default
    of its own: one that was not typed leaves the configuration as it is.

    Args:
        key: the dotted key, as ``training.learning_rate``.
        text: help text where the field's description does not fit the command.
    """
    field = _FIELDS[key]
    kind, bounds = _kind(field)
    name = option_name(key)
    help_text = (text or field.description or "") + _default(field)
    parameter = key.replace(".", _SEPARATOR)
    if key == "data.train":
        return click.option(name, parameter, metavar="PATH[:WEIGHT]", multiple=True, help=help_text + " Repeatable.")
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        return click.option(
            name, parameter, type=_click_type(inner, []), metavar=_metavar(inner), multiple=True,
            help=help_text + " Repeatable.",
        )  # fmt: skip
    if kind is bool:
        return click.option(name, parameter, is_flag=True, default=None, help=help_text)
    return click.option(name, parameter, type=_click_type(kind, bounds), metavar=_metavar(kind), help=help_text)


def config_options(*keys: str) -> Callable[[_Function], _Function]:
    """Several :func:`config_option` in the order in which the help lists them."""

    def decorate(function: _Function) -> _Function:
        for key in reversed(keys):
            function = config_option(key)(function)
        return function

    return decorate


def read_config(config: str | None, parameters: Mapping[str, Any], sets: Sequence[str]) -> Config:
    """The configuration from ``--config``, the options made by :func:`config_option`, and ``--set``.

    Args:
        config: YAML file or name, or None.
        parameters: the command's remaining parameters.
        sets: ``key=value`` texts.

    Raises:
        QaromaError: All problems at once.
    """
    return read_settings(config, _typed(parameters), sets)


def typed_keys(parameters: Mapping[str, Any], sets: Sequence[str]) -> list[str]:
    """The dotted keys of all settings that were given on the command line, by an option or by ``--set``."""
    return [*_typed(parameters), *(text.partition("=")[0].strip() for text in sets)]


def _typed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of the options that were typed."""
    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    return {
        name.replace(_SEPARATOR, "."): list(value) if isinstance(value, tuple) else value
        for name, value in parameters.items()
        if context.get_parameter_source(name) == typed
    }


def _kind(field: FieldInfo) -> tuple[Any, list[Any]]:
    """The type of a field without ``None``, and its bounds."""
    annotation: Any = field.annotation
    bounds = list(field.metadata)
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(member for member in get_args(annotation) if member is not type(None))
    if hasattr(annotation, "__metadata__"):
        bounds += annotation.__metadata__
        annotation = get_args(annotation)[0]
    return annotation, bounds


def _click_type(kind: Any, bounds: Sequence[Any]) -> click.ParamType[Any]:
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if kind not in (int, float):
        return click.STRING
    low = next((bound for bound in bounds if isinstance(bound, (Ge, Gt))), None)
    high = next((bound for bound in bounds if isinstance(bound, (Le, Lt))), None)
    least: Any = None if low is None else low.ge if isinstance(low, Ge) else low.gt
    most: Any = None if high is None else high.le if isinstance(high, Le) else high.lt
    if kind is int:
        return _Integer(least, most, min_open=isinstance(low, Gt), max_open=isinstance(high, Lt))
    return _Number(least, most, min_open=isinstance(low, Gt), max_open=isinstance(high, Lt))


def _metavar(kind: Any) -> str | None:
    if get_origin(kind) is dict:
        return "KEY=NAME,..."
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return names.get(kind)


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default_factory is not None or field.default is None or field.default is False:
        return ""
    return f"  [default: {field.default}]"

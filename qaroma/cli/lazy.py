"""A command group that imports a command's module when the command is used, not before."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """A group whose command ``name`` is the object ``command`` of the module ``<package>.<name>``.

    Args:
        package: dotted name of the package that holds the modules.
        commands_help: each command's name (with ``-`` for ``_`` in the module's name) and the line
            that stands beside it in the group's help; that list is shown without importing them.
        sections: the titles of the list, each by the command that it stands above; None is one title for all.
    """

    def __init__(
        self,
        *args: Any,
        package: str,
        commands_help: Mapping[str, str],
        sections: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._package = package
        self._commands_help = commands_help
        self._sections = sections or {next(iter(commands_help)): "Commands"}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands' names, in the order of their declaration."""
        return list(self._commands_help)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, its module freshly imported; None for an unknown name."""
        if cmd_name not in self._commands_help:
            return None
        module = importlib.import_module(f"{self._package}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown name comes with the nearest known one."""
        if args and not args[0].startswith("-") and args[0] not in self._commands_help:
            near = difflib.get_close_matches(args[0], self._commands_help, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(self._commands_help)}"
            ctx.fail(f"No such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands from their declared lines, in sections of one width."""
        width = max(map(len, self._commands_help))
        listed: dict[str, list[tuple[str, str]]] = {}
        for name, line in self._commands_help.items():
            title = self._sections.get(name) or list(listed)[-1]
            listed.setdefault(title, []).append((name.ljust(width), line))
        for title, lines in listed.items():
            with formatter.section(title):
                formatter.write_dl(lines)

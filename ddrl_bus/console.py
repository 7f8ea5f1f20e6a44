"""What commands share: how they end, options, words, and a stand-in for those that are imported when called."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from ddrl_bus.errors import DdrlError, UsageError


class Command(click.Command):
    """Ends the process as errors.py says, with a traceback for bugs only, or wherever --debug asks for one."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        code: Any
        try:
            code = super().main(args, **extra | {"standalone_mode": False})
        except click.ClickException as error:
            error.show()
            code = UsageError.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = 130
        except DdrlError as error:
            click.echo(traceback.format_exc() if "--debug" in args else f"error: {error}", err=True)
            code = error.exit_code
        except BrokenPipeError:
            sys.stdout = None  # whoever read it has left
            code = 0
        except Exception:
            click.echo(f"{traceback.format_exc()}this is a bug in ddrl_bus or in the environment", err=True)
            code = DdrlError.exit_code
        sys.exit(code if isinstance(code, int) else 0)


class Group(Command, click.Group):
    pass


class Elsewhere(click.Command):
    """Stands in lists of commands for the one of this name in `module`, which is imported when it is called."""

    def __init__(self, name: str, module: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._module = module

    def make_context(self, info_name: str | None, *args: Any, **extra: Any) -> click.Context:
        command: click.Command = getattr(import_module(self._module), str(self.name))
        return command.make_context(info_name, *args, **extra)


debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of every error.")
words_argument = click.argument("words", nargs=-1, metavar="[TOPO] [KEY=VALUE]...")


def split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    topologies = [word for word in words if "=" not in word]
    if len(topologies) > 1:
        raise UsageError(f"one topology at a time: got {' and '.join(topologies)}; changes to it are KEY=VALUE")
    return next(iter(topologies), None), [word for word in words if "=" in word]


def required(topology: str | None) -> str:
    if topology is None:
        raise UsageError("which topology? Give a file, or the name of a packaged one, such as quickstart")
    return topology

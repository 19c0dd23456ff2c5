"""The `zoo` command, one file for each verb.

A verb's module has a one-line docstring, `add_arguments(parser)` and `run(arguments)`. Exit status: 0; 2 if the request
was wrong, with one line on stderr; 130 after Ctrl-C; 141 if nobody reads the output any more.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import ClassVar, NoReturn

from jsonargparse import ArgumentParser

from zoo.cli import check, describe, export, generate, import_
from zoo.cli.errors import CommandError
from zoo.config import ConfigError
from zoo.schema import nearest

VERBS = {"check": check, "describe": describe, "generate": generate, "import": import_, "export": export}


class _Parser(ArgumentParser):
    spelled: ClassVar[dict[str, str]] = {}
    """Name of an argument -> how it is spelled on the command line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise CommandError(_in_plain_words(" ".join(message.split()), self))


def _in_plain_words(message: str, parser: _Parser) -> str:
    """jsonargparse's message without the names of its insides, and with the nearest option for an unknown one."""
    if surplus := re.match(r"unrecognized arguments: ([^-]\S*)", message):
        return f"{surplus[1]}: is one argument too many; remove it, or put quotes around a text with spaces"
    if unknown := re.match(r"unrecognized arguments: -*([^ =]+)", message):
        options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        return f"--{unknown[1]}: unknown option; {nearest('--' + unknown[1], options)}"
    if verb := re.match(r"argument \w+: invalid choice: '(.+?)' ", message):
        return f"{verb[1]}: unknown command; {nearest(verb[1], VERBS)}"
    if missing := re.match(r"the following arguments are required: (?:\w+\.)?(\w+)", message):
        return f"{parser.spelled[missing[1]]} is missing; `zoo COMMAND --help` says what it is"
    message = re.sub(r'^Parser key "(?:\w+\.)?(\w+)": ', r"--\1: ", message)
    return re.sub(r"^argument ", "", message)


def _parser() -> _Parser:
    parser = _Parser(prog="zoo", description="Hybrid-architecture language models from one YAML file.")
    verbs = parser.add_subcommands(required=False, dest="verb", metavar="COMMAND")
    for name, module in VERBS.items():
        description = module.__doc__.strip()
        verb = _Parser(description=description)
        module.add_arguments(verb)
        verb.spelled.update((action.dest, (action.option_strings or [action.metavar])[0]) for action in verb._actions)
        verbs.add_subcommand(name, verb, help=description.splitlines()[0])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zoo` with `argv` (default: sys.argv) and return the exit status."""
    if sys.stderr is None:  # closed, as by `2>&-`
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    if sys.stdout is None:
        print("error: the output is closed; give it a terminal, a file or a pipe", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character gets its number
    try:
        arguments = _parser().parse_args(None if argv is None else list(argv))
        if arguments.verb is None:
            raise CommandError(f"give a command: {', '.join(VERBS)}; `zoo --help` says what they do")
        VERBS[arguments.verb].run(arguments[arguments.verb])
        sys.stdout.flush()
    except (CommandError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's own last flush is quiet
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"error: the output cannot be written ({error.strerror}); give it another place", file=sys.stderr)
        return 2
    return 0

"""From settings classes to command-line options and back, with help for people and mistakes in one line."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from bti_fast.engine.options import flag
from bti_fast.errors import UserError

KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
}
METAVARS = {int: "N", int | None: "N", float: "X", str: "NAME", str | None: "PATH"}


class Help(DefaultHelpFormatter):
    """Help as written, wrapped by paragraph, with the default beside it and no Python types."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n".join(line if line[:1] == " " else fill(line, width, indent) for line in text.splitlines())

    def _get_help_string(self, action: Any) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS, []) or action.nargs == 0:
            return text
        return f"{text} (default: {str(action.default).replace('True', 'true').replace('False', 'false')})"


class Parser(ArgumentParser):
    """jsonargparse's parser, except that a mistake is one line and the help is for people."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Help, **options)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise UserError(_one_line(message))


def _one_line(message: str) -> str:
    """jsonargparse's message in one line, with options spelled as the user spells them."""
    text = " ".join(str(message).split())
    if match := re.match(r'Parser key "([\w.]+)": (.*)', text):
        name, said = flag(match[1].rsplit(".")[-1]), match[2]
        # An option that may also be left out has a union of types, of which the first one is meant.
        union = r"Does not validate against any.*?Expected an? (<class '\w+'>) .*Given value: (.*)"
        if wrong := re.match(r"Expected an? (.*)\. Got value: (.*)", said) or re.match(union, said):
            kind = wrong[1].removeprefix("typing.").removeprefix("Literal")
            return f"{name} {wrong[2]}: must be {KINDS.get(kind, 'one of ' + kind.strip('[]'))}"
        return f"{name}: {said}"
    text = re.sub(r"^Subcommand '(\w+)' does not accept option '(.*)'$", r"\1 has no setting \2", text)
    text = re.sub(r"^Unexpected config:.*", "--config: needs lines such as batch_size: 4", text)
    text = re.sub(r"^Problems parsing config:", "--config: is not YAML:", text)
    return text.replace("unrecognized arguments:", "unknown option")


def add_settings(
    parser: Parser, config: type, positional: Sequence[str] = (), unused: Sequence[str] = ()
) -> None:
    """One option per field of a settings class, in its groups, with its help and default; plus --config."""
    hints, groups = get_type_hints(config), {}
    for item in dataclasses.fields(config):
        if item.name in unused:
            continue
        text = item.metadata["help"].replace("%", "%%")
        several = get_origin(hints[item.name]) is tuple
        if item.name in positional:
            kind = (
                {"nargs": "*", "type": str, "default": []}
                if several
                else {"nargs": "?", "type": hints[item.name]}
            )
            parser.add_argument(item.name, help=text, **kind)
            continue
        title = item.metadata["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        kind = {"metavar": METAVARS[hints[item.name]]} if hints[item.name] in METAVARS else {}
        group.add_argument(flag(item.name), type=hints[item.name], default=item.default, help=text, **kind)
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file of settings (batch_size: 4); options given beside it win.",
    )


def settings(config: type, values: Namespace) -> Any:
    """The settings object of parsed options."""
    names = [item.name for item in dataclasses.fields(config) if item.name in values]
    plain = {name: getattr(values, name) for name in names}
    return config(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    )

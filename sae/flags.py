"""From dataclass fields to command-line flags and json, and back: one place for a setting's default, help and type.

Knows no setting by name. Bad input is a UserError: one sentence, which scripts end on with exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

C = TypeVar("C")
WANTED = {int: "an integer (such as 10 or 1e6)", float: "a number", bool: "true or false", str: "text"}
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)  # it parses every annotation anew
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class UserError(ValueError):
    """Bad input, in one sentence: the value, what is expected, what to do. Scripts exit with 2."""


class Lost(UserError):
    """Another process of the run has ended, or no longer answers."""


def knob(default: Any, help: str, alias: str = "", *, sweep: bool = False) -> Any:
    """A config field: its default, one line of help (with the unit), and other names its flag goes by.

    sweep: if the config has a field `sweep`, the flag takes several values, which are kept there under this name.
    """
    return dataclasses.field(default=default, metadata={"help": help, "alias": alias.split(), "sweep": sweep})


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless condition holds."""
    if not condition:
        raise UserError(message)


def said(config: Any, *names: str) -> list[str]:
    """Those of a config's settings that are not at their default."""
    return [name for name in names if getattr(config, name) != getattr(type(config), name)]


def build(cls: type[C], fields: Mapping[str, Any]) -> C:
    """A config from a plain dict: lists become tuples, unknown names and wrong types are UserErrors."""
    hints = _hints(cls)
    for name in fields:
        require(name in hints, f"unknown setting '{name}'{did_you_mean(name, hints)}")
    return cls(**{name: _check(name, hints[name], value) for name, value in fields.items()})


def check_types(config: Any) -> None:
    """Raise UserError for a field whose value is not of its type (a config made in Python, not from flags)."""
    for name, hint in _hints(type(config)).items():
        _check(name, hint, getattr(config, name))


def read_json(path: str | Path) -> Any:
    """The content of a json file; a missing or broken one is a UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read '{path}': {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"'{path}' is not valid json ({e}); give another file or write it anew") from e


def did_you_mean(name: str, known: Iterable[str], what: str = "") -> str:
    """'; did you mean ...?' or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{what}{near[0]}'?" if near else ""


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type that a field takes, and whether it takes None too."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    return next(a for a in typing.get_args(hint) if a is not type(None)), type(None) in typing.get_args(hint)


def _check(name: str, hint: Any, value: Any) -> Any:
    """A json value as the field takes it."""
    kind, optional = _kind(hint)
    if value is None and optional:
        return None
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        with suppress(UserError):
            if isinstance(value, (list, tuple)):
                return tuple(_check(name, item, v) for v in value)
        wanted = f"a list of {item.__name__}"
    elif typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        wanted = f"one of {', '.join(map(str, choices))}{did_you_mean(str(value), choices)}"
    else:
        if kind is float and type(value) is int:
            return float(value)
        if isinstance(value, kind) and not (kind is int and type(value) is bool):
            return value
        wanted = WANTED.get(kind, kind.__name__)
    raise UserError(f"{name}={value!r}; expected {wanted}")


def _parse(text: str, *, kind: Any, optional: bool = False) -> Any:
    """A flag's text as the field takes it."""
    if optional and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return BOOLS[text.lower()]
        if kind is int:
            number = float(text) if "e" in text.lower() else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(text)
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected {WANTED[kind]}, got '{text}'") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _add_flag(parser: _Parser, f: dataclasses.Field, hint: Any, several: bool) -> None:
    kind, optional = _kind(hint)
    names = [n for flag in (f.name, *f.metadata["alias"]) for n in dict.fromkeys((flag, flag.replace("_", "-")))]
    shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
    text = f.metadata["help"].replace("%", "%%")
    if "default:" not in text and shown != "":
        text += f" [{'none' if shown is None else shown}]"
    options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
    add = functools.partial(parser.add_argument, *(f"--{n}" for n in names))
    if typing.get_origin(kind) is tuple:
        item = functools.partial(_parse, kind=typing.get_args(kind)[0])
        add(nargs="+", action="extend", type=item, **options)
    elif kind is bool:
        add(nargs="?", const=True, type=functools.partial(_parse, kind=bool), metavar="true|false", **options)
        options["help"] = argparse.SUPPRESS
        parser.add_argument(*(f"--no-{n}" for n in names), action="store_const", const=False, **options)
    else:
        options |= {"nargs": "+"} if several else {}
        if typing.get_origin(kind) is Literal:
            add(metavar="{" + ",".join(typing.get_args(kind)) + "}", **options)
        else:
            add(type=functools.partial(_parse, kind=kind, optional=optional), metavar=kind.__name__, **options)


def _refuse(argument: str, parser: _Parser, replaced: Mapping[str, str]) -> typing.NoReturn:
    """Raise UserError for an argument that is no flag here."""
    known = [s[2:] for a in parser._actions for s in a.option_strings if s.startswith("--")]
    name = argument.split("=")[0].lstrip("-").replace("-", "_")
    if name in replaced:
        raise UserError(f"'{argument}' is not a flag here; {replaced[name]}")
    raise UserError(f"unknown argument '{argument}'{did_you_mean(name, known, '--') or '; --help lists them all'}")


def from_cli(
    cls: type[C],
    argv: list[str],
    *,
    prog: str = "",
    description: str | None = None,
    replaced: Mapping[str, str] = types.MappingProxyType({}),
    start_from: Callable[[dict[str, Any]], Path | None] = lambda _: None,
) -> C:
    """A config from flags. Later wins: defaults < `--config file.json` < flags; validated once, together.

    replaced: flags that other tools have and this one does not, with what to do instead. start_from: given the flags,
    the file to use if there is no --config among them; it may add flags.
    Raises UserError for an unknown flag (with the nearest one) or a bad value; `--help` prints and exits.
    """
    wide = functools.partial(argparse.HelpFormatter, max_help_position=34, width=118)
    parser = _Parser(prog=prog, description=description or cls.__doc__, allow_abbrev=False, formatter_class=wide)
    parser.add_argument("--config", metavar="file.json", help="settings to start from (a run's config.json)")
    hints, known = _hints(cls), {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    swept = {name for name, f in known.items() if f.metadata.get("sweep") and "sweep" in known}
    for name, f in known.items():
        if name != "sweep":
            _add_flag(parser, f, hints[name], name in swept)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(unknown[0], parser, replaced)
    fields = vars(given)
    several = {name: fields[name] for name in known if name in swept & fields.keys()}
    fields |= {name: values[0] for name, values in several.items()}
    path = fields.pop("config", None) or start_from(fields)
    start = read_json(path) if path else {}
    if isinstance(start, dict):
        start = start.get("config", start)  # a run's config.json keeps the settings under "config"
    require(isinstance(start, dict), f"'{path}' does not hold a json object of settings")
    # whether to resume or overwrite is a matter of this call, not of the run whose settings are taken over
    start = {name: value for name, value in start.items() if name not in ("resume", "overwrite")}
    if several:
        kept = {name: values for name, values in (start.get("sweep") or {}).items() if name not in several}
        fields["sweep"] = kept | {name: values for name, values in several.items() if len(values) > 1}
    return build(cls, {**start, **fields})

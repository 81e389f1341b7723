"""From dataclass fields to command-line flags and json, and back: one place for a setting's default, help and type.

Knows no setting by name. Bad input is a UserError: one sentence, which scripts end on with exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

C = TypeVar("C")


class UserError(ValueError):
    """Bad input, told in one sentence: what was got, what was wanted, what to do. Scripts exit with 2."""


class Lost(UserError):
    """Another process of the run has ended, or no longer answers."""


def knob(default: Any, help: str, *, alias: tuple[str, ...] = (), sweep: bool = False) -> Any:
    """A config field: its default, one line of help (with the unit), and other names its flag goes by.

    sweep: where the config has a field `sweep`, the flag takes several values, which go there under this name.
    """
    return dataclasses.field(default=default, metadata={"help": help, "alias": alias, "sweep": sweep})


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless condition holds."""
    if not condition:
        raise UserError(message)


def said(config: Any, *names: str) -> list[str]:
    """Those of a config's settings that are not at their default."""
    return [name for name in names if getattr(config, name) != getattr(type(config), name)]


def build(cls: type[C], fields: dict[str, Any]) -> C:
    """A config from a plain dict: lists become tuples, unknown names and wrong types are UserErrors."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"unknown setting '{name}'{did_you_mean(name, known)}")
        values[name] = _check(name, hints[name], value)
    return cls(**values)


def check_types(config: Any) -> None:
    """Raise UserError for a field whose value is not of its type (a config made in Python, not from flags)."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        _check(f.name, hints[f.name], getattr(config, f.name))


def read_json(path: str | Path) -> Any:
    """The content of a json file; a missing or broken one is a UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read '{path}': {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"'{path}' is not valid json ({e}); give another file or write it anew") from e


def did_you_mean(name: str, known: typing.Iterable[str], what: str = "") -> str:
    """'; did you mean ...?' or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{what}{near[0]}'?" if near else ""


def _options(hint: Any) -> tuple[list[Any], bool]:
    """The types a field takes, and whether None is one of them."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        args = typing.get_args(hint)
        return [a for a in args if a is not type(None)], type(None) in args
    return [hint], False


def _check(name: str, hint: Any, value: Any) -> Any:
    """A json value as the field wants it."""
    (kind, *_), optional = _options(hint)
    if value is None and optional:
        return None
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, (list, tuple)):
            try:
                return tuple(_check(name, item, v) for v in value)
            except UserError:
                pass
        raise UserError(f"{name}={value!r}; a list of {item.__name__} was wanted")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        raise UserError(
            f"{name}={value!r}; one of {', '.join(map(str, choices))} was wanted" + did_you_mean(str(value), choices)
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UserError(f"{name}={value!r}; {kind.__name__} was wanted")


def _parse(kind: Any, optional: bool, text: str) -> Any:
    """A flag's text as the field wants it."""
    if optional and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is int:
            number = float(text) if "e" in text.lower() else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            return float(text)
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' was given; {kind.__name__} was wanted") from None
    return text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _add_flag(parser: _Parser, f: dataclasses.Field, hint: Any, *, sweep: bool = False) -> None:
    (kind, *_), optional = _options(hint)
    names = [n for flag in (f.name, *f.metadata["alias"]) for n in dict.fromkeys((flag, flag.replace("_", "-")))]
    flags = [f"--{n}" for n in names]
    default = f.default
    shown = "none" if default is None else " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = f.metadata["help"].replace("%", "%%")
    if "default:" not in text and shown != "":
        text += f" [{shown}]"
    options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        parser.add_argument(*flags, nargs="+", action="extend", type=lambda s: _parse(item, False, s), **options)
    elif kind is bool:
        to_bool = lambda s: _parse(bool, False, s)
        parser.add_argument(*flags, nargs="?", const=True, type=to_bool, metavar="true|false", **options)
        options["help"] = argparse.SUPPRESS
        parser.add_argument(*(f"--no-{n}" for n in names), action="store_const", const=False, **options)
    else:
        options |= {"nargs": "+"} if sweep else {}
        if typing.get_origin(kind) is Literal:
            parser.add_argument(*flags, metavar="{" + ",".join(typing.get_args(kind)) + "}", **options)
        else:
            parser.add_argument(*flags, type=lambda s: _parse(kind, optional, s), metavar=kind.__name__, **options)


def from_cli(
    cls: type[C],
    argv: list[str],
    *,
    prog: str = "",
    description: str = "",
    replaced: dict[str, str] | None = None,
    start_from: Callable[[dict[str, Any]], Path | None] = lambda _: None,
) -> C:
    """A config from flags. Later wins: defaults < `--config file.json` < flags; validated once, together.

    replaced: flags that other tools have and this one does not, with what to do instead. start_from: given the flags,
    the file that stands in for a --config that is not among them; it may add to them.
    Raises UserError for an unknown flag (with the nearest one) or a bad value; `--help` prints and exits.
    """
    parser = _Parser(
        prog=prog,
        description=description or cls.__doc__,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
    )
    parser.add_argument("--config", metavar="file.json", help="settings to start from (a run's config.json)")
    hints = typing.get_type_hints(cls)
    swept = {f.name for f in dataclasses.fields(cls) if f.metadata.get("sweep")} if "sweep" in hints else set()  # type: ignore[arg-type]
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.name != "sweep":
            _add_flag(parser, f, hints[f.name], sweep=f.name in swept)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [s[2:] for a in parser._actions for s in a.option_strings if s.startswith("--")]
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        if name in (replaced or {}):
            raise UserError(f"'{unknown[0]}' is not a flag here; {(replaced or {})[name]}")
        hint = did_you_mean(name, known, "--")
        raise UserError(f"unknown argument '{unknown[0]}'{hint or '; --help lists them all'}")
    fields = vars(given)
    several = {f.name: fields.pop(f.name) for f in dataclasses.fields(cls) if f.name in swept & fields.keys()}  # type: ignore[arg-type]
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

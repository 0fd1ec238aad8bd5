"""A config as named fields: read from files, checked, saved beside the run, compared on resume.

    file or command line
      -> from_fields            types and ranges
      -> a trainer's resolve    rules between fields, derived values
      -> saved_fields, to_yaml  result.json, checkpoints, config.yaml
      -> differences            which fields of a checkpoint's config are no longer the same

The work is cut so that each message can name its field: pydantic judges one field at a time,
``check_together`` and ``refuse_idle`` judge several. Every message names the field, what was
expected and what came.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from nvfp4.run.errors import TrainError
from nvfp4.run.options import FREE, ResumableConfig, RunConfig

Config = TypeVar("Config", bound=RunConfig)
Resumable = TypeVar("Resumable", bound=ResumableConfig)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The fields of a .yaml, .yml, .toml or .json file.

    ``TrainError`` if the file is missing, malformed, or holds something else than fields.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            fields = yaml.safe_load(text)
        elif path.suffix == ".json":
            fields = json.loads(text)
        elif path.suffix == ".toml":
            fields = _toml(text)
        else:
            raise TrainError(f"config: expected a .yaml, .yml, .toml or .json file, got {path}")
    except OSError as error:
        raise TrainError(f"config: cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise TrainError(f"config: {path} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise TrainError(
            f"config: {path} is not valid {path.suffix[1:]}: {' '.join(str(error).split())}"
        ) from error

    # YAML gives None for an empty file: a config that changes nothing
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise TrainError(
            f"config: {path} must hold fields with values, got a {type(fields).__name__}"
        )
    return fields


def from_fields(kind: type[Config], fields: dict[str, Any], origin: str) -> Config:
    """A config of class ``kind`` from names and values.

    ``TrainError``, beginning with ``origin`` (the command line, a file), for each field that is
    wrong.
    """
    try:
        return _validate(kind, fields)
    except TrainError as error:
        raise TrainError(f"{origin}: {error}") from None


def validate(config: Config) -> Config:
    """The same config with its types and ranges checked, as those of a file are.

    Python itself checks nothing when somebody writes ``PretrainConfig(steps="many")``.
    """
    return _validate(type(config), dataclasses.asdict(config))


def to_fields(config: RunConfig) -> dict[str, Any]:
    """Names and values of a config as JSON and YAML have them (lists for tuples)."""
    return {
        name: list(v) if isinstance(v, tuple) else v
        for name, v in dataclasses.asdict(config).items()
    }


def saved_config(config: Resumable) -> Resumable:
    """The config as it is saved beside the run: without the fields that concern one start alone."""
    return dataclasses.replace(
        config, resume=False, resume_from=None, overwrite=False, allow_changes=()
    )


def saved_fields(config: ResumableConfig) -> dict[str, Any]:
    """``to_fields`` of ``saved_config``: what result.json and checkpoints say of the config."""
    return to_fields(saved_config(config))


def to_yaml(config: RunConfig) -> str:
    """A config as a YAML file that ``--config`` reads back."""
    return yaml.safe_dump(to_fields(config), sort_keys=False, allow_unicode=True)


def free_on_resume(kind: type[RunConfig]) -> frozenset[str]:
    """Fields that cannot change what is learnt: those whose type is ``Free``."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return frozenset(
        name for name, hint in hints.items() if FREE in getattr(hint, "__metadata__", ())
    )


def differences(
    saved: dict[str, Any], config: ResumableConfig, bound: frozenset[str] = frozenset()
) -> list[str]:
    """``field: saved value, now value`` for each field that can change a loss and has changed.

    Fields in ``allow_changes`` are passed over. bound: fields that are free as a rule and not in
    this run.
    """
    present = to_fields(config)
    ignored = (free_on_resume(type(config)) - bound) | set(config.allow_changes)

    # The union of both: a field that a later version adds or drops counts as a difference.
    names = [name for name in {**saved, **present} if name not in ignored]
    return [
        f"{name}: {saved.get(name)!r}, now {present.get(name)!r}"
        for name in names
        if saved.get(name) != present.get(name)
    ]


def fill(config: Config, values: dict[str, Any]) -> Config:
    """The config with ``values`` in the fields that are None."""
    return dataclasses.replace(
        config, **{name: v for name, v in values.items() if getattr(config, name) is None}
    )


def refuse_idle(config: RunConfig, rules: tuple[tuple[str, bool, str], ...]) -> None:
    """``TrainError`` for an option that was given and has no effect.

    Whoever gives an option expects something of it. rules: names of fields, whether they are
    without effect in this config, and why. A field that has its default was not given. The rules of
    the learning rate, which every trainer has, are added here.
    """
    wsd = config.schedule == "wsd"
    shared = (
        ("decay", not wsd, "only the schedule wsd has such a part"),
        ("min_lr", wsd and config.decay == 0, "without --decay the schedule wsd stays at its peak"),
    )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for names, idle, why in (*rules, *shared):
        for name in names.split() if idle else ():
            value = getattr(config, name)
            if value != defaults[name]:
                raise TrainError(f"{name}: {value!r} has no effect, since {why}; leave it out")


def check_together(config: RunConfig) -> None:
    """``TrainError`` for fields of every trainer that contradict each other."""
    if config.warmup is not None and config.warmup >= config.steps:
        raise TrainError(f"warmup: must be below steps = {config.steps}, got {config.warmup}")
    if not isinstance(config, ResumableConfig):
        return

    # Three ways to begin: anew, from the newest checkpoint, from a named one. Give at most one.
    if config.resume_from is not None and (config.resume or config.overwrite):
        raise TrainError("resume_from: names one checkpoint, so leave out --resume and --overwrite")
    if config.resume and config.overwrite:
        raise TrainError(
            "overwrite: deletes the run that --resume would go on with; give one of the two"
        )

    # Else a misspelt name would allow nothing, and the refusal on resume would be a riddle.
    unknown = set(config.allow_changes) - {field.name for field in dataclasses.fields(config)}
    if unknown:
        raise TrainError(
            f"allow_changes: no such field: {', '.join(sorted(unknown))}; see --help for the fields"
        )


def _validate(kind: type[Config], fields: dict[str, Any]) -> Config:
    try:
        config = pydantic.TypeAdapter(kind).validate_python(fields)
    except pydantic.ValidationError as error:
        raise TrainError(
            "; ".join(_explain(kind, item) for item in error.errors(include_url=False))
        ) from None

    # Texts that pydantic accepts and that no file system or tokenizer can hold. An empty --out
    # is a shell variable that was not set; it would make the working folder the run folder.
    if config.out == "":
        raise TrainError("out: expected the name of a folder, got ''")
    for name, value in vars(config).items():
        if any(
            "\0" in text
            for text in (value if isinstance(value, tuple) else (value,))
            if isinstance(text, str)
        ):
            raise TrainError(f"{name}: expected a text without null bytes, got {value!r}")

    # A terminal in another encoding gives lone surrogates, which no tokenizer takes.
    prompt = getattr(config, "prompt", None)
    try:
        (prompt or "").encode()
    except UnicodeEncodeError:
        raise TrainError(f"prompt: expected a text in UTF-8, got {prompt!a}") from None
    return config


def _explain(kind: type[RunConfig], item: Any) -> str:
    name = str(item["loc"][0])
    fields = [field.name for field in dataclasses.fields(kind)]
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=1)
        return f"{name}: no such field" + (
            f"; did you mean {close[0]}?" if close else "; see --help for the fields"
        )
    expected = item["msg"].removeprefix("Input should be ")
    return f"{name}: expected {expected}, got {item['input']!r}"


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:
        raise TrainError(
            "config: TOML needs Python 3.11 or newer; write the file as YAML or JSON"
        ) from None
    return tomllib.loads(text)

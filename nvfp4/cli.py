"""The command line: parse, call, exit code.

    nvfp4 pretrain | compare | rl | gvendi | prismatic | info | bench   [--option value ...]

A command is a dataclass: its fields are the options, their types the ranges, the sentences below
them the text of ``--help``. Three sources, the later ones win: defaults of the class, the file of
``--config`` (and a preset), the command line. So the file is read first and becomes the defaults
that tyro shows and changes.

Exit codes: 0; 1 for what the user can put right (one sentence); 2 for a wrong option, by tyro;
128 + n after signal n. A defect of ours keeps its traceback.

What does the work of a command is looked up when the command runs (``LATE``): importing this file
takes 3.3 s of CPU time, of which torch is 2.3, and a trainer with its model 7.4 to 8.2
(benchmarks/NOTES.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

import tyro

from nvfp4.rl import gvendi, prismatic
from nvfp4.rl.config import PRESETS, RLConfig
from nvfp4.rl.folder import RENAMED
from nvfp4.rl.gvendi import GVendiConfig
from nvfp4.rl.prismatic import PrismaticConfig
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import from_fields, read_config_file
from nvfp4.run.options import RunConfig
from nvfp4.train.config import CompareConfig, PretrainConfig

LATE = {
    "pretrain": "nvfp4.train.loop:pretrain",
    "compare": "nvfp4.train.compare:compare",
    "rl": "nvfp4.rl.loop:rl",
    "rl compare": "nvfp4.rl.compare:compare",
    "bench all": "nvfp4.bench.report:bench_all",
    "bench all fails": "nvfp4.bench.gates:WrongResults",
    "bench roofline": "nvfp4.bench.roofline_report:report",
}
"""What does the work of a command, as module:name, imported when it runs: ``--help`` needs no
trainer, and a trainer may come from anywhere."""

DESCRIPTION = (
    "NVFP4 4-bit training of language models, on any machine. COMMAND --help lists every option."
)
FAILED = 1
INTERRUPTED = 130

MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
)
"""Full, read-only or broken disks, missing rights, too many open files: a user's to put right,
wherever it came up."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(PretrainConfig):
    """Train a language model in NVFP4 (or BF16) and export it."""

    config: str | None = None
    """YAML, TOML or JSON file with any of these options (snake_case); what is given on the command
    line wins."""


@dataclass(frozen=True, kw_only=True)
class Compare(CompareConfig):
    """Train the same model once for each recipe and measure the gap to BF16."""

    config: str | None = None
    """YAML, TOML or JSON file with any of these options (snake_case); what is given on the command
    line wins."""


@dataclass(frozen=True, kw_only=True)
class RL(RLConfig):
    """Train a language model by reinforcement with verifiable rewards; it samples as it trains."""

    preset: Literal["sort"] | None = None
    """A set of options, which the others then change; sort: full precision against NVFP4 over three
    seeds, in minutes on a CPU."""
    config: str | None = None
    """YAML, TOML or JSON file with any of these options (snake_case); what is given on the command
    line wins."""


@dataclass(frozen=True, kw_only=True)
class GVendi(GVendiConfig):
    """Measure how diverse problems are, as a model sees them (G-Vendi, arXiv 2505.20161)."""


@dataclass(frozen=True, kw_only=True)
class Prismatic(PrismaticConfig):
    """Grow a set of problems where a model sees few (Prismatic Synthesis, arXiv 2505.20161)."""


@dataclass(frozen=True)
class Info:
    """Say which backends run on this machine, and why the others do not."""


@dataclass(frozen=True)
class Bench:
    """Measure everything on this machine (all), or predict what layers cost on any (roofline)."""

    benchmark: tyro.conf.Positional[Literal["roofline", "all"]] = "roofline"
    """roofline: bytes, FLOPs and instructions of every kernel, and which of them decides its time.
    all: check every backend against the reference, then time quantisers, GEMMs, layers and memory;
    nothing is timed if one is wrong."""
    report: str | None = None
    """all: write the tables here as Markdown, with device, clocks and versions, and beside it as
    JSON."""
    quick: bool = False
    """all: small shapes, less than a minute on a processor."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """all: where to measure; auto is the GPU if there is one."""
    isa: Literal["", "avx512", "avx2", "portable"] = ""
    """all: instruction set that our kernels on the processor are held to; by default the best it
    has, or what the environment's NVFP4_ISA names, which every command follows."""
    seconds: float | None = None
    """all: time for each candidate; by default 0.5, and 0.02 when quick."""
    devices: tuple[str, ...] = ("B200", "GB300", "RTX 5090", "H200", "H100", "cpu")
    """roofline: machines, by the names of the table that is printed first; cpu is the one at
    hand."""
    models: tuple[str, ...] = ("800M", "3B", "7B", "22B")
    """roofline: blocks whose layers are counted; kernels are listed for the last."""
    recipe: str = "search_eden"
    """roofline: recipe to hold beside BF16."""
    tokens: int = 16384
    """roofline: tokens in a step."""
    json: str | None = None
    """roofline: keep the figures here."""
    plot: str | None = None
    """roofline: draw the speed-up over tokens here (PNG, SVG or PDF)."""
    measure_cpu: bool = False
    """roofline: also time the layers on the processor at hand; a GPU at hand is timed if it is
    among the devices."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 after an error, 128 + n after signal n.

    A wrong option ends the process with 2, as argparse does.
    """
    try:
        command = parse(sys.argv[1:] if arguments is None else list(arguments))
        _hold(getattr(command, "isa", "") or os.environ.get("NVFP4_ISA", ""))
        RUNNERS[type(command)](command)
        return 0
    except TrainError as error:
        print(f"nvfp4: error: {error}", file=sys.stderr)
        return FAILED
    except Interrupted as stop:
        print(f"nvfp4: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    except OSError as error:
        # the machine may fail anywhere; any other OSError is a defect and keeps its traceback
        if error.errno not in MACHINE:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(
            f"nvfp4: error: {error.strerror}{where}; put that right and go on with --resume",
            file=sys.stderr,
        )
        return FAILED
    except KeyboardInterrupt:
        print(
            "nvfp4: interrupted; what was saved is complete, go on with --resume", file=sys.stderr
        )
        return INTERRUPTED


def _hold(isa: str) -> None:
    """Keep the processor's kernels to an instruction set, if one is named."""
    if not isa:
        return
    from nvfp4.backends.native.cpu import use_instruction_set

    try:
        use_instruction_set(isa)
    except (ValueError, RuntimeError) as error:
        raise TrainError(str(error)) from error


def parse(arguments: list[str]) -> Any:
    """The command as an object of its class.

    A wrong option ends the process (2), a wrong config file is a ``TrainError``.
    """
    arguments = _apart(arguments)
    defaults = _defaults(arguments)
    commands: list[Any] = [
        Annotated[kind, tyro.conf.subcommand(kind.__name__.lower(), **_default(kind, defaults))]
        for kind in RUNNERS
    ]
    union: Any = reduce(or_, commands)
    return tyro.cli(union, args=arguments, prog="nvfp4", description=DESCRIPTION)


def _apart(arguments: list[str]) -> list[str]:
    """``--seeds 0,1,2`` as ``--seeds 0 1 2``, which is how tyro reads several numbers.

    So is ``--seeds 0, 1, 2``, which a shell takes apart at its spaces. Lists of names may keep
    their commas: they are split where a config is checked.
    """
    apart: list[str] = []
    option = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            option = name
        if option != "--seeds":
            apart.append(argument)
        else:
            given = value if equals else argument
            numbers = [number for number in given.split(",") if number.strip()]
            apart += [*([name] if equals else []), *(numbers or [given])]
    return apart


def _default(kind: type, defaults: dict[type, Any]) -> dict[str, Any]:
    """The command that the given options change; none for one that cannot do without options."""
    if any(f.default is dataclasses.MISSING for f in dataclasses.fields(kind)):
        return {}
    return {"default": defaults.get(kind, kind())}


def _defaults(arguments: list[str]) -> dict[type, Any]:
    """The file that ``--config`` names, as the defaults that the other options then change."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument("command", nargs="?")
    look.add_argument("--config")
    look.add_argument("--preset")
    look.add_argument("--model")
    look.add_argument("--objective")

    # The few options that decide about the others' defaults; tyro will read them all again.
    known, _ = look.parse_known_args(arguments)
    kind = next((kind for kind in RUNNERS if kind.__name__.lower() == known.command), None)
    if kind is None or not issubclass(kind, RunConfig):
        return {}
    if issubclass(kind, RLConfig):
        _refuse_renamed(
            argument.partition("=")[0] for argument in arguments if argument.startswith("--")
        )

    # A file wins over a preset, and the command line over both.
    fields: dict[str, Any] = {}
    if issubclass(kind, RLConfig) and known.preset in PRESETS:
        fields |= {**_preset(known.preset, known.model, known.objective), "preset": known.preset}
    if known.config is not None:
        fields |= {**read_config_file(known.config), "config": known.config}
        if issubclass(kind, RLConfig):
            _refuse_renamed(fields)
    return {kind: from_fields(kind, fields, known.config or "options")} if fields else {}


def _preset(name: str, model: str | None, objective: str | None) -> dict[str, Any]:
    """The options of a preset beside a model and an objective of the user's.

    What a preset says of the model that it makes goes where a model is given, and what it says of
    its own objective goes where another is chosen: it would have no effect there, and nobody asked
    for it.
    """
    fields = dict(PRESETS[name])
    if model is not None:
        fields.pop("context", None)
    if objective not in (None, fields.get("objective", RLConfig.objective)):
        fields.pop("objective_options", None)
    return fields


def _refuse_renamed(names: Iterable[str]) -> None:
    """``TrainError`` for an option of an earlier version that says what to give instead."""
    for name in names:
        plain = name.lstrip("-").replace("-", "_")
        if plain in RENAMED:
            raise TrainError(f"{plain} is no longer an option: {RENAMED[plain]}")


def _pretrain(command: Pretrain) -> None:
    _late("pretrain")(_without_file(PretrainConfig, command))


def _compare(command: Compare) -> None:
    _late("compare")(_without_file(CompareConfig, command))


def _rl(command: RL) -> None:
    config = _without_file(RLConfig, command)
    _late("rl compare" if config.seeds or config.recipes else "rl")(config)


def _gvendi(command: GVendi) -> None:
    gvendi.report(command)


def _prismatic(command: Prismatic) -> None:
    prismatic.report(command)


def _info(command: Info) -> None:
    from nvfp4.backends.machine import info

    print(info())


def _bench(command: Bench) -> None:
    (_bench_all if command.benchmark == "all" else _roofline)(command)


def _bench_all(command: Bench) -> None:
    try:
        _late("bench all")(command.report, command.device, command.quick, command.seconds)
    except (ValueError, OSError, _late("bench all fails")) as error:
        raise TrainError(str(error)) from error
    except KeyboardInterrupt as error:
        raise Interrupted(
            signal.SIGINT, "bench interrupted; the report, if one was asked for, is written"
        ) from error


def _roofline(command: Bench) -> None:
    from nvfp4.bench.devices import find_device
    from nvfp4.recipes import Recipe

    try:
        _late("bench roofline")(
            Recipe.from_name(command.recipe),
            command.models,
            [find_device(name) for name in command.devices],
            command.tokens,
            command.json,
            command.plot,
            command.measure_cpu,
        )
    except (ValueError, OSError) as error:
        raise TrainError(str(error)) from error


def _late(name: str) -> Any:
    """What ``LATE`` names, imported now."""
    module, _, attribute = LATE[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _without_file(kind: type, command: Any) -> Any:
    """The command as the config that it extends, without the file, which has been read."""
    return kind(**{field.name: getattr(command, field.name) for field in dataclasses.fields(kind)})


RUNNERS: dict[type, Callable[[Any], None]] = {
    Pretrain: _pretrain,
    Compare: _compare,
    RL: _rl,
    GVendi: _gvendi,
    Prismatic: _prismatic,
    Info: _info,
    Bench: _bench,
}


if __name__ == "__main__":
    sys.exit(main())

"""Tasks by name, by file of problems, and by the place of a class of one's own.

    sort                    a name of ``TASKS``
    problems.jsonl          a file of problems: jsonl.py
    my_tasks.py:MyTask      a class in a file, or module:Class

A task of the package is one line here; base.py says how to write one. A user's class is imported
and run in the trainer's own process, as any module that a user imports; only reward functions of a
.jsonl file and programs of the model are foreign.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from nvfp4.rl.tasks.arithmetic import Addition, Countdown, Modular
from nvfp4.rl.tasks.base import Task
from nvfp4.rl.tasks.digits import Parity, Reverse, Sort
from nvfp4.rl.tasks.fill_in import FillIn
from nvfp4.rl.tasks.jsonl import Jsonl
from nvfp4.run.corpus import JSONL
from nvfp4.run.errors import TrainError

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Sort,
        Reverse,
        Parity,
        Addition,
        Modular,
        Countdown,
        FillIn,
    )
}


def load_task(name: str, **options: Any) -> Task:
    """A task by a name of ``TASKS``, a .jsonl file of problems, "module:Class" or "file.py:Class".

    options: the arguments of the class. ``TrainError`` says what is wrong with the name, the class
    or the options.
    """
    if name.endswith(JSONL):
        kind: type[Task] = Jsonl
        options = {"path": name, **options}
    elif ":" in name:
        kind = _class(name)
    elif name in TASKS:
        kind = TASKS[name]
    else:
        files = " or ".join(JSONL)
        expected = f"one of {', '.join(TASKS)}, a file {files}, module:Class or file.py:Class"
        raise TrainError(f"task: expected {expected}, got {name!r}")

    # Wrong options are the user's to mend; so is whatever a class of the user's raises.
    _refuse_idle_confinement(kind, name, options)
    try:
        return kind(**options)
    except TrainError:
        raise
    except (TypeError, ValueError) as error:
        raise TrainError(f"task {name}: {error}; it takes {inspect.signature(kind)}") from error
    except (Exception, SystemExit) as error:  # whatever the user's class raises
        raise TrainError(f"task {name}: {type(error).__name__}: {error}") from error


def _refuse_idle_confinement(kind: type[Task], name: str, options: dict[str, Any]) -> None:
    """``TrainError`` for --unsafe-rewards where the task's own class is the only code that runs."""
    parameters = inspect.signature(kind).parameters.values()
    takes = any(p.name == "unsafe_rewards" or p.kind is p.VAR_KEYWORD for p in parameters)
    if options.get("unsafe_rewards") and not takes:
        raise TrainError(
            f"unsafe_rewards: task {name} runs neither reward functions of a file nor programs of "
            f"the model, so there is nothing to confine; leave out --unsafe-rewards"
        )


def _class(name: str) -> type[Task]:
    """The class at "module:Class" or "file.py:Class"; ``TrainError`` says what it is not."""
    where, _, attribute = name.rpartition(":")
    try:
        module = _file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        what = f"{type(error).__name__}: {error}"
        raise TrainError(f"task: {where} cannot be imported: {what}") from error

    kind = getattr(module, attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        expected = "derived from nvfp4.rl.tasks.base.Task"
        raise TrainError(f"task: {where} has no class {attribute!r} {expected}")
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise TrainError(f"task: {attribute} of {where} does not define {missing}")
    return kind


def _file(path: Path) -> Any:
    """The module of a file, known to ``sys.modules`` as dataclasses and pickles want it."""
    key = f"nvfp4_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module

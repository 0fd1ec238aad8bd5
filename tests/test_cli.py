"""The command line: every option is listed, files and options combine, errors are one line and an
exit code."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import children
import pytest
from training import ROOT, environment, run_cli, write_texts

from nvfp4 import cli
from nvfp4.backends.native.cpu import instruction_sets, use_instruction_set
from nvfp4.cli import Compare, Info, Pretrain, main, parse
from nvfp4.run.errors import TrainError
from nvfp4.train.config import resolve


def said_by(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code, capsys.readouterr()


@pytest.mark.parametrize(("command", "kind"), [("pretrain", Pretrain), ("compare", Compare)])
def test_help_lists_every_option_with_a_sentence_and_its_default(command, kind, capsys):
    code, said = said_by([command, "--help"], capsys)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said.out).split())
    assert code == 0
    for field in dataclasses.fields(kind):
        option = f"--{field.name.replace('_', '-')}"
        entry = re.search(rf"(?<!\S){option}(?:, --no-| [A-Z\[{{])(.*?\(default: .*?\))", text)
        assert entry, f"{option} is not in the help"
        assert len(entry.group(1).split()) > 4, f"{option} has no description: {entry.group(0)}"


@pytest.mark.parametrize("name", cli.LATE)
def test_what_is_looked_up_late_is_there(name):
    assert callable(cli._late(name))


def test_help_names_the_commands(capsys):
    code, said = said_by(["--help"], capsys)
    assert code == 0
    assert all(
        name in said.out
        for name in ("pretrain", "compare", "info", "bench", "NVFP4 4-bit training")
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "--stepz", "3"],
        ["pretrain", "--steps", "many"],
        ["train"],
        [],
        ["pretrain", "--architecture", "gru"],
    ],
)
def test_wrong_options_end_with_code_2_and_name_the_option(arguments, capsys):
    code, said = said_by(arguments, capsys)
    assert code == 2
    assert said.err
    assert "Traceback" not in said.err
    if len(arguments) > 1:
        assert arguments[1] in said.err


def test_options_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 33\nlr: 1e-3\ndata: [a, b]\nrecipe: rtn\ncompile: true\n")
    command = parse(["pretrain", "--config", str(path), "--lr", "0.5", "--no-compile"])
    assert isinstance(command, Pretrain)
    assert (command.steps, command.lr, command.data, command.recipe, command.compile) == (
        33,
        0.5,
        ("a", "b"),
        "rtn",
        False,
    )
    assert command.batch == Pretrain().batch
    command = (
        parse(["compare", f"--config={tmp_path / 'd.json'}"])
        if (tmp_path / "d.json").write_text('{"depth": 3}')
        else None
    )
    assert command == dataclasses.replace(Compare(), depth=3, config=str(tmp_path / "d.json"))


def test_options_may_be_written_with_underscores_and_lists_with_spaces():
    command = parse(["compare", "--recipes", "bf16", "rtn", "--seq_len", "64", "--data", "a", "b"])
    assert (command.recipes, command.seq_len, command.data) == (("bf16", "rtn"), 64, ("a", "b"))
    assert resolve(parse(["compare", "--recipes", "bf16,rtn"])).recipes == ("bf16", "rtn")
    assert resolve(parse(["compare", "--recipes", "bf16,rtn", "nvidia"])).recipes == (
        "bf16",
        "rtn",
        "nvidia",
    )


@pytest.mark.parametrize(
    "given",
    [
        ["--seeds", "0,1,2"],
        ["--seeds=0,1,2"],
        ["--seeds", "0", "1,2"],
        ["--seeds", "0,", "1,", "2"],
        ["--seeds", "0, 1, 2,"],
    ],
)
@pytest.mark.parametrize("command", ["compare", "rl"])
def test_seeds_may_be_written_with_commas_as_their_help_says(command, given):
    parsed = parse([command, *given, "--exclude", "a,b"])
    assert (parsed.seeds, parsed.exclude) == ((0, 1, 2), ("a,b",))


def test_a_seed_that_is_no_number_is_named(capsys):
    code, said = said_by(["compare", "--seeds", "0,one"], capsys)
    assert (code, "--seeds" in said.err) == (2, True)


def test_a_wrong_file_is_a_clear_error(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("stepz: 3\n")
    with pytest.raises(TrainError):
        parse(["pretrain", "--config", str(path)])
    assert main(["pretrain", "--config", str(path)]) == 1
    assert (
        capsys.readouterr().err
        == f"nvfp4: error: {path}: stepz: no such field; did you mean steps?\n"
    )
    path.write_text("recipes: [bf16]\n")  # a field of the other command
    assert main(["pretrain", "--config", str(path)]) == 1
    assert "recipes: no such field" in capsys.readouterr().err


def test_errors_are_one_line_without_a_traceback(tmp_path):
    run = run_cli(
        "pretrain", "--data", str(tmp_path / "absent.txt"), "--out", str(tmp_path / "run")
    )
    assert run.returncode == 1
    assert run.stderr == f"nvfp4: error: data: no such file: {tmp_path / 'absent.txt'}\n"
    assert not (tmp_path / "run").exists()


def test_a_keyboard_interrupt_is_code_130(monkeypatch, capsys):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.RUNNERS, Info, interrupted)
    assert main(["info"]) == 130
    assert "go on with --resume" in capsys.readouterr().err


def test_info_names_the_backends(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"backend reference on cpu +yes", said)
    assert "torch" in said


def test_the_example_runs(tmp_path):
    write_texts(tmp_path)
    run = children.script(
        ROOT / "examples" / "pretrain_tiny.py", environment(), str(tmp_path / "out")
    )
    assert run.returncode == 0, run.stdout + run.stderr
    numbers = re.search(r"bits per byte: bf16 (\S+), quartet2 (\S+), gap (\S+) %", run.stdout)
    assert numbers
    bf16, _, gap = map(float, numbers.groups())
    assert 3 < bf16 < 5.5  # begins at 8; 60 short steps reach about the entropy of single bytes
    assert abs(gap) < 3
    assert "the exported model, in plain transformers: 'import" in run.stdout


@pytest.mark.skipif(not instruction_sets(), reason="the native CPU kernels are not built")
def test_an_instruction_set_is_taken_from_the_environment_and_the_option_wins(monkeypatch, capsys):
    """NVFP4_ISA holds any command to it; what is unknown ends with code 1 and one line, and nothing
    has run."""
    best = instruction_sets()[0]
    try:
        monkeypatch.setenv("NVFP4_ISA", "portable")
        assert main(["info"]) == 0
        assert "kernels on cpu portable" in " ".join(capsys.readouterr().out.split())
        monkeypatch.setattr(
            cli, "RUNNERS", {**cli.RUNNERS, cli.Bench: lambda command: print(*instruction_sets())}
        )
        assert main(["bench", "all", "--isa", best]) == 0
        assert capsys.readouterr().out.split()[0] == best
        monkeypatch.setenv("NVFP4_ISA", "sse9")
        assert main(["info"]) == 1
        assert "instruction set 'sse9' is unknown" in capsys.readouterr().err
    finally:
        use_instruction_set(best)


# In a process of its own: the command line, its help and its refusals. Transformers alone takes
# longer than all of it.
IMPORTS_NO_MODELS = """
import sys
import nvfp4.cli
heavy = {"transformers", "accelerate", "torch._dynamo", "matplotlib", "pyarrow", "trl", "peft"}
heavy &= sys.modules.keys()
assert not heavy, heavy
"""


def test_help_waits_for_no_library_of_models() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS_NO_MODELS], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr

"""nvfp4 bench all: right before fast, everything in the report, and no prediction that is not
labelled one.
"""

from __future__ import annotations

import json
import re
import subprocess
import types

import pytest
import torch

from benchmarks import harness
from nvfp4.backends.native.cpu import CpuBackend
from nvfp4.backends.registry import BACKENDS
from nvfp4.bench import cases, measure, report, tables, timing
from nvfp4.bench.gates import WrongResults, check_all
from nvfp4.bench.roofline import PREDICTED
from nvfp4.bench.timing import interleaved, machine
from nvfp4.cli import main

CPU = torch.device("cpu")


@pytest.fixture
def no_self_check(monkeypatch):
    """The registry trusts every backend, so that the gates have to find what is wrong."""
    monkeypatch.setattr("nvfp4.backends.registry.find_fault", lambda *args: None)


def test_the_command_measures_everything_and_says_on_what(tmp_path, capsys):
    """A quick run on the processor: sections, units, machine, versions, gates; the same figures as
    data.
    """
    path = tmp_path / "report.md"
    options = ["--report", str(path), "--quick", "--device", "cpu", "--seconds", "0.001"]
    assert main(["bench", "all", *options]) == 0
    page, kept = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    said = capsys.readouterr().out
    assert f"written: {path}" in " ".join(said.split())
    facts = kept["machine"]
    assert facts["torch"] == torch.__version__
    assert {"processor", "threads", "python", "date"} <= facts.keys()
    assert all(f"- {key}: {value}" in page for key, value in facts.items())
    assert kept["complete"]
    assert all(gate["fault"] is None for gate in kept["gates"])
    judged = {gate["backend"] for gate in kept["gates"]}
    assert judged == {"auto"} | {backend.name for backend in cases.at_hand(CPU)}
    assert list(kept["sections"]) == list(measure.SECTIONS)
    for title, rows in kept["sections"].items():
        assert f"## {title}" in page
        assert all(row["ms"] > 0 for row in rows)
    sections = kept["sections"]
    assert {row["recipe"] for row in sections["Linear layer, forward and backward"]} == {
        "bf16",
        "nvidia",
        "quartet2",
        "search_eden",
    }
    assert all(row["saved x BF16"] in (1, pytest.approx(0.28, abs=0.02)) for row in
               sections["Linear layer, forward and backward"])  # fmt: skip
    for row in sections["GEMM on codes"]:
        tokens, inputs, outputs = map(
            int, re.search(r"\((\d+) x (\d+) -> (\d+)\)", row["GEMM"]).groups()
        )
        assert row["TFLOP/s"] == pytest.approx(2 * tokens * inputs * outputs / row["ms"] / 1e9)


def test_every_prediction_is_labelled():
    """In the page and in the data: the heading of the cards, each column that was not measured."""
    page = report.Findings({}, None, complete=True).markdown()
    blackwell = page.partition(f"## Blackwell: {PREDICTED}")[2]
    assert "nobody has measured these" in blackwell
    assert "| B200 | 7B | 16384 | quartet2 |" in blackwell
    assert "B200" not in page.partition("## Blackwell")[0]
    for row in report.predictions():
        assert set(row) == {
            "predicted for",
            "block",
            "tokens",
            "recipe",
            "predicted speed-up",
            "predicted from tokens",
        }


class Wrong(Exception):
    """Nothing may be timed once a gate is red."""


def never(*args, **kwargs):
    raise Wrong


@pytest.mark.parametrize("fault", ["quantize", "transposed", "both", "again", "matmul", "nan"])
@pytest.mark.skipif(
    BACKENDS["cpu"].unavailable(CPU) is not None, reason="the native extension is not built"
)
def test_a_red_gate_stops_everything(fault, monkeypatch, tmp_path, capsys, no_self_check):
    """One bit of one code in one orientation, or one element of a product: named, code 1, no figure
    and no file.
    """
    real = {
        name: getattr(CpuBackend, name)
        for name in ("quantize", "quantize_both", "requantize", "matmul")
    }

    def spoilt(q):
        q.codes.view(-1)[-1] ^= 1
        return q

    def quantize(self, x, quantizer, options):
        made = real["quantize"](self, x, quantizer, options)
        hit = quantizer.name == "sr" and (
            fault == "quantize" or (fault == "transposed" and x.stride(0) == 1)
        )
        return spoilt(made) if hit else made

    def both(self, *args):
        rows, columns = real["quantize_both"](self, *args)
        return rows, spoilt(columns) if fault == "both" and args[1][0].name == "sr" else columns

    def again(self, q, quantizer, options):
        made = real["requantize"](self, q, quantizer, options)
        return spoilt(made) if fault == "again" and quantizer.name == "sr" else made

    def matmul(self, *args):
        y = real["matmul"](self, *args)
        if fault in ("matmul", "nan"):
            y.view(-1)[7] = float("nan") if fault == "nan" else y.view(-1)[7] * 1.001 + 1
        return y

    for name, replacement in zip(real, (quantize, both, again, matmul), strict=True):
        monkeypatch.setattr(CpuBackend, name, replacement)
    monkeypatch.setattr(measure, "interleaved", never)
    path = tmp_path / "r.md"
    assert main(["bench", "all", "--quick", "--device", "cpu", "--report", str(path)]) == 1
    said = capsys.readouterr().err
    assert "not timed, because it is wrong: cpu, " in said
    assert ("cpu, sr: " in said) == (fault not in ("matmul", "nan"))
    assert ("matmul of real operands" in said) == (fault in ("matmul", "nan"))
    assert not path.exists()


def test_layers_have_a_gate_of_their_own(monkeypatch):
    """Right kernels on the wrong operands: a wgrad of something else is found."""
    from nvfp4.layer import gemms

    real = gemms.product
    monkeypatch.setattr(gemms, "product", lambda call, dy, *rest: real(call, dy, *rest).flip(0))
    with pytest.raises(
        WrongResults, match="auto, layer, quartet2: output or weight gradient is far"
    ):
        check_all(CPU, quick=True)


def test_an_interruption_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    """Ctrl-C in the middle of a section: its rows so far are written and the page says so; exit
    code 130.
    """

    def stopped(work):
        yield {"quantiser": "rtn", "backend": "cpu", "ms": 1.25}
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "SECTIONS", {"First": stopped, "Second": never})
    monkeypatch.setattr(report, "check_all", lambda device, quick: [])
    path = tmp_path / "r.md"
    assert main(["bench", "all", "--device", "cpu", "--quick", "--report", str(path)]) == 130
    assert "| rtn | cpu | 1.25 |" in path.read_text()
    assert "**Interrupted" in path.read_text()
    assert json.loads(path.with_suffix(".json").read_text())["complete"] is False
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report", "/absent/r.md"], "No such file"),
        (["--report", "."], "directory"),
        (["--report", "r.json"], "name it .md"),
        (["--seconds", "0"], "seconds must be positive"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_are_heard_before_anything_runs(options, message, monkeypatch, tmp_path, capsys):
    """One line, code 1, and neither gates nor clocks were run; no file is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "check_all", never)
    assert main(["bench", "all", "--quick", *options]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_older_report_is_kept_until_there_is_a_new_one(monkeypatch, tmp_path):
    """Trying the path out, and a red gate, leave it as it is."""
    path = tmp_path / "r.md"
    path.write_text("older")
    monkeypatch.setattr(report, "check_all", lambda device, quick: never())
    with pytest.raises(Wrong):
        report.bench_all(str(path), "cpu", quick=True)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_help_describes_both_benchmarks(capsys):
    """Every option says which of the two it belongs to."""
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    entries = {
        entry.split()[0].rstrip(","): entry for entry in re.split(r"(?<!\S)--(?!no-)", said)[1:]
    }
    belongs = dict.fromkeys(("report", "quick", "device", "seconds"), " all: ")
    belongs |= dict.fromkeys(
        ("devices", "models", "recipe", "tokens", "json", "plot", "measure-cpu"), " roofline: "
    )
    assert all(word in entries[option] for option, word in belongs.items())


def test_candidates_take_turns():
    """a b, then a b again and again: a drift of the machine falls on both; the first run of each is
    not counted.
    """
    order = []
    ms = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, least=4
    )
    assert order == ["a", "b"] * 5
    assert set(ms) == {"a", "b"}


def test_clocks_come_from_nvidia_smi_where_it_is(monkeypatch):
    """Asked for the GPU at hand by its uuid; without the program, or when it fails, there is
    nothing, and no error.
    """
    cuda, asked = torch.device("cuda", 0), []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="ab-1")
    )
    monkeypatch.setattr(timing.shutil, "which", lambda name: f"/usr/bin/{name}")

    def run(command, **kwargs):
        asked.append(command)
        return subprocess.CompletedProcess(
            command, 0, stdout="1980 MHz, 2619 MHz, 1980 MHz, 700.00 W, 570.1\n"
        )

    monkeypatch.setattr(timing.subprocess, "run", run)
    found = timing.clocks(cuda)
    assert (found["SM clock"], found["driver"]) == ("1980 MHz", "570.1")
    assert "--id=GPU-ab-1" in asked[0]

    def fails(command, **kwargs):
        raise subprocess.CalledProcessError(6, command)

    monkeypatch.setattr(timing.subprocess, "run", fails)
    assert timing.clocks(cuda) == {}
    assert "commit" not in machine(), "unknown, so not claimed"
    monkeypatch.setattr(timing.shutil, "which", lambda name: None)
    assert timing.clocks(cuda) == timing.clocks(CPU) == {}


def test_kept_rows_replace_their_like(tmp_path):
    """A row with the same labels and processor gives way, the others stay; each says where it was
    measured."""
    path = tmp_path / "results" / "rows.json"
    first, second = (
        {"processor": "a", "commit": "1"},
        {"processor": "a", "commit": "2", "python": "3"},
    )
    harness.keep(
        path,
        "t",
        [{"quantiser": "rtn", "isa": "avx2", "ms": 1.0}, {"quantiser": "sr", "isa": "", "ms": 2.0}],
        first,
        2,
    )
    harness.keep(
        path,
        "t",
        [
            {"quantiser": "rtn", "isa": "avx2", "ms": 3.0},
            {"quantiser": "rtn", "isa": "", "ms": 4.0},
        ],
        second,
        2,
    )
    rows = [
        (row["quantiser"], row["isa"], row["ms"], row["machine"])
        for row in json.loads(path.read_text())["rows"]
    ]
    again = {"processor": "a", "commit": "2"}
    assert rows == [("rtn", "avx2", 3.0, again), ("sr", "", 2.0, first), ("rtn", "", 4.0, again)]
    harness.keep(path, "t", [{"quantiser": "sr", "isa": "", "ms": 5.0}], {"processor": "b"}, 2)
    assert [row["ms"] for row in json.loads(path.read_text())["rows"]] == [3.0, 2.0, 4.0, 5.0], (
        "another machine"
    )
    assert [each.name for each in path.parent.iterdir()] == ["rows.json"]


def test_rows_of_an_older_file_keep_their_machine(tmp_path):
    """Files written at once have it beside the rows."""
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps(
            {"title": "t", "machine": {"processor": "a", "cuda": "1"}, "rows": [{"recipe": "bf16"}]}
        )
    )
    harness.keep(path, "t", [{"recipe": "rtn"}], {"processor": "b"})
    rows = json.loads(path.read_text())["rows"]
    assert rows == [
        {"recipe": "bf16", "machine": {"processor": "a"}},
        {"recipe": "rtn", "machine": {"processor": "b"}},
    ]


def test_tables_have_every_column():
    """Of all rows, each once; a missing cell is empty; what Markdown would take for a new cell or
    line is not one.
    """
    rows = [{"a": "x|y\nz", "b": 1234.5}, {"a": "w", "c": 0.123456}]
    assert tables.markdown(rows) == [
        "| a | b | c |",
        "| --- | ---: | ---: |",
        "| x\\|y z | 1234 |  |",
        "| w |  | 0.123 |",
    ]
    assert tables.markdown([]) == ["(nothing measured)"]
    table = tables.terminal("t", rows, labels=1, red=[False, True])
    assert [column.justify for column in table.columns] == ["left", "right", "right"]
    assert [row.style for row in table.rows] == [None, "red"]


def test_matrices_are_what_they_say():
    """The same every time; magnitudes from 2^-20 to 2^20; one NaN, in the last place."""
    assert torch.equal(cases.matrix(8, 8), cases.matrix(8, 8))
    wide = cases.matrix(41, 512, "wide", torch.float32).square().mean(1).sqrt()
    # 512 squares: 0.045 is one sigma
    assert torch.allclose(wide.log2(), torch.arange(-20.0, 21.0), atol=0.2)
    nan = cases.matrix(3, 5, "nan").isnan()
    assert (nan.sum(), nan[-1, -1]) == (1, True)


def test_bytes_that_must_move():
    """By hand for 64 x 32 BF16: two readings and 4.5 bits, one where a row has its scale or a
    rotation finds the range afterwards, a sixteenth of the scales for 16 x 16 blocks.
    """
    x = cases.matrix(64, 32)
    moved = {
        name: cases.quantiser(name).bytes_moved(x)
        for name in ("rtn", "rtn row-scaled", "ms_eden(2)", "rtn_2d")
    }
    assert moved == {
        "rtn": 2 * 4096 + 1024 + 128,
        "rtn row-scaled": 4096 + 1024 + 128,
        "ms_eden(2)": 4096 + 1024 + 128,
        "rtn_2d": 2 * 4096 + 1024 + 8,
    }

"""Tasks: every problem has its right answer, wrong ones score 0 whatever they are, and vocabularies
spell them all."""

from __future__ import annotations

import ast
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nvfp4.rl.tasks.arithmetic import Addition, Countdown, Modular
from nvfp4.rl.tasks.base import Problem, Task
from nvfp4.rl.tasks.digits import Parity, Reverse, Sort, replace_digit
from nvfp4.rl.tasks.expressions import MAX_DEPTH, ExpressionError, evaluate
from nvfp4.rl.tasks.fill_in import GAP, LETTERS, FillIn
from nvfp4.rl.tasks.registry import TASKS, load_task
from nvfp4.rl.vocabulary import SYMBOLS, Bytes, Symbols, load_vocabulary
from nvfp4.run.errors import TrainError

by_name = pytest.mark.parametrize("name", TASKS)
FORMATS = {
    "sort": r"s\d{3,6}>",
    "reverse": r"r\d{3,6}>",
    "parity": r"p[01]{7}>",
    "addition": r"a\d{3}\+\d{3}>",
    "modular": r"m\d+[-+*]\d+%\d+>",
    "countdown": r"c\d(,\d){2}=\d+>",
    "fill_in": r"(?s)(async )?def .*____.*\nA\) .*\n____ is ",
}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    """Each with its defaults; one object, since reading the standard library takes a while."""
    return {name: load_task(name) for name in TASKS}


def solve(prompt: str) -> str | None:
    """The answer, from the prompt alone, in other words than the task's; None for tasks with
    many."""
    body = prompt[1:-1]
    if prompt[0] == "s":
        counts = Counter(body)
        return "".join(digit * counts[digit] for digit in "0123456789")
    if prompt[0] == "r":
        return "".join(reversed(body))
    if prompt[0] == "p":
        total, out = 0, ""
        for bit in body:
            total ^= int(bit)
            out += f"{bit}{total}"
        return f"{out}={total}"
    if prompt[0] == "a":
        a, b = body.split("+")
        return f"{int(a) + int(b):04d}"[::-1]
    if prompt[0] == "m":
        expression, modulus = body.split("%")
        a, sign, b = re.fullmatch(r"(\d+)([-+*])(\d+)", expression).groups()
        return str(
            {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] % int(modulus)
        )
    return None


@by_name
def test_problems_have_right_answers(tasks: dict[str, Task], name: str) -> None:
    """In the documented format, with the answer one gets otherwise; it scores 1 and other texts
    score 0."""
    task = tasks[name]
    for problem in task.problems(200, 1):
        assert re.fullmatch(FORMATS[name], problem.prompt), problem.prompt
        want = None if name in ("fill_in", "countdown") else solve(problem.prompt)
        assert want is None or problem.answer == want
        assert task.reward(problem, problem.answer) == 1.0
        for wrong in (
            "",
            " ",
            problem.answer + "0",
            "0" + problem.answer,
            problem.prompt,
            "²",
            "\ud800",
            "(" * 5000,
        ):
            assert task.reward(problem, wrong) == 0.0 or (
                name == "parity" and wrong.endswith(problem.answer[-2:])
            )


@by_name
def test_problems_follow_from_the_seed(tasks: dict[str, Task], name: str) -> None:
    """The same for the same seed, from another object too; others for another; many different
    ones."""
    task = tasks[name]
    assert task.problems(50, 3) == load_task(name).problems(50, 3)
    assert task.problems(50, 3)[:20] == task.problems(20, 3)
    assert task.problems(50, 3) != task.problems(50, 4)
    assert len({p.prompt for p in task.problems(50, 3)}) > 25


@by_name
def test_held_out_problems_are_never_trained_on(tasks: dict[str, Task], name: str) -> None:
    """The sides share no origin, whatever the seeds; about an eighth is held out."""
    task = tasks[name]
    held = {task.origin(p) for p in task.problems(300, 1, held_out=True)}
    free = {task.origin(p) for p in task.problems(300, 1, held_out=False)}
    assert not held & free
    # nearly all of 800 differ: an eighth of them, 100, within 4 standard deviations, 38
    if name == "sort":
        drawn = {task.origin(p) for p in task.problems(800, 2)}
        free = {task.origin(p) for p in task.problems(20_000, 2, held_out=False)}
        assert 62 <= len(drawn - free) <= 138


@by_name
def test_corrupt_demonstrations(tasks: dict[str, Task], name: str) -> None:
    """Of the answer's length and symbols, mostly wrong, not always the same, determined by the
    generator."""
    task, rng = tasks[name], np.random.default_rng(0)
    problems = task.problems(200, 5)
    texts = [task.corrupt(p, rng) for p in problems]
    rewards = [task.reward(p, t) for p, t in zip(problems, texts, strict=True)]
    assert np.mean(rewards) <= (0.25 if name == "countdown" else 0.0)
    again = np.random.default_rng(0)
    assert texts == [task.corrupt(p, again) for p in problems]
    for problem, text in zip(problems, texts, strict=True):
        if name in ("sort", "reverse", "addition", "modular"):
            assert len(text) == len(problem.answer)
            assert sum(a != b for a, b in zip(text, problem.answer, strict=True)) == 1
        if name == "countdown":
            assert sorted(evaluate(text)[1]) == problem.data["numbers"]
        if name == "parity":
            assert len(text) == len(problem.answer)
            assert set(text) <= set("01=")


def test_replace_digit() -> None:
    """Every digit of every place can be hit, every other value can come, and a text without digits
    stays."""
    rng = np.random.default_rng(0)
    seen = {replace_digit("a12", rng) for _ in range(500)}
    assert seen == {f"a{d}2" for d in "023456789"} | {f"a1{d}" for d in "013456789"}
    assert replace_digit("none", rng) == "none"


# --- countdown and its evaluator


def test_countdown_accepts_every_right_way_and_no_other() -> None:
    """3*2+7 = 13 from 3, 7, 2; each number once, no eval tricks."""
    task, problem = (
        Countdown(),
        Problem("c3,7,2=13>", "3*2+7", {"numbers": [2, 3, 7], "target": 13}),
    )
    for right in ("3*2+7", "7+2*3", "(2*3)+7", "7+(3*2)", "((7))+3*2"):
        assert task.reward(problem, right) == 1.0, right
    for wrong in (
        "13",
        "3*2+7+0",
        "3*2*7",
        "2*3+7-",
        "3*2+07+",
        " 3*2+7",
        "3*2+7\n",
        "+3*2+7",
        "3**2+7-2",
        "int(13)",
    ):
        assert task.reward(problem, wrong) == 0.0, wrong
    half = Problem("c1,2,4=2>", "", {"numbers": [1, 2, 4], "target": 2})
    assert task.reward(half, "4*(1/2)") == 1.0  # fractions on the way are exact
    assert task.reward(half, "4/(1-1)") == 0.0
    assert all(
        0 <= p.data["target"] <= 20 for p in Countdown(numbers=4, largest=20).problems(100, 0)
    )


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join),
        inner.map(lambda text: f"({text})"),
    ),
    max_leaves=12,
)


@given(EXPRESSIONS)
def test_evaluate_is_arithmetic(text: str) -> None:
    """Against Python's own parser with exact fractions; both refuse division by zero."""

    def value(node: Any) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        left, right = value(node.left), value(node.right)
        kinds = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}
        return left / right if isinstance(node.op, ast.Div) else kinds[type(node.op)]

    try:
        want = value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(ExpressionError, match="division by zero"):
            evaluate(text)
        return
    assert evaluate(text) == (want, [int(n) for n in re.findall(r"\d+", text)])


@given(st.text(alphabet="0123456789+-*/() .e_x²٣\n", max_size=20))
def test_evaluate_refuses_the_rest(text: str) -> None:
    """A value or ``ExpressionError``, never anything else; and no value for what holds other
    symbols."""
    try:
        evaluate(text)
    except ExpressionError:
        return
    assert re.fullmatch(r"[0-9+\-*/()]+", text)


def test_evaluate_has_bounds() -> None:
    deep = "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH
    assert evaluate(deep) == (1, [1])
    for text in (
        f"({deep})",
        "1" * 10,
        "+".join("1" * 101),
        "",
        "()",
        "1+",
        "(1",
        "1)",
        "-1",
        "1 + 1",
        "01",
        "00",
    ):
        with pytest.raises(ExpressionError):
            evaluate(text)


# --- fill in the middle


def test_fill_in_is_a_fair_choice(tasks: dict[str, Task]) -> None:
    """Options differ, one of them stood there, letters are uniform (chi-square below its 0.999
    quantile, 16.3 for 3 degrees of freedom), and always answering A scores a quarter."""
    task = tasks["fill_in"]
    problems = task.problems(600, 0)
    letters = Counter(p.answer for p in problems)
    assert sum((letters[c] - 150) ** 2 / 150 for c in "ABCD") < 16.3
    assert np.mean([task.reward(p, "A") for p in problems]) == letters["A"] / 600
    for problem in problems:
        code, options, _ = re.fullmatch(r"(?s)(.*?)\n(A\) .*)\n(____ is )", problem.prompt).groups()
        choices = dict(line.split(") ", 1) for line in options.split("\n"))
        assert list(choices) == list("ABCD")
        assert len(set(choices.values())) == 4
        assert code.count(GAP) == 1
        ast.parse(code.replace(GAP, choices[problem.answer]).replace("\nasync ", "\n"))
        assert len(problem.prompt) < 1500


def test_fill_in_reads_other_files(tmp_path: Path) -> None:
    """The original line is in the file at that place; what is no Python is passed over; too little
    data is an error."""
    lines = [
        f"def f{i}(x):\n    y = x + {i}\n    z = y * {i}\n    return z - {i}\n" for i in range(20)
    ]
    (tmp_path / "good.py").write_text("\n".join(lines))
    (tmp_path / "bad.py").write_text("def (")
    task = FillIn(options=3, data=(str(tmp_path),))
    for problem in task.problems(50, 0):
        code, _, options = problem.prompt.partition("\nA) ")
        chosen = dict(
            zip(LETTERS, re.split(r"\n[BC]\) ", options.removesuffix(f"\n{GAP} is ")), strict=False)
        )
        assert code.replace(GAP, chosen[problem.answer]) + "\n" in lines
        assert problem.data == {"file": "good.py"}
    with pytest.raises(TrainError, match="no function"):
        FillIn(data=(str(tmp_path / "bad.py"),)).problems(1, 0)
    one = tmp_path / "one.py"
    one.write_text("def f(x):\n    y = x\n    return y\n")
    with pytest.raises(TrainError, match="too few statements"):
        FillIn(options=16, data=(str(one),)).problems(1, 0)


# --- the registry


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from nvfp4.rl.tasks.base import Problem, Task

@dataclass
class Echo(Task):
    name = "echo"
    length: int = 3

    def problem(self, rng):
        text = "".join(map(str, rng.integers(0, 10, self.length)))
        return Problem(text + ">", text)

    def reward(self, problem, completion):
        return float(completion == problem.answer)

class Half(Task):
    name = "half"

other = 3
"""


def test_a_task_of_ones_own_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file and from a module, with options."""
    (tmp_path / "own_tasks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{tmp_path}/own_tasks.py:Echo", "own_tasks:Echo"):
        task = load_task(name, length=5)
        [problem] = task.problems(1, 0)
        assert len(problem.answer) == 5
        assert task.verdicts([problem], [problem.answer])[0].reward == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("srot", "expected one of sort, reverse, .*, got 'srot'"),
        ("no_such_module:Task", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("{folder}/none.py:Task", "none.py cannot be imported: FileNotFoundError"),
        ("{folder}/own.py:Nothing", "has no class 'Nothing' derived from"),
        ("{folder}/own.py:other", "has no class 'other'"),
        ("{folder}/own.py:Half", "Half of .* does not define problem, reward"),
        ("{folder}/broken.py:Task", "broken.py cannot be imported: ZeroDivisionError"),
    ],
)
def test_wrong_names_say_what_is_wrong(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(TrainError, match=message):
        load_task(name.format(folder=tmp_path))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sort", {"shortest": 7}),
        ("sort", {"size": 3}),
        ("addition", {"digits": 0}),
        ("modular", {"largest": 1}),
        ("countdown", {"numbers": 0}),
        ("fill_in", {"options": 1}),
    ],
)
def test_wrong_options_say_what_is_wrong(name: str, options: dict[str, int]) -> None:
    with pytest.raises(TrainError, match=f"task {name}: .*; it takes "):
        load_task(name, **options)


def test_a_task_without_foreign_code_says_that_nothing_is_confined(tmp_path: Path) -> None:
    """--unsafe-rewards used to end in "unexpected keyword argument"; a class that takes the option
    gets it."""
    message = r"^unsafe_rewards: task {} runs neither .*; leave out --unsafe-rewards$"
    (tmp_path / "own.py").write_text(OWN)
    for name in ("sort", f"{tmp_path}/own.py:Echo"):
        with pytest.raises(TrainError, match=message.format(re.escape(name))):
            load_task(name, unsafe_rewards=True)
    assert load_task("sort", shortest=2).problems(1, 0)
    (tmp_path / "takes.py").write_text(
        OWN.replace("length: int = 3", "length: int = 3\n    unsafe_rewards: bool = False")
    )
    assert load_task(f"{tmp_path}/takes.py:Echo", unsafe_rewards=True).unsafe_rewards is True


def test_a_task_lists_its_problems_or_draws_them(tmp_path: Path) -> None:
    """All rows of a file, the longest among them; of a rule there is no list."""
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(f'{{"prompt": "{"1" * n}", "answer": "1"}}' for n in (3, 9, 5))
    )
    listed = load_task(str(tmp_path / "rows.jsonl")).listed()
    assert [len(problem.prompt) for problem in listed] == [3, 9, 5]
    assert all(load_task(name).listed() is None for name in TASKS)


def test_options_are_obeyed() -> None:
    assert {len(p.answer) for p in Sort(shortest=2, longest=4).problems(100, 0)} == {2, 3, 4}
    assert {len(p.answer) for p in Reverse(longest=3).problems(20, 0)} == {3}
    assert {len(p.answer) for p in Parity(shortest=4, longest=4).problems(20, 0)} == {10}
    assert all(
        re.fullmatch(r"a\d{2}\+\d{2}>", p.prompt) for p in Addition(digits=2).problems(20, 0)
    )
    assert {int(p.prompt[:-1].split("%")[1]) for p in Modular(largest=3).problems(50, 0)} == {2, 3}


# --- vocabularies


@by_name
def test_vocabularies_spell_every_task(tasks: dict[str, Task], name: str) -> None:
    """Prompt, answer and corrupt answer, there and back; the end-of-text token is in none of
    them."""
    task, rng = tasks[name], np.random.default_rng(0)
    for vocabulary in {"symbols": [Symbols(), Bytes()], "bytes": [Bytes()]}[task.vocabulary]:
        for problem in task.problems(50, 0):
            for text in (problem.prompt, problem.answer, task.corrupt(problem, rng)):
                ids = vocabulary.encode(text)
                assert not {vocabulary.eos_id, vocabulary.pad_id} & set(ids)
                assert max(ids) < vocabulary.vocab_size
                assert vocabulary.decode(ids) == text
                assert vocabulary.decode([*ids, vocabulary.eos_id, vocabulary.pad_id, *ids]) == text


def test_symbols() -> None:
    """32 different ones; what is missing is named."""
    assert len(set(SYMBOLS)) == Symbols.vocab_size == 32
    for text in ("x=y", "1.5", "<pad>"):
        with pytest.raises(ValueError, match="not among the symbols"):
            Symbols().encode(text)


@pytest.mark.parametrize("name", ["symbols", "bytes"])
def test_saved_vocabularies_load_in_transformers(tmp_path: Path, name: str) -> None:
    """The same ids and texts from ``AutoTokenizer``, the same special tokens, padding on the left;
    and from us."""
    ours = load_vocabulary(name)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.padding_side) == (
        ours.eos_id,
        ours.pad_id,
        "left",
    )
    for text in ("s52907>", "c3,7,2=13>", "3*(2+7)/1-0"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs.decode([*ours.encode(text), ours.eos_id], skip_special_tokens=True) == text
    again = load_vocabulary(str(tmp_path))
    assert (again.eos_id, again.pad_id) == (ours.eos_id, ours.pad_id)
    assert again.encode("s52907>") == ours.encode("s52907>")
    assert again.decode([*ours.encode("02579"), ours.eos_id, 7]) == "02579"
    with pytest.raises(TrainError, match="tokenizer"):
        load_vocabulary(str(tmp_path / "none"))

"""What a warp issues when it runs a kernel: machine code as counts, by the unit that runs it.

    parse       the listing of ``cuobjdump -sass`` -> instructions
    executed    -> how often each runs: once, or as often as the loops that it lies in go round
    counts      -> {"fp32": 512.0, "logic": 310.0, ...}, the units of ``nvfp4/bench/issue.py``

A loop is a jump back to a block that dominates it; its trips are known to the launch alone, so that
the caller gives them, outermost and first in the code first, and a number of loops that it did not
expect is an error. Not counted is what an ordinary operand never reaches: a block that calls a
subroutine (ptxas calls one for a quotient out of the range of its Newton steps), what only such
blocks lead to, and blocks that the caller names as cold. A branch over a block is taken to be
taken by some lanes of the warp only, so that the block runs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nvfp4.bench.issue import LANES

LINE_BYTES = 128
"""Of an access of shared or global memory, per warp."""

_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);",
    re.MULTILINE,
)

_OPCODES = {
    "fp32": "FADD FMUL FFMA FADD32I FMUL32I FFMA32I FSWZADD FCHK FHADD FHFMA",
    "fp32x2": "FADD2 FMUL2 FFMA2",
    "half2": "HADD2 HMUL2 HFMA2 HADD2_32I HMUL2_32I HFMA2_32I",
    "imad": "IMAD IMAD32I IDP XMAD IMUL",
    "iadd": "IADD IADD3 IADD32I VIADD VIADDMNMX LEA IABS ISCADD",
    "minmax": "FMNMX FMNMX3 IMNMX VIMNMX VIMNMX3 HMNMX2 VHMNMX",
    "logic": "LOP LOP3 LOP32I SHF SHL SHR PRMT SEL FSEL FSET ISETP FSETP HSETP2 HSET2 PLOP3 MOV "
    "MOV32I P2R R2P BMSK SGXT ICMP VABSDIFF VABSDIFF4 PSETP CS2R CSEL",
    "pack": "F2FP I2FP F2IP I2IP",
    "xu": "MUFU POPC FLO BREV",
    "convert": "I2F F2F FRND I2I",
    "to_integer": "F2I",
    "shuffle": "SHFL",
    "shared": "LDS STS LDSM STSM",
    "global": "LDG STG LD ST LDL STL LDGSTS",
    "atomic": "ATOM ATOMG ATOMS RED REDG",
    "vote": "VOTE VOTEU MATCH REDUX CREDUX",
    "tensor": "HMMA IMMA QMMA OMMA DMMA HGMMA UTCHMMA UTCQMMA UTCOMMA UTCBAR LDTM STTM",
    "constant": "LDC S2R LEPC",
    "control": "BRA BRX JMP JMX CALL RET EXIT BAR BSSY BSYNC BREAK WARPSYNC NANOSLEEP YIELD NOP "
    "DEPBAR LDGDEPBAR ERRBAR MEMBAR CCTL BPT KILL ELECT SYNCS FENCE ACQBULK PREEXIT BMOV "
    "CGAERRBAR UCGABAR_ARV UCGABAR_WAIT LDCU RPCMOV",
}
_UNIT = {opcode: unit for unit, opcodes in _OPCODES.items() for opcode in opcodes.split()}
_UNIT["LDCU"] = "uniform"
_SHARED_BY_LANES = re.compile(r"U[A-Z]|R2UR|C?S2UR")

ENDS = ("EXIT", "RET", "BPT", "KILL")


@dataclass(frozen=True)
class Instruction:
    """One instruction. predicate: "P0", "!P0", or "". target: of a jump, or None."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def conditional(self) -> bool:
        """Whether what follows may run too: by a predicate before it, or among its operands."""
        return bool(self.predicate) or (self.name == "BRA" and "," in self.operands)

    @property
    def target(self) -> int | None:
        """Where a jump goes; none that is made only where lanes of a warp have parted (BRA.DIV)."""
        if self.name != "BRA" or ".DIV" in self.opcode:
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return None if found is None else int(found[1], 16)

    @property
    def unit(self) -> str:
        """Who runs it; ValueError for an opcode that nobody sorted yet."""
        unit = _UNIT.get(self.name)
        if unit is None and _SHARED_BY_LANES.match(self.name):
            unit = "uniform"
        if unit is None:
            raise ValueError(f"which unit runs {self.opcode}? add it to tools/sass.py")
        return unit

    @property
    def bytes(self) -> int:
        """Of an access of memory, per lane."""
        modifiers = self.opcode.split(".")[1:]
        if self.name in ("LDSM", "STSM"):
            return 4 * int(modifiers[-1]) if modifiers[-1].isdigit() else 4
        for modifier, size in (("256", 32), ("128", 16), ("64", 8), ("U8", 1), ("S8", 1)):
            if modifier in modifiers:
                return size
        return 2 if {"U16", "S16", "U"} & set(modifiers) else 4


def parse(listing: str) -> list[Instruction]:
    """The instructions of the one kernel that a listing holds, in their order."""
    return [
        Instruction(int(address, 16), predicate, opcode, operands.strip())
        for address, predicate, opcode, operands in _LINE.findall(listing)
    ]


class Block:
    """Instructions that run together. after: the blocks that may follow."""

    def __init__(self, instructions: list[Instruction]) -> None:
        self.instructions = instructions
        self.after: list[int] = []

    @property
    def start(self) -> int:
        """Its address."""
        return self.instructions[0].address

    @property
    def calls(self) -> bool:
        """Whether it calls a subroutine."""
        return any(each.name == "CALL" for each in self.instructions)


def blocks(instructions: Sequence[Instruction]) -> list[Block]:
    """Cut at jumps, at what they lead to, and where a warp ends."""
    targets = {each.target for each in instructions} - {None}
    found: list[Block] = []
    piece: list[Instruction] = []
    for each in instructions:
        if piece and each.address in targets:
            found.append(Block(piece))
            piece = []
        piece.append(each)
        if each.target is not None or each.name in (*ENDS, "CALL"):
            found.append(Block(piece))
            piece = []
    if piece:
        found.append(Block(piece))

    at = {block.start: i for i, block in enumerate(found)}
    for i, block in enumerate(found):
        last = block.instructions[-1]
        if last.target in at:
            block.after.append(at[last.target])
        goes_on = last.conditional or (last.target is None and last.name not in ENDS)
        if goes_on and i + 1 < len(found):
            block.after.append(i + 1)
    return found


def executed(
    instructions: Sequence[Instruction],
    trips: Sequence[float] | Callable[[list[Instruction]], float] = (),
    cold: Callable[[Block], bool] = lambda block: False,
) -> list[tuple[Instruction, float]]:
    """Each instruction with how often a warp runs it.

    trips: of each loop, by the address at which it begins, or by what is in it. Raises ValueError
    where the code has another number of loops.
    """
    graph = blocks(instructions)
    hot = _reached(graph, lambda block: block.calls or cold(block))
    loops = _loops(graph, hot)
    if callable(trips):
        within = (
            [each for i in sorted(body) for each in graph[i].instructions] for _, body in loops
        )
        trips = [trips(body) for body in within]
    if len(loops) != len(trips):
        where = ", ".join(f"{graph[header].start:#x}" for header, _ in loops) or "none"
        raise ValueError(f"{len(trips)} loops were expected; the code has {len(loops)}: {where}")

    often = dict.fromkeys(hot, 1.0)
    for (_, body), count in zip(loops, trips, strict=True):
        for i in body:
            often[i] *= count
    return [(each, often[i]) for i in sorted(hot) for each in graph[i].instructions]


def _reached(graph: list[Block], cold: Callable[[Block], bool]) -> set[int]:
    """The blocks that run when nothing runs that is cold."""
    hot: set[int] = set()
    ahead = [0] if graph else []
    while ahead:
        i = ahead.pop()
        if i in hot or cold(graph[i]):
            continue
        hot.add(i)
        ahead += graph[i].after
    return hot


def _loops(graph: list[Block], hot: set[int]) -> list[tuple[int, set[int]]]:
    """(header, all blocks) of each loop among the hot blocks, by the place of the header."""
    before: dict[int, list[int]] = {i: [] for i in hot}
    for i in hot:
        for j in graph[i].after:
            if j in hot:
                before[j].append(i)

    # a block dominates another if every way there leads through it
    dominators = {i: set(hot) for i in hot}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in sorted(hot - {0}):
            ways = [dominators[j] for j in before[i]]
            new = {i} | (set.intersection(*ways) if ways else set())
            if new != dominators[i]:
                dominators[i], changed = new, True

    found: dict[int, set[int]] = {}
    for i in sorted(hot):
        for header in graph[i].after:
            if header not in dominators[i]:
                continue
            body, ahead = found.setdefault(header, {header}), [i]
            while ahead:
                j = ahead.pop()
                if j not in body:
                    body.add(j)
                    ahead += before[j]
    return sorted(found.items())


def counts(ran: Iterable[tuple[Instruction, float]]) -> defaultdict[str, float]:
    """Instructions of a thread by unit, and accesses to memory by lines of 128 bytes per warp."""
    total: defaultdict[str, float] = defaultdict(float)
    for each, often in ran:
        unit = each.unit
        total[unit] += often
        if unit in ("shared", "global"):
            total[f"{unit}_lines"] += often * max(1.0, each.bytes * LANES / LINE_BYTES)
    return total

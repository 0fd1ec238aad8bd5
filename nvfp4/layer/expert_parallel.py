"""Experts spread over processes: tokens travel to the experts they chose, as FP4 codes if they can.

    process r      its tokens' rows x [S, K], ordered by expert; experts r E/P to (r + 1) E/P
    all-gather     how many rows each process has for each expert, int64 [P, E]
    all-reduce     the magnitude of each expert's rows on all processes, float32 [E]
    all-to-all     codes and block scales: 4.5 bits per element, where BF16 has 16
    at the owner   rows of its experts, those of process 0 first: as one process would order them
    all-to-all     the results, back to the tokens, in their dtype

One scale for each expert, agreed on by all, and blocks along K alone: so a row's codes are those
that it has among all rows of its expert, and everything after that is what one process computes
that holds all tokens and all experts. Outputs and gradients are equal to the bit. Row-scaled
operands take a scale of each row along, four bytes, and agree on nothing.

Where wgrad starts from x itself instead of fprop's codes (rtn, nvidia, four_over_six), and where
fprop's operand of x is stochastic or rotated, whose codes depend on an element's place, the rows
travel as they are and are quantised by the owner: the same bits. The backward sends dy and dx in
their dtypes: operands of dy are stochastic or rotated, and made along both axes.

How many rows come from where is read on the host once per call: all-to-alls are asked for by
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from nvfp4.grouped_ops import grouped_quantize
from nvfp4.numerics.formats import ROW_BLOCK
from nvfp4.numerics.groups import GroupedQTensor, Groups
from nvfp4.numerics.scaling import magnitude
from nvfp4.quantizers.base import Options, Quantizer


class Part(NamedTuple):
    """Some experts of a stack.

    experts: their numbers in it. rank: of the process that they round for, the first of those that
    share the stack: an expert is on one alone, and draws what it would draw with all others there.
    """

    experts: range
    rank: int


@dataclass(frozen=True, eq=False)
class Routes:
    """Which rows go to which process, and how those that come lie there.

    sent, received: rows to and from each process. order: of received rows, those of this process's
    first expert first, each expert's by process; int64. groups: of the rows in that order. part: of
    the experts, which this process has.
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    order: torch.Tensor
    groups: Groups
    part: Part


def routes_of(groups: Groups, group: dist.ProcessGroup) -> Routes:
    """The routes of rows that are ordered by expert, groups of all of them; a collective call."""
    processes, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = groups.offsets.diff().to(torch.int64)
    table = torch.empty(processes * groups.count, dtype=torch.int64, device=counts.device)
    dist.all_gather_into_tensor(table, counts, group=group)

    # of each process's experts, how many rows each process has: read on the host
    each = groups.count // processes
    experts = range(rank * each, (rank + 1) * each)
    here = table.view(processes, -1)[:, experts.start : experts.stop]
    by_process = torch.stack((counts.view(processes, each).sum(1), here.sum(1)))
    sent, received = by_process.tolist()

    # rows come by process, each process's by expert; a stable sort brings them by expert
    expert = torch.arange(each, device=here.device).repeat(processes)
    expert = expert.repeat_interleave(here.flatten(), output_size=sum(received))
    offsets = torch.cat((here.new_zeros(1), here.sum(0).cumsum(0))).to(torch.int32)
    own = Groups(offsets, sum(received))
    part = Part(experts, dist.get_process_group_ranks(group)[0])
    return Routes(group, sent, received, expert.argsort(stable=True), own, part)


def to_owners(rows: torch.Tensor, routes: Routes) -> torch.Tensor:
    """Rows [S, ...] to the processes of their experts; those that come here, by expert."""
    return _exchanged(rows, routes.sent, routes.received, routes.group)[routes.order]


def to_tokens(rows: torch.Tensor, routes: Routes) -> torch.Tensor:
    """The inverse of ``to_owners``."""
    lying = torch.empty_like(rows, memory_format=torch.contiguous_format)
    lying[routes.order] = rows
    return _exchanged(lying, routes.received, routes.sent, routes.group)


def _exchanged(
    rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """All-to-all of rows, as bytes: every backend sends those."""
    out = torch.empty(sum(received), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    dist.all_to_all_single(
        out.view(torch.uint8), rows.contiguous().view(torch.uint8), received, sent, group=group
    )
    return out


def results_to_tokens(y: torch.Tensor, routes: Routes) -> torch.Tensor:
    """``to_tokens`` of results, differentiable: their gradients go the other way."""
    moved: torch.Tensor = _ResultsToTokens.apply(y, routes)
    return moved


class _ResultsToTokens(torch.autograd.Function):
    """See ``results_to_tokens``."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, routes: Routes) -> torch.Tensor:
        ctx.routes = routes
        return to_tokens(y, routes)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return to_owners(dy, ctx.routes), None


def codes_may_travel(quantizer: Quantizer, options: Options) -> bool:
    """Whether codes of a row are a function of the row and one amax."""
    deterministic = quantizer.claims(options).deterministic and options.rotation is None
    return deterministic and options.block == ROW_BLOCK


def codes_to_owners(
    x: torch.Tensor,
    groups: Groups,
    routes: Routes,
    quantizer: Quantizer,
    options: Options,
    backend: str,
) -> GroupedQTensor:
    """Rows x [S, K] as codes at the processes of their experts; a collective call."""
    # one scale for each expert's rows on all processes, or one for each row
    amax = None if options.row_scaled else _agreed_amax(x, groups, routes.group)
    q = grouped_quantize(x, groups, quantizer, options, amax=amax, backend=backend)

    # codes and scales of a row travel together, one all-to-all of bytes
    parts = [q.codes, q.block_scale]
    if options.row_scaled:
        parts.append(q.global_scale.view(-1, 1).view(torch.uint8))
    came = to_owners(torch.cat(parts, dim=1), routes)
    codes, block_scale, *scales = came.split([part.shape[1] for part in parts], dim=1)

    # every process knows the scales of its experts, also of those that its own rows did not choose
    if amax is None:
        global_scale = scales[0].contiguous().view(torch.float32).view(-1)
    else:
        own = slice(routes.part.experts.start, routes.part.experts.stop)
        zeros = torch.zeros(len(routes.part.experts), 1, 16, device=x.device)
        global_scale = grouped_quantize(
            zeros, None, quantizer, options, amax=amax[own], backend=backend
        ).global_scale
    return GroupedQTensor(
        codes.contiguous(),
        block_scale.contiguous(),
        global_scale,
        ROW_BLOCK,
        routes.groups.rows,
        x.shape[1],
        len(routes.part.experts),
        routes.groups,
        "rows",
        options.row_scaled,
    )


def _agreed_amax(x: torch.Tensor, groups: Groups, group: dist.ProcessGroup) -> torch.Tensor:
    """The largest magnitude of each expert's rows on all processes: float32 [E]; Inf for NaN."""
    expert = torch.arange(groups.count, device=x.device)
    expert = expert.repeat_interleave(groups.offsets.diff(), output_size=groups.rows)
    of_rows = magnitude(x, row_scaled=True)
    of_rows = torch.where(of_rows.isfinite(), of_rows, torch.inf)
    amax = torch.zeros(groups.count, device=x.device).scatter_reduce_(0, expert, of_rows, "amax")
    dist.all_reduce(amax, dist.ReduceOp.MAX, group)
    return amax

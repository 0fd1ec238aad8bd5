"""Options for models spread over processes. DDP, FSDP2 and tensor parallelism need none of them.

    model = nvfp4.convert(model)            first: parameters keep their identity
    fully_shard(model)                      FSDP2
    fp4_all_gather(model)                   weights travel as codes, a quarter of the bytes
    parallelize_module(model, mesh, plan)   tensor parallelism, see ``layer/tensor_parallel.py``
    share_noise(model, mesh)                what it left whole rounds alike on all processes
    expert_parallel(model, mesh)            a part of the experts on each process, see
                                            ``layer/expert_parallel.py``

Weights under FSDP2 are DTensors outside of forward and plain tensors inside, so a converted layer
notices nothing. Quantised weights are not kept between calls while torch.distributed runs: gathered
memory comes and goes.

With ``fp4_all_gather`` the way of a weight is

    shard [N/P, K]  -> amax, all-reduced: one number  -> codes and scales of the shard
                    -> FSDP2 gathers their bytes      -> ``GatheredWeight``, which fprop takes as it
                                                         is, and dgrad transposes or decodes

Blocks are whole in every shard, so its codes equal the whole weight's, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard

from nvfp4.layer.call import quantize_with_amax
from nvfp4.layer.experts import Experts
from nvfp4.layer.linear import Linear, layers
from nvfp4.layer.sharding import GatheredWeight, amax_of_parts
from nvfp4.layer.state import LinearState
from nvfp4.layer.weight_cache import STACKS
from nvfp4.numerics.formats import TILE_BLOCK
from nvfp4.numerics.qtensor import QTensor

_BEFORE, _AFTER = "fsdp_pre_all_gather", "fsdp_post_all_gather"
"""FSDP2's extension points, looked up on the sharded tensor (torchao's FP8 gather uses them too).
"""


def share_noise(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Let layers that ``parallelize_module`` left whole round alike on all processes of the mesh.

    Nothing averages the gradients of such copies, so they must be equal to the bit or the copies
    drift apart. mesh: of one dimension, as given to ``parallelize_module``; call it after that, on
    all its processes. Returns ``model``. ValueError if the processes converted with different
    seeds.
    """
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, as for parallelize_module, got {mesh}: say mesh['tp']"
        )

    # equal seeds, or the rank below would not make the noise equal
    seeds: list[Any] = [None] * mesh.size()
    dist.all_gather_object(
        seeds, [layer.nvfp4.noise.seed for layer in layers(model).values()], mesh.get_group()
    )
    if any(other != seeds[0] for other in seeds):
        raise ValueError(
            "the processes converted with different seeds: give convert one seed= on all of them"
        )

    # all round as the first process; layers with a DTensor weight set their rank in forward
    first = int(mesh.mesh.flatten()[0])
    for layer in layers(model).values():
        layer.nvfp4.noise.rank = first
    return model


def expert_parallel(model: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Spread converted experts over the processes of ``mesh``: each keeps its part of every stack.

    Outputs and gradients are those of one process that holds all experts and all tokens, those of
    process 0 first, to the bit; tokens travel as FP4 codes where the recipe allows
    (``layer/expert_parallel.py``). mesh: of one dimension; call it on all its processes, with equal
    weights, after ``convert`` and before an optimizer is made. Parameters become DTensors
    [E, ...] sharded over experts, so ``state_dict``, DCP and optimizers work, and the number of
    processes may change on loading. A gradient of an expert sums what all processes' losses send
    it: where DDP averages the others, divide each loss by the number of processes instead, and keep
    DDP from the experts. Each forward and backward is a collective call.

    Returns the names of the modules. ValueError, with nothing changed, if the mesh has another
    dimension, experts are not a multiple of the processes or spread already, or the processes
    converted with different seeds.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh}: say mesh['ep']")
    found = {name: m for name, m in model.named_modules() if isinstance(m, Experts)}

    # all is checked before anything is changed
    for name, module in found.items():
        stack = getattr(module, STACKS[0])
        if isinstance(stack, DTensor):
            raise ValueError(f"{name} is spread over processes already: {stack.placements}")
        if stack.shape[0] % mesh.size():
            raise ValueError(
                f"{name} has {stack.shape[0]} experts, which {mesh.size()} processes cannot share "
                "alike: take a number of processes that divides it"
            )
    seeds: list[Any] = [None] * mesh.size()
    own = [state.noise.seed for module in found.values() for state in module.nvfp4.values()]
    dist.all_gather_object(seeds, own, mesh.get_group())
    if any(other != seeds[0] for other in seeds):
        raise ValueError(
            "the processes converted with different seeds: give convert one seed= on all of them"
        )

    # of every stack and every bias this process's experts, in memory of their own
    for module in found.values():
        for parameter in [f"{stack}{end}" for stack in STACKS for end in ("", "_bias")]:
            whole = getattr(module, parameter, None)
            if isinstance(whole, nn.Parameter):
                part = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
                spread = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
                setattr(module, parameter, nn.Parameter(spread, whole.requires_grad))
    return list(found)


def fp4_all_gather(model: nn.Module, enabled: bool = True) -> dict[str, str]:
    """Let FSDP2 gather weights of converted layers as FP4 codes: a quarter of the bytes, same bits.

    Each process quantises its shard (the scale from an all-reduced amax), codes and scales are
    gathered. Results equal gathering in high precision and quantising. Parameters, gradients,
    ``state_dict`` and checkpoints stay as they are. model: after ``fully_shard``, outside of
    forward and backward; again after ``.to()`` or ``load_state_dict`` with ``assign=True``.
    enabled: False goes back to gathering in high precision, e.g. for ``nvfp4.disabled(model)``.
    Returns the layers that are still gathered in high precision by name, each with the reason.
    """
    # of every sharded parameter: is it a weight of ours, and may it travel as codes?
    names = {id(layer): name for name, layer in layers(model).items()}
    reasons: dict[str, str | None] = dict.fromkeys(names.values(), "not sharded")
    for parameter in _sharded_parameters(model):
        is_weight = parameter._module_info.param_name == "weight"
        name = names.get(id(parameter._module_info.module)) if is_weight else None
        reason = "off" if not enabled or name is None else _why_not(parameter)
        _switch(parameter, reason is None)
        if name is not None:
            reasons[name] = reason
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _pre_all_gather(
    shard: Callable[[], torch.Tensor | None],
    mesh: DeviceMesh,
    outer_size: torch.Size,
    outer_stride: tuple[int, ...],
    module: nn.Module,
    mp_policy: MixedPrecisionPolicy,
) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """What FSDP2 sends of a weight: codes, block scales and global scale of its shard.

    And what it hands on to ``_post_all_gather``: (block, shape of the whole).
    """
    part = shard()
    assert part is not None
    if not isinstance(module, Linear):
        raise RuntimeError(
            "the layer was reverted while its weight is gathered in FP4: call fp4_all_gather(model)"
        )
    spec = module.nvfp4.recipe.fprop.right
    options = spec.options_given_amax
    assert options is not None

    # in the dtype of the forward, as it would have been gathered
    part = part if mp_policy.param_dtype is None else part.to(mp_policy.param_dtype)
    amax = amax_of_parts(part, mesh.get_group())
    q = quantize_with_amax(part, spec.rule, options, amax, backend=module.nvfp4.backend)
    return q.tensors, (q.block, tuple(outer_size))


def _post_all_gather(
    gathered: tuple[torch.Tensor, ...],
    record: tuple[Any, ...],
    dtype: torch.dtype,
    *,
    out: Any = None,
) -> tuple[GatheredWeight, tuple[()]] | None:
    """The weight that FSDP2 received.

    Made once: later all-gathers write into the memory of its codes (``out``).
    """
    if out is not None:
        return None
    codes, block_scale, global_scale = gathered

    # every process sends the same global scale
    q = QTensor(codes, block_scale, global_scale[:1], *record)
    return GatheredWeight(q, dtype), ()


def _sharded_parameters(model: nn.Module) -> list[Any]:
    """FSDP2's records of all parameters that it shards; ValueError if there are none."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        raise ValueError(
            "no part of the model is sharded: call torch.distributed.fsdp.fully_shard on it first"
        )
    groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]
    return [parameter for group in groups for parameter in group.fsdp_params]


def _switch(parameter: Any, on: bool) -> None:
    """Set or remove FSDP2's extension points on the shard, and let it make its buffers anew."""
    # a weak reference, since the shard would hold itself otherwise
    shard = parameter._sharded_local_tensor
    if on and not hasattr(shard, _BEFORE):
        setattr(shard, _BEFORE, partial(_pre_all_gather, weakref.ref(shard)))
        setattr(shard, _AFTER, _post_all_gather)
    elif not on and hasattr(shard, _BEFORE):
        delattr(shard, _BEFORE)
        delattr(shard, _AFTER)

    # the buffers of the other kind of gather are of no use
    parameter._init_extensions()
    if on != isinstance(getattr(parameter, "_unsharded_param", None), GatheredWeight):
        parameter.all_gather_outputs = []
        vars(parameter).pop("_unsharded_param", None)


def _why_not(parameter: Any) -> str | None:
    """Why this weight must travel in high precision, in words; None if it need not."""
    layer, shard = parameter._module_info.module, parameter._sharded_local_tensor
    state: LinearState = layer.nvfp4

    # the recipe, the layer, the weight
    options = state.recipe.fprop.right.options_given_amax
    if options is None:
        return f"recipe {state.recipe.name}: codes of w in fprop depend on more than w and its amax"
    if state.recipe.dgrad.right.source == "tensor":
        return f"recipe {state.recipe.name}: dgrad needs w in high precision"
    if not state.enabled:
        return "layer is disabled"
    if state.cache.group is not None:
        return "its scale is shared with other layers"
    if parameter._module_info.shared_modules:
        return "weight is tied"
    if parameter.is_dtensor:
        return "weight is tensor parallel too"
    if parameter.offload_to_cpu:
        return "weight is offloaded to the cpu"
    if parameter.post_forward_mesh_info not in (None, parameter.mesh_info):
        return "reshard_after_forward is a number"

    # shards of whole blocks: a block that is cut would have two scales
    rows = parameter._orig_size[0]
    processes = parameter.mesh_info.shard_mesh_size
    unit = processes * (options.block[0] if options.block == TILE_BLOCK else 1)
    if shard.shape[1:] != parameter._orig_size[1:] or rows % unit:
        return f"{rows} rows do not divide into {processes} shards of whole blocks {options.block}"
    return None

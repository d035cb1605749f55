"""Devices, threads, and the processes that train together: how they share a batch, and how they share the weights."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from refine_control.data.batch import Batch
from refine_control.errors import RecipeError, UserError
from refine_control.files import cores
from refine_control.recipe import RunConfig, StageConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as a recipe names them
OWN = ("_modules", "_parameters", "_buffers")  # of a module
BLOCK = re.compile(r"(^|\.)(down_blocks\.\d+|mid_block|up_blocks\.\d+)$")  # what is gathered at a time


class Batches(Protocol):
    """A step's batch, or every `parts`-th row of it from row `part` on."""

    def __call__(self, step: int, part: int, parts: int, /) -> Batch: ...


def pick_device(name: str) -> torch.device:
    """'auto' is this process's GPU where there is one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"run.device = '{name}' is no device; give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"run.device = '{name}' but torch sees {torch.cuda.device_count()} GPUs here; give auto or cpu")
    team = PartialState(cpu=device.type == "cpu")  # joins the other processes, where torchrun or accelerate began them
    if device.type == "cuda":
        device = torch.device("cuda", team.local_process_index if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def set_threads(run: RunConfig) -> None:
    """As many threads as cores we may use, shared with this machine's other processes: too many can cost five times."""
    torch.set_num_threads(run.num_threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def refuse_processes(command: str) -> None:
    """Raises UserError where a command that is one process's work was launched as several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{command} runs as one process, only distill is shared by several; start it without a launcher"
        )


def gather(device: torch.device) -> Accelerator:
    """The processes of this run. Precision and sharding are the recipe's settings, not the launcher's.

    Raises:
        RecipeError: the launcher was told to shard.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise RecipeError("launched with --use_fsdp: leave it out and add --run.shard true, which does the same")
    return Accelerator(device_placement=False, mixed_precision="no", cpu=device.type == "cpu")


def share_out(
    batches: Batches, stage: StageConfig, run: RunConfig, team: Accelerator | PartialState
) -> Callable[[int], list[Batch]]:
    """step -> this process's parts of its batch, one for each pass. All parts of all processes have equally many rows.

    Raises:
        RecipeError: the batch does not divide.
    """
    parts = team.num_processes * run.gradient_accumulation_steps
    if stage.batch_size % parts:
        raise RecipeError(
            f"batch_size {stage.batch_size} does not divide into {team.num_processes} processes x "
            f"{run.gradient_accumulation_steps} gradient_accumulation_steps; use a multiple of {parts}"
        )
    mine = range(team.process_index, parts, team.num_processes)
    return lambda step: [batches(step, part, parts) for part in mine]


def sharded(objective: nn.Module, device: torch.device) -> nn.Module:
    """A twin of the objective whose weights lie spread over all processes (FSDP, Zhao et al. 2023, 2304.11277).

    Each block's weights are gathered while it runs. What is no submodule, such as the teacher, is shared with the twin.
    The objective itself is moved to the CPU.
    """
    twin = copy.copy(objective.to("cpu"))
    own = {name: value for name, value in vars(objective).items() if name in OWN or name.endswith("_hooks")}
    vars(twin).update(copy.deepcopy(own))
    mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    for name, module in list(twin.named_modules()):
        if BLOCK.search(name):
            fully_shard(module, mesh=mesh)  # moves it to the device
    fully_shard(twin, mesh=mesh)
    return twin.to(device)


@contextmanager
def _gradients_kept_here(network: FSDPModule) -> Any:
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def unsynchronised(team: Accelerator, network: nn.Module) -> AbstractContextManager[Any]:
    """Inside, backward adds up this process's gradients without exchanging them: a later pass of the step will."""
    return _gradients_kept_here(network) if isinstance(network, FSDPModule) else team.no_sync(network)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie spread over the processes. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may lie spread over the processes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, on the device of the example and, where that is spread over the processes, spread alike."""
    tensor = tensor.to(example.device)
    if isinstance(example, DTensor) and tensor.shape == example.shape:
        return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)
    return tensor

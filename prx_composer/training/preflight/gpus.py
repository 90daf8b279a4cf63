"""Number, precision and free memory of the GPUs of a node."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from prx_composer.algorithms.base import Trick
from prx_composer.recipe.config import Recipe
from prx_composer.training.preflight.result import Result, failed, passed, skipped, warned

FOREIGN_MEMORY = 2e9  # bytes in use on a GPU that cannot be this process's own context


def check_gpus(recipe: Recipe, algorithms: Iterable[Any], local_ranks: int, num_ranks: int) -> Iterator[Result]:
    """Number, precision and free memory of the GPUs of this node.

    Args:
        algorithms: of the run.
        local_ranks: processes of this run on this node; 0 = not known, as in a check before the run.
        num_ranks: processes on all nodes.
    """
    problems = [problem for one in algorithms if isinstance(one, Trick) and (problem := one.hardware_problem()) is not None]
    if not torch.cuda.is_available():
        if recipe.precision == "fp32" and problems:
            yield from map(failed, problems)
        elif recipe.precision == "fp32":
            yield passed("GPUs", "none here; fp32 trains on the CPU too")
        else:
            yield skipped(
                f"GPUs and precision: {recipe.precision}", "there is no GPU here; train.py needs one, or precision=fp32"
            )
        return
    count = torch.cuda.device_count()
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(index) for index in range(count)))
    if local_ranks > count:
        yield failed(
            f"{local_ranks} processes on this node, but {count} visible GPUs. Launch with `composer -n {count}`, or mend "
            "CUDA_VISIBLE_DEVICES."
        )
        return
    fact = f"{count} × {names}"
    if not local_ranks and num_ranks > count:
        fact += f"; {num_ranks} ranks take {-(-num_ranks // count)} such nodes"
    yield passed("GPUs", fact)
    if recipe.precision == "amp_bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield failed(f"precision: {names} has no bf16; use precision=amp_fp16 or fp32.")
    yield from map(failed, problems)
    for index in [int(os.environ.get("LOCAL_RANK", "0"))] if local_ranks else range(count):
        free, total = torch.cuda.mem_get_info(index)
        used = total - free - torch.cuda.memory_reserved(index)
        if used > FOREIGN_MEMORY:
            yield warned("GPUs", f"another process holds {used / 1e9:.1f} of {total / 1e9:.1f} GB on GPU {index}; see nvidia-smi")

"""How the weights lie on the ranks: `parallelism_config` of a recipe → Composer's configuration.

(left out)                    DDP: every rank has all weights
{fsdp: {}}                    FSDP2: every rank has a shard
{fsdp: {shard_degree: 8}}     HSDP: shards over 8 ranks, such as those of a node, and replicas of that over the others
"""

from dataclasses import dataclass
from typing import Any

from composer.utils import FSDP2Config, ParallelismConfig

from prx_composer.common.errors import UserError
from prx_composer.recipe.checks import check_parallelism


@dataclass
class HybridConfig(FSDP2Config):
    """FSDP2Config that can also ask for hybrid sharding, which Composer's own answers with "all ranks" whatever it is given.

    Args:
        shard_degree: ranks that share one copy of the weights; −1: all.
    """

    shard_degree: int = -1

    @property
    def data_parallel_shard_degree(self) -> int:
        return self.shard_degree

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return None if self.shard_degree == -1 else -1


def parallelism(config: dict[str, Any] | None, num_ranks: int, on_gpu: bool = True) -> ParallelismConfig | None:
    """Composer's configuration, or None for DDP.

    Args:
        config: the recipe's `parallelism_config`.
        num_ranks: of the run.
        on_gpu: replicas average their gradients over NCCL; gloo has no such operation.

    Raises:
        UserError: an unknown key, shards that the ranks don't divide into, replicas on CPUs.
    """
    if config is None:
        return None
    check_parallelism(config, num_ranks)
    arguments = config.get("fsdp") or {}
    degree, path = arguments.get("shard_degree", -1), "parallelism_config"
    if degree not in (-1, num_ranks) and not on_gpu:
        raise UserError(
            f"{path}.fsdp.shard_degree: replicas of shards need GPUs (gloo averages over no replicas); on {num_ranks} CPU "
            f"processes use {path}.fsdp.shard_degree=-1, which shards over all of them."
        )
    # Under amp, autocast chooses dtypes op by op. Composer's default would also round every block's and the backbone's inputs
    # to bf16, timesteps and rotary tables among them.
    settings: dict[str, Any] = {"mixed_precision": "FULL"} | arguments
    if degree == num_ranks:
        settings["shard_degree"] = -1
    return ParallelismConfig(fsdp2=HybridConfig(**settings))

"""Composer's Trainer with a step during which the host waits for the device once, and late; and how weights lie on the ranks."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import composer
import torch
from composer.core import Event, Precision
from composer.distributed.activation_checkpointing import generate_composer_model_check_fn
from composer.distributed.param_init import meta_init
from composer.distributed.prepare_distributed import parallelize_model
from composer.distributed.shared_utils import get_direct_children_from_composer_model
from composer.utils import FSDP2Config, ParallelismConfig, dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import CustomPolicy

from prx_composer.algorithms.gradients import FiniteGuard
from prx_composer.common.distributed import HostGroup
from prx_composer.common.errors import UserError
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.resume import Change
from prx_composer.schedule.clock import TrainingClock


class LateRead:
    """Numbers on the device, on their way to the host: the copy is asked for at once and waited for when it is needed.

    All are summed over the ranks, by one collective.

    Args:
        tensors: of one element each, by name.
        numbers: of the hosts; they travel in fp32.
    """

    def __init__(self, tensors: Mapping[str, Tensor], numbers: Sequence[float] = ()):
        self._names = list(tensors)
        values = [tensor.detach().reshape(1) for tensor in tensors.values()]
        if numbers:  # through pinned memory, for which the host need not wait
            own = torch.tensor(numbers, dtype=torch.float32, pin_memory=values[0].is_cuda)
            values.append(own.to(values[0].device, non_blocking=True))
        stacked = torch.cat(values)
        dist.all_reduce(stacked)
        self._ready: Any = None
        if stacked.is_cuda:
            self._values = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self._values.copy_(stacked, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._values = stacked

    def wait(self) -> tuple[dict[str, float], list[float]]:
        """Wait for what the device was given before this object was made, and for nothing after it."""
        if self._ready is not None:
            self._ready.synchronize()
        values: list[float] = self._values.tolist()
        count = len(self._names)
        return dict(zip(self._names, values[:count], strict=True)), values[count:]


class Trainer(composer.Trainer):
    """Composer's Trainer, whose own step waits for the device at four places: for the size of the batch over all ranks, for the
    loss that the optimizer's closure returns, for every logged loss, and for the count of samples.

    Here there is no closure; and the losses, summed over the ranks by one collective, are read when the optimizer has been handed
    to the device, which has its update to work on while the host goes on to the next step. What is learned and logged is the same
    to the last bit. What the hosts agree on in a step travels with the losses: the clock's reading, requests to stop, and that a
    loader which promises `even` batches keeps its word. With one that doesn't, the hosts add up sizes over gloo, twice in a step.

    It overrides private methods of Composer 0.32.1, the version that pyproject.toml asks for; a test holds their source against
    what was read. With amp_fp16 or with automatic microbatches it is Composer's own step.
    """

    resumed_changes: Sequence[Change] = ()
    """What differs from the recipe in the checkpoint that was loaded."""

    _losses: LateRead | None = None
    _hosts: HostGroup | None = None
    _counted: tuple[int | None, float | None] | None = None  # samples and seconds of a step that is to be counted, if known

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._hosts = HostGroup(float(options.get("dist_timeout", 600.0)))

    @property
    def _ours(self) -> bool:
        fp16 = self.state.precision == Precision.AMP_FP16
        return not (fp16 or self.state.auto_microbatching or self.accumulate_train_batch_on_tokens)

    def _use_closures(self) -> bool:
        return not self._ours and super()._use_closures()

    def _train_batch(self, use_grad_scaling: bool) -> Any:
        losses = super()._train_batch(use_grad_scaling)
        if self._losses is None:  # it was Composer's own step
            for guard in self._guards:
                guard.take_answers(self.state, LateRead(losses | guard.questions(self.state)).wait()[0])
            return losses
        read, self._losses = self._losses, None
        values, numbers = read.wait()
        sizes, reported = numbers[: dist.get_world_size()], numbers[dist.get_world_size() :]
        for guard in self._guards:
            values = guard.take_answers(self.state, values)
        if self._is_even and min(sizes) < max(sizes):
            raise UserError(
                f"train_loader: it promises that batches are `even`, but the ranks have {min(sizes):.0f} to {max(sizes):.0f} "
                "samples. Leave `even` out of the loader, or give every rank as many."
            )
        seconds = None
        if (clock := self._clock) is not None:
            clock.take(self.state, reported)
            seconds = clock.step_seconds
        self._counted = int(sum(sizes)) if self._is_even else None, seconds
        self.state.total_loss_dict = {name: value / dist.get_world_size() for name, value in values.items()}
        self.logger.log_metrics(self.state.total_loss_dict)
        return None  # nothing is left for the Trainer's loop to read

    @property
    def _guards(self) -> list[FiniteGuard]:
        """Return the run's guard, if it has one."""
        return [callback for callback in self.state.callbacks if isinstance(callback, FiniteGuard)]

    @property
    def _clock(self) -> TrainingClock | None:
        return next((callback for callback in self.state.callbacks if isinstance(callback, TrainingClock)), None)

    @property
    def _is_even(self) -> bool:
        """Whether the loader promises that all ranks' batches have as many samples, and as many tokens."""
        return getattr(self.state.dataloader, "even", False)

    def _train_microbatches(
        self, microbatches: Sequence[Any], total_loss_dict: dict[str, Tensor], ddp_sync: bool = True
    ) -> Tensor:
        if not self._ours or not ddp_sync:
            return super()._train_microbatches(microbatches, total_loss_dict, ddp_sync)
        self.engine.run_event(Event.BEFORE_TRAIN_BATCH)
        for optimizer in self.state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        assert self._train_data_spec is not None and self._hosts is not None
        own = sum(self._train_data_spec.get_num_samples_in_batch(microbatch) for microbatch in microbatches)
        average_size = own if self._is_even else self._hosts.sums([own])[0] / dist.get_world_size()

        whole_batch = self.state.batch
        for index, microbatch in enumerate(microbatches):
            self.state.batch = self._train_data_spec.microbatch_transforms(self.state.device.batch_to_device(microbatch))
            losses = self._train_microbatch(False, average_size, index + 1 == len(microbatches))
            for name, loss in losses.items():
                name = f"loss/train/{name}"
                total_loss_dict[name] = total_loss_dict[name] + loss if name in total_loss_dict else loss.reshape(1)
        self.state.batch = whole_batch
        questions = [guard.questions(self.state) for guard in self._guards]
        sizes = [0.0] * dist.get_world_size()
        sizes[dist.get_global_rank()] = own
        reported = [] if self._clock is None else self._clock.report()
        self._losses = LateRead(total_loss_dict | (questions[0] if questions else {}), sizes + reported)
        self.engine.run_event(Event.AFTER_TRAIN_BATCH)
        return total_loss_dict["loss/train/total"]

    def _accumulate_time_across_ranks(
        self, num_samples: int | float, num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        if not self._ours or isinstance(num_samples, float) or self._hosts is None:
            return super()._accumulate_time_across_ranks(num_samples, num_tokens, batch_time)
        (samples, known), self._counted = self._counted or (None, None), None
        if samples is None or known is None:
            own = batch_time.total_seconds() if dist.get_global_rank() == 0 else 0.0
            summed, tokens, seconds = self._hosts.sums([num_samples, num_tokens, own])
            return int(summed), int(tokens), datetime.timedelta(seconds=seconds if known is None else known)
        return samples, dist.get_world_size() * num_tokens, datetime.timedelta(seconds=known)

    def _wrap_model_for_distributed(self, model: Any, optimizers: torch.optim.Optimizer | None) -> None:
        config = self.state.fsdp_config
        if isinstance(config, HybridConfig) and config.mixed_precision.upper() == WEIGHTS:
            shard_with_low_weights(model, optimizers, config, self.state.precision)
        else:
            super()._wrap_model_for_distributed(model, optimizers)

    def close(self) -> None:
        super().close()
        if self._hosts is not None:
            self._hosts.close()


# ----------------------------------------------------------------------------------------------- how weights lie on the ranks


WEIGHTS = "WEIGHTS"  # the value of `mixed_precision` that Composer hasn't

_AUTOCAST = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}


@dataclass
class HybridConfig(FSDP2Config):
    """FSDP2Config that can also ask for hybrid sharding, which Composer's own answers with "all ranks" whatever it is given.

    Its `mixed_precision` has one value more. With WEIGHTS the blocks' weights are gathered in the dtype of autocast, which would
    round them so anyway, and their gradients are reduced in fp32. Unlike Composer's DEFAULT it casts neither a block's inputs nor
    what lies outside of blocks. In fp32 it is FULL.

    Args:
        shard_degree: ranks that share one copy of the weights; −1: all. It divides their number.
        mixed_precision: in what precision weights are gathered: FULL, WEIGHTS, or Composer's DEFAULT and PURE. A recipe's default
            is FULL.
        reshard_after_forward: whether a block's weights go after its forward pass and are gathered again for the backward pass; a
            number: only so many neighbours keep them.
        state_dict_type: `sharded`: every rank writes its part of a checkpoint; `full`: rank 0 everything.
        activation_checkpointing: keep only the inputs of what is wrapped and compute the rest again for the backward pass.
        activation_cpu_offload: keep activations in the memory of the host.
        verbose: log how the model is sharded.
    """

    shard_degree: int = -1

    @property
    def data_parallel_shard_degree(self) -> int:
        return self.shard_degree

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return None if self.shard_degree == -1 else -1


def parallelism(config: dict[str, Any] | None, num_ranks: int, on_gpu: bool = True) -> ParallelismConfig | None:
    """Return Composer's configuration, or None for DDP.

    (left out)                    DDP: every rank has all weights
    {fsdp: {}}                    FSDP2: every rank has a shard
    {fsdp: {shard_degree: 8}}     HSDP: shards over 8 ranks, such as those of a node, and replicas of that over the others

    Args:
        config: the recipe's `parallelism_config`, which `check_parallelism` has nothing against.
        num_ranks: of the run.
        on_gpu: replicas average their gradients over NCCL; gloo has no such operation.

    Raises:
        UserError: replicas on CPUs.
    """
    if config is None:
        return None
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


def sharding(recipe: Recipe, num_gpus: int) -> int:
    """Return into how many parts the state is cut: one under DDP; under FSDP2 all GPUs, or `shard_degree` of them (HSDP).

    So many neighbours hold one copy of the weights; `num_gpus` ÷ that is the number of replicas.
    """
    if recipe.parallelism_config is None:
        return 1
    degree = (recipe.parallelism_config.get("fsdp") or {}).get("shard_degree", -1)
    return num_gpus if degree == -1 else min(degree, num_gpus)


def low_dtype(mixed_precision: str, precision: str | Precision) -> torch.dtype | None:
    """Return the 16-bit dtype in which the blocks' weights, and nothing else, are gathered; None if there is none."""
    return _AUTOCAST.get(Precision(precision)) if mixed_precision.upper() == WEIGHTS else None


def shard_with_low_weights(
    model: Any, optimizer: torch.optim.Optimizer | None, config: HybridConfig, precision: Precision
) -> None:
    """Shard a ComposerModel as Composer does, but for the blocks, which get the policy of `mixed_precision: WEIGHTS`.

    Composer makes one policy for the whole model, and none that leaves inputs alone. Its `parallelize_model` takes a function
    that gives each unit arguments of its own.
    """
    checkpointing = config.activation_checkpointing or config.activation_cpu_offload
    units = sharded_units(model, low_dtype(config.mixed_precision, precision))
    parallelize_model(
        model,
        replace(config, mixed_precision="FULL"),
        optimizer,
        Precision.FP32,  # of no matter to FULL
        fsdp_wrap_policy=CustomPolicy(lambda module: units.get(module, False)),
        activation_checkpointing_check_fn=generate_composer_model_check_fn(model) if checkpointing else None,
        param_init_fn=meta_init,
    )


def sharded_units(model: Any, dtype: torch.dtype | None) -> dict[nn.Module, bool | dict[str, Any]]:
    """Return what FSDP2 shards as a unit, and the arguments of `fully_shard` in which it differs from the others.

    Args:
        model: each of its children is a unit, and so is each module that a child's `fsdp_wrap_fn` names, as for Composer.
        dtype: in which the latter are gathered; None: as they are.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units: dict[nn.Module, bool | dict[str, Any]] = {}
    for child in get_direct_children_from_composer_model(model):
        units[child] = True
        asked = getattr(child, "fsdp_wrap_fn", lambda module: False)
        for module in child.modules():
            if module is not child and (answer := asked(module)):
                units[module] = (answer if isinstance(answer, dict) else {}) | {"mp_policy": policy}
    return units

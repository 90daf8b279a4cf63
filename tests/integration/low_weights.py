"""Run on two ranks: blocks gathered in bf16, or kept gathered, against FSDP2 in full precision, to the bit, under autocast.

Every model trains three steps of two microbatches, with an evaluation in between.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from composer.core import Precision, State
from composer.devices import DeviceCPU
from torch import Tensor
from torch.distributed.tensor import DTensor

from prx_composer.algorithms.ema import WeightAverage
from prx_composer.algorithms.low_precision import apply_low_precision_norm
from prx_composer.common.distributed import average_on_gloo
from prx_composer.models import FlowMatching, HuggingFaceTextEncoder, PRXBackbone, TextToImage
from prx_composer.models.encoders import train_tokenizer
from prx_composer.optim.muon import Muon
from prx_composer.training.trainer import Trainer, parallelism

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "kept": {"reshard_after_forward": False},
    "weights": {"mixed_precision": "WEIGHTS"},
    "both": {"mixed_precision": "WEIGHTS", "reshard_after_forward": False},
}
STEPS, MICROBATCHES = 3, 2

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
tokenizer = train_tokenizer(["a red circle"])
t5 = dict(model_type="t5", d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)


def build(low_norms: bool) -> TextToImage:
    torch.manual_seed(0)
    encoder = HuggingFaceTextEncoder(tokenizer, config=t5, max_tokens=8)
    backbone = PRXBackbone(in_channels=3, patch_size=4, hidden_size=64, depth=2, num_heads=2, context_in_dim=64)
    model = TextToImage(backbone, encoder, FlowMatching())
    for parameter in backbone.parameters():  # gains and biases that are no round numbers
        parameter.data += 0.1 * torch.randn(parameter.shape)
    if low_norms:
        apply_low_precision_norm(model)
    return model


def sharded(arguments: dict[str, Any], low_norms: bool) -> tuple[TextToImage, Muon]:
    """Shard a model as our Trainer does, which Composer lets run in bf16 on GPUs alone."""
    model = build(low_norms)
    optimizer = Muon(model, lr=0.02, adam_lr=1e-3)
    trainer: Any = object.__new__(Trainer)
    trainer.state = State(
        model=model,
        rank_zero_seed=0,
        run_name="",
        device=DeviceCPU(),
        device_train_microbatch_size=1,
        optimizers=optimizer,
        precision=Precision.AMP_BF16 if "mixed_precision" in arguments else Precision.FP32,  # without a part in FULL
        parallelism_config=parallelism({"fsdp": arguments}, ranks, on_gpu=False),
    )
    trainer._wrap_model_for_distributed(model, optimizer)
    average_on_gloo(model)
    return model, optimizer


def inputs(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    mask = torch.arange(8)[None] < torch.randint(1, 9, (4, 1), generator=generator)
    return {
        "image": torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1,
        "input_ids": torch.randint(0, 4, (4, 8), generator=generator),
        "attention_mask": mask,
    }


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def evaluated(model: TextToImage, average: WeightAverage) -> dict[str, Tensor]:
    """Evaluate with the weights, their average, and the weights again: of neither may what the other left gathered be used."""
    errors = []
    for lent in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16), average.swapped() if lent else nullcontext():
            errors.append(model.eval_forward(inputs(99)))
    assert torch.equal(errors[0], errors[2]) and not torch.equal(errors[0], errors[1])
    return {"evaluation": errors[0], "averaged evaluation": errors[1]}


def train(arguments: dict[str, Any], low_norms: bool = True) -> dict[str, Tensor]:
    """Return every output, gradient and final weight by name."""
    model, optimizer = sharded(arguments, low_norms)
    average, found = WeightAverage(model), dict[str, Tensor]()
    seen: list[set[torch.dtype]] = [set(), set()]
    model.backbone.blocks[0].register_forward_pre_hook(lambda block, _: seen[0].update(p.dtype for p in block.parameters()))
    model.backbone.register_forward_pre_hook(lambda backbone, _: seen[1].update({backbone.txt_in.weight.dtype}))
    for step in range(STEPS):
        optimizer.zero_grad()
        for microbatch in range(MICROBATCHES):
            batch = inputs(MICROBATCHES * step + microbatch)
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(batch)
                loss = model.loss(outputs, batch)["total"]
            (loss / MICROBATCHES).backward()
            found[f"prediction {step} {microbatch}"] = whole(outputs.prediction)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.dtype == torch.float32, name
            if parameter.grad is not None:
                assert parameter.grad.dtype == torch.float32, name
                found[f"gradient {step} {name}"] = whole(parameter.grad)
        optimizer.step()
        average.update(0.5)
        if step == 1:
            found |= evaluated(model, average)
        state = model.state_dict()
        assert all(not isinstance(value, DTensor) or value.dtype == torch.float32 for value in state.values())
        assert all(isinstance(state[name], DTensor) for name, _ in model.backbone.named_parameters(prefix="backbone"))
    assert seen == [{torch.bfloat16 if arguments.get("mixed_precision") else torch.float32}, {torch.float32}], seen
    found |= {f"weight {name}": whole(parameter) for name, parameter in model.state_dict().items()}
    found |= {f"average {name}": whole(value) for name, value in average.average.items()}
    return found


expected = train(WAYS["full"])
assert sum(name.startswith("gradient") for name in expected) > 100
for way in ("kept", "weights", "both"):
    found = train(WAYS[way])
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{way}: {len(different)} of {len(expected)} differ, such as {different[:5]}"

plain, rounded = (train(WAYS[way], low_norms=False) for way in ("full", "weights"))
assert not torch.equal(plain["prediction 0 0"], rounded["prediction 0 0"]), "norms in fp32 see gains that were rounded"
dist.barrier()
dist.destroy_process_group()

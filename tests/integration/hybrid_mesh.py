"""Ranks that are not there (torch's fake backend): where `shard_degree` puts the weights of a model under Composer."""

import os
import sys

import torch.distributed as dist
from composer.core import State
from composer.devices import DeviceCPU
from composer.distributed import parallelize_composer_model
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from prx_composer.models import FlowMatching, HuggingFaceTextEncoder, PRXBackbone, TextToImage
from prx_composer.models.encoders import train_tokenizer
from prx_composer.training.trainer import parallelism

SHARDS, RANKS = int(sys.argv[1]), int(sys.argv[2])
os.environ |= {"RANK": "0", "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "NODE_RANK": "0"}
dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
tokenizer = train_tokenizer(["a red circle"])
t5 = dict(model_type="t5", d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
encoder = HuggingFaceTextEncoder(tokenizer, config=t5, max_tokens=8)
backbone = PRXBackbone(in_channels=3, patch_size=4, hidden_size=64, depth=2, num_heads=2, context_in_dim=64)
model = TextToImage(backbone, encoder, FlowMatching())
config = parallelism({"fsdp": {"shard_degree": SHARDS}}, RANKS)
state = State(
    model=model, rank_zero_seed=0, run_name="mesh", device=DeviceCPU(), device_train_microbatch_size=1, parallelism_config=config
)
assert state.fsdp_config is not None
parallelize_composer_model(model, None, state.fsdp_config)
weight = model.backbone.blocks[0].up_proj.weight  # pyright: ignore[reportAttributeAccessIssue]
assert isinstance(weight, DTensor)
sys.stdout.write(f"{tuple(weight.device_mesh.shape)} {weight.placements} {tuple(weight.to_local().shape)}\n")

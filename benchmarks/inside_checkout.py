"""What same_behaviour.py runs by a checkout's own Python, in a folder of results.

python inside_checkout.py JOBS           # JSON: commands, one after another in one process; or by `composer -n 2`
python inside_checkout.py make FOLDER    # frozen parts of random weights, for recipes that name some by folder
"""

import hashlib
import json
import os
import runpy
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def work(jobs: list[dict[str, Any]]) -> None:
    """Run the commands of job after job in this process, and write into NAME.json what came out."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        for job in jobs:
            _remove(job)
    for job in jobs:
        log = Path(f"{job['name']}.rank{rank}.log")
        with _said_in(log):
            failed = any(_run(command) for command in job["commands"])
        if failed and os.environ.get("WORLD_SIZE", "1") != "1":  # the other rank may wait for this one
            sys.exit(1)
        if rank == "0":
            said = [line for line in log.read_text().splitlines() if line.strip()]
            found = {"error": " / ".join(said[-3:])} if failed else collect(Path(job["folder"]))
            Path(f"{job['name']}.json").write_text(json.dumps({"key": job["key"]} | found))
            _remove(job)


def _remove(job: dict[str, Any]) -> None:
    if job["clean"]:
        shutil.rmtree(job["folder"], ignore_errors=True)


def _run(command: list[str]) -> int:
    """Run a Python program as the interpreter would, but in this process, which has imported everything; return its exit code."""
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _said_in(log: Path) -> Iterator[None]:
    """Let what this process and its children say go to a file."""
    kept = [os.dup(1), os.dup(2)]
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
    sys.stdout.flush()
    os.dup2(kept[0], 1)
    os.dup2(kept[1], 2)


def collect(folder: Path) -> Result:
    """Return the logged rows of a run folder and fingerprints of tensors, pictures and other files, or of any other folder."""
    from PIL import Image
    from safetensors.torch import load_file

    steps = sorted(folder.glob("checkpoints/ba*"), key=lambda path: int(path.name[2:]))
    weights = _read(steps[-1]) if steps else {path.name: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    pictures = {path.name: _hashed(Image.open(path).tobytes()) for path in sorted(folder.rglob("*.png"))}
    texts = [] if rows else [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".yaml", ".html")]
    here = os.getcwd()  # which is named in what `prx import` writes
    files = {p.name: "a page" if p.suffix == ".html" else _hashed(p.read_text().replace(here, "").encode()) for p in texts}
    return {"rows": rows, "tensors": dict(_fingerprints(weights, "")), "pictures": pictures, "files": files}


def _read(checkpoint: Path) -> Any:
    """Return what a checkpoint of one file or in shards holds; this process has written it."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    if not (checkpoint / ".metadata").exists():
        return {file.name: torch.load(file, map_location="cpu", weights_only=False) for file in sorted(checkpoint.glob("*.pt"))}
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
    tensors = {key: entry for key, entry in sorted(entries) if isinstance(entry, TensorStorageMetadata)}
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in tensors.items()}
    load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return state


def _fingerprints(value: Any, path: str) -> Iterator[tuple[str, str]]:
    import torch

    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield path, f"{value.dtype} {list(value.shape)} {_hashed(data)}"
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _fingerprints(item, f"{path}.{key}".lstrip("."))


def _hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def make_shared(folder: Path) -> None:
    """Write a text encoder, a teacher, an autoencoder and a backbone of random weights, as the hub has them."""
    import diffusers
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    words = "<pad> </s> <unk> a the of on in left right centre white black grey red blue green yellow circle square triangle"
    vocabulary = {word: number for number, word in enumerate(words.split())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(str(folder / "text_encoder"))
    t5: dict[str, Any] = dict(vocab_size=len(vocabulary), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(transformers.T5Config(**t5)).save_pretrained(folder / "text_encoder")
    dino: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=32)
    transformers.Dinov2Model(transformers.Dinov2Config(**dino)).save_pretrained(folder / "teacher")
    vae: dict[str, Any] = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    vae |= dict(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, sample_size=32)
    diffusers.AutoencoderKL(**vae).save_pretrained(folder / "autoencoder")  # pyright: ignore[reportPrivateImportUsage]
    prx: dict[str, Any] = dict(
        in_channels=3, patch_size=4, context_in_dim=32, hidden_size=32, mlp_ratio=3.5, num_heads=2, depth=4
    )
    backbone = diffusers.PRXTransformer2DModel(**prx, axes_dim=[8, 8])  # pyright: ignore[reportPrivateImportUsage]
    for parameter in (p for p in backbone.parameters() if not p.any()):
        torch.nn.init.normal_(parameter, std=0.05)
    backbone.save_pretrained(folder / "backbone")


if __name__ == "__main__":
    sys.path[0] = os.environ["PYTHONPATH"]  # not this file's folder
    if sys.argv[1] == "make":
        make_shared(Path(sys.argv[2]))
    else:
        work(json.loads(sys.argv[1]))

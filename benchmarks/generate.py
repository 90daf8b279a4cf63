"""Drawing with this package and with diffusers' pipeline on the same exported model, in turns; images are compared first.

    uv run python benchmarks/generate.py --output benchmarks/results/generate.json

Both start from the prompt and a seed and end with pixels in memory. The model has the quickstart's sizes and random weights. One
prompt at a time, since diffusers' PRX pipelines take no more; and, for this package alone, a batch.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.prx.pipeline_prx_pixel import PRXPixelPipeline
from interleaved import ratio, summary, time_in_turns
from record import circumstances

from prx_composer.commands.export.pipeline import write_pipeline, written_aside
from prx_composer.data.small_sets import all_scenes
from prx_composer.models import HuggingFaceTextEncoder, PRXBackbone, TextToImage
from prx_composer.models.text_encoder import train_tokenizer
from prx_composer.runs.opening import Trained, load_trained

PROMPT = "a red circle on the left of a white background"
TOLERANCE = 1e-4
T5 = dict(model_type="t5", d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, dropout_rate=0.0)


def _model() -> TextToImage:
    torch.manual_seed(0)
    encoder = HuggingFaceTextEncoder(train_tokenizer(s.caption for s in all_scenes()), config=T5, max_tokens=14, trainable=True)
    backbone = PRXBackbone(in_channels=3, patch_size=4, hidden_size=128, depth=4, num_heads=4, mlp_ratio=3.5, context_in_dim=128)
    for parameter in backbone.parameters():
        if not parameter.any():  # layers that start at zero would hide differences
            torch.nn.init.normal_(parameter, std=0.05)
    return TextToImage(backbone, encoder).eval()


def compare(folder: Path, size: int, steps: int, guidance_scale: float, batch: int, rounds: int) -> dict[str, Any]:
    with written_aside(folder) as partial:
        write_pipeline(Trained(_model(), Path("benchmark"), "raw", size), partial)
    ours = load_trained(str(folder)).model
    pipeline = PRXPixelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options: Any = dict(height=size, width=size, num_inference_steps=steps, guidance_scale=guidance_scale)

    def theirs(output_type: str = "np") -> Any:
        generator = torch.Generator().manual_seed(7)
        fixed: Any = dict(use_resolution_binning=False, return_dict=False)
        return pipeline(PROMPT, generator=generator, output_type=output_type, **fixed, **options)[0]

    difference = float((ours.sample([PROMPT], seeds=[7], **options) - theirs("pt")).abs().max())
    if difference > TOLERANCE:
        raise SystemExit(f"Images differ by {difference}: there is nothing to compare.")
    calls: list[int] = []
    hook = ours.backbone.register_forward_pre_hook(lambda module, args: calls.append(1))
    ours.generate([PROMPT], seeds=[7], **options)
    hook.remove()
    turns = {
        "diffusers": theirs,
        "ours": lambda: ours.generate([PROMPT], seeds=[7], **options),
        "batch": lambda: ours.generate([PROMPT] * batch, seeds=list(range(batch)), **options),
    }
    times = time_in_turns(turns, rounds)
    times["per_image_in_batch"] = [milliseconds / batch for milliseconds in times.pop("batch")]
    return {
        "settings": {**options, "batch": batch, "rounds": rounds, "threads": torch.get_num_threads()},
        "largest_difference": difference,
        "backbone_calls_per_step": len(calls) / steps,
        "milliseconds": {name: summary(values, 2) for name, values in times.items()},
        "ratio": ratio(times, "diffusers", "ours"),
        "ratio_in_batch": ratio(times, "diffusers", "per_image_in_batch"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(
            Path(folder) / "exported",
            arguments.size,
            arguments.steps,
            arguments.guidance_scale,
            arguments.batch,
            arguments.rounds,
        )
    text = json.dumps(circumstances() | found, indent=2) + "\n"
    if arguments.output:
        arguments.output.write_text(text)
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()

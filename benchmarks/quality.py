"""What a recipe scores: with other seeds, without the fast paths, and with its checkpoints merged.

python benchmarks/quality.py seeds yamls/quickstart.yaml --seeds 17 1 2 3 --output seeds.json
python benchmarks/quality.py fast-paths --seeds 17 1 2
python benchmarks/quality.py averages runs/merging --last 5 10 --like uniform linear

A run that has been trained already is not trained again.
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from common import main, train_command
from composer import Trainer
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from torch import Tensor, nn
from torch.optim.adamw import adamw  # pyright: ignore[reportPrivateImportUsage]

from prx_composer import registry
from prx_composer.commands.average import AverageOptions, average_run
from prx_composer.data.sources import heldout_scenes
from prx_composer.metrics.scoring import nearest_scenes
from prx_composer.models import PRXBackbone
from prx_composer.optim import parameter_groups
from prx_composer.optim.muon import muon_parameters
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.runs.opening import Trained, load_trained
from prx_composer.training import run as train_module
from prx_composer.training.components import Components

# ------------------------------------------------------------------------------------------------------ plain path


@registry.backbones.register("plain_prx")
class PlainPRX(PRXBackbone):
    """Our parameters, from the same initialisation, in diffusers' forward pass. Nothing can be attached to it."""

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        context_in_dim: int,
        hidden_size: int,
        mlp_ratio: float,
        num_heads: int,
        depth: int,
    ):
        super().__init__(in_channels, patch_size, context_in_dim, hidden_size, mlp_ratio, num_heads, depth)
        self._reference: list[nn.Module] = [PRXTransformer2DModel(**self.config)]  # in a list: it has no parameters of its own

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        route: Any = None,
        return_taps: bool = False,
    ) -> Any:
        if route is not None or self.taps or self.conditioners:
            raise ValueError("plain_prx computes what diffusers' model computes; leave tread, repa and the like out.")
        inputs = (hidden_states, timestep, encoder_hidden_states, attention_mask)
        (sample,) = torch.func.functional_call(
            self._reference[0], dict(self.named_parameters()), inputs, {"return_dict": False}, strict=True
        )
        return (sample, {}) if return_taps else sample


@registry.optimizers.register("plain_muon")
class PlainMuon(torch.optim.Optimizer):
    """Muon as it is usually published, one matrix after the other, and AdamW tensor by tensor, with our arguments and update."""

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adam_lr: float | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
    ):
        matrices = list(muon_parameters(model).values())
        taken = {id(weight) for weight in matrices}
        groups: list[dict[str, Any]] = [dict(params=matrices, muon=True, lr=lr, weight_decay=weight_decay)]
        for group in parameter_groups(model, weight_decay):
            if rest := [parameter for parameter in group["params"] if id(parameter) not in taken]:
                groups.append({**group, "params": rest})
        self._momentum, self._betas, self._eps = momentum, tuple(adam_betas), adam_eps
        super().__init__(groups, dict(muon=False, lr=lr if adam_lr is None else adam_lr))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                for weight in present:
                    self._matrix(weight, group)
            elif present:
                self._adam(present, group)
        return loss

    def _matrix(self, weight: Tensor, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        buffer.lerp_(weight.grad, 1 - self._momentum)
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        update = orthogonalise(weight.grad.lerp(buffer, self._momentum))
        weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(step=torch.zeros(()), **zeros)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,  # which makes it a loop
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._eps,
            maximize=False,
        )


def orthogonalise(matrix: Tensor) -> Tensor:
    """Make five steps of Newton–Schulz, written as they are usually published."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


# ------------------------------------------------------------------------------------------------------ questions

RECIPE = ["yamls/quickstart.yaml", "progress_bar=false", "callbacks.images=false"]
PATHS = {
    "fast": ["model.compile=true"],
    "plain": ["model.backbone.name=plain_prx", "optimizer.name=plain_muon", "preflight=false"],
}


def seeds(
    recipe: Annotated[list[str], "YAML files and key=value, as for train.py"],
    *,
    name: Annotated[str | None, "of the runs, before -seed<n>; by default the first file's"] = None,
    seeds: Sequence[int] = (17, 1, 2, 3),
) -> dict[str, Any]:
    """Final scores of a recipe by seed: does the number hold, or was it one lucky seed?"""
    runs = []
    for seed in seeds:
        run = f"{name or Path(recipe[0]).stem}-seed{seed}"
        arguments = [*recipe, f"seed={seed}", f"run_name={run}"]
        subprocess.run(train_command(arguments, ranks=1), check=True)
        rows = read_metrics(Path("runs", run, "metrics.jsonl"))
        first, last = rows[0], rows[-1]
        told: dict[str, Any] = {key: first[key] for key in first if "accuracy" in key} | last
        scores = {key: told[key] for key in told if "accuracy" in key or key in ("batch", "train_seconds", "loss/train/total")}
        runs.append({"seed": seed, "command": " ".join(["composer", "train.py", *arguments]), **scores})
    return {"recipe": " ".join(recipe), "runs": runs}


def fast_paths(
    overrides: Annotated[Sequence[str], "key=value, as for train.py"] = (), *, seeds: Sequence[int] = (17, 1, 2)
) -> dict[str, Any]:
    """Held-out accuracy of the quickstart, on every fast path and on none: is quality paid for speed?

    Fast: our network compiled, Muon in stacks, fused AdamW, our Trainer. Plain: `plain_prx`, `plain_muon` and Composer's Trainer.
    Both start from the same weights and see the same batches with the same noise. Both have EMA's one call for all tensors, whose
    arithmetic is that of a loop.
    """
    runs = []
    for seed in seeds:
        for path, changes in PATHS.items():
            folder = Path("runs", f"quality-{path}-seed{seed}")
            arguments = [*RECIPE, *changes, f"seed={seed}", f"run_name={folder.name}", *overrides]
            subprocess.run([sys.executable, __file__, "--train", path, *arguments], check=True)
            first, *_, last = read_metrics(folder / "metrics.jsonl")
            found = {key: last[key] for key in ("heldout_accuracy", "metrics/eval/validation_loss", "train_seconds")}
            runs.append({"path": path, "seed": seed, "first_loss": first["loss/train/total"], **found})
    scores = {path: [run["heldout_accuracy"] for run in runs if run["path"] == path] for path in PATHS}
    return {
        "fast_minus_plain_by_seed": [round(a - b, 4) for a, b in zip(scores["fast"], scores["plain"], strict=True)],
        "mean_accuracy": {path: round(statistics.mean(values), 4) for path, values in scores.items()},
        "runs": runs,
    }


def averages(
    run: Annotated[str, "folder of a run of shapes with EMA, at a constant rate, that kept its checkpoints"],
    *,
    last: Annotated[Sequence[int], "how many checkpoints are merged"] = (5, 10),
    like: Annotated[Sequence[str], "as `prx average --like` has it"] = ("uniform", "linear"),
    images_per_prompt: int = 4,
) -> dict[str, Any]:
    """Evaluation loss and held-out accuracy of one run: of its last weights, of their EMA, and of merged checkpoints.

    All are of the same training. Losses are of the same images, noise and timesteps; images are drawn from the same seeds.
    """
    folder = Path(run)
    recipe = config.load([str(folder / "config.yaml"), f"run_folder={folder}"])
    batches = list(Components(recipe, meta=False).loader("eval_loader").dataloader)
    found = {name: _score(load_trained(run, name), recipe, batches, images_per_prompt) for name in ("raw", "ema")}
    with tempfile.TemporaryDirectory() as scratch:
        for count, shape in itertools.product(last, like):
            output = str(Path(scratch, f"{shape}-{count}"))
            average_run(AverageOptions(run=run, last=count, like=shape, output=output))
            found[f"{shape} of {count}"] = _score(load_trained(output), recipe, batches, images_per_prompt)
    told = ("max_duration", "save_interval", "scheduler", "optimizer", "seed")
    return {"recipe": {key: getattr(recipe, key) for key in told} | {"ema": recipe.algorithms["ema"]}, "weights": found}


@torch.no_grad()
def _score(trained: Trained, recipe: config.Recipe, batches: list[Any], images_per_prompt: int) -> dict[str, float]:
    """Return the evaluation's metrics and the held-out accuracy, scored as the callback `shapes_score` does."""
    model = trained.model
    for batch in batches:
        outputs = model.eval_forward(batch)
        for metric in model.get_metrics().values():
            model.update_metric(batch, outputs, metric)
    found = {name: round(float(metric.compute()), 6) for name, metric in model.get_metrics().items()}
    source = {"seed": 0} | recipe.train_loader["source"]
    asked = heldout_scenes(source["heldout"], source["seed"]) * images_per_prompt
    side = trained.image_size
    drawn = nearest_scenes(
        model.generate([scene.caption for scene in asked], side, side, [*range(1000, 1000 + len(asked))], 20, 3.0)
    )
    return found | {"heldout_accuracy": round(sum(d == a for d, a in zip(drawn, asked, strict=True)) / len(asked), 4)}


def train_here(path: str, arguments: list[str]) -> int:
    """Train in this process, on the plain path with Composer's own Trainer."""
    if path == "plain":
        setattr(train_module, "Trainer", Trainer)  # noqa: B010 - for this process
    train_module.run(config.load(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(
        train_here(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["--train"] else main(__doc__, seeds, fast_paths, averages)
    )

"""A new colour for the quickstart's model: a dozen images of it, prompts for what it must not forget, and a score of both.

python recipes/finetune/concept.py pink_images   # images, captions.jsonl, prior_prompts.txt

Named in code_paths, it registers the callback `concept_score`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import Callback, State
from composer.loggers import Logger

from prx_composer import registry
from prx_composer.callbacks.drawings import draw_images
from prx_composer.data.sources import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, Scene, all_scenes, heldout_scenes, render
from prx_composer.metrics.scoring import nearest_scenes

COLOUR = "pink"
SIDE = 32


@registry.callbacks.register("concept_score")
class ConceptScore(Callback):
    """Draws every combination of the new colour, and the quickstart's held-out ones, at the beginning and at the end.

    Logs `new_accuracy`, of which `new_accuracy/unseen` of combinations that no training image shows, and `old_accuracy`; before
    the first step with `_before`. An image is right if, of the renderings of all combinations, old and new, the one asked for is
    the nearest.

    Args:
        images_per_prompt: with different seeds.
        num_inference_steps, guidance_scale, seed: of sampling.
    """

    def __init__(self, images_per_prompt: int = 4, num_inference_steps: int = 20, guidance_scale: float = 3.0, seed: int = 1000):
        self._per_prompt, self._seed = images_per_prompt, seed
        self._sampling = (num_inference_steps, guidance_scale)

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 0:
            logger.log_metrics({f"{name}_before": score for name, score in self._scores(state).items()})

    def fit_end(self, state: State, logger: Logger) -> None:
        logger.log_metrics(self._scores(state))

    def _scores(self, state: State) -> dict[str, float]:
        new, shown = all_scenes([COLOUR]), set(shown_scenes())
        right = self._right(state, new)
        unseen = [right[scene] for scene in new if scene not in shown]
        old = list(self._right(state, heldout_scenes(36)).values())
        return {
            "new_accuracy": sum(right.values()) / len(right),
            "new_accuracy/unseen": sum(unseen) / len(unseen),
            "old_accuracy": sum(old) / len(old),
        }

    def _right(self, state: State, scenes: list[Scene]) -> dict[Scene, float]:
        """Share of each scene's images that show it."""
        asked = scenes * self._per_prompt
        seeds = [self._seed + index for index in range(len(asked))]
        images = draw_images(state, [scene.caption for scene in asked], SIDE, SIDE, seeds, *self._sampling)
        nearest = nearest_scenes(images, all_scenes([*COLOURS, COLOUR]))
        right = dict.fromkeys(scenes, 0.0)
        for scene, drawn in zip(asked, nearest, strict=True):
            right[scene] += (scene == drawn) / self._per_prompt
        return right


def shown_scenes() -> list[Scene]:
    """The dozen combinations of the new colour trained on: each shape two or three times, each background and place four."""
    shapes, backgrounds, places = list(SHAPES), list(BACKGROUNDS), list(POSITIONS)
    return [Scene(COLOUR, shapes[i % 5], backgrounds[i % 3], places[(i // 3 + i // 9) % 3]) for i in range(12)]


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    lines = []
    for index, scene in enumerate(shown_scenes()):
        name = f"{index:02d}.png"
        shift = tuple(rng.uniform(-0.05, 0.05, 2).tolist())
        render(scene, SIDE, SIDE, shift=shift, scale=float(rng.uniform(0.85, 1.15))).save(folder / name)
        lines.append(json.dumps({"file": name, "caption": scene.caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    heldout = set(heldout_scenes(36))
    prior = [scene.caption for scene in all_scenes() if scene not in heldout]
    (folder / "prior_prompts.txt").write_text("\n".join(prior) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments: Any = parser.parse_args()
    write(arguments.folder)

"""Writes an example of what `source: folder` reads: crops of scikit-learn's two bundled photographs, and their captions.

python recipes/quickstart/example_images.py my_images
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CROPS = 120
SIDES = ((96, 96), (80, 112), (112, 80))  # three aspect ratios: they become three buckets


def main(folder: Path) -> None:
    if folder.exists():
        sys.exit(f"{folder} exists already: name a folder that does not, so that nothing of yours is mixed with the example.")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for name, photograph in zip(("temple roof", "flower"), load_sample_images().images, strict=True):
        for index in range(CROPS):
            height, width = SIDES[index % len(SIDES)]
            top, left = rng.integers(0, photograph.shape[0] - height), rng.integers(0, photograph.shape[1] - width)
            file = f"{name.replace(' ', '-')}-{index:03d}.jpg"
            Image.fromarray(photograph[top : top + height, left : left + width]).save(folder / file, quality=92)
            lines.append(json.dumps({"file": file, "caption": f"a close view of a {name}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    sys.stdout.write(f"{len(lines)} images and captions.jsonl in {folder}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

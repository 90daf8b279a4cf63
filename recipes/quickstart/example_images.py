"""Writes an example of what `source: folder` reads: crops of scikit-learn's two bundled photographs, and their captions.

python recipes/quickstart/example_images.py my_images
python recipes/quickstart/example_images.py my_parquet --parquet     # as one file of a table, for `prx data convert`
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CROPS = 120
SIDES = ((96, 96), (80, 112), (112, 80))  # three aspect ratios: they become three buckets


def main(folder: Path, as_table: bool = False) -> None:
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
    if as_table:
        import pyarrow
        import pyarrow.parquet

        rows = [json.loads(line) for line in lines]
        table = [{"image": (folder / row["file"]).read_bytes(), "caption": row["caption"]} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "part-000.parquet")
        for row in rows:
            (folder / row["file"]).unlink()
        sys.stdout.write(f"{len(lines)} images and captions in {folder}/part-000.parquet\n")
        return
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    sys.stdout.write(f"{len(lines)} images and captions.jsonl in {folder}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--parquet" in sys.argv)

"""Make the bundled sample: a stratified subset of the real Fashion-MNIST images.

    python -m fashion_mnist_sample.make_sample --source zalando-datasets/fashion_mnist --out DIR

`--source` is the data set's name on the Hugging Face Hub or a folder that holds a copy.
The choice of images derives from a fixed seed, and every image is encoded anew from its
pixels, so that each source gives the same files. The checksums printed at the end are
those of the pixels and labels (they do not depend on the version of any encoder).
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path

import numpy as np

PER_CLASS = {"train": 1200, "test": 200}
SEED = 2017  # the year in which Fashion-MNIST was published


def stratified_indices(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Choose `per_class` rows of each label, without replacement, in their original order.

    Raises ValueError when a label has fewer rows than that.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < per_class:
            raise ValueError(f"label {label} has {len(rows)} rows, {per_class} are needed")
        chosen.append(rng.choice(rows, per_class, replace=False))
    return np.sort(np.concatenate(chosen))


def pixel_checksum(images: list[np.ndarray], labels: np.ndarray) -> str:
    """SHA-256 over all pixels (uint8, row by row), then all labels (one byte each)."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.tobytes())
    digest.update(labels.astype(np.uint8).tobytes())
    return digest.hexdigest()


def make_split(source: str, split: str, out: Path) -> str:
    """Write one split as a Parquet file; return the checksum of its pixels and labels."""
    import datasets
    from PIL import Image

    rows = datasets.load_dataset(source, split=split)
    labels = rows.with_format("numpy")[:]["label"] if "label" in rows.features else None
    if labels is None:
        raise ValueError(f"{source} has no column 'label', only {sorted(rows.features)}")
    chosen = stratified_indices(labels, PER_CLASS[split], SEED)
    images = [np.asarray(image.convert("L")) for image in rows.select(chosen)[:]["image"]]

    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", optimize=True)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    sample = datasets.Dataset.from_dict(
        {"image": encoded, "label": labels[chosen]},
        features=datasets.Features({"image": datasets.Image(), "label": rows.features["label"]}),
    )
    path = out / "data" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    sample.to_parquet(path)
    return pixel_checksum(images, labels[chosen])


def main() -> None:
    """Parse the command line and make both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", required=True, help="name on the Hub, or a folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write data/*.parquet to")
    args = parser.parse_args()
    for split, per_class in PER_CLASS.items():
        print(f"{split}: choosing {per_class} images of each class ...", flush=True)
        print(f"{split}: sha256 of pixels and labels {make_split(args.source, split, args.out)}")


if __name__ == "__main__":
    main()

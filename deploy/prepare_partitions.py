"""Write the data of each node to a folder, for `flower-supernode --node-config 'data-path="..."'`.

    python -m deploy.prepare_partitions --nodes 3 --out partitions

writes `partitions/node-0`, `partitions/node-1`, ... with the Dirichlet or the IID partitioner, from any data
set whose columns the app finds without `image-column` and `label-column`. `partitions/labels.png` shows the
number of images of each class on each node. `partitions/partitions.json` records the data set and the
settings: `deploy.local_federation --data` reads it. Send each folder to its own node only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.cli import PARTITIONS, PROJECT
from pytorch_example_low_level.config import RunConfig, UserError
from pytorch_example_low_level.images import opened, partitions, rows_of_partition
from pytorch_example_low_level.sources import BUNDLED

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def main() -> None:
    """Parse the command line and write the partitions, the record and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True, help="number of partitions")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the partitions")
    parser.add_argument("--dataset", default=BUNDLED, help="as in the run configuration (default: %(default)s)")
    parser.add_argument("--partitioner", choices=("dirichlet", "iid"), default="dirichlet")
    parser.add_argument("--alpha", type=float, default=1.0, help="of dirichlet (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the partitioning (default: %(default)s)")
    args = parser.parse_args()
    if args.nodes < 1:
        parser.error("--nodes must be at least 1")
    try:
        args.out.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"--out: {args.out} exists; choose a new folder")
    try:
        write_partitions(args.out, args.nodes, args.dataset, args.partitioner, args.alpha, args.seed)
    except BaseException as error:
        shutil.rmtree(args.out)  # leave no incomplete partitions
        if isinstance(error, UserError | ValueError):
            parser.error(str(error))
        raise


def write_partitions(out: Path, nodes: int, dataset: str, partitioner: str, alpha: float, seed: int) -> None:
    """Save the partitions that a simulation with this many nodes would use, a record and a plot of their labels."""
    import datasets

    defaults = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    chosen = {"dataset": dataset, "partitioner": partitioner, "dirichlet-alpha": alpha, "seed": seed}
    config = RunConfig.model_validate(defaults | chosen)
    rows = [rows_of_partition(config, nodes, index) for index in range(nodes)]  # before any is written: one may fail
    source, _ = opened(config)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=source.class_names)}
    images = source.splits["train"].cast(datasets.Features(features))
    for index, chosen_rows in enumerate(rows):
        images.select(chosen_rows).save_to_disk(out / f"node-{index}")
        print(f"{index + 1}/{nodes}: {len(chosen_rows)} images", flush=True)
    how = f"Dirichlet, α = {alpha:g}" if partitioner == "dirichlet" else "IID"
    plot_labels(out / "labels.png", partitions(config, nodes), f"Images of each class on {nodes} nodes ({how})")
    # The ServerApp runs in another directory, so a folder is recorded with its absolute path.
    folder = Path(dataset).expanduser()
    where = str(folder.resolve()) if dataset != BUNDLED and folder.is_dir() else dataset
    record = chosen | {"dataset": where, "num-partitions": nodes}
    (out / PARTITIONS).write_text(json.dumps(record, indent=2) + "\n")


def plot_labels(path: Path, partitioning: Partitioner, title: str) -> None:
    """Plot the number of images of each class on each node, with flwr-datasets' plot function."""
    import matplotlib as mpl

    mpl.use("Agg")
    from flwr_datasets.visualization import plot_label_distributions

    style = {"plot_kwargs": {"width": 0.8}, "legend_kwargs": {"fontsize": 8}, "cmap": "tab10"}
    size = (max(7.0, 0.22 * partitioning.num_partitions), 4.5)
    figure, axes, _ = plot_label_distributions(
        partitioning, "label", legend=True, verbose_labels=True, title=title, figsize=size, **style
    )
    axes.set(xlabel="partition", ylabel="images")
    axes.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()

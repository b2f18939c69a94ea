"""Write the data of each node to a folder, for `flower-supernode --node-config 'data-path="..."'`.

    python -m deploy.prepare_partitions --nodes 3 --out partitions

writes `partitions/node-0`, `partitions/node-1`, ... with the Dirichlet or the IID partitioner, from any data set whose
columns the app finds without `image-column` and `label-column`. `partitions/labels.png` shows the number of images of
each class on each node. `partitions/partitions.json` records the settings: `deploy.local_federation --data` reads it.
Send each folder to its own node only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from pathlib import Path

from flwr.app import Context, RecordDict

from deploy.cli import PARTITIONS, PROJECT, interrupt_on_signals, raise_if_interrupted
from pytorch_example_low_level.config import RunConfig, UserError, explained
from pytorch_example_low_level.images import opened, partitions, rows_of_partition
from pytorch_example_low_level.sources import BUNDLED


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
        write_partitions(args.out, args.nodes, args.dataset, args.partitioner, args.alpha, args.seed)
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing is written")
    except UserError as error:
        sys.exit(f"error: {error}")


def write_partitions(out: Path, nodes: int, dataset: str, partitioner: str, alpha: float, seed: int) -> None:
    """Save the partitions that a simulation with this many nodes would use, a record and a plot of their labels.

    The folder appears when it is complete. Raises UserError.
    """
    import datasets

    defaults = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    # The ServerApp runs in another directory, so a folder is recorded with its absolute path.
    folder = Path(dataset).expanduser()
    dataset = str(folder.resolve()) if dataset != BUNDLED and folder.is_dir() else dataset
    chosen = {"dataset": dataset, "partitioner": partitioner, "dirichlet-alpha": alpha, "seed": seed}
    config = RunConfig.from_context(Context(0, 0, {}, RecordDict(), defaults | chosen))
    with explained(f"Cannot write {out}", " -- Allowed: a new folder"):
        if out.exists():
            raise UserError("it exists")
        out.parent.mkdir(parents=True, exist_ok=True)
    with explained(f"Cannot use dataset {dataset!r} for {nodes} nodes"):
        rows = [rows_of_partition(config, nodes, index) for index in range(nodes)]
        source, _ = opened(config)
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=source.class_names)}
        images = source.splits["train"].cast(datasets.Features(features))
    with explained(f"Cannot write {out}"), tempfile.TemporaryDirectory(prefix=".", dir=out.parent) as made:
        (parts := Path(made) / "parts").mkdir()
        for index, chosen_rows in enumerate(rows):
            images.select(chosen_rows).save_to_disk(parts / f"node-{index}")
            print(f"{index + 1}/{nodes}: {len(chosen_rows)} images", flush=True)
            raise_if_interrupted()  # `datasets` hashes what it does to the images, and catches every exception there
        plot_labels(parts / "labels.png", config, nodes)
        (parts / PARTITIONS).write_text(json.dumps(chosen | {"num-partitions": nodes}, indent=2) + "\n")
        raise_if_interrupted()
        parts.rename(out)


def plot_labels(path: Path, config: RunConfig, nodes: int) -> None:
    """Plot the number of images of each class on each node, with flwr-datasets' plot function."""
    from flwr_datasets.visualization import plot_label_distributions

    how = f"Dirichlet, α = {config.dirichlet_alpha:g}" if config.partitioner == "dirichlet" else "IID"
    title, size = f"Images of each class on {nodes} nodes ({how})", (max(7.0, 0.22 * nodes), 4.5)
    figure, axes, _ = plot_label_distributions(
        partitions(config, nodes), "label", title=title, figsize=size, legend=True, cmap="tab10"
    )
    axes.set(xlabel="partition", ylabel="images")
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    interrupt_on_signals()
    main()

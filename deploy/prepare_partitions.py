"""Write each node's data as a folder, for `flower-supernode --node-config 'data-path="..."'`.

    python -m deploy.prepare_partitions --nodes 3 --out partitions

writes `partitions/node-0`, `partitions/node-1`, ... from any data set and partitioner that the
app knows, and `partitions/labels.png`, which shows how the labels are spread. Send each folder
to its node, and to nobody else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pytorch_example_low_level.config import UserError
from pytorch_example_low_level.task import BUNDLED, federated_dataset


def main() -> None:
    """Parse the command line, write the partitions and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True, help="number of partitions")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist yet")
    parser.add_argument("--dataset", default=BUNDLED, help="as in the run configuration (default: %(default)s)")
    parser.add_argument("--partitioner", choices=("dirichlet", "iid"), default="dirichlet")
    parser.add_argument("--alpha", type=float, default=1.0, help="of the Dirichlet distribution (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True)
        write_partitions(args.out, args.nodes, args.dataset, args.partitioner, args.alpha, args.seed)
    except FileExistsError:
        parser.error(f"--out: {args.out} exists; name a new folder")
    except (UserError, ValueError) as error:
        args.out.rmdir()
        parser.error(str(error))


def write_partitions(out: Path, nodes: int, dataset: str, partitioner: str, alpha: float, seed: int) -> None:
    """Save the partitions that a simulation of so many nodes would use, and plot their labels."""
    fds = federated_dataset(dataset, partitioner, nodes, alpha, seed)
    partitions = [fds.load_partition(index) for index in range(nodes)]  # all or none
    for index, partition in enumerate(partitions):
        partition.with_format(None).save_to_disk(out / f"node-{index}")
        print(f"{index + 1}/{nodes}: {len(partition)} images", flush=True)
    plot_labels(out / "labels.png", dataset, partitioner, nodes, alpha, seed)


def plot_labels(path: Path, dataset: str, partitioner: str, nodes: int, alpha: float, seed: int) -> None:
    """Draw how many images of each class each node has, with flwr-datasets' own plot."""
    import matplotlib as mpl

    mpl.use("Agg")
    from flwr_datasets.visualization import plot_label_distributions

    fds = federated_dataset(dataset, partitioner, nodes, alpha, seed)
    how = f"Dirichlet, α = {alpha:g}" if partitioner == "dirichlet" else "IID"
    figure, axes, _ = plot_label_distributions(
        partitioner=fds.partitioners["train"],
        label_name="label",
        size_unit="absolute",
        partition_id_axis="x",
        legend=True,
        verbose_labels=True,
        cmap="tab10",
        title=f"Images of each class on {nodes} nodes ({how})",
        figsize=(max(7.0, 0.22 * nodes), 4.5),
        plot_kwargs={"width": 0.8},
        legend_kwargs={"fontsize": 8},
    )
    axes.set_xlabel("partition")
    axes.set_ylabel("images")
    axes.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()

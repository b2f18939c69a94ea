"""The ServerApp: `main` is federated learning, written as a plain loop over rounds.

Read `main` first: its loop body is one round, from top to bottom. The functions that it calls
follow in the order of the round. `messaging.py` sends their messages and checks the replies.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from pytorch_example_low_level import figures, messaging, task, utils
from pytorch_example_low_level.config import CODE, Purpose, RunConfig, UserError, log, random_stream
from pytorch_example_low_level.figures import Report, Row
from pytorch_example_low_level.messaging import Batch, Mailbox, Node
from pytorch_example_low_level.task import SCORE, Metrics, StateDict
from pytorch_example_low_level.utils import ServerState, open_run

BLOCK = 2**15  # numbers that are added at a time: in double precision, they fit in the cache
SETTLE = 0.5  # seconds without a new node after which all are assumed to be connected

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train a global model over `num-server-rounds` rounds. Raises UserError."""
    # Errors in the configuration and the data set are raised here, before anything is sent or written.
    config = RunConfig.from_context(context)
    utils.log_environment()
    device = task.pick_device(config.server_device)
    task.make_gpu_repeatable()
    test_data = task.load_test_data(config)
    state, frozen = first_state(config, test_data)

    with open_run(config, context.run_id, state, test_data.facts, SCORE) as recorder:
        mailbox = Mailbox(grid)
        if state.server_round < 0:  # a new run: round 0 is the initial model
            metrics = evaluate_centrally(state.model, test_data, config, device)
            recorder.commit(figures.new_row(figures.result_keys(metrics, SCORE), 0) | figures.centralized(metrics))

        nodes: list[Node] = []
        for server_round in range(state.server_round + 1, config.num_server_rounds + 1):
            log.info("")
            log.info("🔄 Starting round %s/%s", server_round, config.num_server_rounds)
            whole_round, stopwatch = utils.Stopwatch(), utils.Stopwatch()
            lr = utils.learning_rate(config, server_round)
            row = figures.new_row(state.results[-1], server_round, lr)
            reports: list[Report] = []

            # --- 0. Nodes: wait for them, and sample the cohort that trains in this round
            before = state.results[-1]["nodes_available"]
            nodes = wait_for_nodes(grid, config, before, test_data.node_names, resumed=not nodes)
            cohort = sample_cohort(nodes, config, server_round)
            log.info("Sampled %s out of %s nodes.", len(cohort), len(nodes))
            row |= {"nodes_available": len(nodes), "train_sampled": len(cohort), "seconds_nodes": stopwatch.lap()}

            # --- 1. TRAIN on the cohort, and 2. aggregate the models that come back. What is frozen does not travel
            model = {name: tensor for name, tensor in state.model.items() if name not in frozen}
            same = {"app": CODE, "frozen": state.identity["frozen parameters"]}  # on all nodes as here
            instructions = {"server-round": server_round, **same, **test_data.facts}
            batch, model, train_loss = train(mailbox, cohort, model, instructions | {"lr": lr}, config)
            state.model = state.model | model
            state.last_fault = batch.log_faults()
            if server_round == 1 and 0 < len(cohort) == batch.broken:
                raise UserError(f"No node can train: {state.last_fault}")
            row |= {f"train_{k}": getattr(batch, k) for k in ("received", "failed", "rejected")}
            row |= {"train_loss": train_loss, "seconds_train": stopwatch.lap()}

            # --- 3. Central evaluation. It needs no node, so the queries of phase 4 are sent first
            queries = None
            if server_round % config.evaluate_every == 0 or server_round == config.num_server_rounds:
                queries = send_queries(mailbox, sample_asked(nodes, config, server_round), server_round, config)
            metrics = evaluate_centrally(state.model, test_data, config, device)
            row |= figures.centralized(metrics) | {"seconds_central": stopwatch.lap()}
            if recorder.is_best(row):
                log.info("🎉 New best global model found: %f", metrics[SCORE])

            if queries is not None:
                # --- 4. QUERY: the nodes that opt in before the deadline
                opted_in = collect_opt_ins(mailbox, queries)
                row |= {"query_sent": queries.sent, "query_received": queries.received, "opted_in": len(opted_in)}
                row["seconds_query"] = stopwatch.lap()

                # --- 5. EVALUATE on the nodes that opted in
                reports, outcome = evaluate(mailbox, opted_in, model, instructions, metrics, config)
                row |= outcome | {"seconds_evaluate": stopwatch.lap()}

            # --- 6. Record: from here on, the round survives a crash
            recorder.commit(row | {"seconds_total": whole_round.lap()} | mailbox.traffic(), reports)
            log.info("⏱️ %s", figures.time_summary(state.results, rounds_left=config.num_server_rounds - server_round))

        recorder.finish()


def first_state(config: RunConfig, test_data: task.Data) -> tuple[ServerState, set[str]]:
    """Return the state of a new run, and the names of the frozen parameters. The network is not kept in memory."""
    net = task.initial_model(test_data.facts, config.seed)
    return utils.new_state(config, net, test_data.facts, test_data.fingerprint(), SCORE), set(utils.frozen(net))


# ------------------------------------------------------------------------------- 0. Nodes


def wait_for_nodes(
    grid: Grid, config: RunConfig, before: int | None, names: Sequence[str], *, resumed: bool
) -> list[Node]:
    """Wait until at least `min-available-nodes` are connected and their number is stable; return all.

    `before` is their number in the last round, `names` are those of the partitions. Raises UserError when too few nodes
    connect within `node-wait-timeout`, and when a simulation has another number of nodes than the data is split for.
    """
    started, last = time.monotonic(), None if resumed else before
    for look in count():
        nodes = messaging.connected_nodes(grid, names)
        left = config.node_wait_timeout - (time.monotonic() - started)
        if len(nodes) >= config.min_available_nodes and (len(nodes) == last or left < 0):
            break
        if left < 0:
            raise UserError(
                f"Connected nodes after {config.node_wait_timeout:g} s: {len(nodes)}; min-available-nodes is "
                f"{config.min_available_nodes}. Start more nodes, or change min-available-nodes or node-wait-timeout."
            )
        if look % 10 == 2:  # after a second, and then every five seconds
            log.info("Waiting for nodes: %s/%s, %.0f s left", len(nodes), config.min_available_nodes, left)
        last = len(nodes)  # in a simulation, nodes still register while the ServerApp is running
        time.sleep(min(SETTLE, config.node_wait_timeout))
    simulated = all(node.simulated for node in nodes)
    expected = len(names) or (before if resumed else None)
    if simulated and expected not in (None, len(nodes)):
        raise UserError(
            f"The data is split for {expected} simulated nodes, and now there are {len(nodes)}. A node would get other "
            f'data. Use --federation-config "num-supernodes={expected} client-resources-num-cpus=1".'
        )
    if before is None and simulated and len(nodes) == 2:  # Flower's default
        log.info('To simulate 50 nodes, add --federation-config "num-supernodes=50 client-resources-num-cpus=1"')
    return nodes


def sample_cohort(nodes: Sequence[Node], config: RunConfig, server_round: int) -> list[Node]:
    """Draw the nodes that train: uniformly, without replacement, a pure function of (seed, round)."""
    size = max(share(config.fraction_clients_train, len(nodes)), config.min_train_nodes)
    return draw(nodes, size, random_stream(config.seed, Purpose.COHORT, server_round))


def sample_asked(nodes: Sequence[Node], config: RunConfig, server_round: int) -> list[Node]:
    """Draw the nodes that are asked to opt in to the evaluation, in the same way."""
    size = max(share(config.fraction_clients_query, len(nodes)), 1)
    return draw(nodes, size, random_stream(config.seed, Purpose.ASKED, server_round))


def share(fraction: float, count: int) -> int:
    """Return the whole number of nodes in a fraction of `count`."""
    return int(fraction * count + 1e-9)  # 0.29 * 100 is 28.999...


def draw(nodes: Sequence[Node], size: int, stream: np.random.Generator) -> list[Node]:
    """Draw `size` nodes, or all if there are fewer, and keep their order."""
    chosen = stream.choice(len(nodes), min(size, len(nodes)), replace=False)
    return [nodes[i] for i in sorted(chosen)]


# ------------------------------------------------------------- 1. TRAIN and 2. aggregation


def train(
    mailbox: Mailbox, cohort: Sequence[Node], model: StateDict, instructions: dict[str, Any], config: RunConfig
) -> tuple[Batch, StateDict, float | None]:
    """Have the cohort train the model. Return the batch, the new model (or the old one) and the mean training loss."""
    sent = messaging.to_array_record(model)
    content = RecordDict({"arrays": sent, "config": ConfigRecord(instructions)})
    batch = mailbox.send(cohort, MessageType.TRAIN, content, instructions["server-round"], config.train_timeout)
    losses: list[float] = []
    weights: list[int] = []

    def read(reply: RecordDict) -> tuple[StateDict, float, int]:
        metrics, num_examples = messaging.read_metrics(reply, {"train_loss": 0.0})
        return messaging.read_arrays(reply, sent), metrics["train_loss"], num_examples

    def updates() -> Iterator[tuple[StateDict, int]]:
        for _, (arrays, loss, num_examples) in mailbox.collect(batch, read, messaging.MAX_WAITING):
            losses.append(loss)
            weights.append(num_examples)
            yield arrays, num_examples
            del arrays  # here and in weighted_mean: its memory is free before the next one is fetched

    mean = weighted_mean(updates(), like=model)
    log.info("📥 Received %s/%s results (TRAIN)", batch.received, len(cohort))
    if mean is None:
        log.warning("Round %s: no usable TRAIN reply; the global model stays as it is.", batch.server_round)
    return batch, model if mean is None else mean, weighted_mean_std(losses, weights)[0]


def weighted_mean(updates: Iterable[tuple[StateDict, int]], like: StateDict) -> StateDict | None:
    """Return the mean of state_dicts, weighted by their numbers of examples; None if there are none.

    FedAvg (McMahan et al. 2017, arXiv:1602.05629, algorithm 1). One running sum is kept in double precision, and
    each model, as `read_arrays` returns it, is released once it is added. The mean has the shapes and dtypes of
    `like`; integers are rounded.
    """
    # NumPy adds in one thread. PyTorch's threads would spin after each sum, on cores that simulated nodes need.
    sums = {name: np.zeros(t.numel(), np.complex128 if t.is_complex() else np.float64) for name, t in like.items()}
    total, unchanged = 0, set(like)  # what no node has changed stays as it is, such as an int64 beyond 2**53
    for arrays, num_examples in updates:
        total += num_examples
        unchanged -= {n for n in unchanged if not torch.equal(arrays[n], like[n].to(arrays[n].dtype))}
        for name, running in sums.items():
            flat = arrays[name].numpy().reshape(-1)
            for i in range(0, len(flat), BLOCK):
                running[i : i + BLOCK] += np.multiply(flat[i : i + BLOCK], num_examples, dtype=running.dtype)
        del arrays
    if not total:
        return None
    means = {n: torch.from_numpy(np.divide(s, total, out=s)).view(like[n].shape) for n, s in sums.items()}
    inexact = {name for name, t in like.items() if t.is_floating_point() or t.is_complex()}
    rounded = {n: mean if n in inexact else mean.round() for n, mean in means.items()}
    return {n: like[n] if n in unchanged else mean.to(like[n].dtype) for n, mean in rounded.items()}


# ------------------------------------------------------------------ 3. Central evaluation


def evaluate_centrally(model: StateDict, test_data: task.Data, config: RunConfig, device: torch.device) -> Metrics:
    """Evaluate the global model on the server's data; return the metrics, None for a number that is not finite."""
    net = task.initial_model(test_data.facts, config.seed)
    net.load_state_dict(model)
    metrics = task.test(net, test_data, device)
    numbers = [f"{name}: {value:7.4f}" for name, value in metrics.items() if isinstance(value, int | float)]
    log.info("💡 Centrally evaluated model -> %s", " /  ".join(numbers))
    return figures.checked(metrics, SCORE)


# ------------------------------------------------------------------------------- 4. QUERY


def send_queries(mailbox: Mailbox, asked: Sequence[Node], server_round: int, config: RunConfig) -> Batch:
    """Ask nodes whether they opt in to the evaluation."""
    content = RecordDict({"config": ConfigRecord({"server-round": server_round, "max-delay": config.query_max_delay})})
    return mailbox.send(asked, MessageType.QUERY, content, server_round, config.query_timeout)


def collect_opt_ins(mailbox: Mailbox, queries: Batch) -> list[Node]:
    """Return the nodes that opted in before the deadline. No reply, or an error, counts as opting out."""
    opted_in = [node for node, opt_in in mailbox.collect(queries, messaging.read_opt_in) if opt_in]
    log.info("📨 Received %s/%s results (QUERY)", queries.received, queries.sent)
    log.info("✅ %s/%s nodes opted-in for evaluation (QUERY)", len(opted_in), queries.sent)
    queries.log_faults()
    return opted_in


# -------------------------------------------------------------- 5. EVALUATE and 6. record


def evaluate(
    mailbox: Mailbox,
    nodes: Sequence[Node],
    model: StateDict,
    instructions: dict[str, Any],
    central: Metrics,
    config: RunConfig,
) -> tuple[list[Report], Row]:
    """Have nodes evaluate the model on their own data; return their metrics, which `central` has too, and the row."""
    content = RecordDict({"arrays": messaging.to_array_record(model), "config": ConfigRecord(instructions)})
    batch = mailbox.send(nodes, MessageType.EVALUATE, content, instructions["server-round"], config.evaluate_timeout)
    expected = {messaging.metric_key(name): value for name, value in central.items()}
    reports: list[Report] = [
        {"node": node.name, "num_examples": num_examples, **dict(zip(central, values.values(), strict=True))}
        for node, (values, num_examples) in mailbox.collect(batch, lambda r: messaging.read_metrics(r, expected))
    ]
    log.info("📥 Received %s/%s results (EVALUATE)", batch.received, len(nodes))
    batch.log_faults()
    row: Row = {"evaluate_received": batch.received, "evaluate_failed": len(nodes) - batch.received}
    weights, numbers = [report["num_examples"] for report in reports], []
    for name in central:
        mean, std = weighted_mean_std([report[name] for report in reports], weights)
        row |= {f"federated_evaluate_{name}": mean, f"federated_evaluate_{name}_std": std}
        numbers += [f"{name}: {mean:.3f}±{std:.3f}"] if isinstance(mean, float) else []
    log.info("📊 Federated evaluation -> %s", " / ".join(numbers) or "no node took part")
    # A mean hides the nodes for which the model does not work, so the tail is also recorded.
    if scores := [report[SCORE] for report in reports if report[SCORE] is not None]:
        row |= {f"federated_evaluate_{SCORE}_{k}": float(np.percentile(scores, q)) for k, q in figures.TAIL.items()}
    return reports, row


def weighted_mean_std(values: Sequence[Any], weights: Sequence[int]) -> tuple[Any, Any]:
    """Return the weighted mean and (population) standard deviation; of each element of lists; None without a value."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    if not known:
        return None, None
    values, weights = zip(*known, strict=True)
    if isinstance(values[0], list):
        pairs = [weighted_mean_std(element, weights) for element in zip(*values, strict=True)]
        return [mean for mean, _ in pairs], [std for _, std in pairs]
    mean = np.average(values, weights=weights)
    return float(mean), float(np.average((np.array(values) - mean) ** 2, weights=weights) ** 0.5)

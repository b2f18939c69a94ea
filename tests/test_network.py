"""A network that fails: real SuperNodes with TLS and authentication, each behind a proxy of its own.

Each test takes about a minute, most of it waiting, so they are not in the default suite: pytest -m network
"""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.simulation import AppCli, FinishedRun
from deploy.cli import wait_for
from tests.proxy import ProxiedFederation

pytestmark = [pytest.mark.network, pytest.mark.e2e, pytest.mark.timeout(900)]
NODES = 3
SETTINGS = {
    "partitioner": "iid",
    "num_server_rounds": 2,
    "fraction_clients_train": 1.0,
    "opt_in_probability": 1.0,
    "query_max_delay": 0.0,
    "query_timeout": 60.0,
    "train_timeout": 60.0,
    "evaluate_timeout": 60.0,
    "min_available_nodes": NODES,
    "node_wait_timeout": 240.0,
    "use_wandb": False,
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory) -> Iterator[ProxiedFederation]:
    with ProxiedFederation(tmp_path_factory.mktemp("network") / "federation", NODES) as federation:
        yield federation


@pytest.fixture
def run(federation, tiny_dataset):
    """Run the app; call a function at the first line of the log that has its pattern. Then mend all nodes."""

    def run(on: dict[str, Callable[[], object]] | None = None, **settings: object) -> FinishedRun:
        federation.wait_until_online(NODES)
        waiting, log = dict(on or {}), ""
        flwr = AppCli(federation.flwr.home)
        for line in flwr.log_of(**(SETTINGS | {"dataset": tiny_dataset} | settings)):
            log += line
            print(re.sub(r"\x1b\[\d+m", "", line), end="", flush=True)
            for pattern in [pattern for pattern in waiting if re.search(pattern, line)]:
                waiting.pop(pattern)()
        finished = flwr.finished(log)
        assert finished.status == "finished:completed", finished.log
        assert not waiting, f"never logged: {list(waiting)}"
        return finished

    yield run
    for index, proxy in enumerate(federation.proxies):
        proxy.heal()
        if federation.supernodes[index].poll() is not None:
            revive(federation, index)


def revive(federation: ProxiedFederation, index: int) -> None:
    """Start a killed node again, as soon as the SuperLink lets it."""
    wait_for(lambda: federation.online() < NODES, 150, 5)
    federation.start_supernode(index)


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def when_it_trains(federation: ProxiedFederation, index: int, then: Callable[[], object]) -> None:
    """Call a function in a thread, when a node has got its next TRAIN message."""
    log = federation.state / f"node-{index}.log"
    before = len(re.findall("Receiving: train message", log.read_text()))

    def wait() -> None:
        wait_for(lambda: len(re.findall("Receiving: train message", log.read_text())) > before, 120, 0.02)
        then()

    threading.Thread(target=wait).start()


def pause(process: subprocess.Popen, seconds: float) -> None:
    """Stop a process for some seconds: its connections stay open, and nothing comes through."""
    process.send_signal(signal.SIGSTOP)
    threading.Timer(seconds, lambda: process.send_signal(signal.SIGCONT)).start()


def trained(finished: FinishedRun) -> list[tuple[int, int]]:
    return [(row["train_received"], row["train_failed"]) for row in finished.results[1:]]


def test_a_slow_node_takes_part(federation, run):
    seconds = [row["seconds_total"] for row in run().results[1:]]
    federation.proxies[1].latency, federation.proxies[1].rate = 0.2, 1e6
    slow = run()
    assert trained(slow) == [(3, 0)] * 2
    assert [row["evaluate_received"] for row in slow.results[1:]] == [3, 3]
    print("FIGURES s per round without and with a slow node:", seconds, [r["seconds_total"] for r in slow.results[1:]])


@pytest.mark.parametrize("back_after", [5, 90])
def test_an_upload_that_is_cut_counts_if_it_is_back_before_the_deadline(federation, run, back_after):
    proxy = federation.proxies[1]

    def cut() -> None:
        proxy.uploaded, proxy.cut_after = 0, 150_000  # of a model of 320,000

    def back() -> None:
        wait_for(lambda: proxy.refuses, 300, 0.05)
        time.sleep(back_after)
        proxy.heal()

    threading.Thread(target=back).start()
    finished = run({"Starting round 1/": lambda: when_it_trains(federation, 1, cut)})
    first, second = trained(finished)
    if back_after == 5:
        assert first in [(3, 0), (2, 1)]
    else:
        assert first == (2, 1)
    if first == (2, 1):
        assert re.search(r"Round 1: left out node \d+ \(train\): ", finished.log)
    assert second == (3, 0)
    print("FIGURES cut, back after", back_after, "s:", first, [row["seconds_train"] for row in finished.results[1:]])


def test_a_node_killed_in_its_upload_delays_no_phase(federation, run):
    proxy, node = federation.proxies[1], federation.supernodes[1]

    def stall() -> None:
        proxy.uploaded, proxy.hold_after = 0, 150_000
        wait_for(lambda: proxy.uploaded > proxy.hold_after, 120, 0.02)
        kill(node)

    starts = {"Starting round 1/": lambda: when_it_trains(federation, 1, stall)}
    finished = run(starts, num_server_rounds=1, evaluate_every=5, train_timeout=40.0, opt_in_probability=0.0)
    (row,) = finished.results[1:]
    assert (row["train_received"], row["train_failed"]) == (2, 1)
    print("FIGURES killed in its upload: TRAIN took", row["seconds_train"], "s of 40")
    assert row["seconds_train"] < 40 + 15


def test_a_node_that_is_half_open_is_left_out_and_comes_back(federation, run):
    proxy = federation.proxies[1]

    def hold() -> None:
        proxy.hold = True
        threading.Timer(60, proxy.heal).start()

    finished = run({"Starting round 1/": hold}, train_timeout=40.0)
    assert trained(finished)[0] == (2, 1)
    assert re.search(r"Round 1: left out node \d+ \(train\): ", finished.log)
    assert trained(finished)[1] == (3, 0)
    print("FIGURES half-open:", trained(finished), [row["seconds_total"] for row in finished.results[1:]])


def test_a_round_without_any_node_keeps_the_model(federation, run):
    def away() -> None:
        for proxy in federation.proxies:
            proxy.cut()
        threading.Timer(60, lambda: [proxy.heal() for proxy in federation.proxies]).start()

    finished = run({"Starting round 1/": away}, num_server_rounds=4, train_timeout=30.0, query_timeout=5.0)
    assert trained(finished)[0] == (0, 3)
    assert trained(finished)[-1] == (3, 0)  # between, the SuperLink may not have noticed yet that they are away
    rows = finished.results
    assert rows[1]["centralized_loss"] == rows[0]["centralized_loss"]
    assert rows[1]["federated_evaluate_loss"] is None
    assert "no usable TRAIN reply; the global model stays as it is" in finished.log
    print("FIGURES all away:", [row["seconds_total"] for row in rows[1:]])


def test_a_superlink_that_hangs_for_20_seconds_costs_only_time(federation, run):
    hang = {"Starting round 1/": lambda: when_it_trains(federation, 1, lambda: pause(federation.superlink, 20))}
    finished = run(hang)
    assert trained(finished) == [(3, 0)] * 2
    print("FIGURES SuperLink hangs for 20 s:", [row["seconds_total"] for row in finished.results[1:]])

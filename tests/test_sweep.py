"""Comparing settings over seeds: real runs of the app, small, and what is computed from them."""

import json
import os
import re
import threading
import time
from types import SimpleNamespace

import pytest

import sweep
from benchmarks.simulation import FinishedRun
from tests.conftest import results
from tests.test_benchmarks import NODES, InProcessSuperLink, commands, run_main, short_sleeps, superlink

__all__ = ["short_sleeps", "superlink"]  # fixtures


@pytest.mark.parametrize("command", commands("sweep"), ids=" ".join)
def test_a_sweep_writes_tables_plot_and_json(command, superlink, short_sleeps, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "LocalSuperLink", superlink)
    command = [argument for argument in command if argument != "--in-process"]
    out = tmp_path / "made" / "run"
    run_main(sweep, monkeypatch, *command, "--seeds", "2", "--jobs", "1", "--out", str(out))
    variants = max(1, command.count("--vary"))
    written = json.loads(out.with_name("run.json").read_text())
    assert len(written["settings"]) == variants
    assert [list(runs) for runs in written["runs"].values()] == [["0", "1"]] * variants
    assert sorted(asked["seed"] for asked in superlink.asked) == sorted([0, 1] * variants)
    shown = capsys.readouterr().out
    assert f"{2 * variants}/{2 * variants} " in shown
    assert all(sweep.table(list(runs.values())) in shown for runs in written["runs"].values())
    assert out.with_name("run.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_in_process_is_the_run_of_the_app(app, tmp_path):
    ours = sweep.run_in_process(NODES, app.config(seed=3, output_dir=str(tmp_path / "ours")))
    theirs = results(app.run(seed=3))
    assert [{key: row[key] for key in theirs[0]} for row in ours] == theirs


def test_a_sweep_does_only_what_is_missing(superlink, short_sleeps, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "LocalSuperLink", superlink)
    arguments = ["--out", str(tmp_path / "run"), "--nodes", "5", "--vary", "momentum=0.5", "--vary", "momentum=0.0"]
    run_main(sweep, monkeypatch, *arguments, "--seeds", "1")
    assert len(superlink.asked) == 2
    run_main(sweep, monkeypatch, *arguments, "--seeds", "2")
    assert [asked["seed"] for asked in superlink.asked] == [0, 0, 1, 1]
    capsys.readouterr()
    run_main(sweep, monkeypatch, *arguments, "--seeds", "1")
    assert len(superlink.asked) == 4
    assert "worst of 1 seeds" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        run_main(sweep, monkeypatch, *arguments, "--run-config", "batch-size=16")


def test_a_failed_run_keeps_those_that_went_well(superlink, short_sleeps, monkeypatch, tmp_path):
    class Failing(InProcessSuperLink):
        def run(self, nodes, **run_config):
            if run_config["seed"] == 1:
                return FinishedRun("1", "what went wrong", "finished:failed", None)
            return super().run(nodes, **run_config)

    monkeypatch.setattr(sweep, "LocalSuperLink", Failing(superlink.app))
    with pytest.raises(SystemExit, match="seed 1 ended with finished:failed:\nwhat went wrong"):
        run_main(sweep, monkeypatch, "--out", str(tmp_path / "run"), "--seeds", "2")
    assert list(json.loads((tmp_path / "run.json").read_text())["runs"][""]) == ["0"]


def test_runs_are_done_at_the_same_time_with_the_time_left_by_their_rounds(monkeypatch, capsys):
    both, done, rounds = threading.Barrier(2, timeout=20), [], iter([5, 5, 6, 6, 9, 9, 9])
    monkeypatch.setattr(sweep, "PROGRESS_EVERY", 0.2)

    def run(name: str, seed: int) -> list[dict]:
        both.wait()
        time.sleep(0.5)
        return [dict.fromkeys(sweep.COLUMNS.values(), 0.5)]

    sweep.do_runs([("", 0), ("", 1)], run, lambda name, seed, rows: done.append(seed), 2, 4, lambda: next(rounds))
    assert sorted(done) == [0, 1]
    shown = capsys.readouterr().out
    assert "2 runs with 4 rounds to do" in shown
    assert "... 0/4 rounds; about an unknown time left" in shown
    assert re.search(r"\.\.\. 1/4 rounds; about 0:00:0[12] left", shown)


def test_an_interruption_does_not_wait_for_the_runs_at_work():
    stopped = threading.Event()

    def run(name: str, seed: int) -> list[dict]:
        if seed == 1:
            raise KeyboardInterrupt
        stopped.wait(60)
        return []

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep.do_runs([("", 0), ("", 1)], run, lambda *args: None, 2, 4, lambda: 0)
    assert time.monotonic() - started < 30
    stopped.set()


def test_settings_are_read_as_flower_reads_them():
    text = "a-b=1 c='x y'  d=\"z\" e=0.5 f=true"
    assert sweep.parse_settings(text) == {"a-b": 1, "c": "x y", "d": "z", "e": 0.5, "f": True}
    assert sweep.parse_settings("") == {}
    for wrong in ("a", "a=1 b", "a=b", "a='x"):
        with pytest.raises(ValueError):
            sweep.parse_settings(wrong)


def test_an_interrupted_sweep_shows_what_is_there_and_goes_on(superlink, short_sleeps, monkeypatch, tmp_path, capsys):
    class Interrupted(InProcessSuperLink):
        def run(self, nodes, **run_config):
            if run_config["seed"] == 1:
                raise KeyboardInterrupt
            return super().run(nodes, **run_config)

    arguments = ["--out", str(tmp_path / "run"), "--vary", "momentum=0.5", "--vary", "momentum=0.0", "--seeds", "2"]
    monkeypatch.setattr(sweep, "LocalSuperLink", Interrupted(superlink.app))
    monkeypatch.setattr(sweep, "family", lambda pid: [])
    with pytest.raises(SystemExit, match=r"Interrupted: 2 of 4 runs are in .*run\.json\. The same command continues"):
        run_main(sweep, monkeypatch, *arguments)
    shown = capsys.readouterr().out
    assert "worst of 1 seeds" in shown
    assert re.search(r"2/4 .*; \d+/40 rounds; about .* left", shown)
    monkeypatch.setattr(sweep, "LocalSuperLink", superlink)
    run_main(sweep, monkeypatch, *arguments)
    assert [asked["seed"] for asked in superlink.asked] == [1, 1]


def test_the_runs_of_a_sweep_are_a_group_in_wandb(superlink, short_sleeps, monkeypatch, tmp_path):
    groups: list[str] = []

    class Watching(InProcessSuperLink):
        def run(self, nodes, **run_config):
            groups.append(os.environ["WANDB_RUN_GROUP"])  # W&B reads it
            return super().run(nodes, **run_config)

    monkeypatch.setattr(sweep, "LocalSuperLink", Watching(superlink.app))
    run_main(sweep, monkeypatch, "--out", str(tmp_path / "rates"), "--seeds", "1")
    assert groups == ["rates"]


def test_settings_that_differ_only_in_odd_characters_have_folders_of_their_own(superlink, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "LocalSuperLink", superlink)
    names = ("wandb-project='a/b'", "wandb-project='a+b'")
    variants = {name: {} for name in names}
    with sweep.runner(SimpleNamespace(in_process=False, nodes=2, out=tmp_path / "x"), variants) as run:
        for name in names:
            run(name, 0)
    folders = {asked["output-dir"] for asked in superlink.asked}
    assert len(folders) == 2


def test_differences_are_compared_with_the_spread():
    def runs(*scores: float) -> list[list[dict]]:
        return [[{"centralized_accuracy": score}] for score in scores]

    shown = sweep.differences({"a": runs(0.70, 0.72), "b": runs(0.78, 0.82), "c": runs(0.76, 0.80)})
    assert shown.splitlines()[1:] == [
        "The best is b. The others, in the central accuracy:",
        "",
        "- a: -0.090, beyond the spread over seeds (0.030)",
        "- c: -0.020, within the spread over seeds (0.040)",
    ]


def test_runs_that_stopped_early_and_runs_without_a_central_score(tmp_path):
    def run(*scores: float | None) -> list[dict]:
        others = {"federated_evaluate_accuracy": None, "federated_evaluate_accuracy_min": None}
        return [{"centralized_accuracy": score, **others} for score in scores]

    early = {"a": [run(0.1, 0.4), run(0.1, 0.2, 0.6)], "b": [run(None, None)]}
    rest = " | –" * 4
    assert sweep.table(early["a"]).splitlines()[2:] == [
        f"| 1 | 0.300 ± 0.100 | 0.200{rest} |",
        f"| 2 | 0.600 ± 0.000 | 0.600{rest} |",
    ]
    assert sweep.differences(early).splitlines()[1].startswith("The best is a.")
    assert sweep.differences({"b": early["b"], "c": early["b"]}) == "\nNo run has a central accuracy."
    sweep.plot(early, tmp_path / "early.png")


@pytest.mark.parametrize("arguments", [("--vary", "seed=7"), ("--run-config", "output-dir='x'")])
def test_what_a_sweep_sets_itself_is_refused(arguments, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_main(sweep, monkeypatch, "--out", str(tmp_path / "run"), *arguments)
    assert "a sweep sets" in capsys.readouterr().err


def test_the_table_of_seeds_has_mean_deviation_and_worst():
    def run(central: float, federated: float | None) -> list[dict]:
        row = {"centralized_accuracy": central, "federated_evaluate_accuracy": federated}
        row["federated_evaluate_accuracy_min"] = None
        return [row, row]

    seeds = [run(0.2, 0.5), run(0.4, 0.7), run(0.6, None)]
    figures = "0.400 ± 0.163 | 0.200 | 0.600 ± 0.100 | 0.500 | – | – |"
    assert sweep.table(seeds).splitlines()[-1] == f"| 1 | {figures}"
    assert sweep.final_table({"momentum=0.5": seeds}).splitlines()[-1] == f"| momentum=0.5 | {figures}"

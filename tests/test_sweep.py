"""Comparing settings over seeds: real runs of the app, small, and what is computed from them."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

import sweep
from benchmarks import seeds
from benchmarks.simulation import FinishedRun
from deploy.cli import PROJECT, family, wait_for
from pytorch_example_low_level import utils
from pytorch_example_low_level.config import UserError
from tests.conftest import alive, results
from tests.grid import run_config
from tests.test_benchmarks import NODES, InProcessSuperLink, commands, run_main, short_sleeps, superlink
from tests.test_deploy_commands import using

__all__ = ["short_sleeps", "superlink"]  # fixtures


@pytest.mark.parametrize("command", commands("sweep"), ids=" ".join)
def test_a_sweep_writes_tables_plot_and_json(command, superlink, short_sleeps, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "LocalSuperLink", superlink)
    command = [argument for argument in command if argument != "--in-process"]
    out = tmp_path / "made" / "run"
    variants = max(1, command.count("--vary"))
    numbers = ["0", "1"] if variants <= 2 else ["0"]
    run_main(sweep, monkeypatch, *command, "--seeds", str(len(numbers)), "--jobs", "1", "--out", str(out))
    written = json.loads(out.with_name("run.json").read_text())
    assert len(written["settings"]) == variants
    assert [list(runs) for runs in written["runs"].values()] == [numbers] * variants
    assert sorted(str(asked["seed"]) for asked in superlink.asked) == sorted(numbers * variants)
    shown = capsys.readouterr().out
    assert f"{len(numbers) * variants}/{len(numbers) * variants} " in shown
    assert all(seeds.table(list(runs.values())) in shown for runs in written["runs"].values())
    assert out.with_name("run.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_in_process_is_the_run_of_the_app(app, tmp_path):
    ours = sweep.run_in_process(NODES, sweep.CODE_DIGEST, app.config(seed=3, output_dir=str(tmp_path / "ours")))
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
    assert "The last round of seed 0\n" in capsys.readouterr().out
    run_main(sweep, monkeypatch, *arguments[:-2], "--vary", "momentum=0.1", "--seeds", "1")
    assert [asked["momentum"] for asked in superlink.asked[4:]] == [0.1]
    assert "momentum=0.0" not in capsys.readouterr().out
    run_main(sweep, monkeypatch, *arguments, "--seeds", "2")  # still there
    assert len(superlink.asked) == 5


def differing(monkeypatch, capsys, *arguments: str) -> list[str]:
    """What a sweep that is started again reports as different."""
    first, *rest = refused(monkeypatch, capsys, *arguments).splitlines()
    assert "run.json has runs of something else. Choose another --out, or delete the file." in first
    return [line.removeprefix("  - ") for line in rest]


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """The error of the command line."""
    with pytest.raises(SystemExit) as end:
        run_main(sweep, monkeypatch, *arguments)
    assert end.value.code == 2
    return capsys.readouterr().err.split(" error: ", 1)[1].strip()


def test_a_sweep_refuses_to_continue_with_something_else(superlink, short_sleeps, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "LocalSuperLink", superlink)
    arguments = ["--out", str(tmp_path / "run"), "--nodes", "5", "--seeds", "1", "--vary", "momentum=0.5"]
    run_main(sweep, monkeypatch, *arguments)
    written = (tmp_path / "run.json").read_bytes()
    assert json.loads(written)["settings"]["momentum=0.5"]["batch-size"] == 32  # a default

    def found(*more: str) -> list[str]:
        return differing(monkeypatch, capsys, *arguments, *more)

    assert found("--in-process") == ["--in-process: False then, True now"]
    assert found("--nodes", "6", "--run-config", "batch-size=16") == [
        "--nodes: 5 then, 6 now",
        "batch-size of 'momentum=0.5': 32 then, 16 now",
    ]
    with monkeypatch.context() as changed:
        changed.setattr(sweep, "CODE_DIGEST", "123")
        assert found() == [f"the app's code: '{sweep.CODE.split()[0]}' then, '123' now"]
    defaults = sweep.run_config
    with monkeypatch.context() as changed:  # of pyproject.toml
        changed.setattr(sweep, "run_config", lambda **more: defaults(**more) | {"learning-rate": 0.1})
        assert found() == ["learning-rate of 'momentum=0.5': 0.05 then, 0.1 now"]
    assert (tmp_path / "run.json").read_bytes() == written
    assert len(superlink.asked) == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "EOF"),
        (b'{"nodes": 5', "EOF"),
        (b"[]", "object"),
        (b'{"nodes": 5}', "code: Field required"),
        (b"\xff", ""),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(content, why, superlink, monkeypatch, tmp_path, capsys):
    (tmp_path / "run.json").write_bytes(content)
    error = refused(monkeypatch, capsys, "--out", str(tmp_path / "run"))
    assert re.search(rf"run\.json is damaged, or not of this version .*\(.*{why}.*\)\. Choose another --out", error)
    assert "\n" not in error
    assert (tmp_path / "run.json").read_bytes() == content


def test_a_run_of_code_that_was_edited_after_the_beginning_is_refused(app, superlink, monkeypatch, tmp_path, capsys):
    with pytest.raises(UserError, match="the app was edited after the sweep began"):
        sweep.run_in_process(NODES, "123", app.config(output_dir=str(tmp_path)))
    monkeypatch.setattr(sweep, "LocalSuperLink", superlink)
    monkeypatch.setattr(sweep, "source_digest", lambda folder: "456")
    with pytest.raises(SystemExit):
        run_main(sweep, monkeypatch, "--out", str(tmp_path / "run"))
    assert "run, seed 0 failed: the app was edited after the sweep began" in capsys.readouterr().err
    assert superlink.asked == []


def test_a_run_has_all_settings_of_its_variant(superlink, short_sleeps, monkeypatch, tmp_path):
    """So that a default of pyproject.toml that is edited meanwhile changes nothing."""
    monkeypatch.setattr(sweep, "LocalSuperLink", superlink)
    run_main(sweep, monkeypatch, "--out", str(tmp_path / "run"), "--seeds", "1", "--run-config", "batch-size=16")
    (asked,) = superlink.asked
    changed = {"batch-size": 16, "seed": 0, "use-wandb": False, "nodes": 50, "output-dir": asked["output-dir"]}
    assert asked == run_config() | changed
    assert Path(asked["output-dir"]).is_relative_to(tmp_path / "run-runs")


TRACEBACK = """
Traceback (most recent call last):
pytorch_example_low_level.config.UserError: there is no folder /nowhere

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
pytorch_example_low_level.config.UserError: Cannot use dataset '/nowhere':
- and why
ERROR :     Exit Code: 700
"""


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("what went wrong", "finished:failed:\nwhat went wrong\n"),
        ("a node: UserError: x", "finished:failed:\na node: UserError: x\n"),
        (TRACEBACK, "Cannot use dataset '/nowhere':\n- and why\n"),
    ],
)
def test_a_failed_run_keeps_those_that_went_well(log, why, superlink, short_sleeps, monkeypatch, tmp_path, capsys):
    class Failing(InProcessSuperLink):
        def run(self, nodes, **run_config):
            if run_config["seed"] == 1:
                return FinishedRun("1", log, "finished:failed", None)
            return super().run(nodes, **run_config)

    monkeypatch.setattr(sweep, "LocalSuperLink", Failing(superlink.app))
    with pytest.raises(
        SystemExit, match=r"Failed: run, seed 1\. 1 of 3 runs are in .*run\.json\. Run the same command"
    ):
        run_main(sweep, monkeypatch, "--out", str(tmp_path / "run"), "--seeds", "3")
    assert capsys.readouterr().err == f"run, seed 1 failed: {why}"
    assert list(json.loads((tmp_path / "run.json").read_text())["runs"][""]) == ["0"]


ROW = dict.fromkeys(seeds.COLUMNS.values(), 0.5)


def in_threads(run: Callable[[str, str], list[dict]], jobs: int = 2) -> Callable[[str, str], Future]:
    executor = ThreadPoolExecutor(jobs)
    return lambda name, seed: executor.submit(run, name, seed)


def test_runs_are_done_at_the_same_time_with_the_time_left_by_their_rounds(monkeypatch, capsys):
    both, done, rounds = threading.Barrier(2, timeout=20), [], iter([5, 5, 6, 6, 9, 9, 9])
    monkeypatch.setattr(sweep, "PROGRESS_EVERY", 0.2)

    def run(name: str, seed: str) -> list[dict]:
        both.wait()
        time.sleep(0.5)
        return [ROW]

    begin, todo = in_threads(run), [("", "0"), ("", "1")]
    assert sweep.do_runs(todo, begin, lambda name, seed, rows: done.append(seed), 2, 4, lambda: next(rounds)) == []
    assert sorted(done) == ["0", "1"]
    shown = capsys.readouterr().out
    assert "Runs to do: 2, with 4 rounds in all" in shown
    assert "... 0/4 rounds; time left unknown" in shown
    assert re.search(r"\.\.\. 1/4 rounds; about 0:00:0[12] left", shown)


def test_a_failure_is_shown_at_once_and_the_run_beside_it_is_kept(capsys):
    """No other begins. A fault that is none of the user's is shown with its traceback."""
    shown, done, begun = [], [], []

    def run(name: str, seed: str) -> list[dict]:
        begun.append(name)
        if name == "a":
            raise ZeroDivisionError("a fault of ours")
        deadline = time.monotonic() + 20
        while not shown and time.monotonic() < deadline:  # until the failure is shown
            shown.extend(line for line in capsys.readouterr().err.splitlines() if line)
            time.sleep(0.05)
        return [ROW]

    todo = [("a", "0"), ("b", "0"), ("c", "0")]
    failed = sweep.do_runs(todo, in_threads(run), lambda name, seed, rows: done.append(name), 2, 4, lambda: 0)
    assert failed == ["a, seed 0"]
    assert done == ["b"]
    assert sorted(begun) == ["a", "b"]
    assert shown[0].startswith("a, seed 0 failed: Traceback")
    assert shown[-2:] == [
        "ZeroDivisionError: a fault of ours",
        "Waiting for the runs in progress (1); no other run is started.",
    ]


def test_a_result_that_cannot_be_written_is_a_failure(superlink, short_sleeps, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "LocalSuperLink", superlink)
    monkeypatch.setattr(sweep, "replace_json", lambda path, value: utils.replace_json(path / "x", value))
    with pytest.raises(SystemExit, match="Failed: run, seed 0"):
        run_main(sweep, monkeypatch, "--out", str(tmp_path / "run"), "--seeds", "2")
    assert "run, seed 0 failed: Cannot write " in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.parametrize("options", [["--in-process", "--jobs", "2"], ["--jobs", "1"]], ids=["in process", "engine"])
def test_a_stop_signal_ends_the_runs_at_work_and_leaves_no_process(options, tiny_dataset, tmp_path):
    """In process, one run has failed before, with an error of the user."""
    out, wrong = tmp_path / "run", ["--vary", "dataset='/nowhere'"] if "--in-process" in options else []
    settings = f"num-server-rounds=1000 query-max-delay=0.0 dataset='{tiny_dataset}' partitioner='iid'"
    command = [sys.executable, "-m", "sweep", *options, "--nodes", "2", "--seeds", "1", "--run-config", settings]
    with tempfile.TemporaryDirectory(prefix="sw-") as short:  # Ray's sockets have paths of 107 bytes at most
        env = os.environ | {"TMPDIR": short}
        command += [*wrong, "--vary", "momentum=0.0", "--out", str(out)]
        with subprocess.Popen(command, cwd=PROJECT, env=env, stderr=subprocess.PIPE, text=True) as process:
            said = process.stderr.readline() if wrong else ""
            wait_for(lambda: len(list(out.with_name("run-runs").glob("*/*/*/*/results.json"))) == 1, 120)
            started = [each.pid for each in family(process.pid)]
            assert len(started) > 2
            process.send_signal(signal.SIGTERM)  # as Ctrl-C, which a shell's background jobs ignore
            error = process.communicate(timeout=60)[1]
        if wrong:
            assert said.startswith("dataset='/nowhere', seed 0 failed: Cannot use dataset '/nowhere': there is no fold")
        assert (
            f"Interrupted. 0 of {1 + len(wrong) // 2} runs are in {out}.json. Run the same command to continue."
            in error
        )
        assert "Traceback" not in error
        assert process.returncode == 1
        assert not alive(started)
        assert not using(Path(short))


def test_settings_are_read_as_flower_reads_them():
    text = "a-b=1 c='x y'  d=\"z\" e=0.5 f=true"
    assert sweep.parse_settings(text) == {"a-b": 1, "c": "x y", "d": "z", "e": 0.5, "f": True}
    assert sweep.parse_settings("") == {}
    for wrong in ("a", "a=1 b", "a=b", "a='x", "a=1 a=2"):
        with pytest.raises(
            UserError, match=re.escape(f"--run-config and --vary take settings such as \"a=1 b='x'\", not {wrong}")
        ):
            sweep.parse_settings(wrong)


def test_an_interrupted_sweep_shows_what_is_there_and_goes_on(superlink, short_sleeps, monkeypatch, tmp_path, capsys):
    class Interrupted(InProcessSuperLink):
        def run(self, nodes, **run_config):
            if run_config["seed"] == 1:
                raise KeyboardInterrupt
            return super().run(nodes, **run_config)

    arguments = ["--out", str(tmp_path / "run"), "--vary", "momentum=0.5", "--vary", "momentum=0.0", "--seeds", "2"]
    monkeypatch.setattr(sweep, "LocalSuperLink", Interrupted(superlink.app))
    with pytest.raises(
        SystemExit, match=r"Interrupted\. 2 of 4 runs are in .*run\.json\. Run the same command to continue"
    ):
        run_main(sweep, monkeypatch, *arguments)
    shown = capsys.readouterr().out
    assert "\nMissing: momentum=0.5, seed 1; momentum=0.0, seed 1\n\nThe last round of seed 0\n" in shown
    assert re.search(r"2/4 .*; \d+/40 rounds; (about .* left|time left unknown)", shown)
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


def test_settings_that_differ_only_in_odd_characters_have_folders_of_their_own(
    superlink, short_sleeps, monkeypatch, tmp_path
):
    monkeypatch.setattr(sweep, "LocalSuperLink", superlink)
    settings: dict = {"image-column='a/b'": {}, "image-column='a+b'": {}}
    it = sweep.Sweep(code=sweep.CODE_DIGEST, in_process=False, nodes=2, settings=settings, runs={})
    with sweep.runner(it, 1, tmp_path / "x-runs") as begin:
        for name in settings:
            begin(name, "0").result()
    folders = {asked["output-dir"] for asked in superlink.asked}
    assert len(folders) == 2


def test_differences_are_compared_with_the_spread():
    def runs(*scores: float) -> list[list[dict]]:
        return [[{"centralized_accuracy": score}] for score in scores]

    shown = seeds.differences({"a": runs(0.70, 0.72), "b": runs(0.78, 0.82), "c": runs(0.76, 0.80)})
    assert shown.splitlines()[1:] == [
        "The best is b. The others, in the central accuracy:",
        "",
        "- a: -0.090, beyond the spread over seeds (0.030)",
        "- c: -0.020, within the spread over seeds (0.040)",
    ]
    shown = seeds.differences({"a": runs(0.70), "b": runs(0.78)})
    assert shown.splitlines()[3:] == ["- a: -0.080, and one seed shows no spread"]


def test_variants_are_compared_over_the_seeds_that_all_have(tmp_path, capsys):
    def run(score: float) -> list[dict]:
        return [dict.fromkeys(seeds.COLUMNS.values(), score)] * 2

    several = {"0": run(0.2), "1": run(0.4), "2": run(0.9), "3": run(0.9)}
    runs = {"a": several, "b": {"2": run(0.6), "0": run(0.4), "1": run(0.5)}, "c": {"7": run(0.1)}}
    seeds.show(runs, ["0", "1", "3"], tmp_path / "x.png")
    shown = capsys.readouterr().out
    assert "\nMissing: b, seed 3; c, seed 0; c, seed 1; c, seed 3\n" in shown
    assert "The last round, mean ± standard deviation and worst of the seeds 0, 1\n" in shown
    assert "| a | 0.300 ± 0.100 | 0.200 |" in shown
    assert "| b | 0.450 ± 0.050 | 0.400 |" in shown
    assert "- a: -0.150, within the spread over seeds (0.150)" in shown
    assert "| c |" not in shown
    seeds.show({"a": {"0": run(0.1)}, "b": {"1": run(0.1)}}, ["0", "1"], tmp_path / "none.png")
    assert "There is no seed that all variants with results have" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()


def test_runs_that_stopped_early_and_runs_without_a_central_score(tmp_path):
    def run(*scores: float | None) -> list[dict]:
        others = {"federated_evaluate_accuracy": None, "federated_evaluate_accuracy_min": None}
        return [{"centralized_accuracy": score, **others} for score in scores]

    early = {"a": [run(0.1, 0.4), run(0.1, 0.2, 0.6)], "b": [run(None, None)]}
    rest = " | –" * 4
    assert seeds.table(early["a"]).splitlines()[2:] == [
        f"| 1 | 0.300 ± 0.100 | 0.200{rest} |",
        f"| 2 | 0.600 | 0.600{rest} |",
    ]
    first, *_, last = seeds.differences(early | {"c": [run(0.9), run(None)]}).splitlines()[1:]
    assert first.startswith("The best is a.")
    assert last == "- c: not compared, 1 of 2 runs have none"
    without = seeds.differences({"b": early["b"], "c": early["b"]})
    assert without == "\nNo variant has a central accuracy for all seeds."
    seeds.plot(early, tmp_path / "early.png")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--vary", "seed=7"], "a sweep sets seed itself"),
        (["--run-config", "output-dir='x'"], "a sweep sets output-dir itself"),
        (["--run-config", "resume-from='/x'"], "a sweep sets resume-from itself"),
        (["--seeds", "0"], "--seeds: 0 is not allowed; it must be at least 1"),
        (["--jobs", "-1"], "--jobs: -1 is not allowed"),
        (["--nodes", "0"], "--nodes: 0 is not allowed"),
        (["--nodes", "2.5"], "--nodes: invalid positive value: '2.5'"),
        (["--nodes", "1"], "--nodes 1 is less than min-available-nodes, 2"),
        (["--out", "."], "--out: '.' does not end in a name"),
        (["--out", "x/"], "--out: 'x/' does not end in a name"),
        (["--out", ""], "--out: '' does not end in a name"),
        (["--out", "x/.."], "--out: 'x/..' does not end in a name"),
        (["--out", "file/x"], "Not a directory"),
        (["--vary", "a"], "--run-config and --vary take settings such as"),
        (
            ["--vary", "momentum=0.5", "--vary", "momentum=0.50"],
            "two variants have the same settings: --vary 'momentum",
        ),
        (["--run-config", "dataset='./x'"], "dataset='./x' is a relative path; use the absolute one, '"),
        (["--run-config", "dataset='folder'"], "dataset='folder' is a relative path"),
        (["--run-config", "initial-model='m.pt'"], "initial-model='m.pt' is a relative path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_is_refused_before_anything_is_done(arguments, error, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    arguments = [*([] if "--out" in arguments else ["--out", "run"]), *arguments]
    assert error in refused(monkeypatch, capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_faults_of_all_variants_are_found_before_the_first_run(monkeypatch, tmp_path, capsys):
    arguments = ["--run-config", "batch-siz=3", "--vary", "momentum=0.5", "--vary", "momentum=2", "--vary", "augment=1"]
    error = refused(monkeypatch, capsys, "--out", str(tmp_path / "run"), *arguments)
    faults = re.findall(r"^(?:--vary .*|  - .*)$", re.sub(r" \(checked in .*\)", "", error), re.MULTILINE)
    unknown = "  - batch-siz: Extra inputs are not permitted; it is 3"
    assert faults == [
        "--vary 'momentum=0.5': Wrong run configuration:",
        unknown,
        "--vary 'momentum=2': Wrong run configuration:",
        "  - momentum: Input should be less than 1; it is 2",
        unknown,
        "--vary 'augment=1': Wrong run configuration:",
        "  - augment: Input should be a valid boolean; it is 1",
        unknown,
    ]


def test_absolute_paths_and_names_on_the_hub_are_no_relative_paths(tmp_path):
    for name in (str(tmp_path), "~/x", "fashion-mnist-sample", "zalando-datasets/fashion_mnist"):
        (settings,) = sweep.read_variants([f"dataset='{name}' initial-model='/x/m.pt'"], [], 50).values()
        assert settings["dataset"] == name


def test_a_later_run_config_overrides_an_earlier_one_as_for_flower():
    texts = ["batch-size=16 momentum=0.5", "momentum=0.1 augment=true"]
    (settings,) = sweep.read_variants(texts, [], 50).values()
    assert settings | {"batch-size": 16, "momentum": 0.1, "augment": True} == settings
    assert parse_config_args(texts).items() <= settings.items()


def test_the_table_of_seeds_has_mean_deviation_and_worst():
    def run(central: float, federated: float | None) -> list[dict]:
        row = {"centralized_accuracy": central, "federated_evaluate_accuracy": federated}
        row["federated_evaluate_accuracy_min"] = None
        return [row, row]

    runs = [run(0.2, 0.5), run(0.4, 0.7), run(0.6, None)]
    figures = "0.400 ± 0.163 | 0.200 | 0.600 ± 0.100 | 0.500 | – | – |"
    assert seeds.table(runs).splitlines()[-1] == f"| 1 | {figures}"
    assert seeds.final_table({"momentum=0.5": runs}).splitlines()[-1] == f"| momentum=0.5 | {figures}"

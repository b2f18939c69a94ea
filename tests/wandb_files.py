"""Reads W&B's own offline files, whose format has no public reader."""

import json
import struct
from pathlib import Path

from deploy.cli import wait_for
from tests.conftest import results


def records_of(folder: Path) -> list:
    """The records of an offline run: LevelDB's log format, behind a header of 7 bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    data, position, parts, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:  # too small for a header: padding
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            break  # not written to its end
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def history_of(folder: Path) -> list[dict]:
    """What was logged at each step, as Python values."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records_of(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def wandb_rounds(folder: Path) -> list[int]:
    """The rounds that were logged."""
    return [int(values["round"]) for values in history_of(folder) if "round" in values]


def wandb_folder(directory: Path) -> Path:
    """The newest offline run, once its file is whole: W&B's process may still write when `finish` has returned."""
    folder = max((directory / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    wait_for(lambda: (records := records_of(folder)) and records[-1].WhichOneof("record_type") == "exit")
    return folder


def expected_history(directory: Path) -> list[dict]:
    """What results.json has, as W&B should have it."""
    names = json.loads((directory / "run_config.json").read_text())["class-names"]
    rows = []
    for row in results(directory, times=True):
        for key in [key for key, value in row.items() if isinstance(value, list)]:
            row |= {f"{key}/{name}": value for name, value in zip(names, row.pop(key), strict=True)}
        rows.append({key: value for key, value in row.items() if value is not None} | {"_step": row["round"]})
    return rows


def own(history: list[dict]) -> list[dict]:
    """History without what W&B and the histograms add."""
    added = ("_runtime", "_timestamp", "client_accuracy")
    return [{key: value for key, value in values.items() if not key.startswith(added)} for values in history]

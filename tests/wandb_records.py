"""Reads back the records of an offline W&B run (LevelDB's log format, one protobuf record each)."""

import json
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


@dataclass
class Records:
    config: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    ended: bool = False


def _payloads(data: bytes):
    position, parts = HEADER, b""  # the file starts with a header of its own
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def _value(item) -> tuple[str, object]:
    return item.key or "/".join(item.nested_key), json.loads(item.value_json)


def read_records(path: Path, patience: float = 30.0) -> Records:
    """The records of a run that was finished: W&B's own process may write the last of them a moment after that."""
    deadline = time.monotonic() + patience
    while not (found := _read(path)).ended:
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)
    return found


def _read(path: Path) -> Records:
    found = Records()
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.config |= dict(_value(item) for item in record.run.config.update)
            found.tags = list(record.run.tags)
        elif kind == "config":
            found.config |= dict(_value(item) for item in record.config.update)
        elif kind == "history":
            found.history.append(dict(_value(item) for item in record.history.item))
        elif kind == "summary":
            found.summary |= dict(_value(item) for item in record.summary.update)
        elif kind == "exit":
            found.ended = True
        elif kind == "metric" and (record.metric.summary.min or record.metric.summary.max):
            found.metrics[record.metric.name] = "min" if record.metric.summary.min else "max"
    return found

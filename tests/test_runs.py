"Reading records: what json.loads gives, line by line, less what the contract refuses, whatever damaged the files."
import json
import math
import os
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import call, finish, start

from speedrun_nb.core.records import FIELDS, RECORD_SCHEMA, Ready, Result, append_record, make_record
from speedrun_nb.core.runs import RunRecord, read_runs
from speedrun_nb.core.study import load_study

STUDY = load_study("cifar")


# a reader that anyone would write

WORDS = "study profile variant config_hash batch sweep host_id device precision package_hash status error started_at"
TEXT = {*WORDS.split(), "run_id", "ended_at", "clock", "fingerprint"}
WHOLE = {"schema", "seed", "repeat", "block", "order", "threads", "ranks", "resumed_at", "peak_memory_bytes"}
MAPPINGS = {"config", "tokens", "compiled"}


def is_number(value): return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def is_whole(value): return isinstance(value, int) and not isinstance(value, bool)


def is_mapping(value, is_right): return isinstance(value, dict) and all(map(is_right, value.values()))


def or_none(is_right): return lambda value: value is None or is_right(value)


def is_curve(value): return isinstance(value, list) and all(map(or_none(is_number), value))


RULES = dict.fromkeys(TEXT, lambda value: isinstance(value, str)) | dict.fromkeys(WHOLE, is_whole) | dict.fromkeys(
    MAPPINGS, lambda value: isinstance(value, dict)) | dict(
    time_seconds=is_number, curve=lambda value: is_mapping(value, is_curve),
    regions=lambda value: is_mapping(value, or_none(is_number)),
    metrics=lambda value: is_mapping(value, or_none(is_number)))


def refuse(word): raise ValueError(f"{word} is not JSON")


def fault_of(record):
    "The field that breaks the contract; None for a record as it should be."
    if not isinstance(record, dict): return "the line"
    if is_whole(record.get("schema")) and record["schema"] != RECORD_SCHEMA: return "version"
    if not isinstance(record.get("run_id"), str): return "run_id"
    wrong = [name for name, is_right in RULES.items() if name in record and not or_none(is_right)(record[name])]
    return wrong[0] if wrong else None


def parsed(line):
    "A line as JSON has it; an unpaired surrogate is damage."
    record = json.loads(line.decode(), parse_constant=refuse)
    json.dumps(record, ensure_ascii=False).encode()
    return record


def plainly(outputs, study="*", profile="*"):
    "Rows, and the places of the lines that are left out: whether each is damaged, and where."
    rows, left_out = [], []
    for path in sorted(Path(outputs).glob(f"{study}/{profile}/*/*/runs.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line: continue
            try: record = parsed(line)
            except (ValueError, RecursionError): left_out.append((f"{path}, line {number}", "damaged"))
            else:
                fault = fault_of(record)
                if fault: left_out.append((f"{path}, line {number}", fault))
                else: rows.append(row_of(record))
    return sorted(rows, key=lambda row: (row["started_at"] is None, row["started_at"] or "", row["run_id"])), left_out


def row_of(record):
    metrics = record.get("metrics") or {}
    return {name: record.get(name) for name in FIELDS} | {name: metrics[name] for name in metrics if name not in FIELDS}


SAID = {"damaged": "record left out", "version": "is not known to this version"}


def same(mine, its):
    "Equal, with NaN for None."
    mine, its = (None if isinstance(value, float) and math.isnan(value) else value for value in (mine, its))
    return mine == its


def check(outputs, **only):
    "What is read is what is read plainly; returns the frame."
    frame, problems = read_runs(outputs, **only)
    rows, left_out = plainly(outputs, **only)
    assert [problem.partition(": ")[0] for problem in problems] == [place for place, _ in left_out]
    for problem, (_, fault) in zip(problems, left_out, strict=True):
        assert re.search(SAID.get(fault, "record left out: .*(expected|missing|out of range)"), problem), fault
    assert len(frame) == len(rows)
    for mine, its in zip(frame.to_dict("records"), rows, strict=True):
        assert all(same(mine.get(name), its.get(name)) for name in {**mine, **its}), (mine, its)
    return frame


# what a batch writes

COMPILED = {"how": "model", "graphs": 2, "recompiles": 0, "fallbacks": 0}
CONFIG = {"train.epochs": 9.9, "model.widths": [64, 256], "data.note": "a } b"}
CELL = dict(study="cifar", profile="full", config=CONFIG, repeat=0, batch="b",
            host_id="h", package_hash="p", clock=STUDY.clock, ended_at="2026-01-02")


def record(number, variant="baseline", status="completed", **fields):
    "The record of a run."
    seed, started = number, f"2026-01-01T{number // 3600:02d}:{number // 60 % 60:02d}:{number % 60:02d}.5+00:00"
    place = dict(block=seed // 4, order=seed, started_at=started)
    cell = CELL | dict(variant=variant, config_hash=f"hash of {variant}") | place
    result = Result(
        seed=seed, status=status, time_seconds=4 + seed / 7, metrics={"accuracy": 0.9 + seed / 1e6, "train_loss": 1.0},
        curve={"epoch": [0, 1], "train_loss": [2.5, 1e-7 * seed]}, losses=[2.5, seed], peak_memory_bytes=1000 + seed,
        regions={"training": seed / 3, "evaluation": 1}, tokens={"trained": 5, "unique": 3})
    if status == "failed":
        result = replace(result, time_seconds=None, metrics={}, curve={}, error='RuntimeError: "é"\n')
    if variant == "b": result = replace(result, compiled=COMPILED, resumed_at=None if seed % 5 else 600)
    ready = Ready("cuda", "fp16", 8, 0.5, {}, ranks=8 if variant == "b" else None)
    return make_record(result, ready, cell, STUDY.metrics) | fields


def write(path, lines, tail=b""):
    "A runs.jsonl of records and lines of bytes."
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"".join(text + b"\n" for text in texts) + tail)
    return path


# whatever is in the files

ODD = [None, 1, 2.5, 3.0, True, "x", "ü", "2026-01-01T00:00:00", [], [1, "a"], {}, {"a": {"b": [1]}}, 2**62, -1,
       math.nan, "\u2028", 'a"b\\', {"a": True}, {"a": [True]}, {"curve": {"a": [1]}, "metrics": {"z": 1}}]
ENDINGS = [b', "seed": 5}', b', "study": "other", "z": 1}', b', "curve": {"a": [3]}}', b', "metrics": {"accuracy": 3}}',
           b" }", b', "config": {"q": 1}, "z": 0}', b', "schema": 2}']


def changed(chance, made, rate):
    "A record with fields missing, of other types, unknown, in another order."
    def now(): return chance.random() < rate
    if now(): made.pop(chance.choice(list(made)))
    if now(): made[chance.choice(list(made))] = chance.choice(ODD)
    if now(): made["unknown" + chance.choice("abc")] = chance.choice(ODD)
    for mapping, names in (("metrics", ["accuracy", "new", "seed", "study", "curve"]), ("curve", ["epoch", "new"])):
        if now() and isinstance(made.get(mapping), dict): made[mapping][chance.choice(names)] = chance.choice(ODD)
    return dict(chance.sample(list(made.items()), len(made))) if now() else made


def line_of(chance, made, rate, damage):
    "Its line, written in another way now and then, or damaged."
    separators = (",", ":") if chance.random() < rate else None
    line = json.dumps(made, ensure_ascii=chance.random() < 0.5, separators=separators).encode()
    if chance.random() < rate / 2 and fault_of(made) is None: line = line[:-1] + chance.choice(ENDINGS)  # keys twice
    if chance.random() >= damage: return line
    at, byte = chance.randrange(len(line)), bytes([chance.randrange(128)])
    return chance.choice([
        line[:at], line[:at] + byte + line[at + 1:], line[:at] + b"\n" + line[at:], line[:at] + line[at + 9:],
        line + line, b"", b"[]", b"null", b"{}", b"\0" * 50, b" ", line + b"\r", b" " + line])


@pytest.mark.parametrize("seed", range(24))
def test_as_json_reads_it(seed, tmp_path):
    chance = random.Random(seed)
    rate, damage = chance.choice([0, 0.02, 0.1, 0.5]), chance.choice([0, 0.02, 0.2])
    for batch in range(chance.randrange(1, 5)):
        folder = tmp_path / chance.choice(["cifar", "gpt"]) / chance.choice(["full", "demo"]) / "v" / f"b{batch}"
        statuses = [chance.choice(["completed", "failed"]) for _ in range(chance.randrange(30))]
        made = [record(100 * batch + i, chance.choice("ab"), status) for i, status in enumerate(statuses)]
        lines = [line_of(chance, changed(chance, each, rate), rate / 4, damage) for each in made]
        path = write(folder / "runs.jsonl", lines)
        text = path.read_bytes()
        if text and chance.random() < 0.3: path.write_bytes(text[:-chance.randrange(1, 400)])
    check(tmp_path)
    for only in (dict(study="cifar"), dict(profile="demo"), dict(study="gpt", profile="full")): check(tmp_path, **only)


CURVES = [
    b"[2.5,, 1.0]", b"[2.5, 1..0]", b"[2.5 1.0]", b"[2.5, 1.0", b"[2.5, 01.0]", b"[2.5, NaN]", b'[2.5, "x"]',
    b"[[2.5]]", b"[2.5, .5]", b"[2.5, 1.0],", b'{"a": {}}', b"[2.5, \x00]", b'"\xff"', b"null", b"[]", b"1e5",
    b"[true]",
    b"[Infinity]"]
LAST_FIELDS = [
    b'"study": "other", "z": 1}', b'"threads": 3, "z": 1}', b'"config": {"q": 1}, "z": 0}', b'"curve": {"a": [3]}}',
    b'"curve": null}', b'"curve": true}', b'"x": {"curve": {"a": [1]}}}', b'"metrics": {"accuracy": 3}}',
    b'"metrics": null}', b'"metrics": {"started": "2026-01-01"}}', b'"metrics": {"seed": 3}}',
    b'"metrics": {"many": [1, 2]}}', b'"x": "\xc3\xa9"}', b'"x": 1}}', b'"x": 1}{"run_id": "r"}', b'"seed": 1.5}',
    b'"seed": 2.0}', b'"run_id": null}', b'"run_id": 5}', b'"time_seconds": 4}', b'"time_seconds": true}',
    b'"time_seconds": NaN}', b'"block": null}', b'"x": "\x01"}', b'"x": 01}', b'"x": 1,}', b'"schema": 2}',
    b'"schema": "1"}', b'"schema": null}', b'"study": "\\ud800"}', b'"study": "\xff"}',
    b'"time_seconds": 1e400}']
VALUES = [("threads", 2.5), ("threads", True), ("threads", "two"), ("threads", None), ("host_id", None), ("host_id", 5),
          ("config", None), ("config", "none"), ("config", []), ("clock", "2026-01-01T00:00:00"),
          ("tokens", {"curve": {"a": [1]}}), ("status", "failed"), ("ranks", 2.5), ("ranks", 8), ("compiled", "model"),
          ("compiled", {"graphs": 3}), ("resumed_at", 600), ("resumed_at", "600"), ("config", {"a": math.nan})]
USUAL = json.dumps(record(7)).encode()
ODD_LINES = [USUAL.replace(b"[2.5, 7e-07]", curve) for curve in CURVES]
ODD_LINES += [USUAL[:-1] + b", " + last for last in LAST_FIELDS]
ODD_LINES += [json.dumps(record(7) | {name: value}).encode() for name, value in VALUES]
ODD_LINES += [json.dumps(each).encode() for each in (
    {"x": record(7), "run_id": "r"}, {"run_id": "r", "metrics": record(7)}, {"x": [1, 2]} | record(7), [record(7)],
    {name: value for name, value in record(7).items() if name != "run_id"})]


@pytest.mark.parametrize("odd", ODD_LINES)
def test_one_odd_line(odd, tmp_path):
    "Among lines as they should be, and as often as they."
    usual = [record(seed) for seed in range(6)]
    path = tmp_path / "cifar/full/a/b/runs.jsonl"
    for lines in ([*usual[:3], odd, *usual[3:]], [odd, *usual], [odd, odd]):
        write(path, lines)
        check(tmp_path)


@pytest.mark.parametrize("line, message", [
    (record(3, seed="3"), "line 2: record left out: seed: expected int or null, found str"),
    (record(3, threads=True), "line 2: record left out: threads: expected int or null, found bool"),
    (record(3, time_seconds="1"), "line 2: record left out: time_seconds: expected float or null, found str"),
    (record(3, schema=7), "line 2: record left out: schema 7 is not known to this version, which knows 1"),
    (record(3, schema=7, seed="3"), "line 2: record left out: schema 7 is not known to this version, which knows 1"),
    (record(3, config=[1]), "line 2: record left out: config: expected object or null, found array"),
    (record(3, metrics={"accuracy": math.nan}), "line 2: damaged record left out"),
    (b'{"run_id": "r', "line 2: damaged record left out"),
    (b'{"run_id": 5, "seed": 3, "started', "line 2: damaged record left out"),
    (b'{"run_id": "\xff"}', "line 2: damaged record left out")])
def test_what_is_left_out_is_named(line, message, tmp_path):
    path = write(tmp_path / "cifar/full/a/b/runs.jsonl", [record(1), line, record(2)])
    frame, problems = read_runs(tmp_path)
    assert frame["seed"].tolist() == [1, 2] and problems == [f"{path}, {message}"]


def test_a_half_written_line_is_told_from_a_damaged_one(tmp_path):
    path = write(tmp_path / "cifar/full/a/b/runs.jsonl", [record(1), b'{"run_'], tail=b'{"schema": 1, "run_')
    problems = ["line 2: damaged record left out", "line 3: half-written record left out"]
    assert read_runs(tmp_path)[1] == [f"{path}, {problem}" for problem in problems]


def test_every_field_is_declared():
    assert list(RunRecord.__struct_fields__[:2]) == ["run_id", "schema"]
    assert {*RunRecord.__struct_fields__} == {*FIELDS, "metrics"} == record(1, "b").keys() | {"sweep"}


def test_equal_runs_stay_in_the_order_of_files_and_lines(tmp_path):
    folders = [tmp_path / f"{study}/full/a/b{batch}" for study in ("gpt", "cifar") for batch in (1, 0)]
    for folder in folders:
        write(folder / "runs.jsonl", [record(1, study=folder.parts[-4], ended_at=str(line)) for line in range(3)])
    append_record(folders[3] / "runs.jsonl", record(1, ended_at="last"))
    frame = check(tmp_path)
    assert frame["ended_at"].tolist() == ["0", "1", "2", "last", *["0", "1", "2"] * 3]
    assert frame["study"].tolist() == ["cifar"] * 7 + ["gpt"] * 6


def test_what_a_batch_writes(tmp_path):
    "Also failed runs, other letters than English ones, and a half-written last line; settings are shared."
    for variant in "ab":
        path = tmp_path / f"cifar/full/{variant}/b/runs.jsonl"
        path.parent.mkdir(parents=True)
        for seed in range(40): append_record(path, record(seed, variant, "failed" if seed % 9 == 8 else "completed"))
    with open(path, "ab") as file: file.write(b'{"schema": 1, "run_')
    frame = check(tmp_path)
    assert list(frame.columns) == [*FIELDS, *(name for name in STUDY.metrics if name not in FIELDS)]
    assert len(frame) == 80 and len({id(config) for config in frame["config"]}) == 1
    assert [frame[name].dtype.kind for name in ("seed", "time_seconds", "accuracy", "ranks")] == ["i", "f", "f", "f"]


def test_records_from_before_a_field_was_added(tmp_path):
    "They read as None, alone and beside newer ones."
    new = ["schema", "sweep", "ranks", "compiled", "resumed_at"]
    olds = [{name: value for name, value in record(seed).items() if name not in new} for seed in range(20)]
    path = write(tmp_path / "cifar/full/baseline/b/runs.jsonl", olds)
    assert check(tmp_path)[new].isna().all(axis=None)
    for seed in range(20, 25): append_record(path, record(seed, "b"))
    frame = check(tmp_path)
    assert frame["ranks"].tolist()[20:] == [8] * 5 and frame["ranks"].isna().sum() == 20
    assert frame["resumed_at"].dropna().tolist() == [600] and frame["compiled"].tolist() == [None] * 20 + [COMPILED] * 5


def test_no_runs(tmp_path):
    empty = write(tmp_path / "cifar/full/baseline/b/runs.jsonl", [])
    for outputs in (tmp_path, tmp_path / "absent", empty):
        frame, problems = read_runs(outputs)
        assert frame.empty and list(frame.columns) == FIELDS and problems == []


# files that are none

def make_folder(path): path.mkdir(parents=True)


def make_link(path):
    path.parent.mkdir(parents=True)
    path.symlink_to("nowhere")


def make_pipe(path):
    path.parent.mkdir(parents=True)
    os.mkfifo(path)


@pytest.mark.parametrize("make, reason", [
    (make_folder, "not a regular file"), (make_link, "No such file or directory"), (make_pipe, "not a regular file")])
def test_what_is_called_runs_jsonl_and_is_no_file(make, reason, tmp_path):
    path = tmp_path / "cifar/full/a/b0/runs.jsonl"
    make(path)
    write(tmp_path / "cifar/full/a/b1/runs.jsonl", [record(1)])
    frame, problems = read_runs(tmp_path)
    assert frame["seed"].tolist() == [1] and problems == [f"{path}: cannot be read ({reason})"]


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"cifar/full/baseline/b{i}/runs.jsonl", [record(i)]) for i in range(2)]
    read = Path.read_bytes
    def refused(self):
        if self == paths[0]: raise PermissionError(13, "Permission denied")
        return read(self)
    monkeypatch.setattr(Path, "read_bytes", refused)
    frame, problems = read_runs(tmp_path)
    assert frame["seed"].tolist() == [1] and problems == [f"{paths[0]}: cannot be read (Permission denied)"]


def test_a_link_to_another_disk_is_followed(tmp_path):
    there = write(tmp_path / "elsewhere/runs.jsonl", [record(1)])
    (tmp_path / "out/cifar/full/a").mkdir(parents=True)
    (tmp_path / "out/cifar/full/a/b0").symlink_to(there.parent)
    assert check(tmp_path / "out")["seed"].tolist() == [1]


# several processes

READ = """
import sys, time
from pathlib import Path
from speedrun_nb.core.runs import read_runs
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    frame, problems = read_runs(Path(sys.argv[1]))
    assert all("half-written" in problem for problem in problems) and len(problems) < 2, problems
    assert frame["run_id"].is_unique and len(frame) >= 200, len(frame)
    assert all(curve["epoch"] == [0, 1] for curve in frame["curve"].sample(20))
"""


def test_readers_and_a_writer_at_once(tmp_path):
    for variant in "ab":
        records = [record(seed, variant, run_id=f"{variant}{seed}") for seed in range(100)]
        write(tmp_path / f"cifar/full/{variant}/b/runs.jsonl", records)
    readers = [start(sys.executable, "-c", READ, tmp_path, "3") for _ in range(2)]
    seed = 100
    while any(reader.poll() is None for reader in readers):
        append_record(tmp_path / "cifar/full/a/b/runs.jsonl", record(seed, "a", run_id=f"a{seed}"))
        seed += 1
        time.sleep(0.02)
    for reader in readers: assert (done := finish(reader)).code == 0, done.err
    assert len(check(tmp_path)) == 100 + seed


# the benchmark

def test_the_benchmark(tmp_path):
    done = call(sys.executable, "benchmarks/evidence.py", "--runs", "200", "--rounds", "1", "--folder", tmp_path)
    assert done.code == 0 and not list(tmp_path.iterdir()), done.err
    assert all(step in done.out for step in ("read", "audit", "compare")) and "200" in done.out
    done = call(sys.executable, "benchmarks/evidence.py", "--runs", "1000000000000", "--folder", tmp_path)
    assert done.code == 1 and "name another place with --folder" in done.err and "Traceback" not in done.err

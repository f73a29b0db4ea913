"Collecting records: always what json.loads would give, line by line, however the files were damaged and whatever was kept of them."
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import DEADLINE, call, finish, start
from speedrun_nb.core.lines import IN_LINES

from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.core.records import FIELDS, Ready, Result, append_record, make_record, read_records
from speedrun_nb.core.runs import CACHE, collect, read_runs
from speedrun_nb.core.runs import collect as collecting
from speedrun_nb.core.study import load_study

STUDY = load_study("cifar")


def plainly(outputs, study="*", profile="*"):
    "Rows and problems, read the plain way."
    rows, problems = [], []
    for path in sorted(Path(outputs).glob(f"{study}/{profile}/*/*/runs.jsonl")):
        records, bad = read_records(path)
        problems += bad
        for record in records:
            metrics = record["metrics"] if isinstance(record.get("metrics"), dict) else {}
            rows.append({name: record.get(name) for name in FIELDS} | {name: value for name, value in metrics.items() if name not in IN_LINES})
    return sorted(rows, key=lambda row: [(row[name] is None, row[name] or "") for name in ("started_at", "run_id")]), problems


def same(mine, its):
    "Equal, with NaN for None, but a truth value is no number."
    mine, its = (None if isinstance(value, float) and math.isnan(value) else value for value in (mine, its))
    if isinstance(mine, dict) and isinstance(its, dict): return mine.keys() == its.keys() and all(same(mine[key], its[key]) for key in mine)
    if isinstance(mine, list) and isinstance(its, list): return len(mine) == len(its) and all(map(same, mine, its))
    return isinstance(mine, bool) == isinstance(its, bool) and mine == its


def check(outputs, **only):
    "Collected is what is read plainly; returns the frame."
    frame, problems = collect(outputs, **only)
    rows, expected = plainly(outputs, **only)
    assert problems == expected and len(frame) == len(rows)
    for mine, its in zip(frame.to_dict("records"), rows, strict=True):
        assert all(same(mine.get(name), its.get(name)) for name in {**mine, **its}), (mine, its)
    return frame


def record(seed, variant="baseline", status="completed", **fields):
    "What a batch writes."
    cell = dict(study="cifar", profile="full", variant=variant, config={"train.epochs": 9.9, "model.widths": [64, 256], "data.note": "a } b"}, config_hash=f"hash of {variant}", repeat=0, batch="b", block=seed // 4,
                order=seed, host_id="h", package_hash="p", clock=STUDY.clock, started_at=f"2026-01-01T{seed // 3600:02d}:{seed // 60 % 60:02d}:{seed % 60:02d}.5+00:00", ended_at="2026-01-02")
    made = status == "completed"
    result = Result(seed, status, 4 + seed / 7 if made else None, {"accuracy": 0.9 + seed / 1e6, "train_loss": 1.0} if made else {}, {"epoch": [0, 1], "train_loss": [2.5, 1e-7 * seed]} if made else {}, [2.5, seed],
                    1000 + seed, {"training": seed / 3, "evaluation": 1}, None if made else 'RuntimeError: "é"\n', {"trained": 5, "unique": 3})
    if variant == "b": result = replace(result, compiled={"how": "model", "graphs": 2, "recompiles": 0, "fallbacks": 0}, resumed_at=None if seed % 5 else 600)
    return make_record(result, Ready("cuda", "fp16", 8, 0.5, {}, ranks=8 if variant == "b" else None), cell, STUDY.metrics) | fields


def write(path, records, tail=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in records) + tail)
    return path


def forbid(monkeypatch, *names):
    def forbidden(*_): raise AssertionError("not to be called")
    for name in names: monkeypatch.setattr(collecting, name, forbidden)


# whatever is in the files

ODD = [None, 1, 2.5, True, "x", "ü", "2026-01-01T00:00:00", [], [1, "a"], {}, {"a": {"b": [1]}}, 2**70, -1, math.nan, "\u2028", 'a"b\\', {"curve": {"a": [1]}, "config": {"train.epochs": 9.9}, "metrics": {"z": 1}}]


def changed(random, made, rate):
    "A record with fields missing, of other types, unknown, in another order."
    chance = lambda: random.random() < rate
    if chance(): made.pop(random.choice([name for name in made if name != "run_id"]))
    if chance(): made[random.choice([name for name in made if name not in ("started_at", "run_id")])] = random.choice(ODD)
    if chance(): made["unknown" + random.choice("abc")] = random.choice(ODD)
    if chance() and isinstance(made.get("metrics"), dict): made["metrics"][random.choice(["accuracy", "new", "seed", "study", "curve"])] = random.choice(ODD)
    if chance() and isinstance(made.get("curve"), dict): made["curve"][random.choice(["epoch", "new"])] = random.choice(ODD)
    if chance(): made = dict(random.sample(list(made.items()), len(made)))
    return made


def line_of(random, made, rate, damage):
    "Its line, written in another way now and then, or damaged."
    line = json.dumps(made, ensure_ascii=random.random() < 0.5, separators=(",", ":") if random.random() < rate else None).encode()
    if random.random() < rate / 2: line = line[:-1] + random.choice([b', "seed": 5}', b', "study": "other", "z": 1}', b', "curve": {"a": [3]}}', b', "metrics": {"accuracy": 3}}', b" }", b', "config": {"q": 1}, "z": 0}'])
    if random.random() >= damage: return line
    at = random.randrange(len(line))
    return random.choice([line[:at], line[:at] + bytes([random.randrange(256)]) + line[at + 1:], line + line, b"", b"[]", b"null", b"{}", b"\0" * 50, b" ", line[:at] + b"\n" + line[at:], line + b"\r", b" " + line, line[:at] + line[at + 9:]])


@pytest.mark.parametrize("seed", range(24))
def test_as_json_reads_it(seed, tmp_path, monkeypatch):
    chance, number = random.Random(seed), 0
    rate, damage = chance.choice([0, 0.02, 0.1, 0.5]), chance.choice([0, 0.02, 0.2])
    for batch in range(chance.randrange(1, 5)):
        path = tmp_path / chance.choice(["cifar", "gpt"]) / chance.choice(["full", "demo"]) / "v" / f"b{batch}" / "runs.jsonl"
        made = [changed(chance, record(number := number + 1, chance.choice("ab"), chance.choice(["completed", "failed"])), rate) for _ in range(chance.randrange(30))]
        text = b"".join(line_of(chance, each, rate / 4, damage) + b"\n" for each in made)
        path.parent.mkdir(parents=True)
        path.write_bytes(text[:-chance.randrange(1, 400)] if text and chance.random() < 0.3 else text)
    for block, crumb in ((8 << 20, 1 << 16), (3000, 500)):
        monkeypatch.setattr(collecting, "BLOCK", block)
        monkeypatch.setattr(collecting, "CRUMB", crumb)
        monkeypatch.setattr(collecting, "KEEP_FROM", 10**9)
        first = check(tmp_path)
        monkeypatch.setattr(collecting, "KEEP_FROM", 1)
        for _ in range(2): pd.testing.assert_series_equal(check(tmp_path).dtypes, first.dtypes)
        for only in (dict(study="cifar"), dict(profile="demo"), dict(study="gpt", profile="full")): check(tmp_path, **only)
        path.write_bytes(chance.choice([b"", path.read_bytes() + b'{"run_id": "new", "started_at": "2025"}\n', path.read_bytes()[:1000]]))
        check(tmp_path)
        for cache in tmp_path.glob(f"*/{CACHE}"): cache.unlink()


DAMAGED_CURVES = [b"[2.5,, 1.0]", b"[2.5, 1..0]", b"[2.5 1.0]", b"[2.5, 1.0", b"[2.5, 01.0]", b"[2.5, NaN]", b'[2.5, "x"]', b"[[2.5]]", b"[2.5, .5]", b"[2.5, 1.0],", b'{"a": {}}', b"[2.5, \x00]", b"\"\xff\"", b"null", b"[]", b"1e5"]
ODD_ENDINGS = [b'"study": "other", "z": 1}', b'"threads": 3, "z": 1}', b'"config": {"q": 1}, "z": 0}', b'"curve": {"a": [3]}}', b'"curve": null}', b'"curve": true}', b'"x": {"curve": {"a": [1]}}}', b'"metrics": {"accuracy": 3}}', b'"metrics": null}',
               b'"metrics": {"started": "2026-01-01"}}', b'"metrics": {"seed": 3}}', b'"metrics": {"many": [1, 2]}}', b'"x": "\xff"}', b'"x": "\xc3\xa9"}', b'"x": 1}}', b'"x": 1}{"run_id": "r"}', b'"seed": 1.5}', b'"run_id": null}', b'"run_id": 5}', b'"time_seconds": 4}',
               b'"time_seconds": true}', b'"block": null}', b'"x": "\x01"}', b'"x": "\\ud800"}', b'"fingerprint": "\\ud800"}', b'"x": 01}', b'"x": 1,}']
SHARED_ODDLY = [("threads", 2.5), ("threads", True), ("threads", "two"), ("threads", None), ("host_id", None), ("host_id", 5), ("config", None), ("config", "none"), ("config", []), ("repeat", 2**70), ("clock", "2026-01-01T00:00:00"), ("tokens", {"curve": {"a": [1]}}), ("status", "failed"),
                ("ranks", 2.5), ("ranks", 8), ("compiled", "model"), ("compiled", {"graphs": 3}), ("compiled", {"curve": {"a": [1]}}), ("resumed_at", 600), ("resumed_at", "600")]


@pytest.mark.parametrize("odd", [line.replace(b"[2.5, 7e-07]", curve) for line in [json.dumps(record(7)).encode()] for curve in DAMAGED_CURVES]
                         + [json.dumps(record(7)).encode()[:-1] + b", " + ending for ending in ODD_ENDINGS] + [json.dumps(record(7, **{name: value})).encode() for name, value in SHARED_ODDLY]
                         + [json.dumps(each).encode() for each in ({"x": record(7), "run_id": "r"}, {"x": [record(7)], "run_id": "r"}, {"run_id": "r", "metrics": record(7)}, {name: value for name, value in record(7).items() if name != "run_id"}, {"x": [1, 2]} | record(7))])
def test_one_odd_line(odd, tmp_path, monkeypatch):
    "Among lines as they should be, and as often as they."
    usual = [json.dumps(record(seed)).encode() for seed in range(6)]
    assert b"[2.5, 7e-07]" not in odd or odd != json.dumps(record(7)).encode()
    path = write(tmp_path / "cifar/full/a/b/runs.jsonl", [])
    monkeypatch.setattr(collecting, "KEEP_FROM", 1)
    for lines in ([*usual[:3], odd, *usual[3:]], [odd, *usual], [odd, odd]):
        path.write_bytes(b"\n".join(lines) + b"\n")
        first = check(tmp_path)
        pd.testing.assert_series_equal(check(tmp_path).dtypes, first.dtypes)


def test_equal_runs_stay_in_the_order_of_files_and_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "KEEP_FROM", 1)
    paths = [write(tmp_path / f"{study}/full/a/b{batch}/runs.jsonl", [record(1, study=study, batch=f"b{batch}", ended_at=str(line)) for line in range(3)]) for study in ("gpt", "cifar") for batch in (1, 0)]
    check(tmp_path)
    append_record(paths[3], record(1, ended_at="last"))
    frame = check(tmp_path)
    assert frame["ended_at"].tolist() == ["0", "1", "2", "last", *["0", "1", "2"] * 3] and frame["study"].tolist() == ["cifar"] * 7 + ["gpt"] * 6


def test_what_a_batch_writes_goes_the_quick_way(tmp_path, monkeypatch):
    "Also failed runs, other letters than English ones, and a file whose last line is half-written."
    paths = [tmp_path / f"cifar/full/{variant}/b/runs.jsonl" for variant in "ab"]
    for path, variant in zip(paths, "ab", strict=True):
        path.parent.mkdir(parents=True)
        for seed in range(40): append_record(path, record(seed, variant, "failed" if seed % 9 == 8 else "completed"))
    with open(paths[0], "ab") as file: file.write(b'{"schema": 1, "run_')
    tables, quick = [], collecting.quick_table
    monkeypatch.setattr(collecting, "quick_table", lambda pieces: tables.append(quick(pieces)) or tables[-1])
    frame = check(tmp_path)
    assert sum(map(len, tables)) == len(frame) == 80
    rows, _ = plainly(tmp_path)
    expected = pd.DataFrame(rows)
    pd.testing.assert_frame_equal(frame.drop(columns=[*IN_LINES]), expected.drop(columns=[*IN_LINES]))
    assert frame["curve"].tolist() == expected["curve"].tolist() and frame["regions"].tolist() == expected["regions"].tolist()
    assert len({id(config) for config in frame["config"]}) == 1 and read_runs(tmp_path)[0].equals(frame)


def test_records_from_before_a_field_was_added(tmp_path, monkeypatch):
    "They read as None, alone, beside newer ones, and from a cache; a cache from before is not trusted."
    new = ("ranks", "compiled", "resumed_at")
    olds = [{name: value for name, value in record(seed).items() if name not in new} for seed in range(20)]
    path = write(tmp_path / "cifar/full/baseline/b/runs.jsonl", olds)
    monkeypatch.setattr(collecting, "KEEP_FROM", 1)
    with monkeypatch.context() as before:
        before.setattr(collecting, "FIELDS", [name for name in FIELDS if name not in new])
        collect(tmp_path)
    assert collecting.load_cache(tmp_path / "cifar") == (None, {})
    for _ in range(2): assert check(tmp_path)[list(new)].isna().all(axis=None)
    monkeypatch.setattr(collecting, "patient_table", lambda piece: pytest.fail("not to be called"))
    for seed in range(20, 25): append_record(path, record(seed, "b"))
    for _ in range(2): frame = check(tmp_path)
    assert frame["ranks"].tolist()[20:] == [8] * 5 and frame["ranks"].isna().sum() == 20 and frame["resumed_at"].dropna().tolist() == [600]
    assert frame["compiled"].tolist() == [None] * 20 + [{"how": "model", "graphs": 2, "recompiles": 0, "fallbacks": 0}] * 5


def test_one_damaged_line_costs_little(tmp_path, monkeypatch):
    lines = [json.dumps(record(seed)).encode() for seed in range(3000)]
    path = write(tmp_path / "cifar/full/baseline/b/runs.jsonl", [])
    path.write_bytes(b"\n".join([*lines[:2000], lines[2000][:300], *lines[2001:]]) + b"\n")
    patient, read = collecting.patient_table, []
    monkeypatch.setattr(collecting, "patient_table", lambda piece: read.append(len(piece[2])) or patient(piece))
    check(tmp_path)
    assert 0 < sum(read) < 2 * collecting.CRUMB < path.stat().st_size / 10


def test_no_runs(tmp_path):
    for frame, problems in (collect(tmp_path), collect(tmp_path / "absent"), collect(write(tmp_path / "cifar/full/baseline/b/runs.jsonl", []).parents[4])):
        assert frame.empty and list(frame.columns) == FIELDS and problems == []


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"cifar/full/baseline/b{i}/runs.jsonl", [record(i)]) for i in range(2)]
    read = collecting.LineFile.read
    def refuse(self, *args):
        if self.path == str(paths[0]): raise PermissionError(13, "Permission denied")
        return read(self, *args)
    monkeypatch.setattr(collecting, "KEEP_FROM", 1)
    monkeypatch.setattr(collecting.LineFile, "read", refuse)
    frame, problems = collect(tmp_path)
    assert frame["seed"].tolist() == [1] and problems == [f"{paths[0]}: cannot be read (Permission denied)"]
    monkeypatch.undo()
    assert len(check(tmp_path)) == 2  # it was not kept as read


# what is kept

@pytest.fixture
def kept(tmp_path, monkeypatch):
    "Outputs with two batches, one with a damaged line, and their parquet."
    monkeypatch.setattr(collecting, "KEEP_FROM", 50)
    write(tmp_path / "cifar/full/a/b0/runs.jsonl", [record(seed, "a") for seed in range(100)], b'{"run_id": \n')
    write(tmp_path / "cifar/full/b/b1/runs.jsonl", [record(seed, "b") for seed in range(100)])
    check(tmp_path)
    assert [path.name for path in (tmp_path / "cifar").iterdir() if path.is_file()] == [CACHE]
    return tmp_path


def test_a_second_time_reads_no_lines(kept, monkeypatch):
    first, problems = collect(kept)
    forbid(monkeypatch, "quick_table", "patient_table", "save_cache")
    second, again = collect(kept)
    pd.testing.assert_frame_equal(first, second)
    assert problems == again == [f"{kept}/cifar/full/a/b0/runs.jsonl, line 101: damaged record left out"]


def test_only_changed_files_are_read(kept, monkeypatch):
    read = collecting.read_files
    seen = []
    monkeypatch.setattr(collecting, "read_files", lambda files: seen.append([Path(file.path).parent.name for file in files.values()]) or read(files))
    append_record(kept / "cifar/full/b/b1/runs.jsonl", record(100, "b"))
    write(kept / "cifar/demo/c/b2/runs.jsonl", [record(0, "c")])
    check(kept)
    check(kept)
    shutil.rmtree(kept / "cifar/full/a")
    check(kept)
    assert seen == [["b2", "b1"], [], []]


def test_a_change_that_keeps_the_size_is_noticed(kept):
    path = kept / "cifar/full/b/b1/runs.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"seed": 50', b'"seed": 99'))
    assert check(kept)["seed"].eq(99).sum() == 3


def test_few_new_runs_do_not_rewrite_it(kept, monkeypatch):
    before = (kept / "cifar" / CACHE).stat().st_mtime_ns
    write(kept / "cifar/full/c/b2/runs.jsonl", [record(seed, "c") for seed in range(3)])
    check(kept)
    assert (kept / "cifar" / CACHE).stat().st_mtime_ns == before
    write(kept / "cifar/full/c/b2/runs.jsonl", [record(seed, "c") for seed in range(5)])
    check(kept)
    assert (kept / "cifar" / CACHE).stat().st_mtime_ns > before


def test_a_small_study_keeps_nothing(tmp_path):
    write(tmp_path / "cifar/full/a/b0/runs.jsonl", [record(seed) for seed in range(100)])
    check(tmp_path)
    assert [path.name for path in (tmp_path / "cifar").iterdir()] == ["full"]


def test_moved_outputs_keep_it(kept, monkeypatch):
    kept = kept.rename(kept.with_name("moved"))
    forbid(monkeypatch, "quick_table", "patient_table")
    check(kept)


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "older", "folder", *range(10)])
def test_one_that_cannot_be_trusted_is_passed_over(kept, damage, monkeypatch):
    path = kept / "cifar" / CACHE
    data = path.read_bytes()
    if damage == "empty": path.write_bytes(b"")
    if damage == "cut": path.write_bytes(data[:len(data) // 2])
    if isinstance(damage, int):
        at = (damage * len(data) // 10) + 40
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
    if damage == "foreign": pd.DataFrame({"run_id": ["r"]}).to_parquet(path)
    if damage == "older": monkeypatch.setattr(collecting, "VERSION", collecting.VERSION + 1)
    if damage == "folder":
        path.unlink()
        path.mkdir()
    check(kept)
    check(kept)
    assert not list(kept.glob("cifar/*.tmp")) and not list(kept.glob("cifar/.*.tmp"))


def test_where_it_cannot_be_written(kept, monkeypatch):
    def full(*_, **__): raise OSError(28, "No space left on device")
    (kept / "cifar" / CACHE).unlink()
    monkeypatch.setattr(collecting.pq, "write_table", full)
    check(kept)
    assert not [path for path in (kept / "cifar").iterdir() if path.is_file()]


# several processes

READ = """
import sys, time
from speedrun_nb.core import collect as collecting
collecting.KEEP_FROM = 50
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    frame, problems = collecting.collect(sys.argv[1])
    assert not problems and frame["run_id"].is_unique and len(frame) >= 200, (len(frame), problems)
    assert all(curve["epoch"] == [0, 1] for curve in frame["curve"].sample(20))
"""


def test_readers_and_a_writer_at_once(tmp_path):
    for variant in "ab": write(tmp_path / f"cifar/full/{variant}/b/runs.jsonl", [record(seed, variant) for seed in range(100)])
    readers = [start(sys.executable, "-c", READ, tmp_path, "4") for _ in range(3)]
    seed = 100
    while any(reader.poll() is None for reader in readers):
        append_record(tmp_path / "cifar/full/a/b/runs.jsonl", record(seed, "a"))
        seed += 1
        time.sleep(0.02)
    for reader in readers: assert (done := finish(reader)).code == 0, done.err
    assert len(check(tmp_path)) == 100 + seed and not list(tmp_path.glob("cifar/.*.tmp"))


INTERRUPTED = """
import sys, time
from speedrun_nb.core import collect as collecting
write = collecting.pq.write_table
def slow_write(*args, **options):
    write(*args, **options)
    print("writing", flush=True)
    time.sleep(2)
if sys.argv[2] == "writing": collecting.pq.write_table, collecting.KEEP_FROM = slow_write, 1000
else: print("reading", flush=True)
for _ in range(200):
    collecting.collect(sys.argv[1])
    for cache in __import__("pathlib").Path(sys.argv[1]).glob("*/.runs.parquet"): cache.unlink()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("doing", ["reading", "writing"])
def test_interrupted(tmp_path, doing):
    for variant in "abcd": write(tmp_path / f"cifar/full/{variant}/b/runs.jsonl", [record(seed, variant) for seed in range(1000)])
    process = start(sys.executable, "-c", INTERRUPTED, tmp_path, doing)
    assert process.stdout.readline().strip() == doing
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    done = finish(process, DEADLINE)
    assert done.code != 0 and "KeyboardInterrupt" in done.err and not list(tmp_path.glob("cifar/.*.tmp"))
    assert len(check(tmp_path)) == 4000


# curves

def test_curves_stay_in_their_lines(kept):
    frame, _ = collect(kept)
    path = kept / "cifar/full/b/b1/runs.jsonl"
    append_record(path, record(100, "b"))
    mine = frame[frame["variant"] == "b"]
    assert mine["curve"].iloc[7] == {"epoch": [0, 1], "train_loss": [2.5, 7e-7]} and mine["regions"].iloc[7] == {"training": 7 / 3, "evaluation": 1}
    path.unlink()
    with pytest.raises(SpeedrunError, match="b1/runs.jsonl was changed or removed after its runs had been read"): mine["curve"].iloc[7]
    assert mine["time_seconds"].notna().all() and frame["curve"].iloc[0]["epoch"] == [0, 1]


def test_curves_of_few_runs_outlive_their_files(tmp_path):
    write(tmp_path / "cifar/full/a/b0/runs.jsonl", [record(3)])
    frame, _ = collect(tmp_path)
    shutil.rmtree(tmp_path / "cifar")
    assert frame["curve"].tolist() == [{"epoch": [0, 1], "train_loss": [2.5, 3e-7]}]


def test_the_benchmark(tmp_path):
    done = call(sys.executable, "benchmarks/evidence.py", "load", "--runs", "200", "--rounds", "1", "--folder", tmp_path)
    assert done.code == 0 and "200 " in done.out and not list(tmp_path.iterdir()), done.err
    done = call(sys.executable, "benchmarks/evidence.py", "load", "--runs", "1000000000000", "--folder", tmp_path)
    assert done.code == 1 and "GiB are free; name another place with --folder" in done.err and "Traceback" not in done.err

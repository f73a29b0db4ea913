"""Sweeps under faults: whatever dies, hangs, fills up or is interrupted, nothing that was recorded is lost,
nothing is run twice, and the rest goes on."""
import datetime
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import faults
import pytest
from conftest import ROOT, call, read_batch, stub_train
from faults import (
    completed,
    is_held,
    kill_all,
    leases,
    processes,
    records,
    start_sweep,
    stub_project,
    wait_for,
    write_sweep,
)

from speedrun_nb.core import provenance
from speedrun_nb.core import records as record_files
from speedrun_nb.core.batch import record_failure, run_batch
from speedrun_nb.core.parameters import plan_batch
from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.core.machine import process_started, this_process
from speedrun_nb.core.provenance import give_up, read_provenance
from speedrun_nb.core.records import Ready, read_records
from speedrun_nb.sweep.drive import Drive
from speedrun_nb.sweep.file import read_sweep
from speedrun_nb.sweep.leases import Leases
from speedrun_nb.sweep.local import LocalEngine
from speedrun_nb.sweep.notebook import plan_from_parameters
from speedrun_nb.sweep.plan import plan_batches
from speedrun_nb.sweep.slots import Slot

SEED = 5528  # of the three rounds: a worker, one of two drivers, and a kernel are killed
DEAD = dict(pid=2**22 + 1, pid_started=1)  # no process has this number


class InProcess:
    "An engine that runs batches in this process, while the sweep waits."
    def __init__(self, train=stub_train, name="here"):
        self.train, self.slots, self.jobs, self.asked = train, [Slot(name, name)], {}, []

    def free(self): return [slot for slot in self.slots if slot not in self.jobs]

    def start(self, slot, job):
        self.jobs[slot] = job
        self.asked.append(job["parameters"])

    def wait(self, seconds):
        if not self.jobs: time.sleep(0.01)
        return [(slot, self._run(self.jobs.pop(slot)), False) for slot in list(self.jobs)]

    def _run(self, job):
        try: run_batch(plan_from_parameters(job["study"], job["parameters"]), self.train)
        except SpeedrunError as error: return str(error)

    def close(self): pass


def drive(file, outputs, engine=None):
    "A sweep in this process, run to its end."
    found = Drive(read_sweep(file), outputs, engine or InProcess())
    found.run()
    return found


def cells_of(file): return {cell for batch in plan_batches(read_sweep(file)) for cell in batch.cells}


def each_once(file): return dict.fromkeys(cells_of(file), 1)


@pytest.fixture
def file(tmp_path, clean_environment):
    "A sweep of two conditions, two seeds each."
    return write_sweep(tmp_path)


@pytest.fixture
def outputs(tmp_path): return tmp_path / "outputs"


@pytest.fixture
def swept(tmp_path):
    "Start sweeps in a project whose notebook trains nothing; none outlives the test."
    def start(seeds="0:2", variants=("baseline", "det_crop"), seconds=0.3, before="", **more):
        project = tmp_path / "project"
        if not project.exists(): stub_project(project, seconds, before)
        file, log = write_sweep(tmp_path, seeds, variants, **more), tmp_path / "driver.log"
        outputs = tmp_path / "outputs"
        log.write_text("")
        process = start_sweep(file, outputs, tmp_path / "driver", project)
        return SimpleNamespace(process=process, file=file, outputs=outputs, log=log)
    yield start
    kill_all(tmp_path)


def ended(sweep, seconds=120):
    "The exit code of a sweep, which leaves no process, no lease and no device held."
    code = sweep.process.wait(seconds)
    assert wait_for(lambda: not processes(sweep.log.parent), 10, 0.1), "processes are left"
    assert not leases(sweep.outputs) and not is_held(sweep.log.parent / "driver")
    return code


# kill -9

def test_three_rounds_of_faults(tmp_path):
    results = faults.run_rounds(3, SEED, tmp_path, sizes=("0:2",), variants=("baseline",), strikes=(1,))
    assert [result["violations"] for result in results] == [[], [], []]
    assert [result["records"]["completed"] for result in results] == [2, 2, 2]
    assert faults.summary(results, SEED)["killed"] == dict(driver=1, kernel=1, worker=1)


def test_the_faults_have_a_command_line(tmp_path):
    done = call(sys.executable, ROOT / "tests/faults.py", "--help")
    assert done.code == 0 and "--rounds" in done.out and "--seed" in done.out


def test_a_round_notices_what_it_is_to_notice(tmp_path):
    one = faults.Round(tmp_path / "round", random.Random(0), "0:2", ("baseline",), stub=True)
    drive(one.file, one.outputs)
    one.check()
    assert one.wrong == []
    path, = one.outputs.glob("*/*/*/*/runs.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))                       # a cell twice
    (one.outputs / "sweeps/claims/cifar/cell.0").write_text("{}")      # a lease is left
    one.check()
    twice, left = one.wrong
    assert f"cell {json.loads(lines[0])['run_id']} has 2 completed" in twice and "leases that nobody holds" in left
    path.write_text(lines[0])                                          # a record is lost
    one.check()
    assert one.wrong[2].endswith("lost lines") and "has 0 completed" in one.wrong[3]


# what a notebook does

def test_a_notebook_that_raises_and_a_kernel_that_dies(swept):
    before = ('if variant == "det_crop": raise RuntimeError("no such thing")\n'
              'if variant == "det_crop_backoff": os.kill(os.getpid(), signal.SIGKILL)')
    variants = ("det_crop", "det_crop_backoff", "baseline")
    sweep = swept("0:1", variants, settings='{"train.epochs": [4]}', before=before, retries=0)
    assert ended(sweep) == 1
    said, found = sweep.log.read_text(), {record["variant"]: record for record in records(sweep.outputs)}
    assert [found[name]["status"] for name in variants] == ["failed", "failed", "completed"] and len(found) == 3
    assert "RuntimeError: no such thing" in found["det_crop"]["error"]
    assert "the kernel died" in found["det_crop_backoff"]["error"]
    assert re.search(r"2 run.* failed", said) and "no such thing" in said and "the kernel died" in said


def test_a_kernel_that_hangs(swept):
    before = ('def _train(settings, seeds):\n'
              '    yield Ready("cpu", "fp32", 1, 0.1, {})\n'
              '    os.kill(os.getpid(), signal.SIGSTOP)')
    sweep = swept("0:1", before=before, retries=0, hours_per_batch=0.0015)
    assert ended(sweep) == 1
    found = sorted(records(sweep.outputs), key=lambda record: record["variant"])
    assert [record["variant"] for record in found] == ["baseline", "det_crop"]
    assert {(record["seed"], record["status"]) for record in found} == {(0, "failed")}
    assert all("ended after 0.0015 h (hours_per_batch)" in record["error"] for record in found)
    assert "hours_per_batch" in sweep.log.read_text()
    folders = [path.parent for path in sweep.outputs.glob("*/*/*/*/runs.jsonl")]
    assert {read_provenance(folder)["status"] for folder in folders} == {"failed"}
    assert drive(sweep.file, sweep.outputs).cells.done.keys() == cells_of(sweep.file)


# Ctrl-C

def test_interrupted_once_and_twice(swept):
    options = dict(seeds="0:6", variants=("baseline",), seeds_per_batch=6, seconds=0.5)
    first = swept(**options)
    assert wait_for(lambda: completed(first.outputs), 60)
    first.process.send_signal(signal.SIGINT)
    assert ended(first) == 130
    done = completed(first.outputs)
    assert 1 <= len(done) < 6 and len(records(first.outputs)) == len(done)  # the run in hand was finished, none began
    second = swept(**options)
    assert wait_for(lambda: len(completed(second.outputs)) > len(done), 60)
    before = len(completed(second.outputs))
    second.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    second.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert ended(second) == 130 and time.monotonic() - began < 10
    kept = completed(second.outputs)
    assert before <= len(kept) <= before + 1 and kept.keys() > done.keys() and len(kept) < 6
    assert not drive(first.file, first.outputs).failed and completed(first.outputs) == each_once(first.file)


# sharing

@pytest.mark.parametrize("count", [2, 4])
def test_sweeps_on_one_folder_share_the_work(file, tmp_path, outputs, count):
    file, engines = write_sweep(tmp_path, "0:12"), [InProcess(name=f"host{number}") for number in range(count)]
    chance = random.Random(0)

    def slow(settings, seeds):
        for event in stub_train(settings, seeds):
            time.sleep(chance.random() / 100)
            yield event

    for engine in engines: engine.train = slow
    drives = [threading.Thread(target=drive, args=(file, outputs, engine)) for engine in engines]
    for each in drives: each.start()
    for each in drives: each.join()
    assert completed(outputs) == each_once(file) and not leases(outputs)
    assert all(engine.asked for engine in engines) and sum(len(engine.asked) for engine in engines) == 12


# between one step and the next

def given_up(plan): give_up(plan.folder, "its sweep died; another took over")


MOMENTS = [("before it began", 0), ("before it was ready", 0), ("before a run ended", 0), ("after a run", 1)]


@pytest.mark.parametrize("moment, kept", MOMENTS)
def test_a_batch_that_was_given_up_records_nothing_more(clean_environment, outputs, moment, kept):
    plan = plan_batch("cifar", seeds=2, profile="demo", outputs=outputs)

    def train(settings, seeds):
        if moment == "before it was ready": given_up(plan)
        yield Ready("cpu", "fp32", 1, 0.1, {})
        for number, event in enumerate(list(stub_train(settings, seeds))[1:]):
            if (moment, number) in (("before a run ended", 0), ("after a run", 1)): given_up(plan)
            yield event

    began = moment != "before it began"
    if not began: given_up(plan)
    with pytest.raises(SpeedrunError, match="another took over" if began else "holds a batch already"):
        run_batch(plan, train)
    found, known = read_batch(plan.folder)
    assert len(found) == kept and known["status"] in ("failed", "interrupted") and "another took over" in known["error"]


SLEEPER = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('ready', flush=True); time.sleep(60)"


def test_a_stopped_notebook_of_a_dead_sweep_is_ended(clean_environment, outputs):
    sleeper = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert sleeper.stdout.readline()
        sleeper.send_signal(signal.SIGSTOP)
        folder = outputs / "cifar/demo/baseline/old"
        folder.mkdir(parents=True)
        process = this_process() | dict(pid=sleeper.pid, pid_started=process_started(sleeper.pid))
        record_files.write_json(folder / "provenance.json", process | dict(status="running"))
        ours = Leases(outputs, "cifar", patience=0.4)
        assert ours.take(["a"], "cifar/demo/baseline/1") == {"a"}
        path = ours.all.current()["a"]
        path.write_text(json.dumps(this_process() | DEAD | dict(batch="cifar/demo/baseline/old")))
        other = Leases(outputs, "cifar", patience=0.4)
        assert other.take(["a"], "cifar/demo/baseline/2") == set()
        assert sleeper.poll() is None  # it might still wake up
        time.sleep(0.5)
        assert other.take(["a"], "cifar/demo/baseline/2") == {"a"}
        assert process_started(sleeper.pid) is None and read_provenance(folder)["status"] == "interrupted"
        other.close()
        ours.close()
    finally:
        with suppress(ProcessLookupError): os.killpg(sleeper.pid, signal.SIGKILL)


def test_a_sweep_that_died_after_its_last_record_leaves_no_lease(file, outputs):
    drive(file, outputs)
    dead, cell = Leases(outputs, "cifar"), next(iter(cells_of(file)))
    dead.take([cell], "cifar/demo/baseline/none")
    path = dead.all.current()[cell]
    path.write_text(json.dumps(json.loads(path.read_text()) | DEAD))
    assert not drive(file, outputs).engine.asked and not leases(outputs)


def test_a_half_written_line_costs_no_other(clean_environment, outputs):
    plan = plan_batch("cifar", seeds=2, profile="demo", outputs=outputs)
    run_batch(plan, stub_train)
    path = plan.folder / "runs.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1][:100])  # killed while it wrote
    running = read_provenance(plan.folder) | dict(status="running")
    record_files.write_json(plan.folder / "provenance.json", running)
    record_failure(plan, "the kernel died")
    found, problems = read_records(path)
    assert [(record["seed"], record["status"]) for record in found] == [(0, "completed"), (1, "failed")]
    assert len(problems) == 1 and path.read_bytes().startswith(whole[0])


def test_a_device_that_is_not_used_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    first, second = LocalEngine([()]), LocalEngine([()])
    assert first.free() and not second.free()
    first.wait(0)
    assert second.free()
    first.close()
    second.close()


# disks and folders

@contextmanager
def full(monkeypatch, name, after, module=os):
    "From the call after so many, a function of the system finds the disk full."
    real, calls = getattr(module, name), []

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) > after: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, fails)
        yield


def test_full_disk_while_recording(file, outputs, monkeypatch):
    with full(monkeypatch, "fsync", 6):
        stuck = drive(file, outputs)
    assert stuck.failed
    assert all(str(outputs) in why and "No space left on device" in why for why in stuck.failed.values())
    before = faults.snapshot(outputs)
    kept = completed(outputs)
    assert kept and set(kept.values()) == {1}
    again = drive(file, outputs)
    assert not again.failed and completed(outputs) == each_once(file) and not leases(outputs)
    assert all(path.read_bytes().startswith(data) for path, data in before.items())


def test_full_disk_while_taking_leases(file, outputs, monkeypatch):
    message = f"{outputs}/sweeps/claims/cifar cannot be written .No space left on device.*--outputs"
    with full(monkeypatch, "link", 1), pytest.raises(SpeedrunError, match=message): drive(file, outputs)
    assert not leases(outputs)
    assert completed(drive(file, outputs).outputs) == each_once(file)


def test_full_disk_while_taking_leases_lets_go_on_what_runs(tmp_path, file, outputs, monkeypatch):
    class Slow(InProcess):
        "The first batch still runs when the second is to be taken."
        waits = 0

        def wait(self, seconds):
            self.waits += 1
            return super().wait(seconds) if self.waits > 1 else []

    engine = Slow()
    engine.slots = [Slot("a", "here"), Slot("b", "here")]
    with full(monkeypatch, "link", 2), pytest.raises(SpeedrunError, match="no lease can be taken"):
        drive(file, outputs, engine)
    assert len(engine.asked) == 1 and len(completed(outputs)) == 2 and not leases(outputs)


def test_full_disk_before_the_plan_is_frozen(file, outputs, monkeypatch):
    message = f"{outputs}/sweeps/small-.*cannot be written .No space left on device"
    with full(monkeypatch, "fsync", 0), pytest.raises(SpeedrunError, match=message): drive(file, outputs)
    assert not list(outputs.rglob("*.*")), "temporary files are left"


def test_a_disk_that_is_really_full(swept, tmp_path):
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", outputs], capture_output=True)
    if mounted.returncode: pytest.skip("no file system can be mounted here")
    try:
        filler = outputs / "filler"
        sweep = swept("0:2", seconds=1)
        assert wait_for(lambda: completed(sweep.outputs), 60)
        with suppress_full(), open(filler, "wb", buffering=0) as file:
            while True: file.write(bytes(4096))
        code, said = sweep.process.wait(120), sweep.log.read_text()
        assert code == 1 and "Traceback" not in said and completed(outputs)
        assert "No space left on device" in said and str(outputs) in said
        filler.unlink()
        assert not drive(sweep.file, outputs).failed and not leases(outputs)
        assert completed(outputs) == each_once(sweep.file)
    finally:
        kill_all(tmp_path)
        subprocess.run(["umount", outputs], check=True)


@contextmanager
def suppress_full():
    try: yield
    except OSError as error:
        if error.errno != errno.ENOSPC: raise


def test_a_file_in_place_of_a_folder(file, outputs, speedrun):
    outputs.write_text("a file")
    done = speedrun("sweep", file, "--outputs", outputs)
    assert done.code == 1 and "cannot be written" in done.err and str(outputs) in done.err
    outputs.unlink()
    (outputs / "cifar/demo").mkdir(parents=True)
    (outputs / "cifar/demo/det_crop").write_text("a file")
    found = drive(file, outputs)
    assert len(found.cells.done) == 2 and len(found.failed) == 2
    assert all(f"{outputs}/cifar/demo/det_crop" in why and "cannot be written" in why for why in found.failed.values())
    (outputs / "cifar/demo/det_crop").unlink()
    assert not drive(file, outputs).failed and completed(outputs) == each_once(file)


# clocks

def test_a_clock_that_jumps_backwards(tmp_path, file, outputs, monkeypatch, speedrun):
    file = write_sweep(tmp_path, "0:6", settings="{}")
    now, real = [1.9e9], time.time
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            now[0] -= 3600
            return cls.fromtimestamp(now[0], tz)

    with monkeypatch.context() as patched:
        patched.setattr(provenance, "datetime", SimpleNamespace(datetime=Clock, UTC=datetime.UTC))
        patched.setattr(time, "time", lambda: real() - (1.9e9 - now[0]))
        first = drive(file, outputs)
        dead = Leases(outputs, "cifar")
        assert not first.failed and dead.take(["other"], "cifar/demo/baseline/none") == {"other"}
        assert not Leases(outputs, "cifar").take(["other"], "cifar/demo/baseline/none2")  # who lives keeps what it has
        assert dead.take(["another"], "x")
        dead.close()
    assert not drive(file, outputs).engine.asked
    found = sorted(records(outputs), key=lambda record: record["order"])
    starts = [record["started_at"] for record in found]
    assert starts == sorted(starts, reverse=True)
    assert completed(outputs) == each_once(file)
    assert "det_crop" in speedrun("compare", "cifar", "baseline", "det_crop", "--outputs", outputs).out
    for words in (("audit", "cifar"), ("sweep", "status", file), ("ledger",)):
        assert speedrun(*words, "--outputs", outputs).code == 0

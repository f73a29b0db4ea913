"Sweeps under faults: whatever dies, hangs, fills up or is interrupted, nothing that was recorded is lost, nothing is run twice, and the rest goes on."
import datetime
import errno
import json
import os
import random
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
    claims,
    completed,
    is_held,
    kill_all,
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
from speedrun_nb.sweep.leases import Claims
from speedrun_nb.sweep.local import LocalEngine, Slot
from speedrun_nb.sweep.notebook import prepare
from speedrun_nb.sweep.plan import plan

SEED = 696  # of the three rounds: a worker, one of two drivers, and a kernel are killed
DEAD = dict(pid=2**22 + 1, pid_started=1)  # no process has this number


class InProcess:
    "An engine that runs batches in this process, while the sweep waits."
    def __init__(self, train=stub_train, name="here"): self.train, self.slots, self.jobs, self.asked = train, [Slot(name, name)], {}, []

    def free(self): return [slot for slot in self.slots if slot not in self.jobs]

    def start(self, slot, job):
        self.jobs[slot] = job
        self.asked.append(job["parameters"])

    def wait(self, seconds):
        if not self.jobs: time.sleep(0.01)
        return [(slot, self._run(self.jobs.pop(slot)), False) for slot in list(self.jobs)]

    def _run(self, job):
        try: run_batch(prepare(job["study"], job["parameters"]), self.train)
        except SpeedrunError as error: return str(error)

    def close(self): pass


def drive(file, outputs, engine=None):
    "A sweep in this process, run to its end."
    lines = []
    found = Drive(read_sweep(file), outputs, engine or InProcess(), show=lambda drive, line: line and lines.append(line))
    found.run()
    found.lines = lines
    return found


def cells_of(file): return {cell for batch in plan(read_sweep(file)) for cell in batch.cells}


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
        log.write_text("")
        return SimpleNamespace(process=start_sweep(file, tmp_path / "outputs", tmp_path / "driver", project), file=file, outputs=tmp_path / "outputs", log=log)
    yield start
    kill_all(tmp_path)


def ended(sweep, seconds=120):
    "The exit code of a sweep, which leaves no process, no claim and no device held."
    code = sweep.process.wait(seconds)
    assert wait_for(lambda: not processes(sweep.log.parent), 10, 0.1), "processes are left"
    assert not claims(sweep.outputs) and not is_held(sweep.log.parent / "driver")
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
    (one.outputs / "sweeps/claims/cifar/cell.0").write_text("{}")      # a claim is left
    one.check()
    assert [words[:21] for words in one.wrong] == [f"cell {json.loads(lines[0])['run_id']}", "claims that nobody ho"] and "has 2 completed" in one.wrong[0]
    path.write_text(lines[0])                                          # a record is lost
    one.check()
    assert one.wrong[2].endswith("lost lines") and "has 0 completed" in one.wrong[3]


# what a notebook does

def test_a_notebook_that_raises_and_a_kernel_that_dies(swept):
    before = 'if variant == "det_crop": raise RuntimeError("no such thing")\nif variant == "det_crop_backoff": os.kill(os.getpid(), signal.SIGKILL)'
    sweep = swept("0:1", ("det_crop", "det_crop_backoff", "baseline"), settings='{"train.epochs": [4]}', before=before, retries=0)
    assert ended(sweep) == 1
    said, found = sweep.log.read_text(), {record["variant"]: record for record in records(sweep.outputs)}
    assert {name: record["status"] for name, record in found.items()} == dict(det_crop="failed", det_crop_backoff="failed", baseline="completed")
    assert "RuntimeError: no such thing" in found["det_crop"]["error"] and "the kernel died" in found["det_crop_backoff"]["error"]
    assert "2 run(s) failed" in said and "no such thing" in said and "the kernel died" in said


def test_a_kernel_that_hangs(swept):
    before = 'def _train(settings, seeds):\n    yield Ready("cpu", "fp32", 1, 0.1, {})\n    os.kill(os.getpid(), signal.SIGSTOP)'
    sweep = swept("0:1", before=before, retries=0, hours_per_batch=0.0015)
    assert ended(sweep) == 1
    found = records(sweep.outputs)
    assert sorted((record["variant"], record["seed"], record["status"]) for record in found) == [("baseline", 0, "failed"), ("det_crop", 0, "failed")]
    assert all("the batch was ended after 0.0015 h (hours_per_batch)" in record["error"] for record in found) and "hours_per_batch" in sweep.log.read_text()
    assert {read_provenance(path.parent)["status"] for path in sweep.outputs.glob("*/*/*/*/runs.jsonl")} == {"failed"}
    assert drive(sweep.file, sweep.outputs).cells.done.keys() == cells_of(sweep.file)


# Ctrl-C

def test_interrupted_once_and_twice(swept):
    options = dict(seeds="0:6", variants=("baseline",), seeds_per_batch=6, seconds=0.5)
    first = swept(**options)
    assert wait_for(lambda: completed(first.outputs), 60)
    first.process.send_signal(signal.SIGINT)
    assert ended(first) == 130
    done = completed(first.outputs)
    assert 1 <= len(done) < 6 and len(records(first.outputs)) == len(done)  # the run in hand was finished, and no other begun
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
    assert not drive(first.file, first.outputs).failed and completed(first.outputs) == dict.fromkeys(cells_of(first.file), 1)


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
    assert completed(outputs) == dict.fromkeys(cells_of(file), 1) and not claims(outputs)
    assert all(engine.asked for engine in engines) and sum(len(engine.asked) for engine in engines) == 12


# between one step and the next

def given_up(plan): give_up(plan.folder, "its sweep died; another took over")


@pytest.mark.parametrize("moment, kept", [("before it began", 0), ("before it was ready", 0), ("before a run ended", 0), ("after a run", 1)])
def test_a_batch_that_was_given_up_records_nothing_more(clean_environment, outputs, moment, kept):
    plan = plan_batch("cifar", seeds=2, profile="demo", outputs=outputs)

    def train(settings, seeds):
        if moment == "before it was ready": given_up(plan)
        yield Ready("cpu", "fp32", 1, 0.1, {})
        for number, event in enumerate(list(stub_train(settings, seeds))[1:]):
            if (moment, number) in (("before a run ended", 0), ("after a run", 1)): given_up(plan)
            yield event

    if moment == "before it began": given_up(plan)
    with pytest.raises(SpeedrunError, match="holds a batch already" if moment == "before it began" else "another took over"): run_batch(plan, train)
    found, known = read_batch(plan.folder)
    assert len(found) == kept and known["status"] in ("failed", "interrupted") and "another took over" in known["error"]


def test_a_stopped_notebook_of_a_dead_sweep_is_ended(clean_environment, outputs):
    sleeper = subprocess.Popen([sys.executable, "-c", "import subprocess, time; subprocess.Popen(['sleep', '60']); print('ready', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert sleeper.stdout.readline()
        sleeper.send_signal(signal.SIGSTOP)
        folder = outputs / "cifar/demo/baseline/old"
        folder.mkdir(parents=True)
        record_files.write_json(folder / "provenance.json", this_process() | dict(status="running", pid=sleeper.pid, pid_started=process_started(sleeper.pid)))
        ours = Claims(outputs, "cifar", patience=0.4)
        assert ours.take(["a"], "cifar/demo/baseline/1") == {"a"}
        path = ours.current()["a"]
        path.write_text(json.dumps(this_process() | DEAD | dict(batch="cifar/demo/baseline/old")))
        other = Claims(outputs, "cifar", patience=0.4)
        assert other.take(["a"], "cifar/demo/baseline/2") == set() and sleeper.poll() is None  # it might still wake up
        time.sleep(0.5)
        assert other.take(["a"], "cifar/demo/baseline/2") == {"a"}
        assert process_started(sleeper.pid) is None and read_provenance(folder)["status"] == "interrupted"
        other.close()
        ours.close()
    finally:
        with suppress(ProcessLookupError): os.killpg(sleeper.pid, signal.SIGKILL)


def test_a_sweep_that_died_after_its_last_record_leaves_no_claim(file, outputs):
    drive(file, outputs)
    dead = Claims(outputs, "cifar")
    cell = next(iter(cells_of(file)))
    dead.take([cell], "cifar/demo/baseline/none")
    path = dead.current()[cell]
    path.write_text(json.dumps(json.loads(path.read_text()) | DEAD))
    assert not drive(file, outputs).engine.asked and not claims(outputs)


def test_a_half_written_line_costs_no_other(clean_environment, outputs):
    plan = plan_batch("cifar", seeds=2, profile="demo", outputs=outputs)
    run_batch(plan, stub_train)
    path = plan.folder / "runs.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1][:100])  # killed while it wrote
    record_files.write_json(plan.folder / "provenance.json", read_provenance(plan.folder) | dict(status="running"))
    record_failure(plan, "the kernel died")
    found, problems = read_records(path)
    assert [(record["seed"], record["status"]) for record in found] == [(0, "completed"), (1, "failed")] and len(problems) == 1 and path.read_bytes().startswith(whole[0])


def test_a_device_that_is_not_used_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
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
    assert stuck.failed and all(str(outputs) in why and "No space left on device" in why for why in stuck.failed.values())
    before = faults.snapshot(outputs)
    kept = completed(outputs)
    assert kept and set(kept.values()) == {1}
    again = drive(file, outputs)
    assert not again.failed and completed(outputs) == dict.fromkeys(cells_of(file), 1) and all(path.read_bytes().startswith(data) for path, data in before.items()) and not claims(outputs)


def test_full_disk_while_claiming(file, outputs, monkeypatch):
    with full(monkeypatch, "link", 1), pytest.raises(SpeedrunError, match=f"{outputs}/sweeps/claims/cifar cannot be written .No space left on device.*--outputs"): drive(file, outputs)
    assert not claims(outputs)
    assert completed(drive(file, outputs).outputs) == dict.fromkeys(cells_of(file), 1)


def test_full_disk_while_claiming_lets_go_on_what_runs(tmp_path, file, outputs, monkeypatch):
    class Slow(InProcess):
        "The first batch still runs when the second is to be claimed."
        waits = 0

        def wait(self, seconds):
            self.waits += 1
            return super().wait(seconds) if self.waits > 1 else []

    engine = Slow()
    engine.slots = [Slot("a", "here"), Slot("b", "here")]
    with full(monkeypatch, "link", 2), pytest.raises(SpeedrunError, match="no cell can be claimed"): drive(file, outputs, engine)
    assert len(engine.asked) == 1 and len(completed(outputs)) == 2 and not claims(outputs)


def test_full_disk_before_the_plan_is_frozen(file, outputs, monkeypatch):
    with full(monkeypatch, "fsync", 0), pytest.raises(SpeedrunError, match=f"{outputs}/sweeps/small-.*cannot be written .No space left on device"): drive(file, outputs)
    assert not list(outputs.rglob("*.*")), "temporary files are left"


def test_a_disk_that_is_really_full(swept, tmp_path):
    (tmp_path / "outputs").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path / "outputs"], capture_output=True).returncode: pytest.skip("no file system can be mounted here")
    try:
        filler = tmp_path / "outputs/filler"
        sweep = swept("0:2", seconds=1)
        assert wait_for(lambda: completed(sweep.outputs), 60)
        with suppress_full(), open(filler, "wb", buffering=0) as file:
            while True: file.write(bytes(4096))
        code, said = sweep.process.wait(120), sweep.log.read_text()
        kept = completed(sweep.outputs)
        assert code == 1 and "Traceback" not in said and "No space left on device" in said and str(sweep.outputs) in said and kept
        filler.unlink()
        assert not drive(sweep.file, sweep.outputs).failed and not claims(sweep.outputs) and completed(sweep.outputs) == dict.fromkeys(cells_of(sweep.file), 1)
    finally:
        kill_all(tmp_path)
        subprocess.run(["umount", tmp_path / "outputs"], check=True)


@contextmanager
def suppress_full():
    try: yield
    except OSError as error:
        if error.errno != errno.ENOSPC: raise


def test_a_file_in_place_of_a_folder(file, outputs, speedrun):
    outputs.write_text("a file")
    assert "cannot be written" in (done := speedrun("sweep", file, "--outputs", outputs)).err and str(outputs) in done.err and done.code == 1
    outputs.unlink()
    (outputs / "cifar/demo").mkdir(parents=True)
    (outputs / "cifar/demo/det_crop").write_text("a file")
    found = drive(file, outputs)
    assert len(found.cells.done) == 2 and len(found.failed) == 2 and all(f"{outputs}/cifar/demo/det_crop" in why and "cannot be written" in why for why in found.failed.values())
    (outputs / "cifar/demo/det_crop").unlink()
    assert not drive(file, outputs).failed and completed(outputs) == dict.fromkeys(cells_of(file), 1)


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
        dead = Claims(outputs, "cifar")
        assert not first.failed and dead.take(["other"], "cifar/demo/baseline/none") == {"other"}
        assert not Claims(outputs, "cifar").take(["other"], "cifar/demo/baseline/none2") and dead.take(["another"], "x")  # whoever lives keeps what it has, whatever the clock
        dead.close()
    assert not drive(file, outputs).engine.asked
    found = sorted(records(outputs), key=lambda record: record["order"])
    assert [record["started_at"] for record in found] == sorted((record["started_at"] for record in found), reverse=True)
    assert completed(outputs) == dict.fromkeys(cells_of(file), 1)
    assert "det_crop" in speedrun("compare", "cifar", "baseline", "det_crop", "--outputs", outputs).out
    assert speedrun("audit", "cifar", "--outputs", outputs).code == speedrun("sweep", "status", file, "--outputs", outputs).code == speedrun("ledger", "--outputs", outputs).code == 0

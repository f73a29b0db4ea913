"""Kernels that are forked: each batch has a process of its own that knows nothing of the others, computes the same bits
as an ordinary one, and ends with its worker; where no fork can be had the batch runs all the same."""
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import papermill
import psutil
import pytest
from conftest import BIN, ROOT, TINY, batch_folders, call, environment, read_batch
from faults import kill_all, processes, records, start_sweep, stub_project, wait_for, write_sweep

from speedrun_nb.core import forks
from speedrun_nb.core.forks import Forker, can_fork
from speedrun_nb.core.provenance import read_provenance
from speedrun_nb.sweep import notebook
from speedrun_nb.sweep.kernel import Kernels

pytestmark = pytest.mark.skipif(not can_fork(), reason="this system does not fork safely")


@contextmanager
def worker(folder):
    "A worker, and a function that gives it a batch: its records and provenance, or the error."
    command = [sys.executable, "-m", "speedrun_nb.sweep.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                          env=environment(), start_new_session=True) as process:
        assert json.loads(process.stdout.readline()) == {"ready": True}

        def run(name, study="cifar", **more):
            parameters = dict(profile="demo", overrides=TINY, seeds=1, outputs=str(folder), batch=name) | more
            print(json.dumps({"study": study, "parameters": parameters}), file=process.stdin, flush=True)
            error = json.loads(process.stdout.readline())["error"]
            return error or read_batch(next(path for path in batch_folders(folder) if path.name == name))

        try: yield process, run
        finally: process.stdin.close()


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    "Three batches of one worker, the last of another block, and one by `speedrun run`."
    outputs = tmp_path_factory.mktemp("kernels")
    with worker(outputs) as (_, run):
        found = {name: run(name, block=block) for name, block in (("a", 0), ("b", 0), ("c", 1))}
    words = dict(profile="demo", overrides=json.dumps(TINY), seeds=1, outputs=outputs, batch="single")
    done = call(BIN / "speedrun", "run", "cifar", *(word for pair in words.items() for word in ("-p", *pair)))
    assert done.code == 0, done.err
    single, = (path for path in batch_folders(outputs) if path.name == "single")
    return found | {"single": read_batch(single)}, done


def test_each_batch_has_a_process_of_its_own(batches):
    provenances = {name: provenance for name, (_, provenance) in batches[0].items()}
    assert len({provenance["pid"] for provenance in provenances.values()}) == 4
    assert [provenances[name]["process"] for name in ("a", "b", "c", "single")] == ["forked"] * 3 + ["new"]
    assert not any("not_forked" in provenance for provenance in provenances.values())


def test_the_same_seed_gives_the_same_bits(batches):
    runs = [records[0] for records, _ in batches[0].values()]
    assert len({run["fingerprint"] for run in runs}) == 1 and runs[0]["fingerprint"]
    assert all(run["curve"]["train_loss"] == runs[0]["curve"]["train_loss"] for run in runs)
    assert {(run["threads"], run["precision"]) for run in runs} == {(1, runs[0]["precision"])}


def test_a_batch_that_went_well_reports_no_interrupt(batches):
    assert "KeyboardInterrupt" not in batches[1].err


# freshness

SEEN = "import json, os, sys, random, numpy, torch\n"
CHANGE = "json.seen = 1; torch.manual_seed(7); torch.set_num_threads(3); os.environ['SEEN'] = '1'"
LOOK = ("print(json.dumps(dict(pid=os.getpid(), seen=hasattr(json, 'seen'), environment='SEEN' in os.environ, "
        "torch=torch.initial_seed(), threads=torch.get_num_threads(), python=random.random(), "
        "numpy=numpy.random.random(), main=sorted(set(globals()) & {'CHANGED'}))))")


def look(kernel, folder, name):
    "What a notebook sees when it begins; it then changes what it can."
    import nbformat

    from speedrun_nb.sweep.executing import ENGINE
    cells = [nbformat.v4.new_code_cell(code) for code in (SEEN + LOOK, f"CHANGED = 1; {CHANGE}")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    done = papermill.execute_notebook(folder / f"{name}.ipynb", folder / f"{name}-out.ipynb", kernel_name="python3",
                                      progress_bar=False, engine_name=ENGINE, batch_kernel=kernel)
    return json.loads(done.cells[0].outputs[0].text)


def test_a_batch_sees_nothing_of_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kernels = Kernels()
    try: first, second = (look(kernels.for_batch("cifar", {}), tmp_path, name) for name in "ab")
    finally: kernels.close()
    ordinary = look(None, tmp_path, "c")
    own = ("pid", "python", "numpy", "torch")
    assert all(len({seen[name] for seen in (first, second, ordinary)}) == 3 for name in own)
    alike = [{name: value for name, value in seen.items() if name not in own} for seen in (first, second, ordinary)]
    assert alike[0] == alike[1] == alike[2] and not alike[0]["seen"] and alike[0]["threads"] == 1


def test_changed_code_is_loaded_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    code, forker = tmp_path / "changing.py", Forker([])

    def said():
        process = forker.fork("changing:say", [str(tmp_path / "said")], modules=["changing"])
        assert process.wait(20) == 0
        return (tmp_path / "said").read_text(), forker.parent.process.pid

    try:
        found = []
        for word in ("first", "first", "second"):
            if not code.exists() or word not in code.read_text():
                code.write_text(f"def say(path): open(path, 'w').write('{word}{'!' * len(found)}')\n")
            found.append(said())
    finally: forker.close()
    (one, parent), (two, same), (three, another) = found
    assert (one, two, three) == ("first", "first", "second!!") and parent == same != another


# ends

def test_it_ends_with_its_worker(tmp_path):
    with worker(tmp_path) as (process, _):
        parameters = dict(profile="demo", overrides=TINY, seeds="0:100", outputs=str(tmp_path))
        job = {"study": "cifar", "parameters": parameters}
        print(json.dumps(job), file=process.stdin, flush=True)
        assert wait_for(lambda: list(tmp_path.glob("*/*/*/*/runs.jsonl")), 120, 0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        assert {child.name() for child in family} >= {"forks-batches", "batch-kernel"}
        process.kill()
        psutil.wait_procs(family, timeout=10)
        assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


# several processes

GPT = {"model.layers": 2, "model.width": 24, "model.heads": 2, "data.sequence_length": 16, "train.batch_size": 8,
       "train.device_batch_size": 2, "train.iterations": 14, "train.precision": "fp32",
       "schedule.warmdown_iterations": 4, "evaluation.every": 5, "evaluation.tokens": 256}


def family_of(pid, name):
    "Descendants of a process that have a name."
    return [child for child in psutil.Process(pid).children(recursive=True) if child.name() == name]


def test_torchrun_and_its_processes_are_forked(tmp_path):
    words = dict(profile="demo", overrides=json.dumps(GPT), seeds=1, outputs=tmp_path, batch="plain")
    plain = call(sys.executable, "-m", "speedrun_nb.gpt", *(word for pair in words.items() for word in ("-p", *pair)))
    assert plain.code == 0, plain.err
    with worker(tmp_path) as (process, run):
        seen, watch = [], threading.Event()

        def look_on():
            while not watch.wait(0.05):
                with suppress(psutil.Error): seen.append(len(family_of(process.pid, "gpt-process")))

        threading.Thread(target=look_on, daemon=True).start()
        records, provenance = run("forked", "gpt", overrides=GPT)
        watch.set()
        assert not family_of(process.pid, "gpt-process") and not family_of(process.pid, "torchrun")
    ordinary = read_batch(next(path for path in batch_folders(tmp_path) if path.name == "plain"))[0]
    assert max(seen) == 2 and provenance["process"] == "forked" and records[0]["ranks"] == 2
    for name in ("fingerprint", "threads", "tokens", "compiled"): assert records[0][name] == ordinary[0][name]
    assert records[0]["curve"]["val_loss"] == ordinary[0]["curve"]["val_loss"]


def test_a_process_that_is_killed_fails_its_run(tmp_path):
    with worker(tmp_path) as (process, run):
        def strike():
            assert wait_for(lambda: list(tmp_path.glob("gpt/*/*/*/runs.jsonl")), 120, 0.05)
            family_of(process.pid, "gpt-process")[1].kill()

        striker = threading.Thread(target=strike)
        striker.start()
        error = run("struck", "gpt", overrides=GPT | {"train.iterations": 100}, seeds=5)
        striker.join()
        assert "1 of 5 runs failed" in error and "ended by SIGKILL" in error
    found, _ = read_batch(batch_folders(tmp_path)[0])
    assert sorted(record["status"] for record in found) == ["completed"] * 4 + ["failed"]


def test_processes_end_with_the_worker(tmp_path):
    with worker(tmp_path) as (process, _):
        parameters = dict(profile="demo", overrides=GPT | {"train.iterations": 10**6}, outputs=str(tmp_path))
        print(json.dumps({"study": "gpt", "parameters": parameters}), file=process.stdin, flush=True)
        assert wait_for(lambda: len(family_of(process.pid, "gpt-process")) == 2, 120, 0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        psutil.wait_procs(family, timeout=15)
        assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


# a parent that fails

@pytest.fixture
def swept(tmp_path):
    "A sweep whose notebook trains nothing and whose parent of kernels is broken as told."
    def start(before, seeds="0:2", **more):
        project = stub_project(tmp_path / "project", 0.3, before)
        file = write_sweep(tmp_path, seeds, ("baseline",), **more)
        return start_sweep(file, tmp_path / "outputs", tmp_path / "driver", project), tmp_path / "outputs"
    yield start
    kill_all(tmp_path)


KILL = """
if not os.path.exists("killed"):
    open("killed", "w").close()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
"""


def test_a_parent_that_is_killed_costs_one_batch(swept, tmp_path):
    sweep, outputs = swept(KILL, "0:4")
    assert sweep.wait(180) == 0
    failed, *others = sorted(records(outputs), key=lambda record: record["started_at"])
    assert failed["status"] == "failed" and "the kernel died" in failed["error"]
    assert sorted((run["seed"], run["status"]) for run in others) == [(seed, "completed") for seed in range(4)]
    known = [read_provenance(path) for path in batch_folders(outputs)]
    assert [each["process"] for each in known if each["status"] == "completed"] == ["new"] * 2
    assert any("the process that forks has ended (code -9)" in each.get("not_forked", "") for each in known)
    assert wait_for(lambda: not processes(tmp_path), 10, 0.1)


# where no fork can be had

def test_without_forks_the_kernel_is_an_ordinary_one(tmp_path, monkeypatch, clean_environment):
    monkeypatch.setattr(forks, "can_fork", lambda: False)
    kernels = Kernels()
    kernels.prepare()
    kernel = kernels.for_batch("cifar", {})
    assert look(kernel, tmp_path, "a")["seen"] is False
    assert kernel.why_not == "this system does not fork safely" and kernels.forker.parent is None
    assert notebook._not_forked(kernel) == {"not_forked": "this system does not fork safely"}


THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"


@pytest.mark.parametrize("code, why", [
    (THREAD, "a module has started a thread"), ("raise ValueError('broken')", "ValueError: broken"),
    ("import os; os._exit(3)", "the process that forks has ended (code 3)")])
def test_a_module_that_cannot_be_shared(tmp_path, monkeypatch, code, why):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "unshared.py").write_text(code)
    forker = Forker([])
    began = time.monotonic()
    assert forker.fork("time:sleep", [0], modules=["unshared"]) is None and forker.failure == why
    assert forker.fork("time:sleep", [0]) is None and forker.parent is None  # it is not tried again
    assert time.monotonic() - began < 20

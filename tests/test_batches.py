"Batches from end to end: every way to train makes the same runs, and whatever happens, finished runs stay."
import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import (
    BIN,
    DEADLINE,
    NOTEBOOK,
    TINY,
    TINY_WORDS,
    batch_folders,
    call,
    copy_project,
    environment,
    finish,
    read_batch,
    start,
    strict_json,
    stub_train,
)

from speedrun_nb.cifar.data import load_cifar10, load_data
from speedrun_nb.cifar.settings import DATASETS, METRICS
from speedrun_nb.cifar.train import choose_precision, train, train_one
from speedrun_nb.core.batch import run_batch
from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.core.files import DataFile
from speedrun_nb.core.machine import host_id
from speedrun_nb.core.parameters import plan_batch
from speedrun_nb.core.progress import train_batch as train_from_command
from speedrun_nb.core.provenance import batch_state
from speedrun_nb.core.records import Result, run_id
from speedrun_nb.core.runs import read_runs
from speedrun_nb.core.study import load_study, study_names
from speedrun_nb.core.variants import profile_names, resolve, variant_names

RECORD = set("""schema run_id study profile variant config config_hash seed repeat batch sweep block order host_id
    device precision threads package_hash status error started_at ended_at time_seconds clock metrics curve
    peak_memory_bytes fingerprint""".split())
PROVENANCE = set("""git package_hash packages python os host_id cpu cpu_count gpus cuda study profile variant config
    seeds command data device precision threads warmup_seconds started_at ended_at status pid pid_started
    pid_namespace boot_id heartbeat_seconds""".split())
MODULE = [BIN / "python", "-m", "speedrun_nb.cifar"]
COMMAND = [BIN / "speedrun", "run", "cifar"]
TINY_RUN = ["-p", "profile", "demo", "-p", "overrides", TINY_WORDS]
MANY = 200  # runs of a batch that is still running when it is stopped


def computed(record):
    "What a run computed: everything that does not depend on when and where it ran."
    curve = record["curve"]
    identity = record["config_hash"], record["seed"], record["fingerprint"]
    quality = {name: record["metrics"][name] for name, metric in METRICS.items() if metric.quality}
    return *identity, quality, curve["train_loss"], curve["accuracy_plain"]


# the same batch by every way there is

@pytest.fixture(scope="session")
def ways(tmp_path_factory):
    "A folder, and the commands that train below it: all at once, which halves the time on two cores."
    folder = tmp_path_factory.mktemp("ways")
    projects = copy_project(folder / "pipe"), copy_project(folder / "test")
    (folder / "parameters.yaml").write_text(json.dumps({"overrides": TINY}))
    det_crop = ["-p", "variant", "det_crop"]
    numbers = ["-p", "seeds", 2, "-p", "repeat", 1, "-p", "block", 3, "-p", "order_start", 4]
    as_yaml = ["-f", "parameters.yaml", "-y", f"outputs: {folder / 'papermill'}\nprofile: demo"]
    piped = [*TINY_RUN, "-p", "seeds", "1:2", "-p", "outputs", "collected"]
    commanded = [*det_crop, *TINY_RUN, "-p", "seeds", "1,0", "-p", "outputs", folder / "command"]
    by_hand = [*det_crop, *TINY_RUN, "-p", "seeds", "0:2", "-p", "outputs", folder / "module"]
    running = dict(  # the first works outside of the project
        papermill=start(BIN / "papermill", NOTEBOOK, "out.ipynb", *det_crop, *numbers, *as_yaml, cwd=folder),
        pipe=start(BIN / "papermill", "run_cifar.ipynb", *piped, cwd=projects[0] / "nbs"),
        command=start(BIN / "speedrun", "run", "cifar", *commanded),
        module=start(*MODULE, *by_hand),
        nbdev=start(BIN / "nbdev_test", "--path", "nbs/run_cifar.ipynb", "--n_workers", 0, cwd=projects[1]))
    yield folder, running
    for process in running.values():
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish_well(process):
    done = finish(process)
    assert done.code == 0, done.out + done.err
    return done


@pytest.fixture(scope="session")
def by_papermill(ways):
    folder, running = ways
    done = finish_well(running["papermill"])
    batch, = batch_folders(folder / "papermill")
    return done, folder / "out.ipynb", batch, *read_batch(batch)


@pytest.fixture(scope="session")
def by_pipe(ways): return finish_well(ways[1]["pipe"]), ways[0] / "pipe"


@pytest.fixture(scope="session")
def by_command(ways):
    done = finish_well(ways[1]["command"])
    batch, = batch_folders(ways[0] / "command")
    return done, batch, *read_batch(batch)


@pytest.fixture(scope="session")
def by_module(ways):
    done = finish_well(ways[1]["module"])
    batch, = batch_folders(ways[0] / "module")
    return done, batch, *read_batch(batch)


def test_records(by_papermill):
    _, _, folder, records, provenance = by_papermill
    variant = resolve(load_study("cifar"), "det_crop", "demo", TINY)
    for number, record in enumerate(records):
        assert RECORD <= record.keys()
        expected = dict(schema=1, study="cifar", profile="demo", variant="det_crop", status="completed", error=None,
                        device="cpu", seed=number, repeat=1, block=3, order=4 + number, batch=folder.name, threads=1)
        assert {name: record[name] for name in expected} == expected
        assert record["config"] == json.loads(json.dumps(variant.flat)) and record["config_hash"] == variant.config_hash
        assert record["run_id"] == run_id("cifar", "demo", variant.config_hash, number, 1)
        assert record["clock"] == variant.study.clock
        assert record["host_id"] == host_id() and record["package_hash"] == provenance["package_hash"]
        assert record["precision"] in ("bf16", "fp32")
        assert all(0 <= record["metrics"][name] <= 1 for name in ("accuracy", "accuracy_plain"))
        assert record["time_seconds"] > 0
        assert all(len(values) == TINY["train.epochs"] for values in record["curve"].values())
        assert re.fullmatch(r"[0-9a-f]{12}", record["fingerprint"])
        assert (record["peak_memory_bytes"] is None or record["peak_memory_bytes"] > 2**26)
    assert len(records) == 2 and records[0]["fingerprint"] != records[1]["fingerprint"]
    times = [record[name] for record in records for name in ("started_at", "ended_at")]
    assert times == sorted(times) and all(time.endswith("+00:00") for time in times)


def test_provenance(by_papermill):
    _, _, folder, records, provenance = by_papermill
    assert PROVENANCE <= provenance.keys() and provenance["status"] == batch_state(folder) == "completed"
    assert provenance["seeds"] == [0, 1]
    assert provenance["started_at"] < records[0]["started_at"] < records[-1]["ended_at"] <= provenance["ended_at"]
    assert provenance["warmup_seconds"] > 0
    assert provenance["config"] == records[0]["config"] and provenance["overrides"] == TINY
    assert provenance["packages"].keys() >= {"speedrun_nb", "torch", "numpy", "papermill"}
    assert provenance["command"][0] == "run_cifar.ipynb"
    assert {"variant=det_crop", "seeds=2", "repeat=1"} <= set(provenance["command"])
    assert re.fullmatch("[0-9a-f]{64}", provenance["data"]["embedded"])
    assert sorted(path.name for path in folder.iterdir()) == ["provenance.json", "runs.jsonl"]  # nothing temporary


def test_provenance_names_the_commit(by_papermill):
    commit = call("git", "rev-parse", "HEAD")
    if commit.code: pytest.skip("not a git checkout")
    git = by_papermill[-1]["git"]
    assert git["commit"] == commit.out.strip() and isinstance(git["dirty"], bool)
    assert (git["diff_hash"] is not None) == git["dirty"]


def check_notebook(text):
    "An executed notebook: valid, without errors, with a plan, a table and a figure."
    notebook = nbformat.reads(text, 4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert "text/markdown" in shown and shown & {"image/png", "image/svg+xml"}
    assert "CIFAR-10: " in text and "records: " in text and "not with CIFAR-10" in text
    return notebook


def test_the_executed_notebook(by_papermill):
    check_notebook(by_papermill[1].read_text(encoding="utf-8"))


def test_papermill_knows_every_parameter(by_papermill):
    assert "unknown parameter" not in by_papermill[0].err and "Unable to parse" not in by_papermill[0].err


def test_the_notebook_on_standard_output(by_pipe):
    notebook = check_notebook(by_pipe[0].out)
    assert "injected-parameters" in [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]


def test_outputs_are_relative_to_the_project(by_pipe):
    project = by_pipe[1]
    folder, = batch_folders(project / "collected")
    assert folder.relative_to(project / "collected").parts[:3] == ("cifar", "demo", "baseline")
    assert not (project / "nbs/collected").exists()
    assert read_batch(folder)[1]["git"]["commit"] is None  # that copy is no checkout


def test_the_command_keeps_the_notebook_with_the_runs(by_command):
    done, folder, records, provenance = by_command
    check_notebook((folder / "notebook.ipynb").read_text(encoding="utf-8"))
    assert done.out.strip() == str(folder) and provenance["status"] == "completed"
    assert [record["seed"] for record in records] == [1, 0]


def test_the_command_says_where_the_records_will_be(by_command):
    done, folder, _, _ = by_command
    assert f"records: {folder}" in done.err and len(set(re.findall(r"records: (\S+)", done.err))) == 1


def test_every_way_computes_the_same(by_papermill, by_command, by_module, by_pipe):
    first, second = map(computed, by_module[2])
    assert [computed(record) for record in by_papermill[3]] == [first, second]
    assert [computed(record) for record in by_command[2]] == [second, first]  # neither does the order matter
    baseline, = read_batch(*batch_folders(by_pipe[1] / "collected"))[0]
    assert baseline["seed"] == 1 and baseline["fingerprint"] != second[2]


def test_a_replicate_is_another_run_of_the_same_cell(by_papermill, by_module):
    for replicate, run in zip(by_papermill[3], by_module[2], strict=True):
        assert replicate["repeat"] == 1 and run["repeat"] == 0 and replicate["run_id"] != run["run_id"]
        assert replicate["config_hash"] == run["config_hash"]


def test_the_module_says_where_the_runs_are(by_module):
    done, folder, _, provenance = by_module
    assert done.out.strip() == str(folder) and "det_crop seed 1: completed" in done.err
    assert provenance["command"][1:5] == ["-p", "variant", "det_crop", "-p"]


def test_read_back_as_one_frame(by_papermill):
    frame, problems = read_runs(by_papermill[2].parents[3])
    assert problems == [] and list(frame["seed"]) == [0, 1] and frame["accuracy"].between(0, 1).all()
    assert len(frame["config"][0]) == len(by_papermill[3][0]["config"])


# refused by the notebook

@pytest.mark.parametrize("arguments, expected", [
    (["-p", "varaint", "x"], 'there is no parameter "varaint". Did you mean "variant"?'),
    (["-y", "seeds: 10:20"], 'seeds: 620 may be a count, or 10:20 read as a number in base 60'),
    (["-p", "variant", "det_corp"], 'there is no variant of cifar "det_corp". Did you mean "det_crop"?')])
def test_the_notebook_refuses(tmp_path, arguments, expected):
    outputs = tmp_path / "outputs"
    done = call(BIN / "papermill", NOTEBOOK, tmp_path / "out.ipynb", *TINY_RUN, "-p", "outputs", outputs, *arguments)
    assert done.code != 0 and expected in done.err and not outputs.exists()
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert expected in "".join(output.get("evalue", "") for output in outputs)


def test_a_notebook_that_fails_is_kept(tmp_path):
    outputs = tmp_path / "outputs"
    words = ["-p", "profile", "demo", "-p", "overrides", f"{TINY_WORDS} train.precision=fp16", "-p", "outputs", outputs]
    done = call(BIN / "speedrun", "run", "cifar", *words)
    folder, = batch_folders(outputs)
    assert done.code == 1 and done.out == "" and "error: train.precision: fp16 needs CUDA" in done.err
    assert str(folder / "notebook.ipynb") in done.err and "Traceback" not in done.err
    assert "fp16 needs CUDA" in (folder / "notebook.ipynb").read_text() and read_batch(folder)[1]["status"] == "failed"


def test_under_nbdev_test_nothing_is_left(ways):
    done, project = finish_well(ways[1]["nbdev"]), ways[0] / "test"
    assert "Success" in done.out
    assert sorted(path.name for path in project.iterdir()) == ["nbs", "params", "settings.ini"]


# stopped in mid-batch

def wait_for_run(process, outputs):
    "The batch's folder, once it has a finished run."
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        for path in outputs.glob("*/*/*/*/runs.jsonl"):
            if path.read_bytes().endswith(b"\n"): return path.parent
        if process.poll() is not None: break
        time.sleep(0.05)
    raise AssertionError(f"no run was finished: {finish(process, 1).err}")


def wait_until_gone(pid):
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        try: os.kill(pid, 0)
        except ProcessLookupError: return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)  # a kernel that this test started
    raise AssertionError(f"process {pid} went on")


def stop(command, number, tmp_path_factory, whom="command"):
    "Send a signal to a batch, or to its kernel, after its first run: how it ended, its folder, how many runs it had."
    outputs = tmp_path_factory.mktemp("stopped") / "outputs"
    process = start(*command, *TINY_RUN, "-p", "seeds", f"0:{MANY}", "-p", "outputs", outputs)
    try:
        folder = wait_for_run(process, outputs)
        trainer = read_batch(folder)[1]["pid"]
        assert batch_state(folder) == "running"
        finished = len(read_runs(outputs)[0])
        os.kill(process.pid if whom == "command" else trainer, number)
        done = finish(process)
        wait_until_gone(trainer)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    return done, folder, finished


def check_finished_runs(folder, at_least, failed=0):
    "Every line is a whole record of a completed run, but for a cut-off last one and those known to have failed."
    frame, problems = read_runs(folder.parents[3])
    assert list(frame["status"][len(frame) - failed:]) == ["failed"] * failed
    frame = frame[:len(frame) - failed]
    assert at_least <= len(frame) < MANY and list(frame["seed"]) == list(range(len(frame)))
    assert (frame["status"] == "completed").all()
    assert all("half-written" in problem for problem in problems) and len(problems) <= 1


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory): return stop(MODULE, signal.SIGINT, tmp_path_factory)


def test_interrupted(interrupted):
    done, folder, finished = interrupted
    check_finished_runs(folder, finished)
    provenance = read_batch(folder)[1]
    assert done.code != 0 and provenance["status"] == batch_state(folder) == "interrupted"
    assert provenance["ended_at"] > provenance["started_at"]


def test_interrupted_without_a_traceback(interrupted):
    done = interrupted[0]
    assert done.code == 130 and "interrupted; finished runs are kept" in done.err and "Traceback" not in done.err


def test_killed(tmp_path_factory):
    done, folder, finished = stop(MODULE, signal.SIGKILL, tmp_path_factory)
    assert done.code == -signal.SIGKILL and batch_state(folder) == "interrupted"
    assert read_batch(folder)[1]["status"] == "running"
    with (folder / "runs.jsonl").open("ab") as file: file.write(b'{"schema": 1, "run_')  # as if in the middle of a line
    check_finished_runs(folder, finished)
    outputs = folder.parents[3]
    before = len(read_runs(outputs)[0])
    run_batch(plan_batch("cifar", profile="demo", overrides=TINY, seeds="1000:1002", outputs=outputs), stub_train)
    frame, problems = read_runs(outputs)
    assert len(frame) == before + 2 and len(frame["batch"].unique()) == 2 and len(problems) == 1
    assert sorted(map(batch_state, batch_folders(outputs))) == ["completed", "interrupted"]
    table = call(BIN / "speedrun", "runs", "--outputs", outputs)
    assert table.code == 0 and "half-written" in table.err and table.out.count("completed") == len(frame)


def test_papermill_killed(tmp_path_factory, tmp_path):
    command = [BIN / "papermill", NOTEBOOK, tmp_path / "out.ipynb"]
    done, folder, finished = stop(command, signal.SIGKILL, tmp_path_factory)
    check_finished_runs(folder, finished)  # and the kernel did not go on
    assert batch_state(folder) == "interrupted"


@pytest.fixture(scope="module")
def kernel_killed(tmp_path_factory): return stop(COMMAND, signal.SIGKILL, tmp_path_factory, "kernel")


def test_kernel_killed(kernel_killed):
    done, folder, finished = kernel_killed
    check_finished_runs(folder, finished, failed=1)
    assert done.code == 1 and batch_state(folder) == "failed" and (folder / "notebook.ipynb").exists()


def test_kernel_killed_without_a_traceback(kernel_killed):
    done, folder, _ = kernel_killed
    assert "Traceback" not in done.err
    assert re.search(r"^error: .*kernel", done.err, re.MULTILINE | re.IGNORECASE)
    assert str(folder) in done.err.splitlines()[-1]


@pytest.fixture(scope="module")
def command_interrupted(tmp_path_factory): return stop(COMMAND, signal.SIGINT, tmp_path_factory)


def test_command_interrupted(command_interrupted):
    done, folder, finished = command_interrupted
    check_finished_runs(folder, finished)
    assert done.code == 130 and batch_state(folder) == "interrupted" and (folder / "notebook.ipynb").exists()


def test_command_interrupted_says_so(command_interrupted):
    assert "interrupted; finished runs are kept" in command_interrupted[0].err


# faults, within this process

@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def train_batch(clean_environment, one_thread, capsys, tmp_path):
    "`python -m speedrun_nb.cifar` within this process: exit code, error text, records, provenance."
    def on_cpu(settings, seeds): return train(settings, seeds, device=torch.device("cpu"))
    def run(*words):
        capsys.readouterr()
        outputs = tmp_path / f"outputs-{random.getrandbits(32)}"
        code = train_from_command("cifar", ["-p", "outputs", str(outputs), *map(str, words)], on_cpu)
        folders = batch_folders(outputs)
        return code, capsys.readouterr().err, *(read_batch(folders[0]) if folders else ([], {}))
    return run


@pytest.mark.parametrize("words, expected", [
    ("variant det_corp", 'Did you mean "det_crop"?'),
    ("profile dmeo", 'Did you mean "demo"?'),
    ("sedes 1", 'there is no parameter "sedes". Did you mean "seeds"?'),
    ("overrides agument.flip=none", 'Did you mean "augment.flip"?'),
    ("seeds 3:1", "seeds: '3:1' is not valid"),
    ("overrides train.epochs=0", "train.epochs: 0 is not valid; it takes a number above 0"),
    ("overrides data.train_images=6000", "data.train_images (6000) is more than there are (5000)"),
    ("overrides train.batch_size=5001", "larger than the training set")])
def test_the_module_refuses(train_batch, words, expected):
    code, err, records, provenance = train_batch("-p", "profile", "demo", "-p", *words.split())
    assert code == 1 and err.splitlines()[-1].startswith("error: ") and expected in err and records == []
    assert provenance == {}


def test_the_same_seed_gives_the_same_bits(train_batch, by_module):
    _, _, records, _ = train_batch(*TINY_RUN, "-p", "variant", "det_crop", "-p", "seeds", 1)
    assert computed(records[0]) == computed(by_module[2][0])


def test_a_run_that_fails_is_recorded_and_the_next_one_runs(train_batch, monkeypatch):
    def train_one(settings, data, seed, precision, device):
        if seed == 1: raise RuntimeError("out of memory")
        yield Result(seed, "completed", 1.0, dict(accuracy=0.9, accuracy_plain=0.9, train_loss=1.0), {}, [1.0], None)
    monkeypatch.setattr("speedrun_nb.cifar.train.train_one", train_one)
    code, err, records, provenance = train_batch(*TINY_RUN, "-p", "seeds", 3)
    assert code == 1 and "error: 1 of 3 runs failed; all are recorded in" in err
    assert "Seed 1: RuntimeError: out of memory" in err
    assert [record["status"] for record in records] == ["completed", "failed", "completed"]
    assert provenance["status"] == "failed"
    failed = records[1]
    assert failed["error"].startswith("RuntimeError: out of memory") and "train_one" in failed["error"]
    assert failed["time_seconds"] is None and failed["fingerprint"] is None
    assert RECORD <= failed.keys() and set(failed["metrics"].values()) == {None}


def test_a_trainer_that_raises(clean_environment, tmp_path):
    def train(settings, seeds):
        yield from list(stub_train(settings, seeds))[:2]
        raise ValueError("broken")
    plan = plan_batch("cifar", profile="demo", outputs=tmp_path)
    with pytest.raises(ValueError, match="broken"): run_batch(plan, train)
    records, provenance = read_batch(plan.folder)
    assert len(records) == 1 and provenance["status"] == "failed"
    assert provenance["error"] == "ValueError: broken" and batch_state(plan.folder) == "failed"


def test_a_run_that_diverges_is_recorded(train_batch):
    words = ["-p", "profile", "demo", "-p", "overrides", f"{TINY_WORDS} optimizer.lr=1e30", "-p", "seeds", 2]
    code, err, (record, other), provenance = train_batch(*words)
    assert code == 0 and record["status"] == other["status"] == "diverged"
    assert provenance["status"] == "completed" and "diverged" in err
    assert record["metrics"] and set(record["metrics"].values()) == {None}
    assert record["fingerprint"] is not None


def test_one_batch_a_folder(clean_environment, tmp_path):
    plan = plan_batch("cifar", profile="demo", outputs=tmp_path, batch="mine")
    run_batch(plan, stub_train)
    with pytest.raises(SpeedrunError, match="holds a batch already; records are never overwritten"):
        plan_batch("cifar", profile="demo", outputs=tmp_path, batch="mine")


def test_two_runs_of_one_plan_do_not_mix(clean_environment, tmp_path):
    "As when two writers choose the same name at the same time, or a notebook's training cell is executed twice."
    plan = plan_batch("cifar", profile="demo", outputs=tmp_path, batch="mine")
    run_batch(plan, stub_train)
    before = (plan.folder / "provenance.json").read_bytes()
    with pytest.raises(SpeedrunError, match="holds a batch already"): run_batch(plan, stub_train)
    assert (plan.folder / "provenance.json").read_bytes() == before and len(read_batch(plan.folder)[0]) == 2


@pytest.mark.parametrize("below", ["a file", "a file/below", "/proc/nowhere"])
def test_an_outputs_folder_that_cannot_be_written(train_batch, tmp_path, below):
    if below.startswith("/proc") and not Path("/proc/self").exists(): pytest.skip("no /proc here")
    (tmp_path / "a file").touch()
    code, err, _, _ = train_batch(*TINY_RUN, "-p", "outputs", tmp_path / below)
    assert code == 1 and f"error: outputs: {tmp_path / below}/cifar/demo/baseline/" in err
    assert "cannot be written (" in err and "outputs=FOLDER" in err


def test_the_command_and_an_outputs_folder_that_cannot_be_written(speedrun, tmp_path):
    (tmp_path / "file").touch()
    done = speedrun("run", "cifar", *TINY_RUN, "-p", "outputs", tmp_path / "file")
    assert done.code == 1 and done.out == ""
    assert f"error: outputs: {tmp_path / 'file'}/cifar/demo/baseline/" in done.err
    assert "cannot be written (Not a directory)" in done.err


# data files

def write_images(folder, names, count=100):
    "Files in the binary format, with random images; their descriptions."
    folder.mkdir(parents=True, exist_ok=True)
    noise, described = random.Random(0), []
    for name in names:
        content = b"".join(bytes([i % 10]) + noise.randbytes(3072) for i in range(count))
        (folder / name).write_bytes(content)
        digests = hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()
        described.append(DataFile(name, len(content), digests[0], None if name.startswith("test") else digests[1]))
    return tuple(described)


SMALL_CPU = ["-p", "profile", "cpu", "-p", "seeds", "1", "-p", "overrides", TINY_WORDS.replace("=500", "=400")]


@pytest.fixture
def images(clean_environment, monkeypatch, tmp_path):
    "A small data set in place of the published one, without its test batch; its folder."
    folder = tmp_path / "data" / "cifar10"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    small = dataclasses.replace(DATASETS["cifar10"], files=write_images(folder, names))
    monkeypatch.setitem(DATASETS, "cifar10", small)
    monkeypatch.setenv("SPEEDRUN_DATA", str(folder.parent))
    (folder / "test_batch.bin").rename(folder / "elsewhere")
    return folder


def test_files_are_found_and_noted(train_batch, images):
    code, err, records, provenance = train_batch(*SMALL_CPU)
    assert code == 0, err
    assert records[0]["profile"] == "cpu" and records[0]["config"]["data.split"] == "validation"
    assert "synthetic" not in err
    paths = [images / f"data_batch_{i}.bin" for i in range(1, 6)]
    assert provenance["data"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_the_official_split_needs_the_test_batch(train_batch, images):
    official = [*SMALL_CPU[:-1], f"{SMALL_CPU[-1]} data.split=official"]
    code, err, records, provenance = train_batch(*official)
    assert code == 1 and f"error: {images / 'test_batch.bin'} is missing. `speedrun data fetch cifar10`" in err
    assert "SPEEDRUN_DATA" in err
    assert records == [] and provenance["status"] == "failed" and "test_batch.bin is missing" in provenance["error"]
    (images / "elsewhere").rename(images / "test_batch.bin")
    data, hashes = load_cifar10("official")
    assert len(data["train_images"]) == 500 and len(data["test_images"]) == 100 and len(hashes) == 6


def truncate(path): path.write_bytes(path.read_bytes()[:-1])


def lengthen(path): path.write_bytes(path.read_bytes() + b"x")


def alter(path): path.write_bytes(b"x" + path.read_bytes()[1:])


@pytest.mark.parametrize("harm, expected", [
    (Path.unlink, "is missing."),
    (truncate, "has 307,299 bytes instead of 307,300: it is truncated."),
    (lengthen, "has 307,301 bytes instead of 307,300: it is not the published file."),
    (alter, "has the wrong content (sha256 ")])
def test_files_that_are_missing_or_altered(train_batch, images, harm, expected):
    harm(images / "data_batch_3.bin")
    code, err, records, provenance = train_batch(*SMALL_CPU)
    assert code == 1 and f"error: {images / 'data_batch_3.bin'} {expected}" in err and records == []
    assert provenance["status"] == "failed"
    assert "`speedrun data fetch cifar10` downloads it into" in err
    assert "cifar10/data_batch_3.bin" in err.rpartition("SPEEDRUN_DATA")[2]


def test_the_notebook_names_a_truncated_file(tmp_path):
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10" / "data_batch_1.bin"
    path.write_bytes(b"short")
    given = ["-p", "profile", "cpu", "-p", "outputs", tmp_path / "outputs"]
    done = call(*COMMAND, *given, env=environment(SPEEDRUN_DATA=str(tmp_path)))
    assert done.code == 1 and f"error: {path} has 5 bytes instead of 30,730,000: it is truncated." in done.err
    assert "Traceback" not in done.err


REAL = Path(os.environ.get("SPEEDRUN_DATA", "")) / "cifar10"
is_absent = not os.environ.get("SPEEDRUN_DATA") or not (REAL / "data_batch_1.bin").exists()
real_data = pytest.mark.skipif(is_absent, reason="SPEEDRUN_DATA names no folder with cifar10/data_batch_1.bin")


@real_data
def test_real_images():
    data, hashes = load_cifar10("validation")
    assert data["train_images"].shape == (40_000, 32, 32, 3) and data["test_images"].shape == (10_000, 32, 32, 3)
    assert len(hashes) == 5
    assert data["train_labels"][:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # frog, truck, truck, deer, ...
    labels = torch.cat([data["train_labels"], data["test_labels"]])
    assert labels.bincount().tolist() == [5_000] * 10
    pixels = torch.cat([data["train_images"], data["test_images"]]).float().div(255)
    assert torch.allclose(pixels.mean((0, 1, 2)), torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4)


@real_data
def test_real_files_are_checked():
    done = call(BIN / "speedrun", "data", "check", "cifar10", "--json", env=environment(SPEEDRUN_DATA=str(REAL.parent)))
    rows = {row["file"]: row["right"] for row in strict_json(done.out)}
    assert [rows[f"data_batch_{i}.bin"] for i in range(1, 6)] == ["yes"] * 5
    if rows["test_batch.bin"] == "yes": assert done.code == 0
    else: assert done.code == 1 and rows["test_batch.bin"] == "missing" and "cifar10 is not complete" in done.err


# variants

SIZES = [(name, profile) for name in study_names() for profile in profile_names(load_study(name))]


@pytest.mark.parametrize("study, profile", SIZES)
def test_every_variant_resolves_in_every_profile(study, profile):
    chosen = load_study(study)
    hashes = {name: resolve(chosen, name, profile).config_hash for name in variant_names(chosen)}
    assert len(set(hashes.values())) == len(hashes) >= 2
    for name in variant_names(chosen):
        variant = resolve(chosen, name, profile)
        assert variant.title and variant.source and (name == "baseline" or (variant.claim and variant.changed))


def test_every_variant_computes_something_else(clean_environment, one_thread):
    study, found, device = load_study("cifar"), {}, torch.device("cpu")
    for name in variant_names(study):
        settings = resolve(study, name, "demo", TINY).settings
        data, precision = load_data(settings, device)[0], choose_precision("auto", device)
        result = list(train_one(settings, data, 0, precision, device))[-1]
        assert result.status == "completed" and len(result.losses) == 15
        found[name] = result.losses
    assert len(set(map(tuple, found.values()))) == len(found), found
    # until the epoch at which they part, deterministic crops are the same
    assert found["det_crop"][:10] == found["det_crop_backoff"][:10] == found["det_crop_then_random"][:10]
    assert found["baseline"][:10] == found["random_crop_backoff"][:10]

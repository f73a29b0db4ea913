"NanoGPT in processes: the same results on any number of them, failures that are explained and recorded, nothing left."
import functools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch

from speedrun_nb.core import parameters
from speedrun_nb.core.batch import run_batch
from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.core.provenance import read_provenance
from speedrun_nb.core.records import Progress, Result, fingerprint, read_records
from speedrun_nb.core.study import load_study, project_root
from speedrun_nb.core.variants import resolve, resolve_all
from speedrun_nb.gpt.launch import train
from speedrun_nb.gpt.processes import Processes
from speedrun_nb.gpt.shards import write_shard
from speedrun_nb.gpt.train import train_seeds

pytestmark = pytest.mark.usefixtures("one_thread_each")
STUDY = load_study("gpt")
plan_batch = functools.partial(parameters.plan_batch, "gpt", profile="demo")
TINY = {"model.layers": 2, "model.width": 24, "model.heads": 2, "data.sequence_length": 16,
        "train.batch_size": 8, "train.device_batch_size": 2, "train.iterations": 14, "train.precision": "fp32",
        "schedule.warmdown_iterations": 4, "evaluation.every": 5, "evaluation.tokens": 256}
LONG = TINY | {"train.iterations": 1_000_000, "evaluation.every": 1000}


@pytest.fixture(scope="module")
def one_thread_each():
    "Processes use one thread: these networks are too small to share."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def settings(variant="baseline", **overrides):
    overrides = {name.replace("__", "."): value for name, value in overrides.items()}
    return resolve(STUDY, variant, "demo", TINY | overrides).settings


def long_settings(**overrides): return settings(train__iterations=1_000_000, evaluation__every=1000, **overrides)


def start_batch(seed, outputs, **options):
    "A batch that would take hours, as a process."
    words = dict(profile="demo", overrides=json.dumps(LONG), seeds=f"[{seed}]", outputs=str(outputs))
    command = [sys.executable, "-m", "speedrun_nb.gpt"]
    for name, value in words.items(): command += ["-p", name, value]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also in the background of a shell
    return subprocess.Popen(command, text=True, preexec_fn=heed, **options)


def result(events):
    return [event for event in events if isinstance(event, Result)][-1]


def processes_of(seed):
    "Process ids of torchrun and its processes that train this seed."
    return sorted(int(folder.name) for folder in Path("/proc").glob("[0-9]*") if trains(folder, seed))


def trains(folder, seed):
    "Is this (a folder of /proc) a process that trains the seed, and not a zombie?"
    try:
        words = (folder / "cmdline").read_bytes().split(b"\0")
        state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError: return False
    return b"speedrun_nb.gpt.train" in words and f"[{seed}".encode() in b" ".join(words) and state != "Z"


def ranks_of(seed):
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(seed)}
    return [pid for pid, command in commands.items() if b"torch.distributed.run" not in command]


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition(): return True
        time.sleep(0.1)
    return False


HUNG = 910_003


def hang():
    "A run one of whose processes is stopped."
    stopped = []
    for event in train(long_settings(), [HUNG], timeout=4):
        if not stopped and isinstance(event, Progress):
            stopped = ranks_of(HUNG)[-1:]
            os.kill(stopped[0], signal.SIGSTOP)
    return event


@pytest.fixture(scope="module", autouse=True)
def hung(one_thread_each):
    "Started before all else and looked at late: torchrun gives a process half a minute to end."
    with ThreadPoolExecutor(1) as pool: yield pool.submit(hang)


# the same on any number of processes

@pytest.fixture(scope="module")
def alone(one_thread_each):
    return result(train_seeds(settings(), [5]))


def test_a_batch_is_the_same_on_any_number_of_processes(alone):
    first, second = result(train(settings(), [5])), result(train(settings(), [6, 5]))
    four = result(train(settings(train__cpu_processes=4, train__device_batch_size=1), [5]))
    assert first.losses == second.losses and first.curve["val_loss"] == second.curve["val_loss"]  # whatever ran before
    for shared in (first, four):
        np.testing.assert_allclose(shared.losses, alone.losses, rtol=5e-4)
        np.testing.assert_allclose(shared.curve["val_loss"], alone.curve["val_loss"], rtol=5e-4)
        assert shared.tokens == alone.tokens and shared.curve["tokens"] == alone.curve["tokens"]


def test_sharded_muon_computes_what_muon_computes(alone):
    shared = result(train(settings(optimizer__sharded=True), [5]))
    np.testing.assert_allclose(shared.losses, alone.losses, rtol=5e-4)


@pytest.mark.parametrize("variant", ["depth_warming", "curriculum"])
def test_processes_agree_on_what_varies(variant):
    overrides = {"model__layers": 4}
    if variant == "curriculum":
        overrides |= {"schedule__curriculum_lengths": [4, 8, 12], "schedule__curriculum_iterations": [3, 3, 3]}
    chosen = settings(variant, **overrides)
    alone, shared = result(train_seeds(chosen, [5])), result(train(chosen, [5]))
    np.testing.assert_allclose(shared.losses, alone.losses, rtol=5e-4)
    assert shared.tokens == alone.tokens


# the variants

@pytest.mark.parametrize("profile", ["demo", "cpu", "stage_a", "stage_b", "stage_c", "full"])
def test_every_variant_has_settings_of_its_own(profile):
    variants = resolve_all(STUDY, profile)
    assert len(variants) == 16 and len({v.config_hash for v in variants.values()}) == 16
    del variants["baseline"]
    assert all(v.claim and v.claim.guard.metric == "val_loss" and v.source for v in variants.values())


def test_every_variant_computes_something_of_its_own():
    small = {"train.iterations": 20, "schedule.warmdown_iterations": 5, "data.sequence_length": 32,
             "train.batch_size": 4, "train.device_batch_size": 4, "evaluation.every": 0, "evaluation.tokens": 1024,
             "model.width": 48}
    curriculum = {"schedule.curriculum_lengths": [8, 16, 24], "schedule.curriculum_iterations": [4, 4, 4]}
    seen = {}
    for name in resolve_all(STUDY, "demo"):
        if name == "muon_sharded": continue  # computes what the baseline computes; see above
        variant = resolve(STUDY, name, "demo", small | (curriculum if name == "curriculum" else {}))
        ended = result(train_seeds(variant.settings, [0], Processes()))
        assert ended.status == "completed", name
        quality = {metric: ended.metrics[metric] for metric in ("val_loss", "train_loss")}
        seen[name] = fingerprint(ended.losses, quality)
    assert len(set(seen.values())) == len(seen) == 15


# failures

def test_a_process_that_is_killed_fails_one_run(tmp_path):
    seed, events = 910_001, train(long_settings(), [910_001, 910_002])
    killed = []
    for event in events:
        if isinstance(event, Result): break
        if not killed and isinstance(event, Progress):
            killed = ranks_of(seed)[-1:]
            os.kill(killed[0], signal.SIGKILL)
    assert killed and event.seed == seed and event.status == "failed"
    assert "ended by SIGKILL" in event.error.splitlines()[0] and "The end of the log" in event.error
    following = next(event for event in events if isinstance(event, Progress))
    assert following.seed == 910_002  # which has new processes
    events.close()
    assert wait_until(lambda: not processes_of(910_002)) and not processes_of(seed)


def test_a_process_that_hangs_is_not_waited_for(hung):
    ended = hung.result(timeout=120)
    assert ended.status == "failed" and ended.error.startswith("another process is gone, or does not answer")
    assert wait_until(lambda: not processes_of(HUNG), 45)


def test_silence_has_an_end():
    seed = 910_004
    with pytest.raises(SpeedrunError, match="nothing was heard"):
        list(train(long_settings(train__cpu_processes=1), [seed], patience=0.05))
    assert wait_until(lambda: not processes_of(seed))


def test_nothing_outlives_a_parent_that_is_killed(tmp_path):
    seed = 910_005
    parent = start_batch(seed, tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_until(lambda: len(ranks_of(seed)) == 2)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not processes_of(seed))


def test_a_run_that_broke_off_is_resumed(tmp_path):
    overrides = TINY | {"train.iterations": 400, "train.checkpoint_every": 20, "evaluation.every": 50,
                        "train.cpu_processes": 1, "schedule.warmdown_iterations": 40}
    plan = plan_batch(overrides=overrides, seeds=[910_007], outputs=tmp_path)
    again = plan_batch(overrides=overrides, seeds=[910_007], outputs=tmp_path)
    def kill(event):
        if list(tmp_path.glob("gpt/.checkpoints/0/*.pt")):
            for pid in ranks_of(910_007): os.kill(pid, signal.SIGKILL)
    (first,), (second,) = run_batch(plan, show=kill).records, run_batch(again).records
    whole = result(train_seeds(plan.variant.settings, [910_007]))
    assert first["status"] == "failed" and first["resumed_at"] is None and first["run_id"] == second["run_id"]
    assert second["status"] == "completed" and second["resumed_at"] % 20 == 0 and second["resumed_at"] > 0
    assert not list(tmp_path.glob("gpt/.checkpoints/0/*"))
    assert second["metrics"]["val_loss"] == whole.metrics["val_loss"] and second["tokens"] == whole.tokens
    assert second["curve"]["step"] == whole.curve["step"]


def test_an_interrupt_ends_everything_and_keeps_what_is_done(tmp_path):
    seed = 910_006
    parent = start_batch(seed, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert wait_until(lambda: len(ranks_of(seed)) == 2)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 130 and "interrupted" in errors and not processes_of(seed)
    assert read_provenance(next(tmp_path.glob("gpt/demo/baseline/*")))["status"] == "interrupted"


def test_a_run_that_diverges_is_recorded(tmp_path):
    overrides = TINY | {"train.cpu_processes": 1, "optimizer.lr": 1e38}
    plan = plan_batch(overrides=overrides, seeds="0:2", outputs=tmp_path)
    records = run_batch(plan).records
    assert [record["status"] for record in records] == ["diverged", "diverged"]
    assert records[0]["metrics"]["val_loss"] is None
    assert len(read_records(plan.folder / "runs.jsonl")[0]) == 2


def write_shards(folder, broken=None):
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16)
    for name in SHARD_NAMES: write_shard(folder / name, tokens)
    if broken: (folder / broken).write_bytes((folder / broken).read_bytes()[:-7])


SHARD_NAMES = ("my_train_000001.bin", "my_train_000002.bin", "my_val_000000.bin")
SHARDS = TINY | {"data.dataset": "mine", "data.train": "my_train", "data.validation": "my_val",
                 "train.cpu_processes": 1}


def test_own_shards_are_trained_on(tmp_path, monkeypatch):
    write_shards(tmp_path / "mine")
    monkeypatch.setenv("SPEEDRUN_DATA", str(tmp_path))
    plan = plan_batch(overrides=SHARDS | {"train.iterations": 100}, seeds=1, outputs=tmp_path / "outputs")
    record, = run_batch(plan).records
    assert record["tokens"] == {"trained": 12_800, "unique": 10_000} and record["status"] == "completed"
    assert set(read_provenance(plan.folder)["data"]) == set(SHARD_NAMES)


def test_a_damaged_shard_is_named(tmp_path, monkeypatch):
    write_shards(tmp_path / "mine", "my_train_000002.bin")
    monkeypatch.setenv("SPEEDRUN_DATA", str(tmp_path))
    plan = plan_batch(overrides=SHARDS, seeds=2, outputs=tmp_path / "outputs")
    with pytest.raises(SpeedrunError, match="my_train_000002.bin"): run_batch(plan)
    record, = read_records(plan.folder / "runs.jsonl")[0]
    assert record["status"] == "failed" and "my_train_000002.bin" in record["error"]
    assert read_provenance(plan.folder)["status"] == "failed"


def test_sizes_that_do_not_divide_start_nothing(tmp_path):
    with pytest.raises(SpeedrunError, match="3 processes cannot share"):
        run_batch(plan_batch(overrides="train.cpu_processes=3", outputs=tmp_path))
    with pytest.raises(SpeedrunError, match="optimizer.sharded cannot act"):
        run_batch(plan_batch(variant="muon_sharded", overrides="train.cpu_processes=1", outputs=tmp_path))
    assert not list(tmp_path.iterdir())


# the notebook

def test_the_notebook_trains_and_refuses(tmp_path):
    notebook = project_root() / "nbs" / "run_gpt.ipynb"
    given = dict(profile="demo", overrides=TINY | {"train.cpu_processes": 1}, seeds="0:2", outputs=str(tmp_path))
    execute = functools.partial(
        papermill.execute_notebook, notebook, kernel_name="python3", progress_bar=False, cwd=project_root())
    execute(tmp_path / "out.ipynb", given | {"variant": "parallel_unscaled"})
    records = read_records(next(tmp_path.glob("gpt/demo/parallel_unscaled/*/runs.jsonl")))[0]
    assert [r["seed"] for r in records] == [0, 1]
    with pytest.raises(papermill.PapermillExecutionError, match="there is no parameter \"gpu\""):
        execute(tmp_path / "bad.ipynb", given | {"gpu": 1})

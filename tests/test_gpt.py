"""NanoGPT in processes: the same results on any number of them, failures that are explained and recorded, nothing left behind."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import papermill
import pytest

from speedrun_nb.core.config import SpeedrunError
from speedrun_nb.core.project import load_study, project_root, resolve, resolve_all
from speedrun_nb.core.provenance import read_provenance
from speedrun_nb.core.records import Result, fingerprint, read_records
from speedrun_nb.gpt.batch import plan_batch, run_batch
from speedrun_nb.gpt.launch import train
from speedrun_nb.gpt.processes import Processes
from speedrun_nb.gpt.train import train_seeds

STUDY = load_study("gpt")
TINY = {"model.layers": 2, "model.width": 24, "model.heads": 2, "data.sequence_length": 16, "train.batch_size": 8, "train.device_batch_size": 2, "train.iterations": 14,
        "schedule.warmdown_iterations": 4, "evaluation.every": 5, "evaluation.tokens": 256, "train.precision": "fp32"}
LONG = TINY | {"train.iterations": 1_000_000, "evaluation.every": 1000}


def settings(variant="baseline", **overrides):
    return resolve(STUDY, variant, "demo", TINY | {name.replace("__", "."): value for name, value in overrides.items()}).settings


def result(events):
    return [event for event in events if isinstance(event, Result)][-1]


def processes_of(seed):
    "Process ids of torchrun and its processes that train this seed."
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try: words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError: continue
        if b"speedrun_nb.gpt.train" in words and f"[{seed}".encode() in b" ".join(words) and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z": found.append(int(folder.name))
    return sorted(found)


def ranks_of(seed):
    return [pid for pid in processes_of(seed) if b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition(): return True
        time.sleep(0.1)
    return False


# the same on any number of processes

@pytest.fixture(scope="module")
def alone():
    return result(train_seeds(settings(), [5]))


@pytest.mark.parametrize("world, device_batch_size", [(2, 2), (4, 1)])
def test_a_batch_is_the_same_on_any_number_of_processes(alone, world, device_batch_size):
    shared = result(train(settings(train__cpu_processes=world, train__device_batch_size=device_batch_size), [5]))
    np.testing.assert_allclose(shared.losses, alone.losses, rtol=5e-4)
    np.testing.assert_allclose(shared.curve["val_loss"], alone.curve["val_loss"], rtol=5e-4)
    assert shared.tokens == alone.tokens and shared.curve["tokens"] == alone.curve["tokens"]


def test_the_same_processes_give_the_same_bits():
    first, second = (result(train(settings(), [5])) for _ in range(2))
    assert first.losses == second.losses and first.curve["val_loss"] == second.curve["val_loss"]


def test_sharded_muon_computes_what_muon_computes():
    plain, shared = (result(train(settings(optimizer__sharded=sharded), [5])) for sharded in (False, True))
    np.testing.assert_allclose(shared.losses, plain.losses, rtol=1e-4)


@pytest.mark.parametrize("variant", ["depth_warming", "curriculum"])
def test_processes_agree_on_what_varies(variant):
    overrides = {"model__layers": 4} | ({"schedule__curriculum_lengths": [4, 8, 12], "schedule__curriculum_iterations": [3, 3, 3]} if variant == "curriculum" else {})
    alone, shared = result(train_seeds(settings(variant, **overrides), [5])), result(train(settings(variant, **overrides), [5]))
    np.testing.assert_allclose(shared.losses, alone.losses, rtol=5e-4)
    assert shared.tokens == alone.tokens


# the variants

@pytest.mark.parametrize("profile", ["demo", "cpu", "stage_a", "stage_b", "stage_c", "full"])
def test_every_variant_has_settings_of_its_own(profile):
    variants = resolve_all(STUDY, profile)
    assert len(variants) == 16 and len({v.config_hash for v in variants.values()}) == 16
    assert all(v.claim and v.claim.guard.metric == "val_loss" and v.source for name, v in variants.items() if name != "baseline")


def test_every_variant_computes_something_of_its_own():
    small = {"train.iterations": 20, "schedule.warmdown_iterations": 5, "data.sequence_length": 32, "train.batch_size": 4, "train.device_batch_size": 4, "evaluation.every": 0, "evaluation.tokens": 1024,
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
    seed, events = 910_001, train(resolve(STUDY, "baseline", "demo", LONG).settings, [910_001, 910_002])
    killed = []
    for event in events:
        if isinstance(event, Result): break
        if not killed and event.__class__.__name__ == "Progress":
            killed = ranks_of(seed)[-1:]
            os.kill(killed[0], signal.SIGKILL)
    assert killed and event.seed == seed and event.status == "failed" and "SIGKILL" in event.error and "The end of the log" in event.error
    assert next(event for event in events if event.__class__.__name__ == "Progress").seed == 910_002  # the next seed has new processes
    events.close()
    assert wait_until(lambda: not processes_of(910_002)) and not processes_of(seed)


def test_a_process_that_hangs_is_not_waited_for():
    seed, stopped = 910_003, []
    events = train(resolve(STUDY, "baseline", "demo", LONG).settings, [seed], timeout=4)
    for event in events:
        if not stopped and event.__class__.__name__ == "Progress":
            stopped = ranks_of(seed)[-1:]
            os.kill(stopped[0], signal.SIGSTOP)
    assert event.status == "failed" and wait_until(lambda: not processes_of(seed), 45)


def test_silence_has_an_end():
    seed = 910_004
    with pytest.raises(SpeedrunError, match="nothing was heard"):
        list(train(resolve(STUDY, "baseline", "demo", LONG | {"train.cpu_processes": 1}).settings, [seed], patience=0.05))
    assert wait_until(lambda: not processes_of(seed))


def test_nothing_outlives_a_parent_that_is_killed(tmp_path):
    seed = 910_005
    words = ["-p", "profile", "demo", "-p", "overrides", json.dumps(LONG), "-p", "seeds", f"[{seed}]", "-p", "outputs", str(tmp_path)]
    parent = subprocess.Popen([sys.executable, "-m", "speedrun_nb.gpt.batch", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_until(lambda: len(ranks_of(seed)) == 2)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not processes_of(seed))


def test_an_interrupt_ends_everything_and_keeps_what_is_done(tmp_path):
    seed = 910_006
    words = ["-p", "profile", "demo", "-p", "overrides", json.dumps(LONG), "-p", "seeds", f"[{seed}]", "-p", "outputs", str(tmp_path)]
    parent = subprocess.Popen([sys.executable, "-m", "speedrun_nb.gpt.batch", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: len(ranks_of(seed)) == 2)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 130 and "interrupted" in errors and not processes_of(seed)
    assert read_provenance(next(tmp_path.glob("gpt/demo/baseline/*")))["status"] == "interrupted"


def test_a_run_that_diverges_is_recorded(tmp_path):
    plan = plan_batch(profile="demo", overrides=TINY | {"train.cpu_processes": 1, "optimizer.lr": 1e38}, seeds="0:2", outputs=tmp_path)
    batch = run_batch(plan)
    assert [record["status"] for record in batch.records] == ["diverged", "diverged"] and batch.records[0]["metrics"]["val_loss"] is None
    assert len(read_records(plan.folder / "runs.jsonl")[0]) == 2


def write_shards(folder, broken=None):
    from speedrun_nb.gpt.shards import write_shard
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16)
    for name in ("my_train_000001.bin", "my_train_000002.bin", "my_val_000000.bin"): write_shard(folder / name, tokens)
    if broken: (folder / broken).write_bytes((folder / broken).read_bytes()[:-7])


SHARDS = TINY | {"data.dataset": "mine", "data.train": "my_train", "data.validation": "my_val", "train.cpu_processes": 1}


def test_own_shards_are_trained_on(tmp_path, monkeypatch):
    write_shards(tmp_path / "mine")
    monkeypatch.setenv("SPEEDRUN_DATA", str(tmp_path))
    batch = run_batch(plan_batch(profile="demo", overrides=SHARDS | {"train.iterations": 100}, seeds=1, outputs=tmp_path / "outputs"))
    record, = batch.records
    assert record["tokens"] == {"trained": 12_800, "unique": 10_000} and record["status"] == "completed"
    assert set(read_provenance(batch.folder)["data"]) == {"my_train_000001.bin", "my_train_000002.bin", "my_val_000000.bin"}


def test_a_damaged_shard_is_named(tmp_path, monkeypatch):
    write_shards(tmp_path / "mine", "my_train_000002.bin")
    monkeypatch.setenv("SPEEDRUN_DATA", str(tmp_path))
    plan = plan_batch(profile="demo", overrides=SHARDS, seeds=2, outputs=tmp_path / "outputs")
    with pytest.raises(SpeedrunError, match="my_train_000002.bin"): run_batch(plan)
    record, = read_records(plan.folder / "runs.jsonl")[0]
    assert record["status"] == "failed" and "my_train_000002.bin" in record["error"] and read_provenance(plan.folder)["status"] == "failed"


def test_sizes_that_do_not_divide_start_nothing(tmp_path):
    with pytest.raises(SpeedrunError, match="3 processes cannot share"): plan_batch(profile="demo", overrides="train.cpu_processes=3", outputs=tmp_path)
    with pytest.raises(SpeedrunError, match="optimizer.sharded cannot act"): plan_batch(variant="muon_sharded", profile="demo", overrides="train.cpu_processes=1", outputs=tmp_path)
    assert not list(tmp_path.iterdir())


# the notebook

def test_the_notebook_trains_and_refuses(tmp_path):
    notebook = project_root() / "nbs" / "run_gpt.ipynb"
    given = dict(profile="demo", overrides=TINY | {"train.cpu_processes": 1}, seeds="0:2", outputs=str(tmp_path))
    papermill.execute_notebook(notebook, tmp_path / "out.ipynb", given | {"variant": "kv_1"}, kernel_name="python3", progress_bar=False, cwd=project_root())
    records = read_records(next(tmp_path.glob("gpt/demo/kv_1/*/runs.jsonl")))[0]
    assert [r["seed"] for r in records] == [0, 1] and "CUDA" not in (tmp_path / "out.ipynb").read_text()
    with pytest.raises(papermill.PapermillExecutionError, match="there is no parameter \"gpu\""):
        papermill.execute_notebook(notebook, tmp_path / "bad.ipynb", given | {"gpu": 1}, kernel_name="python3", progress_bar=False, cwd=project_root())

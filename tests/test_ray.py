"""Sweeps on a Ray cluster: two nodes and more on this machine, one of which dies."""
import importlib.util
import sys
import time
from collections import Counter, defaultdict

import psutil
import pytest
from conftest import batch_folders, read_batch

from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.core.machine import process_started
from speedrun_nb.core.provenance import read_provenance
from speedrun_nb.sweep import ray_engine
from speedrun_nb.sweep.drive import Drive
from speedrun_nb.sweep.file import read_sweep
from speedrun_nb.sweep.ray_engine import RayEngine

if not importlib.util.find_spec("ray"):
    pytest.skip("needs Ray: pip install 'speedrun_nb[ray]'", allow_module_level=True)

TINY = ("{data.train_images: [200], whitening.images: [100], train.batch_size: [100], train.epochs: [10], "
        "model.widths: [[8, 8, 8]]}")
STORE = 80 * 2**20  # bytes; Ray takes no less than 75 MB


@pytest.fixture(scope="module")
def nodes():
    "A cluster that soon notices when a node is gone; its head runs nothing."
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IN_TEST", "SPEEDRUN_DATA", "SPEEDRUN_PROFILE", "SPEEDRUN_OUTPUTS", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        environment = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", RAY_USAGE_STATS_ENABLED="0",
                           RAY_DEDUP_LOGS_SKIP_REGEX=".")
        for name, value in environment.items(): patch.setenv(name, value)
        from ray.cluster_utils import Cluster
        health = dict(health_check_initial_delay_ms=500, health_check_period_ms=500, health_check_failure_threshold=3)
        head = dict(num_cpus=0, object_store_memory=STORE, include_dashboard=False, _system_config=health)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try: yield cluster
        finally: cluster.shutdown()


def add(cluster, name, **resources):
    return cluster.add_node(node_name=name, object_store_memory=STORE, **{"num_cpus": 1, **resources})


@pytest.fixture(scope="module")
def first(nodes): return add(nodes, "first")


@pytest.fixture(scope="module")
def second(nodes): return add(nodes, "second")


class Watched(RayEngine):
    "Notes where batches run."
    def start(self, slot, job):
        self.placed = [*getattr(self, "placed", []), (job["parameters"]["block"], slot.name)]
        super().start(slot, job)


def drive(cluster, folder, show):
    "Run a sweep of three blocks of two batches."
    path = folder / "two.yaml"
    path.write_text(f"study: cifar\nprofile: demo\nvariants: [baseline: {TINY}, det_crop: {TINY}]\nseeds: 0:3\n")
    driven = Drive(read_sweep(path), folder / "outputs", Watched(cluster.address), show=show)
    driven.run()
    return driven


def completed(folder):
    "How often each run was completed."
    return Counter(record["run_id"] for record in all_records(folder) if record["status"] == "completed")


def all_records(folder):
    return [record for batch in batch_folders(folder / "outputs") for record in read_batch(batch)[0]]


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def running(folder):
    "Provenance of a batch that trains."
    known = map(read_provenance, batch_folders(folder))
    return next((each for each in known if each.get("status") == "running" and each.get("warmup_seconds")), None)


def test_a_batch_that_is_killed_leaves_nothing_behind(nodes, second, tmp_path):
    engine = RayEngine(nodes.address)
    try:
        slot = wait_for(engine.free)[0]
        overrides = {"data.train_images": 200, "whitening.images": 100, "train.batch_size": 100, "train.epochs": 1000,
                     "model.widths": [8, 8, 8]}
        parameters = dict(profile="demo", seeds=[0], overrides=overrides, outputs=str(tmp_path))
        engine.start(slot, dict(study="cifar", parameters=parameters))
        assert slot not in engine.free() and engine.wait(0.1) == []
        kernel = wait_for(lambda: running(tmp_path))["pid"]
        for _ in range(3): engine.kill(slot)
        assert wait_for(lambda: engine.wait(0.1)) == [(slot, "the batch was ended", True)]
        assert process_started(kernel) is None
        assert slot in engine.free()
        engine.start(slot, dict(study="cifar", parameters=dict(variant="det_corp")))
        (_, error, died), = wait_for(lambda: engine.wait(0.1))
        assert "det_corp" in error and not died
    finally: engine.close()


def test_every_cell_once_and_blocks_on_one_node_while_nodes_die_and_come(nodes, first, second, tmp_path, capfd):
    gone = []
    def show(driven, line):
        there = [run for slot, run in driven.running.items() if slot.name == "first"]
        hit = next((run for run in there if read_provenance(run.plan.folder).get("warmup_seconds")), None)
        if hit and not gone:
            kernel = psutil.Process(read_provenance(hit.plan.folder)["pid"])
            gone.append((hit, [kernel.pid, kernel.ppid()]))
            nodes.remove_node(first, allow_graceful=False)
            add(nodes, "third")
    driven = drive(nodes, tmp_path, show)
    (hit, processes), = gone
    assert "raylet" not in "".join(capfd.readouterr())  # Ray keeps what happens to nodes to itself
    assert not driven.failed and not driven.leases.all.current()
    assert completed(tmp_path) == dict.fromkeys(driven.cells.wanted, 1)
    left, recorded = read_batch(hit.plan.folder)[1], all_records(tmp_path)
    assert left["status"] == "interrupted" and left["error"].startswith("the node first died")
    wait_for(lambda: [process_started(pid) for pid in processes] == [None, None], 10)  # its kernel and its worker
    assert hit.cells.keys() - {record["run_id"] for record in recorded if record["batch"] == hit.plan.batch}
    assert {(record["sweep"], record["threads"]) for record in recorded} == {(driven.plan.name, 1)}
    places = defaultdict(set)
    for block, name in driven.engine.placed: places[block].add(name)
    assert places[hit.batch.block] in ({"first", "second"}, {"first", "third"})
    assert set.union(*places.values()) == {"first", "second", "third"}
    assert all(len(names) == 1 for block, names in places.items() if block != hit.batch.block)


def test_what_nodes_lack_is_said(nodes, second, monkeypatch):
    with pytest.raises(SpeedrunError, match=r"a batch that takes one tpu; .*second: 1 CPUs, 0 GPUs, 0 tpu"):
        RayEngine(nodes.address, resource="tpu")
    monkeypatch.setattr(ray_engine, "project_root", lambda: "/nowhere")
    engine = RayEngine(nodes.address)
    with pytest.raises(SpeedrunError, match=r"(?s)second: /nowhere: No such file or directory.*on every node"):
        wait_for(engine.free)
    engine.close()


def test_gpus_are_shared_out(nodes, second, monkeypatch):
    "GPUs that the cluster is told to have: once there are any, nodes without are not used."
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    engine = RayEngine(nodes.address)
    add(nodes, "gpus", num_gpus=2, resources={"device": 1})
    wait_for(lambda: {slot.name for slot in engine.free()} == {"gpus"} and len(engine.free()) == 2)
    assert {slot.devices for slot in engine.slots} == {("0",), ("1",)}
    engine.close()
    engine = RayEngine(nodes.address, each=2, several=True, resource="device")
    slot, = wait_for(engine.free)
    assert slot.devices == ("0", "1")
    engine.close()
    with pytest.raises(SpeedrunError, match="a batch of 4 GPUs"): RayEngine(nodes.address, each=4)


def test_no_cluster(monkeypatch):
    monkeypatch.setattr(ray_engine, "_PATIENCE", 3)
    began = time.monotonic()
    with pytest.raises(SpeedrunError, match="no Ray cluster at 127.0.0.1:1 .*no answer within 3 s.*ray start --head"):
        RayEngine("127.0.0.1:1")
    assert time.monotonic() - began < 20
    with pytest.raises(SpeedrunError, match="no Ray cluster at nonsense .*Invalid address format"):
        RayEngine("nonsense")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SpeedrunError, match=r"pip install 'speedrun_nb\[ray\]'"): RayEngine()

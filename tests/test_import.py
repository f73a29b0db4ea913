"Importing: damaged and hostile files on small examples, and the published runs themselves if the data are there."
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest

from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.core.provenance import batch_state, read_provenance
from speedrun_nb.core.runs import read_runs
from speedrun_nb.importing.import_ import import_runs

ROOT = Path(__file__).resolve().parents[1]
MAP = ROOT / "params" / "maps" / "published.yaml"
PUBLISHED = Path(os.environ.get("SPEEDRUN_DATA", "/nowhere")) / "published"
needs_data = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="SPEEDRUN_DATA names no folder with published runs")


def row(i, **changes):
    "A line of results.jsonl."
    ended = f"2026-01-01T00:00:{i:02}"
    whole = dict(run_id=i, seed=42 + i, accuracy=0.94, time_seconds=4.4, timestamp=ended, success=True)
    return json.dumps(whole | changes)


def make_experiment(folder, rows):
    "The least that is an experiment folder."
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(f"{line}\n" for line in rows))
    return folder


def all_files(folder): return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def test_one_bad_folder_of_eleven_is_reported(tmp_path):
    for n in range(10): make_experiment(tmp_path / f"pub/good_{n}", [row(i, accuracy=0.9 + n / 1000) for i in range(3)])
    make_experiment(tmp_path / "pub/bad", [row(0), row(1, time_seconds=-1), row(2)])
    report = import_runs(tmp_path / "pub", tmp_path / "out")
    assert len(report.imported) == 10 and report.runs == 30
    assert report.refused == ["pub/bad/results.jsonl, line 2: time_seconds: -1 is not at least 0"]
    assert not [name for name in all_files(tmp_path / "out") if "bad" in name or "import-" in name]


@pytest.mark.parametrize("line, why", [
    ('{"run_id": 1, "seed": 43, "accuracy": 0.94', "is not JSON"),
    ("[1, 2]", "holds list"),
    (row(1, accuracy="high"), "'high' is not a number"),
    (row(1, accuracy=94), "94 is not between 0 and 1"),
    (row(1, seed=1.5), "1.5 is not a whole number"),
    (row(1, timestamp="soon"), "'soon' is not a time"),
    (row(1, time_seconds=[4.4]), "is not a number")])
def test_a_bad_line_refuses_its_source(tmp_path, line, why):
    folder = make_experiment(tmp_path / "experiment", [row(0), line, row(2)])
    report = import_runs(folder, tmp_path / "out")
    assert not report.imported and len(report.refused) == 1
    assert report.refused[0].startswith("experiment/results.jsonl, line 2: ") and why in report.refused[0]
    assert all_files(tmp_path / "out") == []


def test_nan_is_a_diverged_run(tmp_path):
    import_runs(make_experiment(tmp_path / "experiment", [row(0), row(1, accuracy=float("nan"))]), tmp_path / "out")
    frame, problems = read_runs(tmp_path / "out")
    assert sorted(frame.status) == ["completed", "diverged"] and not problems


def test_same_bytes_are_the_same_runs(tmp_path):
    for name in "ab": make_experiment(tmp_path / "pub" / name, [row(0)])
    report = import_runs(tmp_path / "pub", tmp_path / "out")
    assert len(report.imported) == len(report.already) == 1 and len(read_runs(tmp_path / "out")[0]) == 1


def test_equal_results_of_two_files_are_both_imported(tmp_path):
    make_experiment(tmp_path / "pub/a", [row(0), row(1)])
    make_experiment(tmp_path / "pub/b", [row(0, timestamp="2026-02-01T00:00:00"), row(1)])
    assert len(import_runs(tmp_path / "pub", tmp_path / "out").imported) == 2
    assert read_runs(tmp_path / "out")[0].run_id.nunique() == 4


def test_names_in_data_stay_inside_outputs(tmp_path):
    folder = make_experiment(tmp_path / "experiment", [row(0)])
    (folder / "config.json").write_text(json.dumps({"experiment_name": "../../../../etc/cron.d/evil"}))
    report = import_runs(folder, tmp_path / "out")
    batch = report.imported[0]["batch"]
    assert batch.startswith("cifar/published/_.._.._.._etc_cron.d_evil/")
    assert (tmp_path / "out" / batch / "runs.jsonl").is_file()


class Trap:
    "A pickle that leaves a trace where it is loaded."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def test_pickles_are_never_loaded(tmp_path):
    for name in ("log.pt", "x/log.pkl"):
        (tmp_path / "pub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pub" / name).write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    assert "convert it to JSON" in import_runs(tmp_path / "pub/log.pt", tmp_path / "out").refused[0]
    make_experiment(tmp_path / "pub/good", [row(0)])
    assert "2 pickles" in import_runs(tmp_path / "pub", tmp_path / "out").notes[0] and not (tmp_path / "trace").exists()


def test_source_in_a_log_is_never_executed(tmp_path):
    trace, bar = tmp_path / "trace", "=" * 100 + "\n"
    opened = f"open({str(trace)!r}, 'w')"
    fields = f"    batch_size : int = {opened} or 8\n    sequence_length : int = 8*128\n"
    code = f"{opened}\nclass Hyperparameters:\n{fields}"
    losses = [(step, kind, 5 - step / 10) for step in (15, 30) for kind in ("train", "val")]
    steps = "".join(f"step:{step}/30 {kind}_loss:{loss} train_time:{step * 100}ms\n" for step, kind, loss in losses)
    (tmp_path / "run.txt").write_text(bar + code + bar + "Running pytorch 2.4 compiled for CUDA 12.1\n" + bar + steps)
    import_runs(tmp_path / "run.txt", tmp_path / "out")
    config = read_runs(tmp_path / "out")[0].config[0]
    assert not trace.exists() and config["data.sequence_length"] == 1024 and "train.batch_size" not in config


def test_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
    folder = make_experiment(tmp_path / "experiment", [row(0)])
    def interrupt(*_): raise KeyboardInterrupt
    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt): import_runs(folder, tmp_path / "out")
    monkeypatch.undo()
    assert not [name for name in all_files(tmp_path / "out") if name.endswith(("runs.jsonl", "provenance.json"))]
    assert read_runs(tmp_path / "out")[0].empty
    assert import_runs(folder, tmp_path / "out").runs == 1


def test_outputs_that_cannot_be_written_are_reported(tmp_path):
    (tmp_path / "out").write_text("a file")
    folder = make_experiment(tmp_path / "experiment", [row(0)])
    assert "cannot be written" in import_runs(folder, tmp_path / "out").refused[0]


def test_map_and_arguments(tmp_path):
    for name in ("a_pod1", "a_pod2"): make_experiment(tmp_path / "pub" / name, [row(0, note=name)])
    (tmp_path / "map.yaml").write_text("""
runs:
  - {path: '*_pod1', host: pod1}
  - {path: 'pub/*', variant: x, host: other, repeat: 2, clock: stopwatch}
  - {path: zzz, host: z}
""")
    report = import_runs(tmp_path / "pub", tmp_path / "out", map_file=tmp_path / "map.yaml")
    frame = read_runs(tmp_path / "out")[0].sort_values("host_id")
    assert list(frame.host_id) == ["other", "pod1"] and set(frame.variant) == {"x"}
    assert set(frame.repeat) == {2} and set(frame.clock) == {"stopwatch"}
    assert len(report.notes) == 1 and "map.yaml" in report.notes[0] and "zzz" in report.notes[0]
    again = import_runs(tmp_path / "pub", tmp_path / "other", variant="y", host="h", map_file=tmp_path / "map.yaml")
    assert {(b["variant"], b["host"]) for b in again.imported} == {("y", "h")}
    (tmp_path / "map.yaml").write_text("runs: [{path: x, hots: y}]")
    with pytest.raises(SpeedrunError, match='Did you mean "host"'):
        import_runs(tmp_path / "pub", tmp_path / "out", map_file=tmp_path / "map.yaml")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "Everything that was published, imported once."
    outputs = tmp_path_factory.mktemp("published")
    report = import_runs(PUBLISHED, outputs, map_file=MAP)
    return outputs, report, read_runs(outputs)[0]


def completed(frame, study, variant):
    "The completed runs of a variant."
    chosen = (frame.study == study) & (frame.variant == variant) & (frame.status == "completed")
    return frame[chosen].reset_index(drop=True)


@needs_data
def test_all_published_runs_are_imported(published):
    outputs, report, frame = published
    assert not report.refused and not report.already and report.runs == len(frame) == 3414 and frame.run_id.is_unique
    assert list(outputs.glob(".*")) == []
    formats = Counter(batch["format"] for batch in report.imported)
    assert formats == {"grid": 10, "experiment folder": 12, "benchmark log": 3, "speedrun log": 2}
    assert all(batch_state(outputs / batch["batch"]) == "imported" for batch in report.imported)


@needs_data
def test_importing_twice_adds_nothing(published):
    outputs, report, _ = published
    before = all_files(outputs)
    again = import_runs(PUBLISHED, outputs)  # without the map: other names, the same runs
    assert again.imported == [] and len(again.already) == len(report.imported) and not again.refused
    assert all_files(outputs) == before


SUMMARIZED = {  # column -> what a summary calls it
    "cifar": {"accuracy": "accuracy", "time_seconds": "time"},
    "gpt": {"val_loss": "val_loss", "train_loss": "train_loss", "wall_seconds": "time"}}


@needs_data
def test_means_are_those_of_the_summaries(published):
    _, report, frame = published
    folders = [batch for batch in report.imported if batch["format"] == "experiment folder"]
    for batch in folders:
        rows = frame[(frame.batch == Path(batch["batch"]).name) & (frame.status == "completed")]
        summary = (PUBLISHED.parent / batch["source"]).with_name("summary.json")
        said = json.loads(summary.read_text())["statistics"]
        assert len(rows) == said["n_runs"]
        for column, metric in SUMMARIZED[batch["study"]].items():
            assert rows[column].mean() == pytest.approx(said[metric]["mean"], rel=1e-12)


@needs_data
@pytest.mark.parametrize("variant, accuracy, seconds", [
    ("benchmark_baseline", 0.9400870, 4.051544), ("hardswish", 0.9376275, 4.016455), ("lion", 0.9265545, 4.124030)])
def test_benchmark_logs(published, variant, accuracy, seconds):
    runs = completed(published[2], "cifar", variant)
    assert len(runs) == 200 and runs.accuracy.mean() == pytest.approx(accuracy, abs=5e-8)
    assert runs.time_seconds.mean() == pytest.approx(seconds, abs=5e-7)
    assert runs.fingerprint.nunique() == 200 and runs.seed.isna().all() and sorted(runs.order) == list(range(200))


@needs_data
def test_a_cell_of_the_grid(published):
    runs = completed(published[2], "cifar", "grid_tta1_ep11.0")
    assert len(runs) == 10 and runs.accuracy.mean() == pytest.approx(0.94035, abs=5e-6)
    assert runs.time_seconds.mean() == pytest.approx(5.169, abs=5e-4)


@needs_data
def test_the_headline_pair(published):
    frame = published[2]
    baseline, variant = completed(frame, "cifar", "baseline"), completed(frame, "cifar", "det_crop_backoff")
    assert baseline.groupby("host_id").size().to_dict() == {"instance1": 200, "instance2": 200}
    assert variant.groupby("host_id").size().to_dict() == {"instance1": 1000, "instance2": 1000}
    assert baseline.config_hash.nunique() == variant.config_hash.nunique() == 1
    assert variant.config[0]["augment.crop_order"] == "deterministic"
    assert variant.config[0]["augment.crop_until_epoch"] == 7
    assert baseline.config[0]["augment.crop_until_epoch"] is None
    assert set(baseline.seed) == set(range(42, 242)) and baseline.clock[0].startswith("wall")


@needs_data
def test_a_control_that_never_ran_is_found(published):
    outputs, report, frame = published
    where = "ablation_random_translate_20251207_055019/experiment.log, line 78"
    found, = [each for each in report.contradictions if where in each]
    assert "augment.crop_order is deterministic" in found and "random" in found
    control = completed(frame, "cifar", "ablation_random_translate")
    other = completed(frame, "cifar", "deterministic_translate")
    assert set(control.config_hash) == set(other.config_hash) and control.accuracy.tolist() == other.accuracy.tolist()
    assert not set(control.run_id) & set(other.run_id)


@needs_data
def test_provenance_of_an_experiment_folder(published):
    provenance = read_provenance(next(published[0].glob("cifar/published/ablation_random_translate/*")))
    assert provenance["settings_claimed"] == {"augment.crop_order": "random"}
    commit = "564309a811be04ac9dc8aca60edc44fada0c8d27"
    assert provenance["git"] == dict(commit=commit, dirty=True, diff_hash=None, diff="")
    assert provenance["gpus"] == [{"name": "NVIDIA A100 80GB PCIe"}]
    assert provenance["packages"] == {"torch": "2.8.0+cu128"} and provenance["expected_runs"] == 100


@needs_data
@pytest.mark.parametrize("variant, seconds", [
    ("baseline_stage_a", [1378.312]),
    ("palm_parallel_stage_a", [1346.969, 1347.741]),
    ("depth_warming_stage_a", [1840.579, 1846.350]),
    ("baseline_stage_c", [1388.871, 1389.268, 1395.493]),
    ("palm_parallel_stage_c", [1346.316, 1350.982, 1355.813]),
    ("record_5", [910.546])])
def test_times_of_nanogpt(published, variant, seconds):
    assert sorted(completed(published[2], "gpt", variant).time_seconds) == seconds


@needs_data
def test_an_interrupted_run_of_nanogpt(published):
    frame = published[2]
    palm = completed(frame, "gpt", "palm_parallel_stage_c")
    failed = frame[(frame.variant == "palm_parallel_stage_c") & (frame.status == "failed")]
    error, = failed.error
    assert failed.seed.tolist() == [44] and "interrupted by user" in error and "step 3250 of 5100" in error
    assert sorted(palm.seed) == [42, 42, 43] and palm.fingerprint.nunique() == 3
    assert len(palm.curve[0]["step"]) == 42 and palm.peak_memory_bytes.tolist() == [28295 * 2**20] * 3


@needs_data
def test_a_fallback_of_the_compiler_is_noted(published):
    outputs, _, frame = published
    curve = completed(frame, "gpt", "depth_warming_stage_a").curve[0]
    assert curve["step_ms"][5] == pytest.approx(1458, abs=30) and curve["step_ms"][-1] == pytest.approx(2463, abs=10)
    assert curve["time_seconds"][0] == 0
    notes = read_provenance(next(outputs.glob("gpt/published/depth_warming_stage_a/*")))["notes"]
    assert "line 701: after step 667: torch._dynamo hit config.recompile_limit (8)" in notes[0]
    assert "'forward' (train_gpt_depth_warn.py:219)" in notes[0]


@needs_data
def test_provenance_of_a_record(published):
    outputs, _, frame = published
    record = read_provenance(next(outputs.glob("gpt/published/record_5/*")))
    assert record["started_at"] == "2024-10-14T05:01:30.000000+00:00" and record["code"] is None
    assert len(record["gpus"]) == 8
    assert record["gpus"][0] == dict(name="NVIDIA H100 80GB HBM3", driver_version="535.129.03")
    replication = completed(frame, "gpt", "record_5_replication")
    assert replication.config[0]["model.key_value_heads"] is None


@needs_data
def test_copies_with_a_damaged_line(tmp_path):
    for name in ("final_baseline_instance1", "final_baseline_instance2"):
        (tmp_path / "pub" / name).mkdir(parents=True)
        for path in (PUBLISHED / "runner-logs/cifar" / name).iterdir():
            shutil.copyfile(path, tmp_path / "pub" / name / path.name)
    damaged = tmp_path / "pub/final_baseline_instance2/results.jsonl"
    lines = damaged.read_text().splitlines()
    damaged.write_text("\n".join([*lines[:56], lines[56][:40], *lines[57:]]))
    report = import_runs(tmp_path / "pub", tmp_path / "out")
    assert report.runs == 200 and len(report.refused) == 1
    assert report.refused[0].startswith("pub/final_baseline_instance2/results.jsonl, line 57: is not JSON")
    assert set(read_runs(tmp_path / "out")[0].variant) == {"cifar10_baseline"}


@needs_data
@pytest.mark.parametrize("lacking", ["hyperparameters.json", "experiment.log", "summary.json"])
def test_a_folder_may_lack_files(tmp_path, lacking):
    (tmp_path / "experiment").mkdir()
    for path in (PUBLISHED / "runner-logs/cifar/ablation_random_translate_20251207_055019").iterdir():
        if path.name != lacking: shutil.copyfile(path, tmp_path / "experiment" / path.name)
    report = import_runs(tmp_path / "experiment", tmp_path / "out")
    assert report.runs == 100 and not report.refused
    assert report.imported[0]["variant"] == "ablation_random_translate"
    assert len(report.contradictions) == (lacking != "experiment.log")  # the log repeats the configuration


def import_truncated(tmp_path, name):
    "Import a published file that lacks its last 1000 bytes."
    path = tmp_path / Path(name).name
    path.write_bytes((PUBLISHED / name).read_bytes()[:-1000])
    return import_runs(path, tmp_path / "out")


@needs_data
def test_a_truncated_benchmark_is_refused(tmp_path):
    report = import_truncated(tmp_path, "benchmark-json/lion_20251209_025537/log.json")
    assert report.imported == [] and "log.json, line " in report.refused[0]


@needs_data
def test_a_truncated_grid_is_noted(tmp_path):
    report = import_truncated(tmp_path, "grid-csv/part1_cifar10.csv")
    assert not report.refused and "line 95 does not end" in report.notes[0]


@needs_data
def test_a_truncated_log_is_a_failed_run(tmp_path):
    report = import_truncated(tmp_path, "speedrun-txt/modern_arch_record.txt")
    assert report.imported[0]["failed"] == 1 and "without a final validation" in read_runs(tmp_path / "out")[0].error[0]

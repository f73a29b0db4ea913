"What the tests share: commands run as a user runs them, each with a deadline; the smallest batch that trains."

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from speedrun_nb.cli.main import main
from speedrun_nb.core.records import Ready, Result

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTEBOOK = ROOT / "nbs" / "run_cifar.ipynb"
DEADLINE = 180  # seconds; a busy machine may need many times what a quiet one does

TINY = {
    "data.train_images": 500,
    "whitening.images": 200,
    "train.batch_size": 100,
    "train.epochs": 3,
    "model.widths": [8, 8, 8],
}
TINY_WORDS = "data.train_images=500 whitening.images=200 train.batch_size=100 train.epochs=3 model.widths=[8,8,8]"


def pytest_collection_modifyitems(items):
    "The longest files first: each stays on one process, and the last should not have to be waited for."
    longest = ("test_sweep", "test_ray", "test_gpt", "test_demo", "test_batches")
    items.sort(key=lambda item: item.path.stem not in longest)


def environment(**changes):
    "This environment without what steers the product; one CPU thread, so that results are the same bits anywhere."
    steering = ("IN_TEST", "SPEEDRUN_DATA", "SPEEDRUN_PROFILE", "SPEEDRUN_OUTPUTS")
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    return kept | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | changes


def start(*command, cwd=ROOT, env=None):
    "Start a command in a process group of its own; an interrupt reaches it even where this one ignores it (nohup)."
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=env or environment(),
        stdin=subprocess.DEVNULL,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process, timeout=DEADLINE):
    "Wait for a command's end: code, out, err. A Jupyter kernel notices by itself that its parent is gone."
    try: out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def call(*command, **options): return finish(start(*command, **options))


def strict_json(text):
    "Parse JSON as the standard has it: NaN and Infinity are not in it."
    def refuse(word): raise ValueError(f"{word} is not JSON")
    return json.loads(text, parse_constant=refuse)


def batch_folders(outputs): return sorted(path.parent for path in Path(outputs).glob("*/*/*/*/provenance.json"))


def read_batch(folder):
    "The records and the provenance of one batch."
    path = folder / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [strict_json(line) for line in lines], strict_json((folder / "provenance.json").read_text(encoding="utf-8"))


def stub_train(settings, seeds):
    "A trainer that trains nothing."
    yield Ready("cpu", "fp32", 1, 0.1, {})
    for seed in seeds:
        yield Result(
            seed,
            "completed",
            1 + seed / 100,
            dict(accuracy=0.9, accuracy_plain=0.9, train_loss=1.0),
            {},
            [1.0, seed],
            None,
        )


def copy_project(folder):
    "A project of its own, with this one's studies."
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns(".ipynb_checkpoints", "_proc")
    for name in ("params", "nbs"): shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


@pytest.fixture
def no_warnings():
    "A warning from numpy, scipy or pandas is a case that was not thought of."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def clean_environment(monkeypatch, tmp_path):
    "No data, no settings of this user; the cache folder is empty."
    for name in ("IN_TEST", "SPEEDRUN_DATA", "SPEEDRUN_PROFILE", "SPEEDRUN_OUTPUTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def speedrun(clean_environment, capsys):
    "The `speedrun` command within this process. An exception that it does not explain fails the test."
    def run(*arguments):
        capsys.readouterr()
        code = 0
        try: main([str(word) for word in arguments])
        except SystemExit as end: code = end.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)
    return run


@pytest.fixture
def project(clean_environment, tmp_path, monkeypatch):
    "A project of its own, which is the working directory."
    folder = copy_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder

"""A third study, as a user would add one: settings and a trainer, params, a run notebook, a paper.

It goes through run, sweep, compare, audit and render, in a checkout of its own.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import BIN, ROOT, call, environment, read_batch, strict_json

TOY = Path(__file__).parent / "toy"


def write_run_notebook(project):
    "The notebook of another study with the name changed, as one would make it."
    notebook = json.loads((ROOT / "nbs/run_cifar.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        text = "".join(cell["source"]).replace("cifar", "toy")
        if "IN_TEST" in text: text = "import sys"  # nothing here is slow
        cell["source"] = text.splitlines(keepends=True)
    (project / "nbs/run_toy.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A checkout with the toy study in it."
    project = tmp_path_factory.mktemp("toy") / "project"
    ignored = shutil.ignore_patterns("__pycache__", "_output", ".ipynb_checkpoints")
    for folder in ("speedrun_nb", "params", "paper"): shutil.copytree(ROOT / folder, project / folder, ignore=ignored)
    (project / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", project)
    package = project / "speedrun_nb/toy"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("settings.py", "train.py"): shutil.copy(TOY / name, package)
    shutil.copytree(TOY / "params", project / "params/toy")
    shutil.copy(TOY / "sweep.yaml", project / "params/sweeps/toy.yaml")
    shutil.copy(TOY / "toy.qmd", project / "paper")
    listed = project / "paper/_quarto.yml"
    listed.write_text(listed.read_text().replace("    - cifar10.qmd\n", "    - cifar10.qmd\n    - toy.qmd\n"))
    write_run_notebook(project)
    return project


@pytest.fixture(scope="module")
def speedrun(project):
    "The command in that checkout; it must succeed."
    def run(*arguments):
        done = call(BIN / "speedrun", *arguments, cwd=project, env=environment(PYTHONPATH=str(project)))
        assert done.code == 0, done.err
        return done
    return run


@pytest.fixture(scope="module")
def swept(speedrun):
    "The sweep has run: two variants, six blocks of one seed."
    done = speedrun("sweep", "toy")
    assert "12 of 12 runs done" in done.out
    return done


def test_a_batch(speedrun, project):
    done = speedrun("run", "toy", "-p", "variant", "faster", "-p", "seeds", "10:12", "-p", "outputs", "outputs/apart")
    records, provenance = read_batch(Path(done.out.strip()))
    assert [record["seed"] for record in records] == [10, 11] and provenance["status"] == "completed"
    assert all(record["study"] == "toy" and record["metrics"]["loss"] < 0.02 for record in records)


def test_a_comparison(speedrun, swept):
    result = strict_json(speedrun("compare", "toy", "baseline", "faster", "--json").out)
    assert result["verdict"]["outcome"] == "supported" and result["guard"]["outcome"] == "kept"
    assert result["difference"]["relative"] == pytest.approx(-0.1, abs=0.01)


def test_an_audit(speedrun, swept):
    found = {finding["id"]: finding for finding in strict_json(speedrun("audit", "toy", "--json").out)}
    assert not [name for name, finding in found.items() if finding["severity"] == "serious"], found


def test_a_paper(speedrun, swept, project):
    speedrun("render", "toy", "--engine", "built-in")
    html = (project / "paper/_output/toy.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", " ", html)
    assert "Does a cheaper step save time?" in text and "supported" in text and "train.step_ms" in text
    assert "Made-up points" in text and (project / "paper/_output/toy.pdf").stat().st_size > 10_000


def test_it_stops_no_command_of_the_others(speedrun, swept):
    "A study without data sets, and with one profile."
    assert "FineWeb" in strict_json(speedrun("doctor", "--json").out)
    studies = {variant["study"] for variant in strict_json(speedrun("variants", "--profile", "demo", "--json").out)}
    assert studies == {"cifar", "gpt", "toy"}
    assert {row["study"] for row in strict_json(speedrun("runs", "--json").out)} == {"toy"}
    assert strict_json(speedrun("ledger", "--json").out)

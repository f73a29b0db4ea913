"The `speedrun` command: every subcommand, its help, its JSON, its exit codes, and its errors."

import json
import re
import shutil

import pytest
from simulate import simulated_runs
import requests
from conftest import BIN, ROOT, call, copy_project, strict_json, stub_train

import speedrun_nb
from speedrun_nb.cifar.settings import METRICS
from speedrun_nb.core import study as core_project
from speedrun_nb.core.batch import run_batch
from speedrun_nb.core.parameters import plan_batch
from speedrun_nb.core.errors import SpeedrunError
from speedrun_nb.core.records import FIELDS, Ready, Result, append_record
from speedrun_nb.sweep.file import promoted_file, read_stage, read_sweep
from speedrun_nb.sweep.slots import Slot

COMMANDS = [
    "doctor",
    "variants",
    "runs",
    "run",
    "sweep",
    "promote",
    "ledger",
    "withdraw",
    "compare",
    "audit",
    "import",
    "power",
    "render",
    "data",
    "tokenize",
]
VARIANTS = ["baseline", "det_crop", "det_crop_backoff", "det_crop_then_random", "random_crop_backoff"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    "Eight simulated runs of three variants: one faster and better, one slower."
    folder = tmp_path_factory.mktemp("simulated")
    simulated_runs(folder, effects={"baseline": (0, 0), "det_crop": (-0.4, 0.01), "random_crop_backoff": (0.4, 0)})
    return folder


@pytest.fixture
def no_training(monkeypatch):
    "What ought to be refused fails at once when it is not, rather than train."
    def execute_notebook(source, target, parameters, **options): raise AssertionError(f"would train {parameters}")
    monkeypatch.setattr("papermill.execute_notebook", execute_notebook)


def lines_of(text, *words):
    "The lines of a table that hold all these words."
    return [line for line in text.splitlines() if all(word in line for word in words)]


# the installed program

def test_installed_command(tmp_path):
    done = call(BIN / "speedrun", "--version", cwd=tmp_path)
    assert (done.code, done.out.strip(), done.err) == (0, speedrun_nb.__version__, "")


def test_errors_go_to_standard_error_without_a_traceback(tmp_path):
    done = call(BIN / "speedrun", "run", "cifar", "-p", "variant", "det_corp", cwd=tmp_path)
    assert done.code == 1 and done.out == ""
    assert done.err.startswith('error: there is no variant of cifar "det_corp". Did you mean "det_crop"?')
    assert "Traceback" not in done.err


def test_works_anywhere_with_root(tmp_path):
    project = copy_project(tmp_path / "elsewhere")
    done = call(BIN / "speedrun", "--root", project, "doctor", "--json", cwd=tmp_path)
    assert done.code == 0 and json.loads(done.out)["project"] == str(project)


# help and misuse

def test_help_names_every_command(speedrun):
    for done in (speedrun("--help"), speedrun()):
        assert all(re.search(rf"\b{name}\b", done.out + done.err) for name in COMMANDS)
    assert speedrun("--help").code == 0


@pytest.mark.parametrize(
    "command, words",
    [
        ("doctor", ["--json"]),
        ("variants", ["--json", "--profile"]),
        ("runs", ["--json", "--outputs", "--profile"]),
        ("run", ["--parameter", "seeds", "overrides"]),
        ("sweep run", ["--dry-run", "--watch-budget", "--engine", "--address", "--resource", "--outputs"]),
        ("sweep status", ["--json", "--outputs"]),
        ("promote", ["--json", "--outputs"]),
        ("ledger", ["--json", "--price", "--outputs"]),
        ("withdraw", ["--why", "--json", "--outputs", "cannot be withdrawn"]),
        ("compare", ["--json", "--metric", "--where", "--profile", "--outputs"]),
        ("audit", ["--json", "--profile", "--outputs"]),
        ("import", ["--study", "--variant", "--host", "--map", "--outputs", "--json"]),
        ("power", ["--claim", "--margin", "--family", "--seeds-per-batch", "--units", "--price", "--json"]),
        ("render", ["--engine", "--profile", "--outputs"]),
        ("data", ["fetch", "check"]),
        ("data fetch", ["Download a data set", "--shards"]),
        ("tokenize", ["--out", "--encoding", "--validation", "--processes"]),
        ("data check", ["--json"]),
    ],
)
def test_help_of_a_command(speedrun, command, words):
    done = speedrun(*command.split(), "--help")
    assert done.code == 0 and [word for word in words if word not in done.out] == []


@pytest.mark.parametrize("arguments", ["nosuch", "runs --nosuch", "run", "compare cifar baseline", "data nosuch"])
def test_misuse_has_exit_code_2(speedrun, arguments):
    done = speedrun(*arguments.split())
    assert done.code == 2 and done.out == "" and "Error" in done.err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("run cifra", 'no study "cifra". Did you mean "cifar"?'),
        ("run cifar -p variant det_corp", 'no variant of cifar "det_corp". Did you mean "det_crop"?'),
        ("run cifar -p profile dmeo", 'no profile of cifar "dmeo". Did you mean "demo"?'),
        ("run cifar -p varaint det_crop", 'no parameter "varaint". Did you mean "variant"?'),
        (
            "run cifar -p profile demo -p overrides train.epoch=4",
            'no setting "train.epoch". Did you mean "train.epochs"?',
        ),
        ("run cifar -p profile demo -p overrides epochs=4", 'no setting "epochs". Did you mean "train.epochs"?'),
        (
            "run cifar -p profile demo -p overrides train.precision=bf61",
            'train.precision: bf61 is not valid; it takes one of auto, fp16, bf16, fp32. Did you mean "bf16"?',
        ),
        (
            "run cifar -p profile demo -p overrides model.logit_scale=0",
            "model.logit_scale: 0 is not valid; it takes a number above 0",
        ),
        (
            "run cifar -p profile demo -p overrides lookahead.decay=1.5",
            "lookahead.decay: 1.5 is not valid; it takes a number at least 0, at most 1",
        ),
        (
            "run cifar -p profile demo -p overrides train.batch_size=ten",
            "train.batch_size: ten is not valid; it takes a whole number",
        ),
        ("run cifar -p profile demo -p overrides train.epochs", "overrides: expected key=value"),
        (
            "run cifar -p profile demo -p overrides model.widths=[8,8]",
            "model.widths: [8, 8] is not valid; it takes a list of 3 whole numbers",
        ),
        (
            "run cifar -p profile demo -p variant det_crop_backoff -p overrides train.epochs=2",
            "augment.crop_until_epoch (2) never comes: training ends after 2 epochs",
        ),
        (
            "run cifar -p profile demo -p variant det_crop -p overrides augment.crop_order=random",
            'the variant "det_crop" has the baseline\'s settings: it would change nothing',
        ),
        ("run cifar -p seeds a", "seeds: 'a' is not valid; write a range"),
        ("run cifar -p seeds 3:1", "seeds: '3:1' is not valid"),
        ("run cifar -p seeds 0", "seeds: '0' is not valid"),
        ("run cifar -p seeds 1,1", "seeds: [1, 1] names a seed twice"),
        ("run cifar -p seeds 1,,2", "seeds: '1,,2' is not valid"),
        ("run cifar -p seeds 4294967296,1", "seeds: '4294967296,1' is not valid"),
        ("run cifar -p repeat -1", "repeat: '-1' is not a whole number from 0 up"),
        ("run cifar -p block x", "block: 'x' is not a whole number"),
        ("run cifar -p batch ../above", "batch: '../above' is not a folder's name"),
        ("run cifar -p variant", "-p takes a name and a value"),
        ("run cifar --parameter=variant", "takes a name and a value"),
        ("variants cifra", 'no study "cifra". Did you mean "cifar"?'),
        ("variants --profile dmeo", 'no profile "dmeo". Did you mean "demo"?'),
        ("runs cifra", 'no study "cifra". Did you mean "cifar"?'),
        ("compare cifra baseline det_crop", 'no study "cifra". Did you mean "cifar"?'),
        ("sweep nosuch.yaml", "there is no sweep file"),
        ("render cifar11", 'no document "cifar11"'),
        ("data check cifar100", 'no data set "cifar100". Did you mean "cifar10"?'),
        ("data fetch cifr10", 'no data set "cifr10". Did you mean "cifar10"?'),
        ("--root nosuch runs", "--root: nosuch is not a folder"),
    ],
)
def test_mistakes_are_explained(speedrun, no_training, arguments, expected):
    done = speedrun(*arguments.split())
    assert done.code == 1 and done.out == "" and done.err.startswith("error: ") and expected in done.err


# doctor, variants

def test_doctor(speedrun, monkeypatch, tmp_path):
    facts = json.loads((done := speedrun("doctor", "--json")).out)
    assert done.code == 0 and facts["project"] == str(ROOT) and facts["device"].split(";")[0] in ("cpu", "cuda")
    assert facts["speedrun_nb"].startswith(speedrun_nb.__version__) and "torch" in facts["packages"]
    assert facts["CIFAR-10"].startswith("not found") and "speedrun data fetch cifar10" in facts["CIFAR-10"]
    assert facts["rendering"].startswith(("built-in", "quarto"))
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "data_batch_1.bin").touch()
    monkeypatch.setenv("SPEEDRUN_DATA", str(tmp_path))
    told = speedrun("doctor")
    assert told.code == 0
    assert f"{tmp_path / 'cifar10'} lacks data_batch_2.bin" in re.sub(r"\s*│\s*│\s*│\s*", "", told.out)
    assert all(name in told.out for name in facts)


def test_variants(speedrun):
    table = speedrun("variants", "cifar", "--profile", "demo")
    assert table.code == 0 and all(len(lines_of(table.out, f" {name} ")) == 1 for name in VARIANTS)
    assert lines_of(
        table.out,
        " det_crop_backoff ",
        "augment.crop_order=deterministic, augment.crop_until_epoch=2",
        "time_seconds decrease by 1.0%",
    )
    assert lines_of(table.out, " baseline ", "nothing: the baseline")


@pytest.mark.parametrize("profile", ["demo", "cpu", "full"])
def test_variants_as_json(speedrun, profile):
    listed = {
        variant["variant"]: variant
        for variant in strict_json(speedrun("variants", "cifar", "--profile", profile, "--json").out)
    }
    assert list(listed) == VARIANTS and len({variant["config_hash"] for variant in listed.values()}) == len(VARIANTS)
    assert listed["baseline"]["changed"] == {} and listed["baseline"]["claim"] is None
    assert listed["det_crop"]["changed"] == {"augment.crop_order": "deterministic"}
    assert listed["det_crop"]["claim"] == dict(
        metric="time_seconds", direction="decrease", at_least=0.01, guard=dict(metric="accuracy", margin=0.0005)
    )
    assert all(
        variant["profile"] == profile and variant["config"].keys() == listed["baseline"]["config"].keys()
        for variant in listed.values()
    )


def test_variants_of_all_studies_that_have_the_profile(speedrun):
    studies = {
        profile: {variant["study"] for variant in strict_json(speedrun("variants", "--profile", profile, "--json").out)}
        for profile in ("demo", "stage_a")
    }
    assert studies == {"demo": {"cifar", "gpt"}, "stage_a": {"gpt"}}
    assert speedrun("variants", "--profile", "stage_x").code == 1


def test_titles_are_shown_as_they_are(speedrun, project):
    (project / "params/cifar/wider.yaml").write_text(
        'title: "Wider [red]network[/red] [b]"\nset: {augment.crop_radius: 3}\n'
    )
    assert lines_of(
        speedrun("variants", "cifar").out, " wider ", "Wider [red]network[/red] [b]", "augment.crop_radius=3"
    )


# variants that are refused, in a project of its own

@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "title: Nothing\nextends: baseline\nset: {augment.flip: alternating}\n",
            "has the baseline's settings: it would change nothing. Give it something to `set`",
        ),
        ("title: Nothing\n", "would change nothing"),
        (
            "title: Twice\nset:\n  augment.flip: none\n  augment.flip: random\n",
            'line 4, column 3: the key "augment.flip" stands twice',
        ),
        ("title: Twice\nset:\n  augment: {flip: none}\n  augment.flip: random\n", "augment.flip is given twice"),
        ("title: Unknown\nset: {augment.flop: none}\n", 'no setting "augment.flop". Did you mean "augment.flip"?'),
        ("title: Unknown\nsets: {augment.flip: none}\n", "no key of a variant"),
        ("title: Type\nset: {train.batch_size: 1.5}\n", "train.batch_size: 1.5 is not valid; it takes a whole number"),
        (
            "title: Type\nset: {augment.flip: yes}\n",
            "augment.flip: yes is not valid; it takes one of alternating, random, none",
        ),
        ("title: Loop\nextends: odd\nset: {augment.flip: none}\n", "extends itself"),
        ("title: Parent\nextends: det_corp\n", 'no variant of cifar "det_corp". Did you mean "det_crop"?'),
        (
            "title: Claim\nset: {augment.flip: none}\nclaim: {metric: time, direction: decrease, at_least: 0.01}\n",
            'Did you mean "time_seconds"?',
        ),
        ("title: Profile\nset: {augment.flip: none}\nprofiles: {dmeo: {}}\n", 'Did you mean "demo"?'),
        ("title: [\n", "line 2, column 1"),
        ("- a\n- b\n", "expected `key: value` lines, found list"),
    ],
)
def test_variant_files_that_are_refused(speedrun, project, no_training, text, expected):
    (project / "params/cifar/odd.yaml").write_text(text)
    done = speedrun("run", "cifar", "-p", "variant", "odd", "-p", "profile", "demo")
    assert done.code == 1 and done.out == "" and expected in done.err and not (project / "outputs").exists()
    assert "odd.yaml" in done.err or "det_corp" in done.err  # the file, or what it names


def test_a_variant_that_changes_nothing_in_one_profile_only(speedrun, project):
    (project / "params/cifar/odd.yaml").write_text(
        "title: Radius\nset: {augment.crop_radius: 3}\nprofiles: {demo: {augment.crop_radius: 2}}\n"
    )
    told = speedrun("variants", "--profile", "demo")
    assert told.code == 1 and "odd.yaml" in told.err and "in profile demo" in told.err and "change nothing" in told.err
    assert speedrun("variants", "--profile", "full").code == 0


def test_a_broken_file_does_not_stop_the_others(project):
    (project / "params/cifar/odd.yaml").write_text("title: [\n")
    assert plan_batch("cifar", "det_crop", profile="demo").variant.name == "det_crop"


def test_words_of_yaml_mean_what_they_say(project):
    (project / "params/cifar/odd.yaml").write_text(
        "title: 'YAML 1.2'\nset: {optimizer.lr: 1e-1, train.precision: fp32, data.train_images: none}\n"
    )
    assert plan_batch("cifar", "odd", profile="demo").variant.changed["optimizer.lr"][1] == 0.1
    sweep = project / "params/sweeps/odd.yaml"
    sweep.write_text(
        "study: cifar\nprofile: demo\nvariants: [baseline]\nseeds: 10:12\nseeds_per_batch: 1\norder_seed: 0\n"
    )
    assert read_sweep(sweep).seeds == (10, 11)  # not 612, which base 60 would make of it


# runs

def test_no_runs_yet(speedrun, tmp_path):
    assert "nothing yet" in speedrun("runs", "--outputs", tmp_path).out
    assert strict_json(speedrun("runs", "--json", "--outputs", tmp_path).out) == []
    told = speedrun("compare", "cifar", "baseline", "det_crop", "--outputs", tmp_path)
    assert told.code == 1 and "no runs yet; make some with `speedrun run cifar`" in told.err


def test_runs(speedrun, simulated):
    table = speedrun("runs", "cifar", "--outputs", simulated)
    assert table.code == 0 and table.err == "" and len(lines_of(table.out, " demo ", " completed ")) == 24
    rows = strict_json(speedrun("runs", "--json", "--outputs", simulated).out)
    assert len(rows) == 24 and {*FIELDS, *METRICS} <= rows[0].keys() and rows[0]["config"]["data.dataset"] == "embedded"
    assert [row["started_at"] for row in rows] == sorted(row["started_at"] for row in rows)
    assert len(strict_json(speedrun("runs", "--profile", "demo", "--json", "--outputs", simulated).out)) == 24


def test_runs_of_an_unknown_profile(speedrun, simulated):
    told = speedrun("runs", "--profile", "dmeo", "--outputs", simulated)
    assert told.code == 1 and 'Did you mean "demo"?' in told.err


def test_half_written_line(speedrun, tmp_path):
    simulated_runs(tmp_path, effects={"baseline": (0, 0), "det_crop": (-0.4, 0.01)})
    path = tmp_path / "cifar/demo/baseline/simulated-00/runs.jsonl"
    with path.open("ab") as file: file.write(b'{"run_id": "05b0bcfe5ceb8795", "stu')
    other = tmp_path / "cifar/demo/det_crop/simulated-00/runs.jsonl"
    other.write_bytes(b"\xff\x00 noise\n" + other.read_bytes())
    for arguments, count in ((["runs", "--json"], 16), (["compare", "cifar", "baseline", "det_crop", "--json"], None)):
        done = speedrun(*arguments, "--outputs", tmp_path)
        assert done.code == 0 and f"{path}, line 2: half-written record left out" in done.err
        assert f"{other}, line 1: damaged record left out" in done.err
        assert count is None or len(strict_json(done.out)) == count


def test_records_that_lack_fields(speedrun, tmp_path):
    folder = tmp_path / "cifar/demo/baseline/other"
    folder.mkdir(parents=True)
    append_record(
        folder / "runs.jsonl",
        dict(run_id="a", study="cifar", profile="demo", variant="baseline", seed=0, status="failed"),
    )
    assert len(strict_json(speedrun("runs", "--json", "--outputs", tmp_path).out)) == 1
    assert lines_of(speedrun("runs", "--outputs", tmp_path).out, " failed ")


def test_values_that_are_not_known(speedrun, tmp_path):
    def train(settings, seeds):
        yield Ready("cpu", "fp32", 1, 0.1, {})
        yield Result(0, "diverged", 1.5, {}, {}, [float("nan")], None)
    run_batch(plan_batch("cifar", profile="demo", seeds=1, outputs=tmp_path), train)
    row, = lines_of(speedrun("runs", "cifar", "--outputs", tmp_path).out, " diverged ")
    assert "1.500" in row and not re.search(r"\bnot\b(?! known)", row)  # half of "not known" says nothing
    assert strict_json(speedrun("runs", "--json", "--outputs", tmp_path).out)[0]["accuracy"] is None


# compare

COMPARISON = {
    "schema": None,
    "study": None,
    "profile": None,
    "metric": None,
    "better": None,
    "claim": {"metric", "direction", "at_least"},
    "baseline": {
        "name",
        "variant",
        "config_hash",
        "n",
        "mean",
        "sd",
        "median",
        "min",
        "max",
        "ci95",
        "failed",
        "diverged",
        "duplicates",
    },
    "variant": {"name", "variant", "config_hash", "n", "mean", "sd", "ci95"},
    "difference": {"absolute", "relative", "ci95", "ci95_relative", "better"},
    "tests": {"welch", "student", "mann_whitney", "permutation", "levene", "shapiro"},
    "effect": {"cohens_d", "hedges_g", "ci95", "probability_better"},
    "basis": {"unit", "method", "units", "apart", "interleaved", "unused", "batch_effect"},
    "hosts": None,
    "across_hosts": None,
    "paired": None,
    "frontier": None,
    "target": None,
    "race": None,
    "robust": {"unit", "main", "chance", "lines", "changes"},
    "family": {"method", "p", "p_adjusted"},
    "raw": {"method", "absolute", "p"},
    "estimate": {"method", "absolute", "relative", "ci95", "ci95_relative", "p", "p_claim", "better", "watched"},
    "fixed": None,
    "findings": None,
    "guard": {"metric", "margin", "difference", "bound", "p", "outcome"},
    "verdict": {"outcome", "reasons"},
}


def test_compare_as_json(speedrun, simulated):
    done = speedrun("compare", "cifar", "baseline", "det_crop", "--outputs", simulated, "--json")
    result = strict_json(done.out)
    assert done.code == 0 and done.err == "" and result.keys() == COMPARISON.keys()
    assert [name for name, keys in COMPARISON.items() if keys and not keys <= result[name].keys()] == []
    assert result["verdict"]["outcome"] == "supported" and result["guard"]["outcome"] == "kept"
    assert result["metric"] == "time_seconds"
    low, high = result["difference"]["ci95"]
    assert low < result["difference"]["absolute"] < high < 0 and -0.12 < result["difference"]["relative"] < -0.08
    assert result["baseline"]["n"] == 8
    assert result["tests"]["welch"].keys() >= {"t", "df", "p"} and result["tests"]["welch"]["p"] < 1e-6
    basis, estimate = result["basis"], result["estimate"]
    assert (basis["unit"], basis["method"], basis["units"]) == ("batch", "blocks", 8)
    assert estimate["p"] < 0.001 and result["tests"]["permutation"]["p"] == 2 / 2**8  # signs of eight blocks
    assert result["effect"]["cohens_d"] > 2


def test_compare_in_words(speedrun, simulated):
    done = speedrun("compare", "cifar", "baseline", "random_crop_backoff", "--outputs", simulated)
    assert done.code == 0 and re.search(r"^refuted$", done.out, re.MULTILINE) and "not with CIFAR-10" in done.out
    assert all(name in done.out for name in ("baseline", "random_crop_backoff", "95 % interval", "profile demo"))
    assert all(words in done.out for words in ("what is counted", "8 blocks", "as if all runs were independent"))
    other = strict_json(
        speedrun(
            "compare", "cifar", "baseline", "det_crop", "--metric", "accuracy", "--outputs", simulated, "--json"
        ).out
    )
    assert other["metric"] == "accuracy" and other["claim"] is None and other["difference"]["absolute"] > 0
    assert other["basis"]["unit"] == "run" and other["paired"].keys() >= {"n", "mean", "t", "p", "ci95", "correlation"}


@pytest.mark.parametrize("arguments, expected", [
    ("baseline det_corp", 'no runs of a variant "det_corp". Did you mean "det_crop"?'),
    ("baseline det_crop_backoff", "det_crop_backoff has no runs here yet"),
    ("baseline baseline", "same group of runs"),
    ("baseline det_crop --metric acuracy", 'no metric "acuracy". Did you mean "accuracy"?'),
    ("baseline det_crop --profile dmeo", 'no runs in profile "dmeo". Did you mean "demo"?'),
    ("baseline det_crop@ffff", "fits 0 groups")])
def test_compare_refuses(speedrun, simulated, arguments, expected):
    done = speedrun("compare", "cifar", *arguments.split(), "--outputs", simulated)
    assert done.code == 1 and done.out == "" and expected in done.err


def test_profiles_are_never_merged(speedrun, tmp_path):
    for profile in ("demo", "cpu"):
        simulated_runs(tmp_path, profile=profile, effects={"baseline": (0, 0), "det_crop": (-0.4, 0.01)})
    told = speedrun("compare", "cifar", "baseline", "det_crop", "--outputs", tmp_path)
    assert told.code == 1 and told.out == "" and "several profiles" in told.err and "demo" in told.err
    assert "cpu" in told.err
    chosen = strict_json(
        speedrun("compare", "cifar", "baseline", "det_crop", "--outputs", tmp_path, "--profile", "cpu", "--json").out
    )
    assert chosen["profile"] == "cpu" and chosen["baseline"]["n"] == 8


@pytest.mark.parametrize("profile, synthetic", [("demo", True), ("cpu", False)])
def test_the_notice_is_that_of_the_compared_runs(speedrun, tmp_path, profile, synthetic):
    for name in ("demo", "cpu"):
        simulated_runs(tmp_path, profile=name, effects={"baseline": (0, 0), "det_crop": (-0.4, 0.01)})
    done = speedrun("compare", "cifar", "baseline", "det_crop", "--outputs", tmp_path, "--profile", profile)
    assert done.code == 0 and ("synthetic images, not with CIFAR-10" in done.out) == synthetic


def test_compare_some_runs(speedrun, simulated):
    few = strict_json(
        speedrun(
            "compare",
            "cifar",
            "baseline",
            "det_crop",
            "--outputs",
            simulated,
            "--where",
            "host_id=simulated",
            "--where",
            "train.epochs=3",
            "--json",
        ).out
    )
    assert few["baseline"]["n"] == 8
    for wrong, expected in (
        ("hots=1", 'Did you mean "host_id"'),
        ("host_id=nowhere", "there are simulated"),
        ("host_id", "expected KEY=VALUE"),
    ):
        done = speedrun("compare", "cifar", "baseline", "det_crop", "--outputs", simulated, "--where", wrong)
        assert done.code == 1 and done.out == "" and expected in done.err


# audit, import, power

def test_audit(speedrun, simulated, tmp_path):
    found = strict_json(speedrun("audit", "cifar", "--outputs", simulated, "--json").out)
    assert isinstance(found, list)
    assert all(
        {"id", "severity", "message", "remedy", "runs", "groups", "figures"} <= finding.keys() for finding in found
    )
    assert {f["id"] for f in found if f["severity"] == "serious"} <= {"guard-missed"}
    done = speedrun("audit", "--outputs", simulated)
    assert done.code == 0 and "Remedy:" in done.out and re.search(r"\d serious, \d+ warning, \d+ note", done.out)
    empty = speedrun("audit", "--outputs", tmp_path)
    assert empty.code == 1 and "no runs to audit yet" in empty.err
    assert "there is no folder" in speedrun("audit", "--outputs", tmp_path / "absent").err


def test_import_compare_audit(speedrun, tmp_path):
    for name, seconds in (("baseline", 4.4), ("faster", 4.2)):
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True)
        rows = [
            dict(run_id=i, seed=i, accuracy=0.94 + i % 3 / 1000, time_seconds=seconds + i % 4 / 100, success=True)
            for i in range(8)
        ]
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = speedrun("import", tmp_path / "logs", "--study", "cifar", "--host", "one", "--outputs", tmp_path / "out")
    assert done.code == 0 and len(lines_of(done.out, "experiment folder")) == 2
    assert (
        "already imported"
        in speedrun("import", tmp_path / "logs", "--study", "cifar", "--outputs", tmp_path / "out").out
    )
    compared = strict_json(
        speedrun("compare", "cifar", "baseline", "faster", "--outputs", tmp_path / "out", "--json").out
    )
    assert compared["profile"] == "published" and compared["difference"]["better"] is True
    assert compared["baseline"]["n"] == 8
    (tmp_path / "logs" / "faster" / "results.jsonl").write_text("not json\n")
    broken = speedrun("import", tmp_path / "logs", "--study", "cifar", "--outputs", tmp_path / "other")
    assert broken.code == 1 and "results.jsonl, line 1" in broken.err
    assert len(lines_of(broken.out, "experiment folder")) == 1


def test_power(speedrun, simulated, tmp_path):
    asked = ["cifar", "--outputs", simulated, "--effect", "6%", "--margin", "accuracy=0.003", "--price", 2]
    planned = strict_json(speedrun("power", *asked, "--claim", "2%", "--units", 10, "--json").out)
    whole, effect, guard, _ = planned["answers"]
    assert whole["blocks"] >= max(effect["blocks"], guard["blocks"]) >= 5 and whole["runs"] == 5 * whole["blocks"]
    assert whole["power"] == pytest.approx(effect["power"] * guard["power"]) and planned["asked"]["blocks"] == 10
    closer = [*asked, "--claim", "4%", "--json"]
    alone, four = (strict_json(speedrun("power", *closer, "--family", n).out)["answers"][1] for n in (1, 4))
    assert four["blocks"] > alone["blocks"] > effect["blocks"]
    equal = speedrun("power", *asked, "--claim", "6%")
    assert "out of reach" in equal.out and "claim less than you expect" in equal.out
    drawn = speedrun("power", "cifar", "--outputs", simulated, "--figure", tmp_path / "power.png")
    assert drawn.code == 0 and (tmp_path / "power.png").stat().st_size > 5000
    assert "blocks of 5 runs a side" in drawn.out and "assumed: the true effect is 2 %" in drawn.out
    for wrong, expected in (
        (["--effect", "much"], "effect"),
        (["--claim", "1"], "For 1 per cent write 1%"),
        (["--margin", "accuarcy=1"], 'Did you mean "accuracy"'),
        (["--power", "80"], "power"),
        (["--units", "3"], "units: 3 is not a whole number from 5"),
        (["--between-ratio", "-1"], "between-ratio"),
        (["--metric", "tiem"], "no metric"),
    ):
        done = speedrun("power", "cifar", "--outputs", simulated, *wrong)
        assert done.code == 1 and done.out == "" and expected in done.err


def test_power_by_its_former_name(speedrun, simulated):
    asked = ["cifar", "--outputs", simulated, "--effect", "6%"]
    assert speedrun("plan", *asked).out == speedrun("power", *asked).out
    assert not lines_of(speedrun("--help").out, "│ plan ")


# sweep

@pytest.fixture
def sweep_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "study: cifar\nprofile: demo\nvariants: [baseline, det_crop, det_crop_backoff]\n"
        'seeds: "0:4"\nseeds_per_batch: 2\norder_seed: 0\n'
    )
    return path


class Asked(list):
    "An engine that notes what it is asked to run and trains nothing; a batch whose variant is in `broken` fails."
    broken, slots = (), [Slot("here", "here")]

    def free(self): return self.slots

    def start(self, slot, job): self.append(job["parameters"])

    def wait(self, seconds):
        if self[-1]["variant"] in self.broken: return [(self.slots[0], "no memory", False)]
        run_batch(plan_batch("cifar", **self[-1]), stub_train)
        return [(self.slots[0], None, False)]

    def close(self): pass


@pytest.fixture
def asked(monkeypatch):
    engine = Asked()
    monkeypatch.setattr("speedrun_nb.cli.run.make_engine", lambda *given: engine)
    return engine


def test_dry_run_alternates(speedrun, sweep_file, tmp_path, asked):
    done = speedrun("sweep", sweep_file, "--dry-run", "--outputs", tmp_path / "outputs")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines_of(done.out, "│ demo ")]
    assert "2 blocks of 2 runs a side: below 5 blocks every verdict is undecided" in done.out
    assert done.code == 0 and asked == [] and not (tmp_path / "outputs").exists()
    assert [sorted(row[2] for row in rows[i : i + 3]) for i in (0, 3)] == [
        ["baseline", "det_crop", "det_crop_backoff"]
    ] * 2
    assert [row[0] for row in rows] == list("000111") and [row[1] for row in rows] == ["0", "2", "4", "6", "8", "10"]
    assert [row[4] for row in rows] == ["0,1"] * 3 + ["2,3"] * 3


def test_a_sweep_runs_what_is_missing(speedrun, sweep_file, tmp_path, asked):
    outputs = tmp_path / "outputs"
    asked.broken = ("det_crop",)
    first = speedrun("sweep", sweep_file, "--outputs", outputs)
    assert first.code == 1 and len(asked) == 8 and "4 runs failed" in first.err
    assert "det_crop seeds 2: no memory" in first.err  # tried twice, and the others ran
    status = {
        row["condition"]: row
        for row in strict_json(speedrun("sweep", "status", sweep_file, "--json", "--outputs", outputs).out)
    }
    assert [status[name]["left"] for name in ("baseline", "det_crop")] == [0, 4]
    assert "95 % interval" in status["det_crop_backoff"]
    asked.broken = ()
    assert speedrun("sweep", sweep_file, "--outputs", outputs).code == 0
    assert [p["variant"] for p in asked[8:]] == ["det_crop"] * 2
    last = speedrun("sweep", sweep_file, "--outputs", outputs)
    assert last.code == 0 and len(asked) == 10 and "12 of 12 runs done" in last.out
    plan, = strict_json(speedrun("sweep", "status", "--json", "--outputs", outputs).out)
    assert (plan["planned"], plan["done"], plan["left"]) == (12, 12, 0) and plan["plan"].startswith("small-")
    rows = strict_json(speedrun("runs", "--json", "--outputs", outputs).out)
    assert {row["sweep"] for row in rows} == {plan["plan"]} and len(rows) == 12
    assert sorted(row["order"] for row in rows) == list(range(12)) and {row["block"] for row in rows} == {0, 1}
    assert speedrun("sweep", sweep_file, "--dry-run", "--outputs", outputs).out.startswith("0 of 6 batches to run")


def test_a_sweep_completes_a_batch_that_was_cut_off(speedrun, sweep_file, tmp_path, asked):
    run_batch(plan_batch("cifar", "det_crop", seeds=[0], profile="demo", outputs=tmp_path / "outputs"), stub_train)
    speedrun("sweep", sweep_file, "--outputs", tmp_path / "outputs")
    assert [p["seeds"] for p in asked if p["variant"] == "det_crop"] == [[1], [2, 3]]


@pytest.mark.parametrize(
    "change, expected",
    [
        (("det_crop,", "det_corp,"), 'Did you mean "det_crop"?'),
        (("profile: demo", "profile: dmeo"), 'Did you mean "demo"?'),
        (("study: cifar", "study: cifra"), 'Did you mean "cifar"?'),
        (('"0:4"', '"4:0"'), "seeds: '4:0' is not valid"),
        (("order_seed", "order_sede"), 'Did you mean "order_seed"?'),
        (('seeds: "0:4"', ""), "seeds missing"),
        (("seeds_per_batch: 2", "seeds_per_batch: 0"), "seeds_per_batch: 0 is not a whole number from 1 up"),
        (("det_crop,", "baseline,"), "'baseline' has the settings of 'baseline'"),
    ],
)
def test_sweep_files_that_are_refused(speedrun, sweep_file, asked, change, expected):
    sweep_file.write_text(sweep_file.read_text().replace(*change))
    done = speedrun("sweep", sweep_file)
    assert done.code == 1 and asked == [] and expected in done.err


@pytest.mark.parametrize("path", sorted((ROOT / "params/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_with_it(path, tmp_path):
    if "variants: promoted" in path.read_text():  # a later stage runs what `speedrun promote` lists
        assert read_stage(path)[3].after in {other.stem for other in path.parent.glob("*.yaml")}
        with pytest.raises(SpeedrunError, match=f"speedrun promote {path.stem}"): read_sweep(path, tmp_path)
        listed = promoted_file(tmp_path, path.stem)
        listed.parent.mkdir()
        listed.write_text('{"promoted": [{"variant": "kv_2"}]}')
    sweep = read_sweep(path, tmp_path)
    assert sweep.conditions[0].name == "baseline" and len(sweep.seeds) >= 3 and len(sweep.conditions) >= 2


# data

def test_data_check_and_fetch_without_data(speedrun, monkeypatch):
    done = speedrun("data", "check", "cifar10", "--json")
    rows = strict_json(done.out)
    assert done.code == 1 and [row["right"] for row in rows] == ["missing"] * 6
    assert "`speedrun data fetch cifar10` downloads it" in done.err

    def unreachable(*arguments, **options): raise requests.ConnectionError("no network")
    monkeypatch.setattr("pooch.retrieve", unreachable)
    told = speedrun("data", "fetch", "cifar10")
    assert told.code == 1 and told.out == "" and "cannot be downloaded (ConnectionError)" in told.err
    assert "set SPEEDRUN_DATA to the folder" in told.err


def test_data_check_names_what_is_wrong(speedrun, monkeypatch, tmp_path):
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    (folder / "data_batch_1.bin").write_bytes(b"short")
    with (folder / "data_batch_2.bin").open("wb") as file: file.truncate(30_730_000)  # the right size, all zeros
    monkeypatch.setenv("SPEEDRUN_DATA", str(folder.parent))
    done = speedrun("data", "check", "cifar10", "--json")
    right = {row["file"]: row["right"] for row in strict_json(done.out)}
    assert done.code == 1 and right["data_batch_3.bin"] == "missing"
    assert "truncated" in right["data_batch_1.bin"] and "wrong content" in right["data_batch_2.bin"]


# render

def test_render_without_runs(tmp_path):
    project = copy_project(tmp_path / "project")
    shutil.copytree(ROOT / "paper", project / "paper", ignore=shutil.ignore_patterns("_output", ".quarto"))
    missing = call(
        BIN / "speedrun", "render", "cifar10", "--engine", "built-in", "--outputs", tmp_path / "none", cwd=project
    )
    assert missing.code == 1 and "there is no folder" in missing.err and not (project / "paper/_output").exists()
    (tmp_path / "none").mkdir()
    done = call(
        BIN / "speedrun", "render", "cifar10", "--engine", "built-in", "--outputs", tmp_path / "none", cwd=project
    )
    assert done.code == 0, done.err
    assert [line.rpartition("/")[2] for line in done.out.splitlines()[-2:]] == ["cifar10.html", "cifar10.pdf"]
    assert done.out.startswith("rendered with built-in")
    page = (project / "paper/_output/cifar10.html").read_text(encoding="utf-8")
    assert "speedrun run cifar" in page or "make report" in page  # how to make some


def test_outside_of_a_checkout(speedrun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(core_project, "_is_root", lambda folder: False)
    done = speedrun("variants")
    assert done.code == 1 and "is not inside a checkout of speedrun_nb" in done.err and "--root FOLDER" in done.err


# runs that are given up

@pytest.fixture
def stopped(tmp_path):
    "A batch of four seeds that was stopped after two runs, one of which failed."
    def train(settings, seeds):
        yield Ready("cpu", "fp32", 1, 0.1, {})
        for seed, status in zip(seeds, ("completed", "failed"), strict=False):
            yield Result(seed, status, 1.0, dict(accuracy=0.9, accuracy_plain=0.9, train_loss=1.0), {}, [1.0], None)
        raise KeyboardInterrupt

    plan = plan_batch("cifar", "det_crop", "0:4", "demo", outputs=str(tmp_path), batch="stopped")
    with pytest.raises(KeyboardInterrupt): run_batch(plan, train)
    return plan.folder


def test_runs_that_are_given_up_are_told_of_everywhere(speedrun, stopped, tmp_path):
    before = (stopped / "runs.jsonl").read_bytes()
    done = speedrun("withdraw", "stopped", "--why", "the machine was needed", "--outputs", tmp_path)
    assert done.code == 0 and "3 runs of batch cifar/demo/det_crop/stopped were withdrawn by" in done.out
    assert (stopped / "runs.jsonl").read_bytes() == before  # nothing is deleted
    decision = json.loads((stopped / "withdrawn.json").read_text())
    assert decision["seeds"] == [1, 2, 3] and decision["by"] and decision["at"].startswith("20")
    for command in ("runs", "ledger"):
        done = speedrun(command, "--outputs", tmp_path)
        assert done.code == 0 and "the machine was needed." in done.err
        assert "stopped" in done.out or command == "ledger"
    [finding] = [f for f in json.loads(speedrun("audit", "cifar", "--json", "--outputs", tmp_path).out)
                 if f["id"] == "missing-runs"]
    assert finding["severity"] == "note" and finding["figures"]["withdrawn"] == 3
    again = speedrun("withdraw", "stopped", "--why", "another reason", "--outputs", tmp_path)
    assert again.code == 1 and "was withdrawn on" in again.err


@pytest.mark.parametrize("batch, why, expected", [
    ("stoped", "no power", 'no batch "stoped"'),
    ("../stopped", "no power", "no batch"),
    ("stopped/../stopped", "no power", "no batch"),
    ("stopped", " ", "--why is empty"),
    ("stopped", "", "--why is empty"),
])
def test_what_cannot_be_withdrawn_is_refused(speedrun, stopped, tmp_path, batch, why, expected):
    done = speedrun("withdraw", batch, "--why", why, "--outputs", tmp_path)
    assert done.code == 1 and expected in done.err and not (stopped / "withdrawn.json").exists()
    if batch == "stoped": assert 'Did you mean "stopped"?' in done.err


def test_a_reason_must_be_given(speedrun, stopped, tmp_path):
    assert speedrun("withdraw", "stopped", "--outputs", tmp_path).code == 2


def test_batches_whose_runs_are_gone_are_audited(speedrun, stopped, tmp_path):
    (stopped / "runs.jsonl").unlink()
    done = speedrun("audit", "--outputs", tmp_path)
    assert done.code == 0 and "Nothing is left of 4 runs of det_crop" in done.out

"The package as it is installed, imported and published: one source for its metadata, layers, a clean tree."

import ast
import configparser
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys

import check_style
import pytest
from conftest import BIN, ROOT, TINY_WORDS, batch_folders, call, environment, read_batch

import speedrun_nb
from speedrun_nb.core.parameters import default_parameters

NAME = "speedrun_nb"


@pytest.fixture(scope="module")
def settings():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


# settings.ini is the single source

def canonical(name): return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def wanted(requirement):
    "A requirement without blanks and with its bounds in order: name, bounds."
    name, bounds = re.fullmatch(r"([\w.-]+)\s*\(?([^;)]*)\)?", requirement.partition(";")[0].strip()).groups()
    return canonical(name), ",".join(sorted(bounds.replace(" ", "").split(",")))


@pytest.fixture(scope="module")
def distribution(tmp_path_factory):
    "The distribution that pip would make of the tree as it is now."
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("distribution")
    (folder / "made").mkdir()
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / NAME, folder / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    done = call(
        sys.executable,
        "-c",
        "import sys; sys.path.insert(0, ''); from setuptools import build_meta; "
        "build_meta.prepare_metadata_for_build_wheel('made')",
        cwd=folder,
    )
    assert done.code == 0, done.err
    return importlib.metadata.PathDistribution(next((folder / "made").glob("*.dist-info")))


def test_metadata_is_that_of_settings_ini(settings, distribution):
    metadata = distribution.metadata
    assert metadata["Name"].replace("-", "_") == settings["lib_name"] == NAME
    assert metadata["Version"] == speedrun_nb.__version__ == importlib.metadata.version(NAME) == settings["version"]
    assert metadata["Requires-Python"] == f">={settings['min_python']}"
    assert metadata["Summary"] == settings["description"]
    assert (metadata["License-Expression"] or metadata["License"]) == "MIT"
    assert metadata["Author"] == settings["author"] == "speedrun_nb contributors"


def test_requirements_and_extras_are_those_of_settings_ini(settings, distribution):
    required, extras = set(), {}
    for requirement in distribution.requires:
        extra = re.search(r"""extra == ["']([\w-]+)["']""", requirement)
        (extras.setdefault(extra[1], set()) if extra else required).add(wanted(requirement))
    assert required == {wanted(word) for word in settings["requirements"].split()}
    given = {
        key.removesuffix("_requirements"): {wanted(word) for word in settings[key].split()}
        for key in settings
        if key.endswith("_requirements")
    }
    assert given.keys() >= {"dev", "quarto", "report", "lab"} and "quarto-cli" in dict(given["quarto"])
    assert {name: extras[name] for name in given} == given and extras["all"] == set.union(*given.values())


def test_the_command_is_that_of_settings_ini(settings, distribution):
    scripts = {entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert (
        scripts
        == dict(word.split("=") for word in settings["console_scripts"].split())
        == {"speedrun": "speedrun_nb.cli.main:main"}
    )


def test_nothing_is_said_twice(settings):
    for name in ("pyproject.toml", "setup.py"):
        text = (ROOT / name).read_text()
        assert (
            not re.search(r"\[project|torch|contributors|speedrun_nb\.cli", text) and settings["version"] not in text
        ), name


def test_constraints_are_plain_and_complete(settings):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [
        line for line in lines if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[0-9][\w.]*", line)
    ] == []  # no addresses, no local versions, no conditions
    locked = [canonical(line) for line in lines]
    assert len(set(locked)) == len(locked)
    needed = {canonical(word) for key in ("requirements", "dev_requirements") for word in settings[key].split()}
    assert needed - set(locked) == set() and canonical(NAME) not in locked


# layers

FORBID = """
import sys
class Without:
    "A finder that does not find what `is_forbidden`: as if it were not installed."
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *more):
        return None if is_forbidden(name.partition(".")[0]) else self.finder.find_spec(name, *more)
loaded = [name for name in sys.modules if is_forbidden(name.partition(".")[0])]
assert not loaded, loaded
sys.meta_path[:] = map(Without, sys.meta_path)
"""
WITHOUT_TORCH = f"""
def is_forbidden(name): return name in ("torch", "torchvision", "IPython", "ipykernel", "papermill")
{FORBID}
import importlib, pkgutil
core = ("settings", "study", "variants", "runs", "provenance", "batch", "data")
modules = ["speedrun_nb.core." + name for name in core]
for layer in ("stats", "importing", "evidence", "audit"):
    package = importlib.import_module(f"speedrun_nb.{{layer}}")
    modules += [module.name for module in pkgutil.walk_packages(package.__path__, f"speedrun_nb.{{layer}}.")]
for name in modules: importlib.import_module(name)
from speedrun_nb.core.study import load_study, study_names
from speedrun_nb.core.variants import resolve, variant_names
for study in map(load_study, study_names()):
    for name in variant_names(study): resolve(study, name, "demo")
from speedrun_nb.report import study
assert "torch" not in sys.modules
print(len(modules))
"""


def test_settings_records_and_evidence_do_without_torch():
    done = call(sys.executable, "-c", WITHOUT_TORCH)
    assert done.code == 0, done.err
    assert int(done.out) >= 30


HEAVY = ("torch", "pandas", "scipy", "matplotlib", "papermill", "msgspec")


@pytest.mark.parametrize("code", ["import speedrun_nb.core.provenance", "import speedrun_nb.cli.main"])
def test_light_imports(code):
    done = call(
        sys.executable,
        "-c",
        f"import sys; {code}; print([name for name in {HEAVY} if name in sys.modules])",
    )
    assert done.code == 0 and done.out.strip() == "[]"


BARE = f"""
import importlib.metadata as metadata, re
def closure(*names):
    "The distributions that these need, without extras."
    found, left = set(), list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found: continue
        try: requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        found.add(name)
        left += [re.match(r"[\\w.-]+", requirement)[0] for requirement in requires if "extra ==" not in requirement]
    return found
allowed = closure("torch", "numpy", "PyYAML")
always = {{"speedrun_nb", "_distutils_hack", "distutils-precedence", "setuptools", "pkg_resources"}}
forbidden = {{module for module, owners in metadata.packages_distributions().items()
             if not any(re.sub(r"[-_.]+", "-", owner).lower() in allowed for owner in owners)}} - always
assert {{"pandas", "tqdm", "papermill", "matplotlib", "scipy", "typer", "rich"}} <= forbidden
assert {{"pooch", "IPython", "msgspec", "requests"}} <= forbidden
def is_forbidden(name): return name in forbidden
{FORBID}
import runpy
runpy.run_module("speedrun_nb.cifar", run_name="__main__", alter_sys=True)
"""


def test_training_with_torch_numpy_and_yaml_alone(tmp_path):
    options = ["-p", "profile", "demo", "-p", "seeds", "1", "-p", "outputs", tmp_path, "-p", "overrides", TINY_WORDS]
    done = call(sys.executable, "-c", BARE, *options)
    assert done.code == 0, done.err
    folder, = batch_folders(tmp_path)
    records, provenance = read_batch(folder)
    assert done.out.strip() == str(folder) and provenance["status"] == "completed"
    assert [record["status"] for record in records] == ["completed"]


def test_bare_machines_are_told_about_data(tmp_path):
    options = ["-p", "profile", "cpu", "-p", "outputs", tmp_path / "outputs"]
    done = call(sys.executable, "-c", BARE, *options, env=environment(HOME=str(tmp_path)))
    assert done.code == 1 and "Traceback" not in done.err
    assert "error: downloading needs the package pooch: pip install pooch" in done.err


@pytest.mark.parametrize("check", [check_style.layer_problems, check_style.order_problems], ids=["layers", "order"])
def test_imports_point_down(check):
    "Of a folder only what is below it, of a notebook only what comes before it."
    assert check(check_style.read_books()) == []


# the run notebooks

@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("run_*.ipynb")), ids=lambda path: path.stem)
def test_the_parameters_cell(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [number for number, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])] == [0]
    statements = ast.parse("".join(cells[0]["source"])).body
    assert all(isinstance(statement, ast.Assign) for statement in statements)
    declared = {statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements}
    assert declared == default_parameters(path.stem.removeprefix("run_"))
    second = ast.parse("".join(cells[1]["source"]))
    assert "notebook_parameters" in ast.unparse(
        second
    )  # which refuses what it does not know, before anything else happens


# the tree

def run_check(tree):
    return subprocess.run([sys.executable, tree / "tests/check_tree.py"], capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A copy of what is checked, as `make export` leaves it."
    tree = tmp_path_factory.mktemp("tree") / "copy"
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("nbs", NAME): shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    (tree / "tests").mkdir()
    for name in ("settings.ini", "pyproject.toml", "README.md", "tests/check_tree.py"):
        shutil.copy(ROOT / name, tree / name)
    for command in ("nbdev_export", "nbdev_clean"): assert call(BIN / command, cwd=tree).code == 0
    return tree


def contents(tree):
    return {path: path.read_bytes() for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def test_a_clean_tree_passes_and_is_left_alone(tree):
    before = contents(tree)
    done = run_check(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tree) == before


def test_everything_that_is_off_is_named(tree):
    changes = {}
    def change(name, text=None, made=False):
        path = tree / name
        changes[path] = None if made else path.read_bytes()
        path.unlink() if text is None else path.write_text(text)
    notebook = json.loads((tree / "nbs/core/09_clock.ipynb").read_text())
    next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")["execution_count"] = 7
    change(f"{NAME}/core/settings.py", (tree / NAME / "core/settings.py").read_text() + "\nx = 1\n")  # edited by hand
    change(f"{NAME}/core/study.py")                                                             # not exported
    change(f"{NAME}/core/extra.py", "x = 1\n", made=True)  # comes from no notebook
    change("nbs/core/09_clock.ipynb", json.dumps(notebook, indent=1))  # executed, not cleaned
    try: done = run_check(tree)
    finally:
        for path, content in changes.items(): path.unlink() if content is None else path.write_bytes(content)
    assert done.returncode == 1
    named = {line.strip() for line in done.stdout.splitlines()[1:]}
    assert named == {str(path.relative_to(tree)) for path in changes} | {
        f"{NAME}/_modidx.py"
    }  # the index, because it lists the odd module


@pytest.fixture(scope="module")
def published():
    "The text of every file that is or would be in a commit, but for the script that knows where data may lie."
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode: pytest.skip("not a git checkout")
    texts = {}
    for name in listed.stdout.split("\0"):
        if not name or name == ".ci/run" or not (ROOT / name).is_file(): continue
        try: texts[name] = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
    return texts


@pytest.mark.parametrize(
    "what, pattern",
    [
        ("a place of one machine", "/" + "work/|[.][.]/" + "shared"),
        ("a home folder", r"(?<![\w.])/(home|root|Users)/\w|[A-Z]:\\Users"),
        ("a private address", r"\b(10|192\.168|172\.\d+)\.\d+\.\d+\.?\d*:\d+"),
        ("an address of a person", r"[\w.+-]+@(?!users\.noreply\.)[\w-]+\.(com|net|de|edu|io)\b"),
        ("a key", r"BEGIN [A-Z ]*PRIVATE KEY|\bgh[ps]_\w{30}|\bhf_\w{30}|\bsk-\w{30}"),
    ],
)
def test_no_traces_of_a_machine(published, what, pattern):
    found = {
        name: match[0]
        for name, text in published.items()
        if name != "tests/test_package.py" and (match := re.search(pattern, text))
    }
    assert found == {}
    assert re.search("/" + "work/", published.get("tests/test_package.py", "")) is None


def test_nothing_made_is_tracked():
    listed = subprocess.run(
        ["git", "ls-files", "outputs", "paper/_output", ".venv", "*.log"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode: pytest.skip("not a git checkout")
    assert listed.stdout.split() in ([], ["outputs/README.md"])

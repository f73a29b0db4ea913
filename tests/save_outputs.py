"""Save what notebooks show: run the ones whose code changed, and keep the outputs that are the same on every run.

Each stale notebook runs twice, each time in a process of its own. An output is kept where both runs agree, where it is
small, and where it names nothing of this machine. Notebooks that train or explore are left alone.

    python tests/save_outputs.py            # run and save (make export)
    python tests/save_outputs.py --check    # are they there? (make test)
"""

import ast
import getpass
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "speedrun_nb"
KEY = "outputs_of"                 # metadata of a notebook: the code that its outputs come from
WITH = "outputs_with"              # and the modules that it used
LONGEST_TEXT, LARGEST_IMAGE = 12_000, 80_000  # characters
SKIPPED = ("run_*.ipynb", "explore.ipynb", "cluster.ipynb")


def notebooks() -> list[Path]:
    found = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    return [path for path in found if not any(path.match(pattern) for pattern in SKIPPED)]


def read(path: Path) -> dict: return json.loads(path.read_text(encoding="utf-8"))


def source_of(cell: dict) -> str: return "".join(cell["source"])


def code_of(notebook: dict) -> str:
    "All code, as one text."
    return "\n\n".join(source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code")


def digest(text: str) -> str: return hashlib.sha256(text.encode()).hexdigest()[:12]


# what a notebook depends on

def imported(code: str) -> set[str]:
    "The modules of the package that a text imports, absolute or in this file's own folder."
    return set(re.findall(rf"(?:from|import) ({NAME}(?:\.\w+)+)", code))


def module_file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports_of(file: Path) -> set[str]:
    "The modules of the package that a module imports; its relative imports made absolute."
    package, found = file.relative_to(ROOT).with_suffix("").parts, set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom): continue
        base = (
            [*package[: len(package) - node.level], *([node.module] if node.module else [])]
            if node.level
            else [node.module]
        )
        name = ".".join(base)
        if name.startswith(NAME): found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return found


def used_modules(code: str) -> str:
    "The text of every module that a notebook uses, directly or not."
    files, left = {}, imported(code)
    while left:
        file = module_file(left.pop())
        if file is None or file in files: continue
        files[file] = file.read_text(encoding="utf-8")
        left |= imports_of(file)
    return "\n".join(files[file] for file in sorted(files))


# running

def execute(path: Path) -> list[list[dict]]:
    "The outputs of every cell of a notebook, run in this process; [] for what is no code or is not run."
    from execnb.nbio import dict2nb
    from execnb.shell import CaptureShell

    os.environ["IN_TEST"] = "1"
    os.chdir(path.parent)
    shell, notebook, outputs = CaptureShell(path, mpl_format="png"), read(path), []
    for cell in dict2nb(notebook).cells:
        runs = cell.cell_type == "code" and not re.search(r"(?m)^#\|\s*(eval:\s*false|slow)", cell.source)
        if runs: shell.cell(cell)
        if runs and shell.exc: raise shell.exc
        outputs.append([dict(output) for output in cell.get("outputs") or []] if runs else [])
    return outputs


def environment() -> dict[str, str]:
    "This environment without what steers the product: data and settings of a user."
    return {name: value for name, value in os.environ.items() if not name.startswith("SPEEDRUN_")}


def run_apart(path: Path) -> list[list[dict]]:
    "`execute` in a process of its own."
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "outputs.json"
        command = [sys.executable, __file__, "--execute", path, target]
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        if done.returncode: raise SystemExit(f"{path.relative_to(ROOT)} fails:\n{done.stderr}")
        return json.loads(target.read_text())


# what is kept

def of_this_machine() -> re.Pattern:
    words = {str(ROOT), str(Path.home()), tempfile.gettempdir(), socket.gethostname()} - {"/", ""}
    if getpass.getuser() != "root": words.add(getpass.getuser())
    return re.compile("|".join(map(re.escape, sorted(words))))


def plain(output: dict) -> dict:
    "An output without what differs from run to run."
    return {name: value for name, value in output.items() if name != "execution_count"} | (
        {"execution_count": None} if output["output_type"] == "execute_result" else {})


def is_kept(output: dict, traces: re.Pattern) -> bool:
    "Small, and without traces of this machine."
    if output.get("name") == "stderr" or output["output_type"] == "error": return False
    data = output.get("data", {"text/plain": output.get("text", "")})
    texts = {kind: "".join(text) for kind, text in data.items() if isinstance(text, str | list)}
    sizes = all(
        len(text) <= (LARGEST_IMAGE if kind.startswith("image/") else LONGEST_TEXT) for kind, text in texts.items()
    )
    return sizes and not any(traces.search(text) for kind, text in texts.items() if not kind.startswith("image/"))


def keep(first: list[dict], second: list[dict], traces: re.Pattern) -> list[dict]:
    "The outputs of a cell that are worth saving: all of them, or none where two runs differ."
    first, second = ([plain(output) for output in outputs if is_kept(output, traces)] for outputs in (first, second))
    return first if first == second else []


def save(path: Path) -> int:
    "Run a notebook twice and save what it shows. The number of cells that show something."
    first, second = run_apart(path), run_apart(path)
    notebook, traces, shown, dropped = read(path), of_this_machine(), 0, 0
    for cell, one, other in zip(notebook["cells"], first, second, strict=True):
        if cell["cell_type"] != "code": continue
        hidden = source_of(cell).startswith("#| hide")
        cell["outputs"] = [] if hidden else keep(one, other, traces)
        shown += bool(cell["outputs"])
        dropped += bool(one) and not hidden and not cell["outputs"]
    code = code_of(notebook)
    notebook["metadata"] |= {KEY: digest(code), WITH: digest(used_modules(code))}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    left_out = f"; {dropped} dropped: too large, of this machine, or not the same twice" if dropped else ""
    print(f"{path.relative_to(ROOT)}: {shown} cells show something{left_out}", flush=True)
    return shown


def is_stale(path: Path) -> bool:
    "Has the notebook's code, or a module that it uses, changed since its outputs were saved?"
    notebook = read(path)
    code = code_of(notebook)
    return (notebook["metadata"].get(KEY), notebook["metadata"].get(WITH)) != (digest(code), digest(used_modules(code)))


def problems(path: Path) -> list[str]:
    "What a check says of a notebook: outputs of other code, or none."
    notebook, name = read(path), path.relative_to(ROOT)
    if notebook["metadata"].get(KEY) != digest(code_of(notebook)):
        return [f"{name}: its outputs are those of other code"]
    if not any(cell.get("outputs") for cell in notebook["cells"]): return [f"{name}: shows nothing"]
    return []


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--execute"]:
        Path(arguments[2]).write_text(json.dumps(execute(Path(arguments[1]))))
        return 0
    if arguments == ["--check"]:
        found = [problem for path in notebooks() for problem in problems(path)]
        print(*found, "run `make export`" if found else "every notebook shows what its code does", sep="\n")
        return int(bool(found))
    stale = [Path(argument).resolve() for argument in arguments] or [path for path in notebooks() if is_stale(path)]
    with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(save, stale))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Does the exported package equal the notebooks, and are the notebooks clean?

Exports and cleans a temporary copy of the tree, so that the tree itself stays as it is.
"""
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nbs", "speedrun_nb")


def copy_tree(target: Path) -> None:
    "Copy what nbdev reads."
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in FOLDERS: shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT / name, target / name)


def files(root: Path) -> set[Path]:
    "All files of the compared folders, relative to `root`."
    found = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file())
    return {path.relative_to(root) for path in found if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)}


def differences(copy: Path) -> list[str]:
    "Files that export or cleaning changed, made or would remove."
    ours, theirs = files(ROOT), files(copy)
    changed = [path for path in ours & theirs if not filecmp.cmp(ROOT / path, copy / path, shallow=False)]
    orphans = [
        path
        for path in ours
        if path.parts[0] == "speedrun_nb" and path.suffix == ".py" and not is_exported(ROOT / path)
    ]
    return sorted(map(str, [*changed, *(ours ^ theirs), *orphans]))


def is_exported(path: Path) -> bool:
    "Does a module name the notebook it comes from, and does that exist?"
    if path.name in ("__init__.py", "_modidx.py"): return True
    line = next((line for line in path.read_text().splitlines() if "File to edit:" in line), "")
    return line != "" and (path.parent / line.partition("File to edit: ")[2].rstrip(".")).resolve().is_file()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        copy.mkdir()
        copy_tree(copy)
        for command in ("nbdev_export", "nbdev_clean"):
            done = subprocess.run([Path(sys.executable).parent / command], cwd=copy, capture_output=True, text=True)
            if done.returncode: return print(done.stdout, done.stderr) or 1
        found = differences(copy)
    if not found: return print("exported package equals the notebooks, notebooks are clean") or 0
    print("not as `make export` would leave it:", *found, sep="\n  ")
    return 1


if __name__ == "__main__":
    sys.exit(main())

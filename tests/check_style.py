"""How the notebooks read: sizes of cells, lines, definitions; layers and reading order.

Prints a table, and fails where a limit is passed.

python tests/check_style.py            # the whole tree
python tests/check_style.py audit      # one folder of nbs/, without the limits that concern all
"""

import ast
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    ("core",),
    ("stats", "importing", "cifar", "gpt"),
    ("evidence",),
    ("audit",),
    ("sweep", "report", "render"),
    ("cli",),
)
SIDEWAYS = {("render", "report"), ("sweep", "report")}  # the first imports the second, on the same layer
FACADES = {"speedrun_nb.evidence"}                      # `evidence.compare` comes with the audit, which is above it
STUDIES = ("cifar", "gpt")
ENTRY = "main"                                          # every program has one
LONGEST_LINE, LONGEST_CELL, MEDIAN_CELL, MANY, CROWDED, NODES = 120, 60, 12, 3, 0.10, 11.0
FOLDERS = [folder for layer in LAYERS for folder in layer]


@dataclass(frozen=True)
class Cell:
    notebook: Path
    number: int
    source: str
    exported: bool

    @property
    def code(self) -> str:
        return "\n".join(line for line in self.source.split("\n") if not line.startswith(("#|", "%", "!")))

    @property
    def tree(self) -> ast.Module: return ast.parse(self.code)

    @property
    def lines(self) -> list[str]: return [line for line in self.code.split("\n") if line.strip()]

    @property
    def definitions(self) -> list[ast.stmt]:
        return [node for node in self.tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]

    @property
    def is_imports(self) -> bool: return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in self.tree.body)

    def __str__(self) -> str: return f"{self.notebook.relative_to(ROOT)}, cell {self.number}"


def notebooks(folders: list[str]) -> list[Path]:
    "In reading order: the layers from below, then the notebooks beside them."
    found = [path for folder in folders for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))]
    return found + (sorted((ROOT / "nbs").glob("*.ipynb")) if folders == FOLDERS else [])


def read_cells(notebook: Path) -> list[Cell]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = [(number, "".join(cell["source"])) for number, cell in enumerate(cells) if cell["cell_type"] == "code"]
    return [Cell(notebook, number, source, source.startswith("#| export")) for number, source in sources]


def module_of(cells: list[Cell]) -> str | None:
    "What a notebook exports to: core.study."
    names = [match[1] for cell in cells if (match := re.match(r"#\|\s*default_exp\s+(\S+)", cell.source))]
    return names[0].removesuffix(".__init__") if names else None


def imported(cell: Cell) -> set[str]:
    "The modules of this package that a cell imports, and packages of it."
    found = set()
    for node in ast.walk(cell.tree):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("speedrun_nb.") for name in found if name.startswith("speedrun_nb.")}


def level(module: str) -> int:
    return next((number for number, layer in enumerate(LAYERS) if module.split(".")[0] in layer), len(LAYERS))


def read_books(folders: list[str] = FOLDERS) -> dict[Path, list[Cell]]:
    "The code cells of each notebook, in reading order."
    return {notebook: read_cells(notebook) for notebook in notebooks(folders)}


def layer_problems(books: dict[Path, list[Cell]]) -> list[str]:
    "Imports that point up, or to a neighbour."
    problems = []
    for cell in (cell for cells in books.values() for cell in cells):
        folder = cell.notebook.parent.name
        if not cell.exported or folder not in FOLDERS: continue
        for other in sorted({name.split(".")[0] for name in imported(cell)} - {folder}):
            allowed = level(other) < level(folder) or (folder, other) in SIDEWAYS
            if other in FOLDERS and not allowed:
                problems.append(f"{cell} imports speedrun_nb.{other}, which is not below {folder}")
    return problems


def order_problems(books: dict[Path, list[Cell]]) -> list[str]:
    "Notebooks that use a later one."
    places = {
        module_of(cells): (notebook, number)
        for number, (notebook, cells) in enumerate(books.items())
        if module_of(cells)
    }
    problems = []
    for number, cells in enumerate(books.values()):
        for cell in cells:
            later = sorted(
                name
                for name in imported(cell) & places.keys()
                if places[name][1] > number and f"speedrun_nb.{name}" not in FACADES
            )
            problems += [f"{cell} uses {places[name][0].relative_to(ROOT)}, which comes later" for name in later]
    return problems


def public_names(books: dict[Path, list[Cell]]) -> dict[str, list[str]]:
    """Public top-level names that several modules define, with the modules.

    What two studies call alike plays the same part in each, so that they count as one.
    """
    found = defaultdict(set)
    for cells in books.values():
        module = module_of(cells)
        for node in (node for cell in cells if cell.exported for node in cell.tree.body):
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if not name.startswith("_") and name != ENTRY:
                    found[name].add("a study" if module and module.split(".")[0] in STUDIES else module)
    return {name: sorted(map(str, modules)) for name, modules in sorted(found.items()) if len(modules) > 1}


@dataclass(frozen=True)
class Measures:
    exported: int   # cells with more than imports
    median: float   # lines of an exported cell
    longest: int
    crowded: float  # share of exported cells with three or more definitions
    nodes: float    # see `nodes_a_line`
    wide: int       # lines of code over 120 characters
    lines: int      # of code, in all cells


def measure(cells: list[Cell]) -> Measures:
    exported = [cell for cell in cells if cell.exported and not cell.is_imports]
    sizes = [len(cell.lines) for cell in exported]
    crowded = sum(len(cell.definitions) >= MANY for cell in exported) / max(len(exported), 1)
    lines = [line for cell in cells for line in cell.lines]
    wide = sum(len(line) > LONGEST_LINE for line in lines)
    return Measures(
        len(exported), median(sizes or [0]), max(sizes, default=0), crowded, nodes_a_line(cells), wide, len(lines)
    )


def nodes_a_line(cells: list[Cell]) -> float:
    "Syntax nodes for each line of exported code that is neither empty nor a comment; imports count."
    exported = [cell for cell in cells if cell.exported]
    lines = sum(not line.lstrip().startswith("#") for cell in exported for line in cell.lines)
    return sum(sum(1 for _ in ast.walk(cell.tree)) for cell in exported) / max(lines, 1)


def row(name: str, m: Measures) -> str:
    sizes = f"{m.exported:6} {m.median:8.1f} {m.longest:8} {m.crowded:9.1%} {m.nodes:8.1f}"
    return f"{name:10} {sizes} {m.wide:6} of {m.lines}"


def style_problems(m: Measures) -> list[str]:
    limits = (
        ("median lines of an exported cell", m.median, MEDIAN_CELL),
        ("share of cells with three or more definitions", m.crowded, CROWDED),
        ("syntax nodes a line", m.nodes, NODES),
    )
    return [f"{what}: {value:.3g}, at most {limit:g} wanted" for what, value, limit in limits if value > limit]


def cell_problems(cells: list[Cell]) -> list[str]:
    wide = [
        f"{cell}: a line of {len(line)} characters: {line.strip()[:60]}..."
        for cell in cells
        for line in cell.lines
        if len(line) > LONGEST_LINE
    ]
    return wide + [
        f"{cell}: {len(cell.lines)} lines, at most {LONGEST_CELL} wanted"
        for cell in cells
        if cell.exported and len(cell.lines) > LONGEST_CELL
    ]


def main(folders: list[str]) -> int:
    books = read_books(folders or FOLDERS)
    cells = [cell for found in books.values() for cell in found]
    print(f"{'':10} {'cells':>6} {'median':>8} {'longest':>8} {'3+ defs':>9} {'nodes':>8}  lines over {LONGEST_LINE}")
    for folder in folders or FOLDERS:
        print(row(folder, measure([cell for cell in cells if cell.notebook.parent.name == folder])))
    print(row("all", measure(cells)))
    problems = cell_problems(cells) + layer_problems(books)
    if not folders:
        problems += style_problems(measure(cells)) + order_problems(books)
        problems += [f"{name} is defined in {', '.join(modules)}" for name, modules in public_names(books).items()]
    print(*problems, f"{len(problems)} to mend" if problems else "nothing to mend", sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

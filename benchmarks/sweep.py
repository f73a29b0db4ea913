"""What a sweep costs beyond training: planning and resuming, our share of a batch's time, and the start of a kernel.

`plan`: seconds until the first batch is handed to an engine, for sweeps of 100, 1,000 and 10,000 cells with one cell a
batch (the worst case), new and with all done but a few, by part. Each is timed in a process of its own. The records are
made up, by the functions that write true ones, in a temporary folder; 10,000 take 100 MB there.

`batch`: the same notebook run by plain papermill and by a sweep on this machine, taking turns, a batch each. The
notebook imports nothing heavy and trains nothing, so that the difference of some hundredths of a second is not lost in
the noise of training; all else (lease, worker, kernel, papermill, provenance, record, reading what is new) is as with
any other. Once with empty outputs, once with many cells done already, once with many to go. Beside the difference,
which is noisy when others use the machine, stands the time between the end of one notebook and the start of the next
within the sweep itself.

`kernel`: a notebook that imports what the run notebook of CIFAR-10 does, by plain papermill and, as in a sweep, with a
kernel that is forked, taking turns; by part, and the ratio of the two. `load` is what a parent of kernels takes to
start, once for each block of a sweep.

`start`: real batches of tiny networks, their kernels forked and ordinary, taking turns: seconds until the trainer
begins, until the first run begins (after data and warm-up), and from the end of the last run to the end of the batch;
and what is not training.

    python benchmarks/sweep.py                 # everything: some minutes
    python benchmarks/sweep.py plan --cells 10000
    python benchmarks/sweep.py batch --batches 20 --cells 10000
    python benchmarks/sweep.py kernel start --rounds 10
"""
import argparse
import datetime
import functools
import json
import operator
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

VARIANTS = ("baseline", "det_crop", "random_crop_backoff", "det_crop_backoff")
QUIET = ["--IPKernelApp.log_level=ERROR"]  # for kernels
TO_GO = 8  # cells that are not done when a sweep is resumed


# made-up sweeps

def write_sweep(folder, cells):
    "A sweep file with one cell a batch; its path."
    path = Path(folder) / "made_up.yaml"
    path.write_text(f"study: cifar\nprofile: demo\nvariants: [{', '.join(VARIANTS)}]\n"
                    f"seeds: 0:{cells // len(VARIANTS)}\nseeds_per_batch: 1\n")
    return path


def train(settings, seeds):
    "What a training of ten epochs would report."
    from speedrun_nb.core.records import Ready, Result

    curve = {name: [random.random() for _ in range(10)] for name in ("train_loss", "accuracy_plain", "time_seconds")}
    yield Ready("cpu", "fp32", 1, 0.5, {"embedded": "0" * 64})
    for seed in seeds:
        yield Result(seed, "completed", time_seconds=4 + random.random() / 10,
                     metrics=dict(accuracy=0.93, accuracy_plain=0.92, train_loss=1.1),
                     curve=curve | {"epoch": list(range(10))}, losses=[2.3] * 20, peak_memory_bytes=1 << 30,
                     regions=dict(whitening=0.0912345, training=3.8123456, evaluation=0.2123456))


def write_models(sweep, name):
    "A batch that was really written, for each variant: its folder's name, its run_id, its files."
    from speedrun_nb.core.batch import run_batch
    from speedrun_nb.core.parameters import plan_batch
    from speedrun_nb.core.provenance import note
    from speedrun_nb.sweep.plan import plan_batches

    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch in plan_batches(sweep)[:len(VARIANTS)]:
            parameters = batch.parameters | dict(outputs=folder, sweep=name)
            made = run_batch(plan_batch(sweep.study.name, **parameters), train).folder
            note(made, notebook_seconds=8.5)
            texts = [(made / file).read_text() for file in ("provenance.json", "runs.jsonl")]
            models[batch.condition.name] = [made.name, *batch.cells, *texts]
    return models


def write_done(sweep, outputs, to_go=TO_GO):
    "Folders of all batches of a sweep but the last ones, like one that was really written for each variant."
    from speedrun_nb.sweep.plan import as_frozen, plan_batches

    models = write_models(sweep, as_frozen(sweep).name)
    for number, batch in enumerate(plan_batches(sweep)[:-to_go]):
        model, cell, provenance, record = models[batch.condition.name]
        place = Path(outputs) / sweep.study.name / sweep.profile / batch.condition.variant.name
        made = place / f"20260101T000000Z-{number:06x}"
        made.mkdir(parents=True)
        (made / "provenance.json").write_text(provenance)
        old_seed, new_seed = (f'"seed": {seed}' for seed in (json.loads(record)["seed"], batch.seeds[0]))
        record = record.replace(model, made.name, 1).replace(cell, *batch.cells, 1).replace(old_seed, new_seed, 1)
        (made / "runs.jsonl").write_text(record)


# planning and resuming

class Handed(Exception):
    "The first batch was handed over."


class Nowhere:
    "An engine that is not asked to run anything."
    def __init__(self):
        from speedrun_nb.sweep.slots import Slot
        self.slots = [Slot("nowhere", "nowhere")]

    def free(self): return self.slots

    def start(self, slot, job): raise Handed

    def close(self): pass


def until_first(path, outputs):
    "Seconds until a sweep hands over its first batch, by part."
    start = time.perf_counter()
    from speedrun_nb.sweep import drive
    from speedrun_nb.sweep.file import read_sweep

    parts = {"import": time.perf_counter() - start}

    def timed(name, function, *arguments):
        began = time.perf_counter()
        try: return function(*arguments)
        finally: parts[name] = parts.get(name, 0) + time.perf_counter() - began

    names = ("as_frozen", "freeze", "Cells", "Leases", "read_costs")
    for name in names: setattr(drive, name, functools.partial(timed, name, getattr(drive, name)))
    sweep = timed("read_sweep", read_sweep, path, outputs)
    made = timed("Drive", drive.Drive, sweep, outputs, Nowhere())
    parts["Drive: rest"] = parts.pop("Drive") - sum(parts[name] for name in names)
    try: timed("first batch", made.run)
    except Handed: pass
    return parts | {"all but import": sum(parts.values()) - parts["import"]}


def in_own_process(path, outputs):
    "`until_first` in a process of its own."
    command = [sys.executable, __file__, "until-first", str(path), str(outputs)]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode: raise SystemExit(found.stderr)
    return json.loads(found.stdout)


def measure_planning(sizes):
    "Seconds by number of cells, for a new sweep and for one that is resumed with all cells done but a few."
    from speedrun_nb.sweep.file import read_sweep

    results = {}
    for cells in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = write_sweep(folder, cells)
            new = in_own_process(path, f"{folder}/new")
            write_done(read_sweep(path), f"{folder}/done")
            results[cells] = {"new": new, "resumed": in_own_process(path, f"{folder}/done")}
    return results


# our share of a batch

STAND_IN = """
from speedrun_nb.core.batch import run_batch
from speedrun_nb.core.parameters import plan_batch
from speedrun_nb.core.records import Ready, Result
def _train(settings, seeds):
    yield Ready("cpu", "fp32", 1, 0.0, {"embedded": "0" * 64})
    metrics = dict(accuracy=0.9, accuracy_plain=0.9, train_loss=1.0)
    for seed in seeds: yield Result(seed, "completed", 1.0, metrics, dict(epoch=[0]), [2.3] * 20, None)
_batch = run_batch(plan_batch("cifar", **_parameters), _train)
_batch.raise_if_failed()
"""


@contextmanager
def stand_in_project():
    """A project whose run notebook of CIFAR-10 takes and checks the same parameters, but trains nothing; the working
    directory meanwhile."""
    import nbformat

    from speedrun_nb.core.study import project_root

    root, before = project_root(), Path.cwd()
    notebook = nbformat.read(root / "nbs/run_cifar.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells = [*code[:2], nbformat.v4.new_code_cell(STAND_IN)]
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        (project / "nbs").mkdir()
        (project / "params").symlink_to(root / "params")
        (project / "settings.ini").write_text("[DEFAULT]\nlib_name = speedrun_nb\n")
        nbformat.write(notebook, project / "nbs/run_cifar.ipynb")
        os.chdir(project)
        try: yield project
        finally: os.chdir(before)


class Turns:
    """After every batch of a sweep, the same by plain papermill. Shows the sweep as on a terminal, which counts as the
    sweep's."""
    def __init__(self, project, batches):
        from rich.console import Console

        from speedrun_nb.sweep.show import Show

        self.project, self.left, self.show = project, batches, Show()
        self.began, self.folder = None, None
        self.sweep, self.plain, self.around = [], [], []
        self.show.console = Console(file=open(os.devnull, "w"), force_terminal=True)

    def __call__(self, drive, line):
        from speedrun_nb.core.provenance import read_provenance

        self.show(drive, line)
        if line and " started on " in line: self.folder = next(iter(drive.running.values())).plan.folder
        if line is None or " done in " not in line: return
        if self.began:  # the first also starts the worker
            self.sweep.append(time.perf_counter() - self.began)
            self.around.append(self.sweep[-1] - read_provenance(self.folder)["notebook_seconds"])
        seconds = self.plainly(drive)
        if self.began: self.plain.append(seconds)
        self.left -= 1
        if self.left < 0: drive.ending = "measured enough"
        self.began = time.perf_counter()

    def plainly(self, drive):
        import papermill

        target = Path(drive.outputs).parent / "plain"
        parameters = dict(variant="baseline", profile="demo", seeds=[0], outputs=str(target), batch=f"b{self.left}")
        target.mkdir(exist_ok=True)
        start = time.perf_counter()
        papermill.execute_notebook(self.project / "nbs/run_cifar.ipynb", target / f"{self.left}.ipynb", parameters,
                                   kernel_name="python3", progress_bar=False, cwd=self.project, extra_arguments=QUIET)
        return time.perf_counter() - start


def our_share(project, cells, done, batches):
    "Seconds a batch by a sweep of so many cells, with all of them to go or nearly all done, and by plain papermill."
    from speedrun_nb.sweep.drive import Drive
    from speedrun_nb.sweep.file import read_sweep
    from speedrun_nb.sweep.local import LocalEngine

    with tempfile.TemporaryDirectory() as folder:
        sweep, turns = read_sweep(write_sweep(folder, cells)), Turns(project, batches)
        if done: write_done(sweep, f"{folder}/outputs", batches + len(VARIANTS))
        drive = Drive(sweep, f"{folder}/outputs", LocalEngine([()]), show=turns)
        with turns.show.showing(): drive.run()
    differences = [ours - plain for ours, plain in zip(turns.sweep, turns.plain, strict=True)]
    return {"sweep": median(turns.sweep), "plain papermill": median(turns.plain),
            "ratio": median(map(operator.truediv, turns.sweep, turns.plain)),
            "median difference": median(differences), "its quartiles": quantiles(differences, n=4)[::2],
            "between notebooks": median(turns.around), "batches": len(differences),
            "load of the machine": os.getloadavg()[0] / os.cpu_count()}


def record_keeping(rounds=7):
    """Seconds that a batch takes to note code and machine, in this checkout, and to write its records: a part of the
    notebook, whoever executes it."""
    from speedrun_nb.core.batch import run_batch
    from speedrun_nb.core.parameters import plan_batch

    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            start = time.perf_counter()
            run_batch(plan_batch("cifar", seeds=1, profile="demo", outputs=folder), train)
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def measure_share(batches, cells):
    "Our share in a batch's time, in an empty folder and in full ones."
    with stand_in_project() as project:
        results = {"small sweep": our_share(project, 4 * (batches + 4), done=False, batches=batches),
                   f"{cells} cells, nearly all done": our_share(project, cells, done=True, batches=batches),
                   f"{cells} cells, all to go": our_share(project, cells, done=False, batches=batches)}
    return results | {"record keeping in the notebook": record_keeping()}


# the start of a kernel

IMPORTS = {
    "parameters": "from speedrun_nb.core.parameters import notebook_parameters, plan_batch",
    "training (torch)": "import speedrun_nb.cifar.train",
    "results (pandas, matplotlib)": "from IPython.display import Markdown\n"
                                    "from speedrun_nb.report.style import batch_curves, batch_table",
}


def take_turns(ways, rounds):
    "Medians over rounds of what two ways give, and of the ratio of the first to the second."
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items(): found[name].append(way())
    medians = {name: {key: median(each[key] for each in seen) for key in seen[0]} for name, seen in found.items()}
    pairs = list(zip(*found.values(), strict=True))
    ratio = {key: median(one[key] / two[key] for one, two in pairs) for key in pairs[0][0]}
    return medians | {"ratio": ratio, "load of the machine": os.getloadavg()[0] / os.cpu_count()}


def seconds_between(begin, end): return (end - begin).total_seconds()


def timed_notebook(path, **options):
    "Seconds until the first cell begins, of each cell, from the last cell to the end."
    import papermill

    began = datetime.datetime.now(datetime.UTC)
    done = papermill.execute_notebook(path, path.with_name("out.ipynb"), kernel_name="python3", progress_bar=False,
                                      extra_arguments=QUIET, **options)
    ended = datetime.datetime.now(datetime.UTC)
    cells = [cell.metadata.papermill for cell in done.cells if cell.cell_type == "code"]
    first, last = (datetime.datetime.fromisoformat(time) for time in (cells[0].start_time, cells[-1].end_time))
    imports = {f"import: {name}": cell.duration for name, cell in zip(IMPORTS, cells, strict=True)}
    return ({"start": seconds_between(began, first)} | imports
            | {"end": seconds_between(last, ended), "together": seconds_between(began, ended)})


@contextmanager
def kernels_of(study):
    "A parent of kernels that has loaded, and the seconds that took."
    from speedrun_nb.sweep.kernel import Kernels, modules_of

    kernels, began = Kernels(), time.perf_counter()
    kernels.forker.fork("time:sleep", [0], modules_of(study)).wait()
    try: yield kernels, time.perf_counter() - began
    finally: kernels.close()


def measure_kernel(rounds):
    "Median seconds of what a batch waits for before and after it does anything."
    import nbformat

    from speedrun_nb.sweep.executing import ENGINE

    with kernels_of("cifar") as (kernels, load), tempfile.TemporaryDirectory() as folder:
        path, cells = Path(folder) / "imports.ipynb", map(nbformat.v4.new_code_cell, IMPORTS.values())
        nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
        ways = {"forked": lambda: timed_notebook(path, engine_name=ENGINE, batch_kernel=kernels.for_batch("cifar", {})),
                "plain papermill": lambda: timed_notebook(path)}
        return take_turns(ways, rounds) | {"load": load}


# the start of a batch

TINY = {
    "cifar": {"data.train_images": 500, "whitening.images": 200, "train.batch_size": 100, "train.epochs": 3,
              "model.widths": [8, 8, 8]},
    "gpt": {"model.layers": 2, "model.width": 24, "model.heads": 2, "data.sequence_length": 16, "train.batch_size": 8,
            "train.device_batch_size": 2, "train.iterations": 14, "schedule.warmdown_iterations": 4,
            "evaluation.every": 5, "evaluation.tokens": 256},
}


def timed_batch(study, kernel):
    "Seconds of a tiny batch of two runs until, between and after its runs."
    from speedrun_nb.core.provenance import read_provenance
    from speedrun_nb.core.records import read_records
    from speedrun_nb.sweep.notebook import run_notebook

    with tempfile.TemporaryDirectory() as outputs:
        parameters = dict(profile="demo", seeds=2, overrides=TINY[study], outputs=outputs)
        began = datetime.datetime.now(datetime.UTC)
        folder = run_notebook(study, parameters, echo=False, kernel=kernel)
        ended = datetime.datetime.now(datetime.UTC)
        trainer = datetime.datetime.fromisoformat(read_provenance(folder)["started_at"])
        runs = [[datetime.datetime.fromisoformat(run[name]) for name in ("started_at", "ended_at")]
                for run in read_records(folder / "runs.jsonl")[0]]
    whole, training = seconds_between(began, ended), sum(seconds_between(*run) for run in runs)
    return {"until the trainer begins": seconds_between(began, trainer),
            "until the first run begins": seconds_between(began, runs[0][0]),
            "after the last run": seconds_between(runs[-1][1], ended), "not training": whole - training}


def measure_start(rounds):
    "Median seconds of tiny batches of each study."
    found = {}
    for study in TINY:
        with kernels_of(study) as (kernels, _):
            ways = {"forked": lambda study=study, kernels=kernels: timed_batch(study, kernels.for_batch(study, {})),
                    "ordinary": lambda study=study: timed_batch(study, None)}
            found[study] = take_turns(ways, rounds)
    return found


def rounded(value):
    "To the millisecond."
    if isinstance(value, dict): return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)): return [rounded(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["all"], metavar="plan|batch|kernel|start",
                        help="what to measure (default: all)")
    parser.add_argument("--cells", type=int, nargs="+", default=[100, 1000, 10000],
                        help="sizes of the sweeps; the largest is that of the full folders of `batch`")
    parser.add_argument("--batches", type=int, default=15, help="batches by each side (batch)")
    parser.add_argument("--rounds", type=int, default=7, help="notebooks by each way (kernel, start)")
    given = parser.parse_args()
    parts = {
        "plan": lambda: measure_planning(given.cells),
        "batch": lambda: measure_share(given.batches, max(given.cells)),
        "kernel": lambda: measure_kernel(given.rounds),
        "start": lambda: measure_start(given.rounds),
    }
    if unknown := set(given.what) - {"all", *parts}: parser.error(f"not known: {', '.join(unknown)}")
    found = {name: measure() for name, measure in parts.items() if {"all", name} & set(given.what)}
    print(json.dumps(rounded(found), indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["until-first"]:  # what `in_own_process` starts
        print(json.dumps(until_first(*map(Path, sys.argv[2:]))))
    else: main()

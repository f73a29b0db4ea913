"""Kill the processes of small sweeps at random moments, and see that nothing is lost and nothing is run twice.

A round starts a sweep in a folder of its own, kills its driver, its worker, its notebook kernel (or two of them) or the
process that forks kernels, once or several times, and runs the sweep again to its end, in some rounds from two drivers
at once. In some the kernel is stopped before, and wakes up when all is over. Then every planned cell has exactly one
completed record, every line that was on the disk when something was killed is there unchanged, no lease and no device
is held, and no process is left.

    python tests/faults.py --rounds 50
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from speedrun_nb.sweep.file import read_sweep
from speedrun_nb.sweep.plan import plan_batches

ROOT = Path(__file__).resolve().parents[1]
TINY = ('{"data.train_images": [200], "whitening.images": [100], "train.batch_size": [100], "train.epochs": [2], '
        '"model.widths": [[8, 8, 8]]}')
STUB = """
import os, signal, time
from speedrun_nb.core.batch import run_batch
from speedrun_nb.core.parameters import notebook_parameters, plan_batch
from speedrun_nb.core.records import Ready, Result
_given = {name: value for name, value in globals().items() if name not in ("os", "signal", "time")}
_plan = plan_batch("cifar", **notebook_parameters(_given))
def _train(settings, seeds):
    yield Ready("cpu", "fp32", 1, 0.1, {})
    for seed in seeds:
        time.sleep(SECONDS)
        metrics = dict(accuracy=0.9, accuracy_plain=0.9, train_loss=1.0)
        yield Result(seed, "completed", 1 + seed / 100, metrics, {}, [1.0, seed], None)
"""
TARGETS = [("driver",), ("kernel",), ("worker",), ("driver", "worker"), ("worker", "kernel"), ("driver", "kernel"),
           ("parent",)]
FROZEN = [("worker",), ("driver", "worker")]  # killed while the kernel is stopped, so that it does not notice
# a random time after the start; or what appears, and a random delay
MOMENTS = ("time", "lease", "folder", "kernel", "provenance", "record", "record")
DEADLINE = 420  # seconds for a sweep of at most four batches, on a machine that may be busy


# small sweeps

def write_sweep(folder, seeds="0:2", variants=("baseline", "det_crop"), settings=TINY, **more):
    "A sweep file of runs that take less than a second."
    lines = ["study: cifar", "profile: demo", f'seeds: "{seeds}"', "variants:"]
    lines += [f"  - {name}: {settings}" for name in variants]
    lines += [f"{key}: {value}" for key, value in ({"seeds_per_batch": 2} | more).items()]
    path = Path(folder) / "small.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def stub_project(folder, seconds=0.3, before="", after=""):
    """A project whose notebook trains nothing, so that a batch takes a second; `before` and `after` are lines of Python
    around the batch."""
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "params", folder / "params")
    shutil.copy(ROOT / "settings.ini", folder)
    notebook = json.loads((ROOT / "nbs/run_cifar.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    for lines in (STUB.replace("SECONDS", str(seconds)), before, "_batch = run_batch(_plan, _train)", after):
        cells.append(dict(cell_type="code", id=f"stub-{len(cells)}", metadata={}, source=lines, outputs=[],
                          execution_count=None))
    notebook["cells"] = cells
    (folder / "nbs").mkdir()
    (folder / "nbs/run_cifar.ipynb").write_text(json.dumps(notebook))
    return folder


def environment(folder):
    "For the processes of a round: one thread; TMPDIR marks them all, and XDG_RUNTIME_DIR holds the locks on devices."
    steering = ("IN_TEST", "SPEEDRUN_DATA", "SPEEDRUN_PROFILE", "SPEEDRUN_OUTPUTS")
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    folder.mkdir(parents=True, exist_ok=True)
    own = dict(TMPDIR=str(folder), XDG_RUNTIME_DIR=str(folder), JUPYTER_RUNTIME_DIR=str(folder / "jupyter"))
    return kept | own | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def start_sweep(file, outputs, mark, project=ROOT):
    """A driver as a user starts it, in a session of its own. `mark` is the folder for temporary files and locks:
    drivers with the same one share the device."""
    env = environment(Path(mark))
    command = [Path(sys.executable).with_name("speedrun"), "sweep", str(file), "--outputs", str(outputs)]
    with open(Path(mark).with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, cwd=project, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


# what there is

def processes(folder):
    "The processes of a round that run, by role: those whose temporary files are below the folder."
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("TMPDIR", "").startswith(str(folder))
            if ours and process.status() != psutil.STATUS_ZOMBIE: found[process] = _role(process)
    return found


ROLES = {"worker": "speedrun_nb.sweep.worker", "kernel": "ipykernel_launcher", "driver": "speedrun sweep"}
FORKS = {"batch-kernel": "kernel", "forks-batches": "parent"}  # have one command line, and a name of their own


def _role(process):
    words = " ".join(process.cmdline())
    if "serve_forks" in words: return FORKS.get(process.name(), "other")
    return next((role for role, word in ROLES.items() if word in words), "other")


def snapshot(outputs):
    "What is on the disk: the whole lines of every runs.jsonl."
    found = {path: path.read_bytes() for path in Path(outputs).glob("*/*/*/*/runs.jsonl")}
    return {path: data[:data.rfind(b"\n") + 1] for path, data in found.items()}


def records(outputs):
    "Every whole record below a folder."
    found = []
    for data in snapshot(outputs).values():
        for line in data.splitlines():
            with suppress(ValueError): found.append(json.loads(line))
    return found


def completed(outputs):
    return Counter(record["run_id"] for record in records(outputs) if record["status"] == "completed")


def leases(outputs): return sorted(path.name for path in Path(outputs).glob("sweeps/claims/*/*"))


def is_held(mark):
    "Is a device of these drivers held by anyone?"
    for path in Path(mark).glob("speedrun_nb/*.lock"):
        lock = FileLock(path)
        try: lock.acquire(blocking=False)
        except Timeout: return True
        lock.release()
    return False


def wait_for(condition, seconds=DEADLINE, every=0.005):
    "Wait until something holds. False when it does not within the time."
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end: return False
        time.sleep(every)
    return found


def kill_all(folder):
    for process in processes(folder):
        with suppress(psutil.Error): process.kill()


# rounds

@dataclass
class Round:
    "One round: what is done to which sweep, and what came of it."
    folder:Path
    rng:random.Random
    seeds:str="0:2"
    variants:tuple=("baseline", "det_crop")
    stub:bool=False                              # train nothing
    strikes:tuple=(1, 1, 2, 3)                   # one of these numbers
    drivers:dict = field(default_factory=dict)   # processes, by their folder for temporary files
    seen:dict = field(default_factory=dict)      # what was on the disk after the last kill
    things:dict = field(default_factory=dict)    # what ever appeared, by kind
    said:list = field(default_factory=list)
    wrong:list = field(default_factory=list)

    def __post_init__(self):
        self.folder.mkdir(parents=True)
        self.project = stub_project(self.folder / "project") if self.stub else ROOT
        self.outputs, self.file = self.folder / "outputs", write_sweep(self.folder, self.seeds, self.variants)
        self.cells = {cell for batch in plan_batches(read_sweep(self.file)) for cell in batch.cells}

    def start(self, *names):
        "Start the drivers that do not run."
        for name in names:
            mark = self.folder / name.split("-")[0]
            if name not in self.alive: self.drivers[name] = start_sweep(self.file, self.outputs, mark, self.project)

    @property
    def alive(self): return [name for name, process in self.drivers.items() if process.poll() is None]

    def look(self, kind):
        "How many leases, folders of batches, notebooks' kernels, provenance files or records there have ever been."
        if kind == "record": return sum(data.count(b"\n") for data in snapshot(self.outputs).values())
        patterns = dict(lease="sweeps/claims/*/*", folder="cifar/*/*/*", provenance="cifar/*/*/*/provenance.json")
        if kind in patterns: now = self.outputs.glob(patterns[kind])
        else: now = [process.pid for process, role in processes(self.folder).items() if role == kind]
        self.things[kind] = self.things.get(kind, set()) | set(now)
        return len(self.things[kind])

    def strike(self):
        "Kill something at a random moment."
        moment, delay, many = self.rng.choice(MOMENTS), self.rng.random(), self.rng.choice((1, 1, 2))
        frozen = self.rng.random() < 0.1
        targets = self.rng.choice(FROZEN if frozen else TARGETS)
        when = self.wait_for_moment(moment, delay, many)
        roles = (*targets, "kernel") if frozen else targets
        wait_for(lambda: not self.alive or self.victims(roles), 1, 0.02)  # a worker or a kernel may only just begin
        victims = self.rng.choice(self.victims(roles) or [{}])
        order = sorted(victims, key=lambda process: roles.index(victims[process]), reverse=frozen)
        for process in order:
            with suppress(psutil.Error):
                if frozen and victims[process] == "kernel": process.suspend()
                else: process.kill()
        self.compare()
        killed = "+".join(sorted(set(targets) & set(victims.values()))) or "nothing"
        if frozen and victims: killed += " of a stopped kernel"
        self.said.append(f"{when}: killed {killed}, {sum(completed(self.outputs).values())} runs on disk")

    def wait_for_moment(self, moment, delay, many):
        "Wait for a random time, or until something appears and a random delay after it: the moment in words."
        if moment == "time":
            wait_for(lambda: not self.alive, delay * (5 if self.stub else 15))
            return f"{delay:.2f} of the time"
        many += self.look(moment)
        wait_for(lambda: not self.alive or self.look(moment) >= many, every=0.02 if moment == "kernel" else 0.002)
        time.sleep(delay * self.rng.choice((0, 0.05, 0.5)))
        return f"at {moment} {many}"

    def victims(self, targets):
        "What is to be killed, by role, for each driver that has all of it."
        found = [{process: role for process, role in self.of(name).items() if role in targets} for name in self.alive]
        return [victims for victims in found if set(victims.values()) == set(targets)]

    def of(self, name):
        "A driver, and what it has started."
        with suppress(psutil.Error):
            root = psutil.Process(self.drivers[name].pid)
            family = (root, *root.children(recursive=True))
            return {process: role for process, role in processes(self.folder).items() if process in family}
        return {}

    def compare(self):
        "Whatever was on the disk before is still there."
        now = snapshot(self.outputs)
        lost = [path for path, data in self.seen.items() if not now.get(path, b"").startswith(data)]
        self.wrong += [f"{path} lost lines" for path in lost]
        self.seen = now

    def finish(self):
        "Wait for the drivers to end: their exit codes."
        if not wait_for(lambda: not self.alive, every=0.05):
            self.wrong.append(f"a sweep did not end within {DEADLINE} s: {self.log()}")
            kill_all(self.folder)
        codes, self.drivers = [process.wait() for process in self.drivers.values()], {}
        return codes

    def log(self):
        texts = [path.read_text(errors="replace")[-400:] for path in sorted(self.folder.glob("*.log"))]
        return " | ".join(text.replace("\n", " / ") for text in texts)

    def check(self):
        "What has to hold when the resumed sweep has ended."
        for process in processes(self.folder):
            with suppress(psutil.Error): process.resume()
        if not wait_for(lambda: not processes(self.folder), 10, 0.1):
            left = [(process.pid, role) for process, role in processes(self.folder).items()]
            self.wrong.append(f"processes that are left: {left}")
        done = completed(self.outputs)
        self.compare()
        self.wrong += [f"cell {cell} has {done[cell]} completed records" for cell in self.cells if done[cell] != 1]
        if extra := done.keys() - self.cells: self.wrong.append(f"cells that were not planned: {extra}")
        if left := leases(self.outputs): self.wrong.append(f"leases that nobody holds: {left}")
        if any(is_held(mark) for mark in self.folder.glob("driver?")): self.wrong.append("a device is held")

    def run(self):
        "Strike, resume, check."
        # two drivers have a device each, as on two machines; or one for both
        names = self.rng.choice((["driver0"],) * 6 + (["driver0", "driver1"], ["driver0", "driver0-again"]))
        for _ in range(self.rng.choice(self.strikes)):
            if completed(self.outputs).keys() >= self.cells: break
            self.start(*names)
            self.strike()
        self.finish()
        self.start(*names)
        if any(codes := self.finish()): self.wrong.append(f"exit codes {codes}: {self.log()}")
        self.check()
        devices = "one device" if "-" in names[-1] else "a device each"
        self.said.append(f"resumed by two with {devices}" if len(names) > 1 else "resumed")


def run_rounds(count, seed, folder, sizes=("0:2", "0:2", "0:4"), say=print, **options):
    "Rounds of faults. The seed decides all that can be decided; what happens at a moment is up to the machine."
    results = []
    for number in range(count):
        began, rng = time.monotonic(), random.Random(f"{seed} {number}")
        one = Round(Path(folder) / f"round{number}", rng, rng.choice(sizes), **options)
        try: one.run()
        finally: kill_all(one.folder)
        statuses = dict(Counter(record["status"] for record in records(one.outputs)))
        seconds, cells = time.monotonic() - began, len(one.cells)
        results.append(dict(round=number, said=one.said, cells=cells, records=statuses, violations=one.wrong,
                            seconds=round(seconds, 1)))
        done = f"{'; '.join(one.said)}; {cells} cells, records {statuses}"
        say(f"round {number}: {done}; {'; '.join(one.wrong) or 'all well'}; {seconds:.0f} s")
        if not one.wrong: shutil.rmtree(one.folder)
    return results


def summary(results, seed):
    "All rounds in figures."
    said = [line for result in results for line in result["said"] if "killed" in line]
    killed = Counter(line.partition("killed ")[2].partition(",")[0] for line in said)
    total = {name: sum(result["records"].get(name, 0) for result in results) for name in ("completed", "failed")}
    violations = [{key: result[key] for key in ("round", "violations")} for result in results if result["violations"]]
    return dict(rounds=len(results), seed=seed, killed=dict(killed.most_common()), records=total, violations=violations,
                cells=sum(result["cells"] for result in results),
                seconds=round(sum(result["seconds"] for result in results)))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, help="of the kills; a random one by default, which is printed")
    parser.add_argument("--stub", action="store_true", help="batches that train nothing: many rounds in little time")
    parser.add_argument("--keep", type=Path,
                        help="folder for the rounds; those that went well are removed. A temporary one by default")
    given = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    folder = given.keep or Path(tempfile.mkdtemp(prefix="speedrun-faults-"))
    print(f"seed {seed}, folders below {folder}", flush=True)
    def say(line): print(line, flush=True)
    found = summary(run_rounds(given.rounds, seed, folder, say=say, stub=given.stub), seed)
    print(json.dumps(found, indent=1))
    if not found["violations"]: shutil.rmtree(folder)
    return bool(found["violations"])


if __name__ == "__main__": sys.exit(main())

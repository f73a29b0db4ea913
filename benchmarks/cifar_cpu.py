"""CIFAR-10 on a CPU: our training step against a plain float32 loop of the same network, and the cost of augmentation.

The two sides live in a process each (so each has its own memory settings and its own peak) and take turns, a step at a
time, so that a machine that drifts treats both alike. The figure that counts is the ratio of medians.

    python benchmarks/cifar_cpu.py --steps 15
"""
import argparse
import json
import multiprocessing
import statistics
import time

BATCH = 1024


def plain_side(settings):
    "The same network as anyone would write its loop: float32, contiguous memory, memory returned when freed."
    import torch
    import torch.nn.functional as F

    from speedrun_nb.cifar.data import normalize
    from speedrun_nb.cifar.model import Network, initialize
    from speedrun_nb.cifar.optimizer import make_optimizer

    network = Network(settings.model)
    initialize(network, torch.Generator().manual_seed(0))
    optimizer = make_optimizer(network, settings.optimizer, BATCH)

    def step(images, labels):
        inputs = normalize(images, torch.float32).contiguous()
        loss = F.cross_entropy(network(inputs), labels, label_smoothing=settings.train.label_smoothing, reduction="none").sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_side(settings):
    "The step of speedrun_nb.cifar.train, with its schedule and lookahead."
    import torch

    from speedrun_nb.cifar.data import normalize
    from speedrun_nb.cifar.train import Trainer, choose_precision, make_network
    from speedrun_nb.core.device import keep_freed_memory

    keep_freed_memory()
    device = torch.device("cpu")
    precision = choose_precision("auto", device)
    trainer = Trainer(make_network(settings, torch.Generator().manual_seed(0), precision, device), settings, precision)
    return lambda images, labels: trainer.step(normalize(images, torch.float32), labels).item()


def worker(make_side, pipe):
    "Make a step whenever asked to; answer with its seconds, at last with the peak memory."
    import torch

    from speedrun_nb.core.clock import peak_memory, reset_peak_memory

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (BATCH,), generator=generator)
    step = make_side(full_settings())
    step(images, labels)  # warm-up
    reset_peak_memory(torch.device("cpu"))
    pipe.send("ready")
    while pipe.recv() == "step":
        start = time.perf_counter()
        step(images, labels)
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_memory(torch.device("cpu")))


def full_settings():
    "The baseline at its published size."
    from speedrun_nb.core.project import load_study, resolve

    return resolve(load_study("cifar"), "baseline", "full").settings


def interleave(steps):
    "Seconds by side, a step each in turn, and the peak memory of each process in bytes."
    context, sides = multiprocessing.get_context("spawn"), {}
    for name, make_side in (("plain", plain_side), ("ours", our_side)):
        pipe, far = context.Pipe()
        process = context.Process(target=worker, args=(make_side, far), daemon=True)
        process.start()
        assert pipe.recv() == "ready"  # one after the other: they must not compete while they warm up
        sides[name] = pipe
    seconds = {name: [] for name in sides}
    for number in range(steps):
        for name, pipe in list(sides.items())[:: 1 if number % 2 else -1]:
            pipe.send("step")
            seconds[name].append(pipe.recv())
    for pipe in sides.values(): pipe.send("stop")
    return seconds, {name: pipe.recv() for name, pipe in sides.items()}


def augmentation_seconds(images=50_000, epochs=4):
    "Median seconds to augment an epoch (the first, which also mirrors and pads, counts as the others)."
    import torch

    from speedrun_nb.cifar.augment import Augmenter

    data = torch.randint(256, (images, 32, 32, 3), dtype=torch.uint8)
    augmenter = Augmenter(data, full_settings().augment, *(torch.Generator().manual_seed(s) for s in (0, 1)))
    seconds = []
    for epoch in range(epochs):
        start = time.perf_counter()
        augmenter.epoch(epoch)
        seconds.append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="steps of each side")
    steps = parser.parse_args().steps
    seconds, peaks = interleave(steps)
    plain, ours = (statistics.median(seconds[name]) for name in ("plain", "ours"))
    augmenting, epoch = augmentation_seconds(), ours * full_settings().steps_per_epoch
    print(json.dumps({
        "batch_size": BATCH, "steps": steps,
        "plain_median_seconds": round(plain, 3), "ours_median_seconds": round(ours, 3), "times_faster": round(plain / ours, 2),
        "times_faster_step_by_step": sorted(round(p / o, 2) for p, o in zip(seconds["plain"], seconds["ours"], strict=True)),
        "peak_MiB": {name: peak >> 20 for name, peak in peaks.items() if peak},
        "augmentation_seconds_by_epoch": [round(s, 3) for s in augmenting],
        "augmentation_part_of_training": round(statistics.median(augmenting) / epoch, 4),
        "first_augmentation_part_of_training": round(augmenting[0] / epoch, 4),
    }, indent=1))


if __name__ == "__main__":
    main()

"""CIFAR-10 on a CPU: our training step against a plain float32 loop of the same network, and the cost of augmentation.

The two sides live in a process each (so each has its own memory settings and its own peak) and take turns, a step at a
time, so that a machine that drifts treats both alike. The figure that counts is the ratio of medians.

    python benchmarks/cifar_cpu.py --steps 15
"""
import argparse
import json
import statistics
import time

from turns import take_turns

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
    optimizer, smoothing = make_optimizer(network, settings.optimizer, BATCH), settings.train.label_smoothing

    def step(images, labels):
        inputs = normalize(images, torch.float32).contiguous()
        losses = F.cross_entropy(network(inputs), labels, label_smoothing=smoothing, reduction="none")
        loss = losses.sum()
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


def full_settings():
    "The baseline at its published size."
    from speedrun_nb.core.study import load_study
    from speedrun_nb.core.variants import resolve

    return resolve(load_study("cifar"), "baseline", "full").settings


def make_step(make_side):
    "A step of one side, on made-up images."
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (BATCH,), generator=generator)
    step = make_side(full_settings())
    return lambda: step(images, labels)


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
    sides = {"plain": (make_step, (plain_side,)), "ours": (make_step, (our_side,))}
    seconds, _, peaks = take_turns(sides, steps, warm_up=1)
    plain, ours = (statistics.median(seconds[name]) for name in ("plain", "ours"))
    augmenting, epoch = augmentation_seconds(), ours * full_settings().steps_per_epoch
    ratios = sorted(p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True))
    print(json.dumps({
        "batch_size": BATCH,
        "steps": steps,
        "plain_median_seconds": round(plain, 3),
        "ours_median_seconds": round(ours, 3),
        "times_faster": round(plain / ours, 2),
        "times_faster_step_by_step": [round(ratio, 2) for ratio in ratios],
        "peak_MiB": {name: peak >> 20 for name, peak in peaks.items() if peak},
        "augmentation_seconds_by_epoch": [round(s, 3) for s in augmenting],
        "augmentation_part_of_training": round(statistics.median(augmenting) / epoch, 4),
        "first_augmentation_part_of_training": round(augmenting[0] / epoch, 4),
    }, indent=1))


if __name__ == "__main__":
    main()

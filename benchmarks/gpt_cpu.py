"""NanoGPT on a CPU: our training step against a plain float32 loop of the same network.

A step is forward, backward, AdamW on the table and Muon on the matrices. The two sides live in a process each (so each
has its own memory settings and its own peak) and take turns, a step at a time, so that a machine that drifts treats
both alike. The figure that counts is the median of the ratios, step by step.

    python benchmarks/gpt_cpu.py --steps 15
    python benchmarks/gpt_cpu.py --steps 15 model.width=384 train.loss_chunk=512
    python benchmarks/gpt_cpu.py --profile-ours
"""
import argparse
import json
import statistics

from gpt_variants import made_up_trainer
from turns import take_turns


def reference_newton_schulz(gradient):
    "Record 5's Newton-Schulz iteration, a matrix at a time in bfloat16."
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.bfloat16() / (gradient.norm() + 1e-7)
    if gradient.size(0) > gradient.size(1): x = x.T
    for _ in range(5):
        square = x @ x.T
        product = square @ x
        x = a * x + b * product + c * square @ product
    return (x.T if gradient.size(0) > gradient.size(1) else x).to(gradient.dtype)


def plain_side(settings):
    "The same network as anyone would write its loop: float32, all logits at once, torch's AdamW, Muon in a loop."
    import torch
    import torch.nn.functional as F

    from speedrun_nb.gpt.model import GPT, initialize, split_parameters

    network = GPT(settings.model, settings.data.sequence_length)
    initialize(network, torch.Generator().manual_seed(0))
    table, matrices, others = split_parameters(network)
    adamw = torch.optim.AdamW(table + others, lr=settings.optimizer.lr, betas=(0.9, 0.95), weight_decay=0)
    buffers = [torch.zeros_like(p) for p in matrices]

    @torch.no_grad()
    def muon():
        for p, buffer in zip(matrices, buffers, strict=True):
            buffer.mul_(settings.optimizer.block_momentum).add_(p.grad)
            update = reference_newton_schulz(p.grad + settings.optimizer.block_momentum * buffer)
            p.add_(update, alpha=-settings.optimizer.block_lr * max(p.shape) ** 0.5)

    def step(tokens, targets):
        logits = network(tokens)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        network.zero_grad(set_to_none=True)
        loss.backward()
        adamw.step()
        muon()
        return loss.item()

    return step


def our_side(settings):
    "The step of speedrun_nb.gpt.train: its number format, chunked loss, accumulation and optimisers."
    trainer = made_up_trainer(settings)

    def step(tokens, targets):
        loss = trainer.accumulate(tokens, targets)
        trainer.update()
        return loss.item()

    return step


def cpu_settings(overrides):
    "The baseline in the profile for CPUs, with changes."
    from speedrun_nb.core.study import load_study
    from speedrun_nb.core.variants import read_overrides, resolve

    return resolve(load_study("gpt"), "baseline", "cpu", read_overrides(overrides)).settings


def batches(settings):
    "Random tokens: a different batch each time, the same for both sides."
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = settings.train.batch_size, settings.data.sequence_length + 1
    while True:
        tokens = torch.randint(settings.model.vocabulary, shape, generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def make_step(make_side, overrides):
    "A step of one side, on its batches."
    settings = cpu_settings(overrides)
    step, data = make_side(settings), batches(settings)
    return lambda: step(*next(data))


def profile(overrides, steps=3):
    "Print where the time of our step goes."
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = make_step(our_side, overrides)
    for _ in range(2): step()
    with profiler(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps): step()
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="steps of each side")
    parser.add_argument("--profile-ours", action="store_true", help="only print where the time of our step goes")
    parser.add_argument("overrides", nargs="*", help="settings, as key=value")
    arguments = parser.parse_args()
    overrides = " ".join(arguments.overrides)
    if arguments.profile_ours: return profile(overrides)
    sides = {"plain": (make_step, (plain_side, overrides)), "ours": (make_step, (our_side, overrides))}
    seconds, losses, peaks = take_turns(sides, arguments.steps)
    settings = cpu_settings(overrides)
    ratios = sorted(p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True))
    tokens = settings.train.batch_size * settings.data.sequence_length
    print(json.dumps({
        "steps": arguments.steps,
        "overrides": overrides,
        "tokens_a_step": tokens,
        "loss_chunk": settings.train.loss_chunk,
        "device_batch_size": settings.train.device_batch_size,
        "median_seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "least_seconds": {name: round(min(values), 3) for name, values in seconds.items()},
        "tokens_per_second": {name: round(tokens / statistics.median(values)) for name, values in seconds.items()},
        "times_faster": round(statistics.median(ratios), 2),
        "times_faster_step_by_step": [round(ratio, 2) for ratio in ratios],
        "peak_MiB": {name: peak >> 20 for name, peak in peaks.items() if peak},
        "last_loss": {name: round(values[-1], 4) for name, values in losses.items()},
    }, indent=1))


if __name__ == "__main__":
    main()

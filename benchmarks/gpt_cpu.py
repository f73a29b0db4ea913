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
import multiprocessing
import statistics
import time


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

    network = GPT(settings.model)
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
    import torch

    from speedrun_nb.core.device import cpu_has_bf16, keep_freed_memory
    from speedrun_nb.gpt.model import GPT, initialize
    from speedrun_nb.gpt.schedules import make_optimizers

    keep_freed_memory()
    network = GPT(settings.model)
    initialize(network, torch.Generator().manual_seed(0))
    optimizers, train = make_optimizers(network, settings), settings.train
    bf16 = train.precision == "bf16" or (train.precision == "auto" and cpu_has_bf16())
    parts = train.batch_size // train.device_batch_size

    def step(tokens, targets):
        total = 0.0
        for part in zip(tokens.split(train.device_batch_size), targets.split(train.device_batch_size), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = network(*part, chunk=train.loss_chunk) / parts
            loss.backward()
            total += loss.item()
        for optimizer in optimizers: optimizer.step()
        network.zero_grad(set_to_none=True)
        return total

    return step


SIDES = {"plain": plain_side, "ours": our_side}


def cpu_settings(overrides):
    "The baseline in the profile for CPUs, with changes."
    from speedrun_nb.core.project import load_study, read_overrides, resolve

    return resolve(load_study("gpt"), "baseline", "cpu", read_overrides(overrides)).settings


def batches(settings):
    "Random tokens: a different batch each time, the same for both sides."
    import torch

    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(settings.model.vocabulary, (settings.train.batch_size, settings.data.sequence_length + 1), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def worker(name, overrides, pipe):
    "Make a step whenever asked to; answer with its seconds and loss, at last with the peak memory."
    import torch

    from speedrun_nb.core.clock import peak_memory, reset_peak_memory

    settings = cpu_settings(overrides)
    step, data = SIDES[name](settings), batches(settings)
    for _ in range(2): step(*next(data))  # warm-up
    reset_peak_memory(torch.device("cpu"))
    pipe.send("ready")
    while pipe.recv() == "step":
        batch = next(data)
        start = time.perf_counter()
        loss = step(*batch)
        pipe.send((time.perf_counter() - start, loss))
    pipe.send(peak_memory(torch.device("cpu")))


def interleave(steps, overrides, names=tuple(SIDES)):
    "Seconds and losses by side, a step each in turn, and the peak memory of each process in bytes."
    context, sides = multiprocessing.get_context("spawn"), {}
    for name in names:
        pipe, far = context.Pipe()
        process = context.Process(target=worker, args=(name, overrides, far), daemon=True)
        process.start()
        assert pipe.recv() == "ready"  # one after the other: they must not compete while they warm up
        sides[name] = pipe
    results = {name: [] for name in sides}
    for number in range(steps):
        for name, pipe in list(sides.items())[:: 1 if number % 2 else -1]:
            pipe.send("step")
            results[name].append(pipe.recv())
    for pipe in sides.values(): pipe.send("stop")
    return results, {name: pipe.recv() for name, pipe in sides.items()}


def profile(overrides, steps=3):
    "Print where the time of our step goes."
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    settings = cpu_settings(overrides)
    step, data = our_side(settings), batches(settings)
    for _ in range(2): step(*next(data))
    with profiler(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps): step(*next(data))
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="steps of each side")
    parser.add_argument("--profile-ours", action="store_true", help="print where the time of our step goes, and nothing else")
    parser.add_argument("overrides", nargs="*", help="settings, as key=value")
    arguments = parser.parse_args()
    overrides = " ".join(arguments.overrides)
    if arguments.profile_ours: return profile(overrides)
    results, peaks = interleave(arguments.steps, overrides)
    settings = cpu_settings(overrides)
    seconds = {name: [second for second, _ in result] for name, result in results.items()}
    ratios = sorted(p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True))
    tokens = settings.train.batch_size * settings.data.sequence_length
    print(json.dumps({
        "steps": arguments.steps, "overrides": overrides, "tokens_a_step": tokens, "loss_chunk": settings.train.loss_chunk, "device_batch_size": settings.train.device_batch_size,
        "median_seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "least_seconds": {name: round(min(values), 3) for name, values in seconds.items()},
        "tokens_per_second": {name: round(tokens / statistics.median(values)) for name, values in seconds.items()},
        "times_faster": round(statistics.median(ratios), 2), "times_faster_step_by_step": [round(ratio, 2) for ratio in ratios],
        "peak_MiB": {name: peak >> 20 for name, peak in peaks.items() if peak},
        "last_loss": {name: round(result[-1][1], 4) for name, result in results.items()},
    }, indent=1))


if __name__ == "__main__":
    main()

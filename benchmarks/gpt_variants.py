"""NanoGPT's variants against the baseline: time of a step and peak memory of each, on the device that is here.

Each variant is trained on random tokens in a process of its own, all on one device; they take turns, a step at a time,
and the figure that counts is the median of the ratios to the baseline's step in the same turn. Random tokens say nothing
of losses. On a GPU each process compiles first, which takes a minute or two.

    python benchmarks/gpt_variants.py --profile stage_a --steps 40 palm_parallel kv_1 gqa_1_8
    python benchmarks/gpt_variants.py --profile full --overrides "train.batch_size=64 train.device_batch_size=16" --steps 100 baseline:train.compile=none depth_warming curriculum
    python benchmarks/gpt_variants.py --profile demo --steps 20 mdha adago      # on a CPU

A name may carry settings, as in baseline:train.compile=none. Depth warming and the curriculum are at their beginning,
where they save most.
"""
import argparse
import json
import statistics

from turns import take_turns


def made_up_trainer(settings):
    "A trainer of the product, alone on its device, with random tokens for data, warmed up."
    import numpy as np

    from speedrun_nb.gpt.processes import join_processes
    from speedrun_nb.gpt.shards import Tokens
    from speedrun_nb.gpt.train import Trainer, set_up, warm_up

    random = np.random.default_rng(0)
    train, validation = (random.integers(0, settings.model.vocabulary, size).astype(np.uint16) for size in (4 * settings.train.batch_size * settings.data.sequence_length + 1, settings.evaluation.tokens + 1))
    bench = set_up(settings, join_processes(), Tokens([train], [validation], {}))
    warm_up(bench)
    return Trainer(bench, 0)


def settings_of(name, profile, overrides):
    "The settings of a variant, or of variant:key=value,key=value."
    from speedrun_nb.core.study import load_study
    from speedrun_nb.core.variants import read_overrides, resolve

    variant, _, own = name.partition(":")
    return resolve(load_study("gpt"), variant, profile, read_overrides(overrides) | read_overrides(own.replace(",", " ")) | {"evaluation.tokens": 64 * 1024}).settings


def make_step(name, profile, overrides):
    trainer = made_up_trainer(settings_of(name, profile, overrides))
    return lambda: trainer.step().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help="names of variants, or name:setting=value")
    parser.add_argument("--profile", default="auto", help="at which size (auto: full on a GPU, demo elsewhere)")
    parser.add_argument("--overrides", default="", help="settings for all of them, as key=value")
    parser.add_argument("--steps", type=int, default=40, help="steps of each, of which the first ten are not counted")
    given = parser.parse_args()
    names = list(dict.fromkeys(["baseline", *given.variants]))
    seconds, _, peaks = take_turns({name: (make_step, (name, given.profile, given.overrides)) for name in names}, given.steps)
    counted = {name: values[min(10, given.steps // 2):] for name, values in seconds.items()}
    print(json.dumps({name: {
        "step_ms": round(1000 * statistics.median(values), 2), "times_the_baseline": round(statistics.median(v / b for v, b in zip(values, counted["baseline"], strict=True)), 4),
        "peak_MiB": peaks[name] and peaks[name] >> 20} for name, values in counted.items()}, indent=1))


if __name__ == "__main__":
    main()

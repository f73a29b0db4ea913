"""NanoGPT's variants against the baseline: time of a step and peak memory of each, on this machine's device.

Each variant is trained on random tokens in a process of its own, all on one device; they take turns, a step at a time,
and the figure that counts is the median of the ratios to the baseline's step in the same turn. Losses on random tokens
mean nothing. On a GPU each process compiles first, which takes a minute or two.

    python benchmarks/gpt_variants.py --profile stage_a --steps 40 palm_parallel kv_1 gqa_1_8
    python benchmarks/gpt_variants.py --profile full --overrides "train.batch_size=64 train.device_batch_size=16" \\
        --steps 100 baseline:train.compile=none depth_warming curriculum
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

    from speedrun_nb.gpt.data import Tokens
    from speedrun_nb.gpt.processes import join_processes
    from speedrun_nb.gpt.train import warm_up
    from speedrun_nb.gpt.trainer import Trainer, set_up

    random = np.random.default_rng(0)
    def draw(tokens): return random.integers(0, settings.model.vocabulary, tokens + 1).astype(np.uint16)
    train = draw(4 * settings.train.batch_size * settings.data.sequence_length)
    validation = draw(settings.evaluation.tokens)
    bench = set_up(settings, join_processes(), Tokens([train], [validation], {}))
    warm_up(bench)
    return Trainer(bench, 0)


def settings_of(name, profile, overrides):
    "The settings of a variant, or of variant:key=value,key=value."
    from speedrun_nb.core.study import load_study
    from speedrun_nb.core.variants import read_overrides, resolve

    variant, _, own = name.partition(":")
    changes = read_overrides(overrides) | read_overrides(own.replace(",", " ")) | {"evaluation.tokens": 64 * 1024}
    return resolve(load_study("gpt"), variant, profile, changes).settings


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
    sides = {name: (make_step, (name, given.profile, given.overrides)) for name in names}
    seconds, _, peaks = take_turns(sides, given.steps)
    counted = {name: values[min(10, given.steps // 2):] for name, values in seconds.items()}
    found = {}
    for name, values in counted.items():
        ratios = [value / base for value, base in zip(values, counted["baseline"], strict=True)]
        found[name] = {
            "step_ms": round(1000 * statistics.median(values), 2),
            "times_the_baseline": round(statistics.median(ratios), 4),
            "peak_MiB": peaks[name] and peaks[name] >> 20}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

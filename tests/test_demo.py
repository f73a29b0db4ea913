"""The embedded data set must be worth training on: learnt well but not perfectly, and augmentation must matter."""
from statistics import mean

import pytest
import torch

from speedrun_nb.cifar.train import train
from speedrun_nb.core.records import Result
from speedrun_nb.core.study import load_study
from speedrun_nb.core.variants import resolve

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def trained():
    "Mean final accuracies by what is left out, in the profile demo."
    left_out = {"nothing": "", "flip": "augment.flip=none", "crop": "augment.crop_order=none"}

    def accuracies(overrides):
        settings = resolve(load_study("cifar"), "baseline", "demo", overrides).settings
        results = [event for event in train(settings, SEEDS, torch.device("cpu")) if isinstance(event, Result)]
        return {name: mean(result.metrics[name] for result in results) for name in ("accuracy", "accuracy_plain")}

    return {name: accuracies(overrides) for name, overrides in left_out.items()}


def test_learnt_well_but_not_perfectly(trained):
    assert 0.80 <= trained["nothing"]["accuracy"] <= 0.95


def test_flips_and_crops_matter(trained):
    "Without test-time augmentation, which would make up for part of it."
    plain = {name: accuracy["accuracy_plain"] for name, accuracy in trained.items()}
    assert plain["nothing"] > plain["flip"] + 0.15
    assert plain["nothing"] > plain["crop"] + 0.01

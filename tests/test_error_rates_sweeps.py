"""A sweep that stops when it is decided, and a promotion, are wrong no more often than they promise: few simulated
studies with a fixed seed. `benchmarks/error_rates_sweeps.py` has many."""
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from error_rates_sweeps import CLAIMED, Noise, promotion_rates, stop_rates


def test_looking_after_every_block_supports_nothing_that_is_not_there():
    found = stop_rates(150, at_least=0.0, effect=0.0)
    assert found["supported"] <= 0.06 and found["refuted"] <= 0.06  # more than 9: 0.4 % by chance at 2.5 %
    assert found["coverage"] >= 0.95 and found["mean_blocks"] > 38


def test_a_clear_effect_ends_a_sweep_and_looks_that_are_left_out_decide_nothing():
    two, quiet = ("det_crop", "random_crop_backoff"), Noise(accuracy=0.0002)
    found = stop_rates(2, CLAIMED, effect=0.06, variants=two, blocks=14, noise=quiet, every_look=True)
    assert found["supported"] == 1 and found["refuted"] == 0 and 5 <= found["mean_blocks"] < 14


def test_promotion_lets_through_what_it_promises():
    nothing, reaching = (promotion_rates(6, effect, blocks=5, seed=1) for effect in (0.0, CLAIMED))
    assert nothing["went_on"] <= 0.3 and 0.03 < nothing["promised"] < 0.15
    assert 0.03 < nothing["expected_of_times"] < 0.1
    assert 0.55 <= reaching["went_on"] <= 1 and 0.7 < reaching["promised"] <= 0.8

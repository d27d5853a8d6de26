"""The weight of a distillation loss, worked out by hand at the ends and in the middle."""

import math
from typing import Any

import pytest

from d2kd import load_config
from d2kd.schedule import WeightSchedule, pixel_factor, scale_schedules


def schedule(**keys: Any) -> WeightSchedule:
    return WeightSchedule(**{"weight": 2.0, "max_iter": 100, **keys})


def from_yaml_keys(**keys: Any) -> WeightSchedule:
    cfg = load_config(opts=["SOLVER.MAX_ITER", 100])
    for key, value in keys.items():
        cfg.merge_from_list([f"DISTILL.MGD.{key.replace('__', '.')}", value])
    return WeightSchedule.from_config("MGD", cfg)


def test_default_is_the_full_weight_from_the_first_to_the_last_iteration() -> None:
    assert [schedule()(i) for i in (0, 50, 99)] == [2.0, 2.0, 2.0]


def test_warm_up_rises_linearly_and_reaches_the_weight_in_its_last_iteration() -> None:
    # 4 iterations: 1/4, 2/4, 3/4, 4/4 of the weight.
    assert [schedule(warmup_iters=4)(i) for i in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_decay_falls_by_equal_steps() -> None:
    # From 2 at iteration 20 towards 0.25 x 2 at iteration 100; half way, at 60: 2 x (1 + 0.25) / 2.
    weight = schedule(decay="linear", decay_from=20, end_factor=0.25)
    assert [weight(i) for i in (0, 20)] == [2.0, 2.0]
    assert weight(60) == pytest.approx(1.25)
    # 79 of the 80 steps of 1.5 / 80 before the stop
    assert weight(99) == pytest.approx(0.5 + 1.5 / 80)


def test_cosine_decay_is_half_a_period_of_a_cosine() -> None:
    # end + (1 - end) (1 + cos(pi x)) / 2: the middle is that of the linear one, a quarter is not.
    weight = schedule(decay="cosine", decay_from=20, end_factor=0.25)
    assert weight(20) == 2.0
    assert weight(40) == pytest.approx(2 * (0.25 + 0.75 * (1 + math.cos(math.pi / 4)) / 2))
    assert weight(60) == pytest.approx(1.25)
    assert 0.5 < weight(99) < 0.501


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_weight_is_exactly_zero_from_the_stop_on(decay: str) -> None:
    weight = schedule(decay=decay, stop_iter=10, end_factor=0.5)
    assert weight(9) >= 1.0, "until the stop the end factor is the least"
    assert [weight(i) for i in (10, 11, 99)] == [0.0, 0.0, 0.0]


def test_decay_ends_at_the_stop() -> None:
    # From 0 to the stop at 10: in iteration 5 half of it.
    assert schedule(decay="linear", stop_iter=10)(5) == pytest.approx(1.0)


def test_decay_from_the_end_of_the_run_on_never_begins() -> None:
    # Of no iterations that are left for it there is no fraction.
    weight = from_yaml_keys(LOSS_WEIGHT=2.0, SCHEDULE__DECAY="linear", SCHEDULE__DECAY_FROM=100)
    assert [weight(i) for i in (0, 99, 100)] == [2.0, 2.0, 0.0]


def test_warm_up_and_decay_multiply() -> None:
    # Iteration 4 of 10: (4 + 1) / 10 of the warm-up, 1 - 4/100 of the decay.
    weight = schedule(warmup_iters=10, decay="linear")
    assert weight(4) == pytest.approx(2 * 0.5 * 0.96)


def test_keys_of_the_config_reach_the_schedule() -> None:
    weight = from_yaml_keys(
        LOSS_WEIGHT=4.0,
        SCHEDULE__WARMUP_ITERS=2,
        SCHEDULE__DECAY="linear",
        SCHEDULE__DECAY_FROM=10,
        SCHEDULE__END_FACTOR=0.5,
        SCHEDULE__STOP_ITER=30,
    )
    assert [weight(0), weight(1), weight(10), weight(30)] == [2.0, 4.0, 4.0, 0.0]
    assert weight(20) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("LOSS_WEIGHT", 0.0, "must be above 0, got 0.0"),
        ("LOSS_WEIGHT", -1.0, "must be above 0, got -1.0"),
        ("LOSS_WEIGHT", math.nan, "must be above 0, got nan"),
        ("REFERENCE_PIXELS", -1, r"must be in \[0, 1000000000\], got -1"),
        ("SCHEDULE__DECAY", "step", "must be one of none, linear, cosine, got 'step'"),
        ("SCHEDULE__END_FACTOR", 1.5, r"must be in \[0, 1\], got 1.5"),
        ("SCHEDULE__END_FACTOR", -0.5, r"must be in \[0, 1\], got -0.5"),
        ("SCHEDULE__WARMUP_ITERS", 101, r"must be in \[0, 100\], got 101: SOLVER.MAX_ITER is 100"),
        ("SCHEDULE__DECAY_FROM", -1, r"must be in \[0, 100\], got -1: SOLVER.MAX_ITER is 100"),
        ("SCHEDULE__STOP_ITER", 0, r"must be -1 \(never\) or a positive iteration, got 0"),
        ("SCHEDULE__STOP_ITER", -2, r"must be -1 \(never\) or a positive iteration, got -2"),
    ],
)
def test_value_outside_its_range_is_refused_by_its_key(key: str, value: Any, message: str) -> None:
    dotted = key.replace("__", r"\.")
    with pytest.raises(ValueError, match=rf"DISTILL\.MGD\.{dotted} {message}"):
        from_yaml_keys(**{key: value})


def test_decay_that_would_begin_after_the_end_is_refused() -> None:
    keys = {"SCHEDULE__DECAY": "linear", "SCHEDULE__DECAY_FROM": 40}
    with pytest.raises(ValueError, match="DECAY_FROM 40 on, but the head is off from STOP_ITER 40"):
        from_yaml_keys(SCHEDULE__STOP_ITER=40, **keys)
    from_yaml_keys(SCHEDULE__STOP_ITER=41, **keys)


def test_iterations_are_rounded_as_detectron2_rounds_max_iter() -> None:
    # 7 / 2 is 4 for both: a schedule that ends with the run still does.
    cfg = load_config(opts=["DISTILL.MGD.SCHEDULE.STOP_ITER", 7])
    scale_schedules(cfg, 0.5)
    assert cfg.DISTILL.MGD.SCHEDULE.STOP_ITER == 4


def test_no_iteration_is_scaled_to_none() -> None:
    # 1 / 8 is rounded to 0, which means no warm-up, and is refused as a stop.
    keys = {"WARMUP_ITERS": 1, "DECAY_FROM": 0, "STOP_ITER": 1}
    opts = [x for k, v in keys.items() for x in (f"DISTILL.MGD.SCHEDULE.{k}", v)]
    cfg = load_config(opts=opts)
    scale_schedules(cfg, 1 / 8)
    assert {k: cfg.DISTILL.MGD.SCHEDULE[k] for k in keys} == keys


# Weights at other sizes of the input --------------------------------------------------------------


# Cells per level, padded to a multiple of 32 pixels; P6 and P7 are strided convolutions.
LEVELS_800x1344 = {"p3": 100 * 168, "p4": 50 * 84, "p5": 25 * 42, "p6": 13 * 21, "p7": 7 * 11}
LEVELS_512x512 = {"p3": 64 * 64, "p4": 32 * 32, "p5": 16 * 16, "p6": 8 * 8, "p7": 4 * 4}


def test_weights_at_512_pixels_are_those_at_800x1344() -> None:
    # 800 x 1344 / 512^2 = 4.1. P6 and P7 are rounded up to whole cells at 800 x 1344 (13 x 21 for
    # 12.5 x 21), hence have 4 % and 15 % less at 512; together they are 1.6 % of all cells.
    reference = 800 * 1344
    assert pixel_factor(reference, [(800, 1344)] * 2) == 1.0
    factor = pixel_factor(reference, [(512, 512)] * 2)
    weights = {k: factor * cells for k, cells in LEVELS_512x512.items()}
    for level in ("p3", "p4", "p5"):
        assert weights[level] == pytest.approx(LEVELS_800x1344[level], rel=0.01)
    assert sum(weights.values()) == pytest.approx(sum(LEVELS_800x1344.values()), rel=0.01)


def test_factor_is_that_of_the_mean_size_and_one_as_published() -> None:
    assert pixel_factor(0, [(10, 10)]) == 1.0
    assert pixel_factor(3000, [(10, 10), (20, 20), (10, 50)]) == 9.0  # 1000 pixels on average

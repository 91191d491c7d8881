"""The learning-rate schedule of the published models, and others."""

import math
from typing import Literal

from perception.errors import ConfigError


def cosine_factor(step: int, *, warmup: int, steps: int, floor: float = 0.01) -> float:
    """What the learning rate is multiplied by at a step: a linear warm-up, then half a cosine down to `floor`.

    step  0 is the first update, whose factor is 0

    Raises ConfigError for a warm-up that does not end before `steps`.
    """
    if not 0 <= warmup < steps or not 0 <= floor <= 1:
        raise ConfigError(f"warmup={warmup}, steps={steps}, floor={floor}: expected 0 <= warmup < steps, floor in 0..1")
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / (steps - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


Schedule = Literal["cosine", "constant", "linear", "inv_sqrt", "wsd", "trapezoid"]


def factor(kind: Schedule, step: int, steps: int, *, warmup: int = 0, floor: float = 0.01, decay: int = 0) -> float:
    """What the learning rate is multiplied by at a step, after a linear warm-up from 0.

    cosine, linear  down to `floor` at the end
    inv_sqrt        sqrt(warmup / step)
    constant        1 from the first step on, without a warm-up
    wsd             1, then over the last `decay` steps (a tenth when 0) as published: harmonically, and not to the end
    trapezoid       1, then over the last `decay` steps on a line to `floor`

    Raises ConfigError for a warm-up that does not end before `steps`, and a decay that does not fit behind it.
    """
    if kind == "cosine":
        return cosine_factor(step, warmup=warmup, steps=steps, floor=floor)
    if not 0 <= warmup < steps or not 0 <= floor <= 1 or not 0 <= decay <= steps - warmup:
        raise ConfigError(
            f"warmup={warmup}, decay={decay}, steps={steps}, floor={floor}: expected warmup + decay <= steps and "
            "a floor of 0 to 1"
        )
    if kind == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if kind == "linear":
        return floor + (1 - floor) * max(0.0, (steps - step) / (steps - warmup))
    if kind == "inv_sqrt":
        return math.sqrt(max(1, warmup) / max(1, step))
    if kind == "wsd" and floor:
        done = max(0, min(step, steps) - (steps - (decay or steps // 10))) / steps
        return 1 / (done / floor + 1 - done)
    if kind == "trapezoid" and step > steps - decay:
        return floor + (1 - floor) * max(0.0, (steps - step) / decay)
    return 1.0

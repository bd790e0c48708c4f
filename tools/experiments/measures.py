"""
What a row is measured by: plans for scenes, and drives in closed loop, that no training, no
validation and no choice of a setting has seen.
"""
from types import SimpleNamespace

import data
import world
from tools.common import COUNT, SHARES, Policy, drive_scenes, measure_plans

FIRST = 60_000  # of a split, the first scene to measure on


def add_flags(add, scenes=256, drives=64):
    """How much is measured."""
    add("--eval", type=COUNT, default=scenes, help="scenes of a split to plan for")
    add("--drive", type=COUNT, default=drives, help="scenarios of a split to drive, 20 s each")


def options(**changed):
    """How plans are made, as tools.common wants it."""
    usual = {"n": 6, "steps": 10, "reason": True, "route": True, "seed": 0, "batch": 32}
    return SimpleNamespace(**usual | changed)


def plans(model, split, args, **changed):
    """{name: mean, name_se: its standard error} of plans for --eval scenes of a split."""
    view = data.view_of(model.cfg, args.size)
    scenes = data.load_world(split, args.eval, FIRST, args.cache, **view)
    return means(measure_plans(model, scenes, options(**changed)))


def drives(model, split, args, **changed):
    """The same of --drive scenarios of a split, driven by the likeliest plans."""
    first = world.SEEDS[split] + FIRST
    view = data.view_of(model.cfg, args.size)
    policy = Policy(model, options(**changed))
    return means(drive_scenes(policy, range(first, first + args.drive), seconds=20.0, **view))


def means(numbers):
    """Means and standard errors of {name: (N,)}; of SHARES over the scenes that state decisions."""
    found = {}
    for name, values in numbers.items():
        values = values.double()
        if name in SHARES:
            values = values[~values.isnan()]
        if len(values):
            error = values.std(correction=0) / len(values) ** 0.5
            found[name] = round(values.mean().item(), 5)
            found[f"{name}_se"] = round(error.item(), 5)
    return found


def shown(found, name, digits=2, scale=1):
    """A number ± its standard error, as a table has it; `-` where it was not measured."""
    if name not in found:
        return "-"
    mean, error = scale * found[name], scale * found[f"{name}_se"]
    return f"{mean:.{digits}f} ± {error:.{digits}f}"

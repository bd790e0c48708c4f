"""
How well a checkpoint plans, and drives, in scenes of the built-in world that it never saw.

    python -m tools.evaluate                          512 scenes: a Markdown table, then JSON
    python -m tools.evaluate --blind out/blind        beside a model that learned from grey images
    python -m tools.evaluate --drive                  64 scenarios of 20 s in closed loop
    python -m tools.evaluate --drive --split tail     in combinations that training never showed
    python -m tools.evaluate --clip FOLDER            scenes of real clips with 6.4 s after them
"""
import json

import torch

import data
import doors
import world
from alpamayo import DT, HORIZON, load_model
from doors import whole
from tools import blind, markdown
from tools.common import (
    COUNT,
    SHARES,
    Policy,
    add_checkpoint_flags,
    drive_scenes,
    load_checkpoint,
    measure_plans,
    world_scenes,
)


def mean_and_error(values):
    """Mean and its standard error of values (N,)."""
    error = values.std(correction=0) / len(values) ** 0.5
    return values.mean().item(), error.item()


def with_error(row, name, scale, digits):
    """A number of a row ± its standard error."""
    mean = scale * row[name]
    error = scale * row[name + "_se"]
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


# --------------------------------------------------------------------------------------------------
# Open loop: plans beside what the expert drove

COLUMNS = ("scenes", "ade", *SHARES, "minade", "eyes")
TITLES = {"ade": "ADE", "minade": "minADE", "eyes": "eyes remove, %"}
PLAN_NOTE = """\
Metres over 6.4 s, mean ± standard error. ADE, longitudinal, lateral, both, exact: of the likeliest
sample, greedy reasoning and the flow from zero; % that decide right, and that say so word for word.
minADE: the best of {n} other samples, each with its own reasoning.
{blind}"""
IN_WORLD = """\
Without eyes: constant velocity goes straight on from the last two positions; fixed offsets to it
are the same in all scenes; the blind network knows history and route. Both are fitted to {scenes}
scenes of split train, one path for ADE and six for minADE. Eyes remove: 1 - ADE / ADE of the blind
network in the same scenes."""
IN_CLIPS = "Without eyes: CV, CTRV and CTRA of motion.baselines."


class OtherImages:
    """A set of scenes, each with the images of the one before it, the first with the last one's."""

    def __init__(self, scenes):
        self.scenes = scenes

    def __len__(self):
        return len(self.scenes)

    def batch(self, indices):
        before = self.scenes.batch([i - 1 for i in indices])
        return self.scenes.batch(indices) | {"images": before["images"]}


def open_loop(model, args):
    """Rows of numbers, {row: see `plan_row`}: by situation, all, by condition, without eyes."""
    if args.clip:
        scenes = clip_scenes(model.cfg, args)
        eyeless = blind.measure(blind.of_physics(), scenes)
        compared = {}
    else:
        scenes = world_scenes(model.cfg, args.split, args.scenes, args)
        eyeless = blind.measure(blind.fit_drivers(args.route), scenes)
        compared = {"blind_ade": eyeless["blind network"]["ade"]}
    numbers = measure_plans(model, scenes, args) | compared
    rows = {}
    for kind in () if args.clip else world.KINDS[args.split]:
        of_kind = torch.tensor([name == kind for name in scenes.names])
        if of_kind.any():
            rows[kind] = plan_row({name: values[of_kind] for name, values in numbers.items()})
    rows["all"] = plan_row(numbers)
    for condition, (driver, shown, show) in conditions_of(model, scenes, args).items():
        rows[condition] = plan_row(measure_plans(driver, shown, args, show) | compared)
    for name, numbers in eyeless.items():
        rows[name] = plan_row(numbers | compared)
    return rows


def conditions_of(model, scenes, args):
    """How else the plans are measured: {row: (model, its scenes, how it is shown them)}."""
    conditions = {}
    if model.cfg.route and args.route and not args.clip:  # a clip tells no route
        conditions["without the route"] = model, scenes, data.without_route
    if not args.clip and len(scenes) > 1:  # of a clip the neighbour is half a second away
        conditions["another scene's images"] = model, OtherImages(scenes), dict
    conditions["no images (grey)"] = model, scenes, data.in_grey
    if args.blind:
        conditions["trained blind"] = load_model(args.blind, args.device), scenes, data.in_grey
    return conditions


def clip_scenes(cfg, args):
    """All Scenes of the clips in a folder, as a model of this Config is shown them."""
    options = dict(frames=cfg.frames, frame_dt=cfg.frame_dt, camera_ids=args.cameras)
    if cfg.max_pixels == 0:  # it knows only the world's cameras
        options |= dict(size=tuple(args.size), rig=world.RIG)
    return data.load(args.clip, **options)


def plan_row(numbers):
    """A row: mean and standard error of each of {name: (N,)}, and what eyes remove of the error.

    SHARES are of the scenes whose truth states decisions, and missing where none does."""
    row = {"scenes": len(numbers["ade"])}
    for name, values in numbers.items():
        if name in SHARES:
            values = values[~values.isnan()]
            if not len(values):
                continue
        mean, error = mean_and_error(values)
        row[name] = round(mean, 4)
        row[name + "_se"] = round(error, 4)
    if "blind_ade" in row:
        row["eyes"] = round(1 - row["ade"] / row["blind_ade"], 4)
    return row


def cell(row, name):
    """A number of a row as the table shows it."""
    if name not in row:
        return "-"  # no reasoning, no decisions; no blind network to compare with
    if name == "scenes":
        return row[name]
    if name == "eyes":
        return f"{100 * row[name]:.0f}"
    scale, digits = (100, 0) if name in SHARES else (1, 2)
    return with_error(row, name, scale, digits)


def open_table(rows):
    """Rows of `open_loop` as Markdown."""
    lines = []
    for title, row in rows.items():
        title = f"**{title}**" if title == "all" else title
        lines.append([title, *(cell(row, name) for name in COLUMNS)])
    return markdown(lines, ["situation", *(TITLES.get(name, name) for name in COLUMNS)])


# --------------------------------------------------------------------------------------------------
# Closed loop: driving

DRIVES = {  # of each scenario: a score, and shares
    "score": "score",
    "close": "close encounter",
    "collision": "collision",
    "off_road": "off the road",
    "ran": "ran a light or sign",
    "progress": "progress",
    "comfort": "comfort",
}
DRIVE_NOTE = """\
{drive} scenarios of {seconds:g} s, mean ± standard error, % but for the score; a new plan from new
images every {replan:g} s. Score, AlpaSim's: 0 after a collision or off the road, else progress /
0.8, at most 1. A scenario ends at its first close encounter, something solid within 0.25 m of the
car, or off the road; a collision counts until 1 s later. Progress: along the route until then, in %
(at most 100) of the expert's way in {seconds:g} s. Comfort: how many of the release's six bounds
held. The last column is kilometres driven for each end (> all that were driven, if none)."""

BRAKING = 2.0  # m/s^2, of who comes to a stand
BRAKING_JERK = 3.0  # m/s^3


def straight_on(scene):
    """The policy of constant velocity."""
    return torch.zeros(len(scene["name"]), HORIZON, 2)


def stand_still(scene):
    """The policy that brakes in comfort, without steering, and then stands."""
    speed, accel, _, _ = scene["ego_kinematics"][:, -1].unbind(-1)  # (B,) each
    most = BRAKING_JERK * DT
    plan = []
    for _ in range(HORIZON):
        braking = (BRAKING_JERK * speed).sqrt().clamp(max=BRAKING)  # eases off before the end
        accel = accel + (-braking - accel).clamp(-most, most)
        speed = (speed + DT * accel).clamp(min=0)
        plan.append(torch.stack([accel, torch.zeros_like(accel)], -1))
    return torch.stack(plan, 1)


def closed_loop(model, args):
    """Rows of numbers over scenarios, {policy: row}: shares, kilometres, how many ended early."""
    first = world.SEEDS[args.split] + args.seed * args.drive
    seeds = range(first, first + args.drive)
    options = dict(seconds=args.seconds, replan=args.replan, device=model.device)
    options |= data.view_of(model.cfg, args.size)
    rows = {}
    policies = {
        "expert": None,
        "go straight": straight_on,
        "stand still": stand_still,
        "model": Policy(model, args),
    }
    for policy, driver in policies.items():
        met = drive_scenes(driver, seeds, args.batch, **options)
        row = rows[policy] = {"scenarios": args.drive}
        for name in DRIVES:
            row[name], row[name + "_se"] = mean_and_error(met[name].double())
        row["km"] = met["km"].double().sum().item()
        row["events"] = int((met["close"] | met["off_road"]).sum())
    return rows


def drive_table(rows):
    """Rows of `closed_loop` as Markdown."""
    lines = []
    for policy, row in rows.items():
        score, *shares = DRIVES
        cells = [with_error(row, score, 1, 2), *(with_error(row, name, 100, 1) for name in shares)]
        km, events = row["km"], row["events"]
        cells.append(f"{km / events:.2f}" if events else f"> {km:.1f}")
        lines.append([policy, *cells])
    return markdown(lines, ["policy", *DRIVES.values(), "km between ends"])


# --------------------------------------------------------------------------------------------------
# The command line


def parse_flags():
    p = doors.Flags("Evaluate a model on held-out scenes of the world, or let it drive there.")
    add_checkpoint_flags(p)
    add = p.add_argument
    add("--split", choices=tuple(world.KINDS), default="val", help="whose scenes")
    add("--scenes", type=COUNT, default=512, help="to plan in")
    add("--clip", metavar="FOLDER", help="plan in all scenes of real clips instead")
    add("--cameras", type=whole(most=6), nargs="+", metavar="ID",
        help="of the clips to look through (default: those of 0, 1, 2 and 6 that there are)")
    add("--n", type=whole(1, 10_000), default=6, help="samples, each with its own reasoning")
    add("--blind", metavar="FOLDER", help="a checkpoint that was trained with train.py --blind")
    add("--drive", type=COUNT, nargs="?", const=64, help="drive in closed loop: scenarios (64)")
    add("--batch", type=COUNT, default=32, help="scenes at a time")
    add("--cache", metavar="FOLDER", default="data", help="where rendered scenes are kept")
    args = p.parse_args()
    if args.clip and args.drive:
        p.error("--drive: a clip cannot tell what happens when the car drives otherwise")
    if args.cameras and not args.clip:
        p.error("--cameras: expected with --clip")
    return args


def main():
    args = parse_flags()
    model = load_checkpoint(args)
    if args.drive:
        rows = closed_loop(model, args)
        print(f"{drive_table(rows)}\n\n{DRIVE_NOTE.format(**vars(args))}")
    else:
        rows = open_loop(model, args)
        fitted = IN_CLIPS if args.clip else IN_WORLD.format(scenes=blind.SCENES)
        print(f"{open_table(rows)}\n\n{PLAN_NOTE.format(n=args.n, blind=fitted)}")
    record = {
        "checkpoint": args.checkpoint,
        "keep": model.cfg.keep,
        "retrieve": model.cfg.retrieve,
        "seed": args.seed,
    }
    record |= {"clip": args.clip} if args.clip else {"split": args.split}
    if not args.drive:
        record["samples"] = args.n
    print(json.dumps({**record, "rows": rows}))


if __name__ == "__main__":
    doors.run(main)

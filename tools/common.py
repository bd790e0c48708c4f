"""
What several tools do: load a checkpoint and its scenes, sample there, let it drive.
"""
import os

import torch
from tqdm import tqdm

import data
from alpamayo import HORIZON, NANO, ade, load_model
from motion import baselines, min_ade


def add_checkpoint_flags(parser):
    """The flags of a tool that lets a checkpoint drive in the world."""
    add = parser.add_argument
    add("--checkpoint", metavar="FOLDER", default=NANO, help="the model, ours or the release's")
    add("--seed", type=int, default=0, help="of the sampling, and of what is driven")
    add("--size", type=int, nargs=2, default=(64, 128), help="H W, pixels of the world's images")
    add("--steps", type=int, default=10, help="Euler steps of the flow from noise to controls")
    add("--no-reasoning", dest="reason", action="store_false", help="drive without thinking")
    add("--no-route", dest="route", action="store_false", help="hide where the route goes")
    add("--keep", type=float, help="share of the image tokens to keep (the checkpoint's)")
    add("--retrieve", type=float, help="share of them for the reasoning to read back (likewise)")
    add("--seconds", type=float, default=20.0, help="of a drive in closed loop")
    add("--replan", type=float, default=0.5, help="seconds of a drive between plans")


def check_at_least(args, least, *flags):
    """ValueError, in one line, where a flag is less than `least`. None is not given."""
    for flag in flags:
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected {least} or more")


def load_checkpoint(args):
    """The model of the flags; `args.reason` becomes False where it has not learned to think."""
    flags = vars(args)
    given = {name: flags[name] for name in ("keep", "retrieve") if flags[name] is not None}
    model = load_model(args.checkpoint, **given)
    if model.cfg.reasoning != "on":
        args.reason = False
    return model


def world_scenes(cfg, split, count, args):
    """The first scenes of a split of the world, as a model of this Config is shown them."""
    view = data.view_of(cfg, args.size)
    return data.load_world(split, count, folder=args.cache, workers=os.cpu_count(), **view)


def batches(scenes, size=32):
    """Yields a set of scenes in order: (number of the first one, their Scene)."""
    for first in tqdm(range(0, len(scenes), size), unit="batch", leave=False):
        last = min(first + size, len(scenes))
        yield first, scenes.batch(range(first, last))


def concatenated(parts):
    """Dictionaries of numbers (B,) as one of (N,)."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


SHARES = ("longitudinal", "lateral", "both", "exact")  # of the first samples that are right


def measure_plans(model, scenes, args, show=dict):
    """All numbers of samples of scenes: {name: (N,) float}. show: how a Scene is shown."""
    parts = []
    for first, scene in batches(scenes, args.batch):
        if not args.route:
            scene = data.without_route(scene)
        seed = args.seed + first
        out = model.sample(show(scene), args.n, steps=args.steps, seed=seed, reason=args.reason)
        paths = out.xyz.cpu()  # (B, n, 64, 3)
        truth = scene["ego_future_xyz"]
        eyeless = {name: ade(path, truth) for name, path in baselines(scene).items()}
        numbers = {"minade": min_ade(paths, truth), "ade": ade(paths[:, 0], truth), **eyeless}
        numbers["best"] = torch.stack(list(eyeless.values())).amin(0)
        if args.reason:
            firsts = [texts[0] for texts in out.reasoning]
            right = torch.tensor(list(map(data.is_right, firsts, scene["reasoning"])))  # (B, 4)
            numbers |= zip(SHARES, right.float().T)
        parts.append(numbers)
    return concatenated(parts)


class Policy:
    """A model as a policy of data.drive: a batched Scene -> controls (n, 64, 2).

    It thinks the likeliest thought, and its flow starts from zero, the middle of the noise. From
    random noise the plans of successive half seconds disagree, and the car wanders off.
    said: its last thoughts, n texts."""

    def __init__(self, model, args):
        self.model = model
        self.args = args

    def __call__(self, scene):
        args = self.args
        if not args.route:
            scene = data.without_route(scene)
        calm = torch.zeros(len(scene["name"]), HORIZON, 2)
        options = dict(steps=args.steps, max_new_tokens=64, reason=args.reason)
        out = self.model.sample(scene, n=1, temperature=0, noise=calm, **options)
        self.said = [texts[0] for texts in out.reasoning]
        return out.actions[:, 0]


def drive_scenes(policy, seeds, batch=32, **options):
    """What data.drive returns of many scenarios, {name: (N,)}; `batch` are driven at a time."""
    parts = []
    for first in tqdm(range(0, len(seeds), batch), desc="driving"):
        parts.append(data.drive(policy, seeds[first : first + batch], **options))
    return concatenated(parts)

"""
What several tools do: load a checkpoint and its scenes, sample there, let it drive.
"""
import os

import torch
from tqdm import tqdm

import data
import rl
import world
from alpamayo import NANO, ade, load_model
from doors import device_of, real, whole
from motion import min_ade

COUNT = whole(1, world.SEEDS["val"])  # of scenes of a split
SIDE = whole(1, 4096)  # pixels of an image


def add_checkpoint_flags(parser):
    """The flags of a tool that lets a checkpoint drive in the world."""
    add = parser.add_argument
    share = real(most=1, above=0)
    add("--checkpoint", metavar="FOLDER", default=NANO, help="the model, ours or the release's")
    add("--device", type=device_of, help="cpu, cuda or mps (default: a GPU if there is one)")
    add("--seed", type=whole(), default=0, help="of the sampling, and of what is driven")
    add("--size", type=SIDE, nargs=2, default=(64, 128), help="H W, pixels of the world's images")
    add("--steps", type=whole(1, 1000), default=10, help="Euler steps from noise to controls")
    add("--no-reasoning", dest="reason", action="store_false", help="drive without thinking")
    add("--no-route", dest="route", action="store_false", help="hide where the route goes")
    add("--keep", type=share, help="share of the image tokens to keep (the checkpoint's)")
    add("--retrieve", type=share, help="share of them for the reasoning to read back (likewise)")
    add("--seconds", type=real(0.1, 3600), default=20.0, help="of a drive in closed loop")
    add("--replan", type=real(0.1, 6.4), default=0.5, help="seconds of a drive between plans")


def load_checkpoint(args):
    """The model of the flags; `args.reason` becomes False where it has not learned to think."""
    flags = vars(args)
    given = {name: flags[name] for name in ("keep", "retrieve") if flags[name] is not None}
    model = load_model(args.checkpoint, args.device, **given)
    if model.cfg.reasoning != "on":
        args.reason = False
    return model


def world_scenes(cfg, split, count, args):
    """The first scenes of a split of the world, as a model of this Config is shown them."""
    unit = cfg.patch * cfg.merge
    if not cfg.max_pixels and any(side % unit for side in args.size):  # before all are rendered
        raise ValueError(f"--size: height and width must be multiples of {unit}")
    view = data.view_of(cfg, args.size)
    return data.load_world(split, count, folder=args.cache, workers=os.cpu_count(), **view)


def batches(scenes, size=32):
    """Yields a set of scenes in order: (number of the first one, their Scene)."""
    for first in tqdm(range(0, len(scenes), size), unit="batch", leave=False):
        last = min(first + size, len(scenes))
        yield first, scenes.batch(range(first, last))


SHARES = ("longitudinal", "lateral", "both", "exact")  # of the likeliest samples that are right


def measure_plans(model, scenes, args, show=dict):
    """All numbers of plans for scenes: {name: (N,) float}. show: how a Scene is shown.

    "ade" and SHARES are of the likeliest sample, "minade" is of the best of args.n others. SHARES
    are NaN where the truth states no decisions."""
    parts = []
    for first, scene in batches(scenes, args.batch):
        if not args.route:
            scene = data.without_route(scene)
        shown = show(scene)
        one = rl.likeliest_of(model, shown, args.steps, args.reason)
        seed = args.seed + first
        many = model.sample(shown, args.n, steps=args.steps, seed=seed, reason=args.reason)
        truth = scene["ego_future_xyz"]
        numbers = {
            "ade": ade(one.xyz[:, 0].cpu(), truth),
            "minade": min_ade(many.xyz.cpu(), truth),
        }
        if args.reason:
            said = [texts[0] for texts in one.reasoning]
            right = torch.tensor(list(map(data.is_right, said, scene["reasoning"]))).float()
            labelled = [data.decisions(text) is not None for text in scene["reasoning"]]
            right[~torch.tensor(labelled)] = torch.nan  # (B, 4)
            numbers |= zip(SHARES, right.T)
        parts.append(numbers)
    return data.joined(parts)


class Policy:
    """A model as a policy of data.drive: a batched Scene -> controls (n, 64, 2), the likeliest.

    said: its last thoughts, n texts."""

    def __init__(self, model, args):
        self.model = model
        self.args = args

    def __call__(self, scene):
        if not self.args.route:
            scene = data.without_route(scene)
        out = rl.likeliest_of(self.model, scene, self.args.steps, self.args.reason)
        self.said = [texts[0] for texts in out.reasoning]
        return out.actions[:, 0]


def drive_scenes(policy, seeds, batch=32, **options):
    """What data.drive returns of many scenarios, {name: (N,)}; `batch` are driven at a time."""
    parts = []
    for first in tqdm(range(0, len(seeds), batch), desc="driving"):
        parts.append(data.drive(policy, seeds[first : first + batch], **options))
    return data.joined(parts)

"""
How far one gets without eyes: drivers that see no images, fitted in seconds to the world's scenes.

    constant velocity    goes on as fast as at t0, straight ahead
    fixed offsets        to constant velocity, the same in all scenes
    blind network        a small one, of the history that a Scene shows and of the route

The last two have one path, fitted for ADE, beside which a model's likeliest path stands, and six,
fitted for the best of six, beside which its minADE stands. What they leave is what eyes can win.
"""
from itertools import islice

import torch
from torch import nn

import data
import world
from alpamayo import HORIZON, ade
from motion import baselines, min_ade, yaw_of
from tools.common import batches

SCENES = 4000  # of split train
BLINK = dict(camera_ids=(1,), size=(2, 4), frames=1)  # the least that can be rendered
MODES = 6
ROUNDS = 40  # of the offsets' fit
STEPS = 1000  # of the network's training
BATCH = 128
WIDTH = 128  # of its two hidden layers
RATE = 0.015  # AdamW's highest learning rate


def fit_drivers(route=True):
    """Drivers without eyes, {name: (one, six)}: functions of a Scene that return its paths
    (B, 1, 64, 3) and (B, 6, 64, 3). route: whether they are told it."""
    scene = training_scenes(SCENES)
    if not route:
        scene = data.without_route(scene)
    both = (1, MODES)
    return {
        "constant velocity": of_physics()["CV"],
        "fixed offsets": tuple(fit_offsets(scene, modes) for modes in both),
        "blind network": tuple(fit_network(scene, modes) for modes in both),
    }


def of_physics():
    """The drivers of motion.baselines, each with one path, as `fit_drivers` returns them."""

    def driver(name):
        return lambda scene: baselines(scene)[name][:, None]

    return {name: (driver(name), driver(name)) for name in ("CV", "CTRV", "CTRA")}


def measure(drivers, scenes):
    """What drivers {name: (one, six)} do in scenes: {name: {"ade": (N,), "minade": (N,)}}."""
    parts = {name: [] for name in drivers}
    for _, scene in batches(scenes):
        truth = scene["ego_future_xyz"]
        for name, (one, many) in drivers.items():
            numbers = {"ade": min_ade(one(scene), truth), "minade": min_ade(many(scene), truth)}
            parts[name].append(numbers)
    return {name: data.joined(some) for name, some in parts.items()}


def training_scenes(count):
    """A Scene of so many scenes of split train that are shown at t0, with hardly any images."""
    seeds = (seed for seed in range(world.SEEDS["val"]) if not world.draw(seed).late)
    parts = []
    for first in range(0, count, 500):  # at a time
        some = list(islice(seeds, min(500, count - first)))
        parts.append(data.make_scenes(some, **BLINK))
    return data.joined(parts)


def history_of(scene):
    """All that a Scene tells without images, (B, 131): kinematics, poses, route."""
    routes = list(data.ROUTES.values())
    said = scene.get("route", [""] * len(scene["name"]))
    told = torch.tensor([[float(route == one) for one in routes] for route in said])
    yaw = yaw_of(scene["ego_history_rot"])
    xy = scene["ego_history_xyz"][..., :2]
    return torch.cat([scene["ego_kinematics"].flatten(1), xy.flatten(1), yaw, told], 1)


def going_on(scene):
    """The path of constant velocity, (B, 1, 64, 3)."""
    return baselines(scene)["CV"][:, None]


def flat(paths):
    """Paths in the plane (..., 64, 2) as paths (..., 64, 3)."""
    return torch.cat([paths, torch.zeros_like(paths[..., :1])], -1)


def beyond(scene):
    """Where the car is in the plane, (B, 64, 2), from where constant velocity would bring it."""
    return (scene["ego_future_xyz"] - going_on(scene)[:, 0])[..., :2]


def fit_offsets(scene, modes):
    """The driver of so many offsets to constant velocity: the best of them has the least error.

    Lloyd's algorithm: each scene chooses the nearest, which then becomes the mean of those that
    chose it, weighted by 1 / their error, as ADE wants (Weiszfeld)."""
    wanted = beyond(scene)
    generator = torch.Generator().manual_seed(0)
    first = torch.randperm(len(wanted), generator=generator)[:modes]
    offsets = wanted[first]  # (modes, 64, 2)
    for _ in range(ROUNDS):
        chosen = ade(offsets, wanted[:, None]).argmin(1)
        for mode in range(modes):
            mine = wanted[chosen == mode]
            far = (mine - offsets[mode]).norm(dim=-1, keepdim=True).clamp(min=0.05)
            if len(mine):
                offsets[mode] = (mine / far).sum(0) / (1 / far).sum(0)
    return lambda scene: going_on(scene) + flat(offsets)


def fit_network(scene, modes):
    """The driver of a network from history (B, 131) to so many offsets, taught the best of them."""
    known = history_of(scene)
    wanted = beyond(scene)
    torch.manual_seed(0)
    net = nn.Sequential(
        Standard(known),
        nn.Linear(known.shape[1], WIDTH), nn.SiLU(),
        nn.Linear(WIDTH, WIDTH), nn.SiLU(),
        nn.Linear(WIDTH, modes * HORIZON * 2),
        nn.Unflatten(1, (modes, HORIZON, 2)),
    )  # fmt: skip
    optimiser = torch.optim.AdamW(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS)
    for _ in range(STEPS):
        some = torch.randint(len(wanted), (BATCH,))
        min_ade(net(known[some]), wanted[some]).mean().backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return lambda scene: going_on(scene) + flat(net(history_of(scene)).detach())


class Standard(nn.Module):
    """Each of the numbers (B, k) by its mean and spread in known (N, k)."""

    def __init__(self, known):
        super().__init__()
        self.mean = known.mean(0)
        self.spread = known.std(0) + 1e-3

    def forward(self, x):
        return (x - self.mean) / self.spread

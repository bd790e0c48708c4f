"""
Scenes, and where they come from.

A Scene is the one thing that crosses between data and model: a dictionary, batched first.

    images            (B, cameras, frames, 3, H, W) uint8, oldest frame first
    camera_ids        (B, cameras) long, ascending: 0 cross left, 1 front wide, 2 cross right,
                                       6 front tele
    ego_history_xyz   (B, 16, 3)       10 Hz, in the ego frame at t0; the last one is t0: the origin
    ego_history_rot   (B, 16, 3, 3)    and the last one is the identity
    ego_kinematics    (B, 20, 4)       t0-1.9 .. t0: speed m/s, acceleration m/s^2, steering angle
                                       rad, turn signal (-1 right, 0 off, 1 left)
    ego_future_xyz    (B, 64, 3)       t0+0.1 .. t0+6.4 s; training and evaluation only
    ego_future_rot    (B, 64, 3, 3)
    reasoning, name   lists of B str:  why the driver does what it does; the situation, or the clip
                                       and its time
    route             list of B str:   turn left, turn right, go straight; clips may have none
    camera_to_ego     (B, cameras, 4, 4)
    intrinsics        (B, cameras, 10) see `alpamayo.project`

Ego frame: origin at the rear axle on the ground, x forward, y left, z up; metres, seconds, yaw
left-positive. Camera axes: z out of the lens, x right, y down. All numbers are float32 unless said.

Scenes come from the built-in world (world/) or from real clips (clips.py). The world needs no
download, and it made the cause of every scene, so it knows the label. The page reads: the words of
a label; what loops do to a Scene; scenes of the world; driving in it; its scenes on disk; one door.

    python data.py --scenes 16000 --size 64 128     # make a training set
    python -m tools.world --look sheet.png          # look at twelve scenes
    python -m tools.label CLIP --out labels         # label a clip of one's own
"""

import argparse
import functools
import inspect
import math
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import doors
import store
from alpamayo import DT, HORIZON, project, rot_of
from clips import load_clips
from motion import comfort_of
from world import (
    FUTURE,
    HISTORY,
    LEFT,
    PAST,
    RIG,
    RIGHT,
    SEEDS,
    WHEELBASE,
    WORLD_VERSION,
    World,
    images_of,
    locate,
    rig_camera,
)

# --------------------------------------------------------------------------------------------------
# The words: closed sets of decisions (Table 1) and components (Table 2), an open reason

# Table 1 calls them: yield (agent right-of-way), stop for static constraints, lead obstacle
# following, gap-searching, speed adaptation (road events), acceleration for passing, set speed
# tracking. The more urgent come first: where causes meet, the first one decides.
LONGITUDINAL = ("yield", "stop", "follow", "search a gap", "adapt speed", "pass", "keep speed")
# Table 1 calls "straddle" an out-of-lane nudge, "nudge" an in-lane nudge, "abort" a lateral
# manoeuvre abort. The world uses keep lane, straddle, nudge, change lane and turn.
LATERAL = (
    "keep lane", "merge left", "merge right", "straddle left", "straddle right",
    "nudge left", "nudge right", "change lane left", "change lane right",
    "pull over", "turn left", "turn right", "abort",
)  # fmt: skip
COMPONENTS = (
    "critical object", "traffic light", "yield or stop control", "road event",
    "lane or lane lines", "routing intent", "ODD constraint",
)  # fmt: skip


class Words(NamedTuple):
    """What a cause makes a driver do and say; {side} is the cause's side, {other} the other one."""

    longitudinal: str
    lateral: str
    component: str
    reason: str


CAUSES = {  # the fields of Words
    "free": ("keep speed", "keep lane", "lane or lane lines", "the road ahead is free"),
    "curve": ("adapt speed", "keep lane", "road event", "the road bends {side} ahead"),
    "slower lead": ("follow", "keep lane", "critical object", "the car ahead is slower"),
    "braking lead": ("follow", "keep lane", "critical object", "the car ahead is braking"),
    "stopped lead": ("follow", "keep lane", "critical object", "the car ahead has stopped"),
    "red light": ("stop", "keep lane", "traffic light", "the light ahead is red"),
    "resume": ("keep speed", "keep lane", "traffic light", "the light ahead has turned green"),
    "green light": ("keep speed", "keep lane", "traffic light", "the light ahead is green"),
    "stop sign": ("stop", "keep lane", "yield or stop control", "a stop sign stands ahead"),
    "pedestrian": (
        "yield", "keep lane", "critical object", "a pedestrian crosses from the {side}"),
    "waiting pedestrian": (
        "keep speed", "keep lane", "critical object", "the pedestrian on the {side} waits"),
    "cut-in": ("yield", "keep lane", "critical object", "a car cuts in from the {side}"),
    "cones": (
        "keep speed", "straddle {other}", "critical object",
        "cones block the {side} side of the lane"),
    "parked car": (
        "keep speed", "nudge {other}", "critical object",
        "a parked car reaches into the lane from the {side}"),
    "double-parked car": (
        "keep speed", "straddle {other}", "critical object",
        "a parked car blocks the {side} side of the lane"),
    "oncoming car": (
        "yield", "keep lane", "critical object",
        "an oncoming car blocks the way around the parked car"),
    "lane closed": (
        "keep speed", "change lane {side}", "critical object", "barriers close the lane"),
    "gap search": (
        "search a gap", "keep lane", "critical object",
        "a car on the {side} blocks the way around the barriers"),
    "speed bump": ("adapt speed", "keep lane", "road event", "a speed bump lies ahead"),
    "swerving car": (
        "yield", "nudge {other}", "critical object", "an oncoming car leaves its lane"),
    "turn": (
        "adapt speed", "turn {side}", "routing intent",
        "the route turns {side} at the crossing"),
    "aside": (
        "keep speed", "keep lane", "lane or lane lines",
        "the car is on the {side} side of the lane"),
    "deer": ("yield", "keep lane", "critical object", "a deer crosses from the {side}"),
    "cyclist": ("yield", "keep lane", "critical object", "a cyclist crosses from the {side}"),
    "debris": (
        "keep speed", "straddle {other}", "critical object",
        "debris blocks the {side} side of the lane"),
}  # fmt: skip
ROUTES = {LEFT: "turn left", RIGHT: "turn right", 0: "go straight"}  # the text of a route


class Label(NamedTuple):
    """A Chain of Causation (Sec. 4): a decision of each kind, what it rests on, the trace."""

    longitudinal: str
    lateral: str
    components: list  # of dictionaries: component, what, x, y (m, ego), uncertainty (low, high)
    trace: str


def words_of(name, side):
    """The Words of a cause at `side` (LEFT or RIGHT)."""
    here, there = ("left", "right")[::side]
    return Words(*(text.format(side=here, other=there) for text in CAUSES[name]))


def compose(causes):
    """The label of causes [(name, side)]: longitudinal, lateral, trace, and which causes decided.

    The most urgent longitudinal decision wins, and the first lateral one that leaves the lane. The
    trace names the causes of these decisions and no others (Table 4: proximate cause). Where every
    cause says go on, it names them all. `which` is the list of the named causes' numbers."""
    rows = [words_of(name, side) for name, side in causes]
    longitudinal = min((row.longitudinal for row in rows), key=LONGITUDINAL.index)
    moves = [row.lateral for row in rows if row.lateral != "keep lane"]
    lateral = moves[0] if moves else "keep lane"
    decided = {longitudinal, lateral} - {"keep speed", "keep lane"}
    which = [i for i, row in enumerate(rows) if decided & {row.longitudinal, row.lateral}]
    which = which or list(range(len(rows)))
    reasons = " and ".join(rows[i].reason for i in which)
    trace = f"{longitudinal} and {lateral} since {reasons}.".capitalize()
    return longitudinal, lateral, trace, which


def sentence(situation, side):
    """The reasoning of a situation whose cause is at `side` (LEFT or RIGHT)."""
    return compose([(situation, side)])[2]


def decisions(text):
    """The decisions (longitudinal, lateral) of a reasoning text, or None if it states none."""
    decided = text.partition(" since ")[0].strip().lower()
    longitudinal, _, lateral = decided.partition(" and ")
    known = longitudinal in LONGITUDINAL and lateral in LATERAL
    return (longitudinal, lateral) if known else None


def is_right(said, true):
    """Whether a text decides as the true one: longitudinal, lateral, both, word for word."""
    ours = decisions(said) or (None, None)
    theirs = decisions(true) or ("", "")  # no decision is never right
    return ours[0] == theirs[0], ours[1] == theirs[1], ours == theirs, said == true


def labels_of(world):
    """The Label of each scene of a World at this moment, n of them; nothing of the future is used.

    Components are the causes of what is decided, and no others (Table 2)."""
    x, y, _ = world.poses_to_ego()
    places = torch.stack([x, y], -1)  # (n, things, 2)
    labels = []
    for i, causes in enumerate(world.causes()):
        pairs = [(cause.name, cause.side) for cause in causes]
        longitudinal, lateral, trace, which = compose(pairs)
        visibility = world.draws[i].visibility
        components = [component_of(causes[k], places[i], visibility) for k in which]
        labels.append(Label(longitudinal, lateral, components, trace))
    return labels


def component_of(cause, places, visibility):
    """A component of a Label, from the places of all things (things, 2) and visibility, in m.

    Uncertainty is high where haze or distance hides more than half. The rule is ours."""
    component = {"component": words_of(cause.name, cause.side).component, "what": cause.name}
    if cause.thing < 0:  # a bend or a free road stands nowhere
        return component
    x, y = places[cause.thing].tolist()
    seen = math.exp(-math.hypot(x, y) / (8 / 3 * visibility))  # as the renderer fades things
    uncertainty = "low" if seen > 0.5 else "high"
    return component | {"x": round(x, 1), "y": round(y, 1), "uncertainty": uncertainty}


# --------------------------------------------------------------------------------------------------
# What every loop does to a Scene


def view_of(cfg, size):
    """The options of `View` for a model: its cameras and frames, at size (H, W) pixels."""
    return {
        "camera_ids": cfg.cameras,
        "size": tuple(size),
        "frames": cfg.frames,
        "frame_dt": cfg.frame_dt,
    }


def to_device(scene, device):
    """The Scene with its tensors on a device."""
    move = {k: v.to(device, non_blocking=True) for k, v in scene.items() if torch.is_tensor(v)}
    return scene | move


def rows_of(scene, keep):
    """The Scene of some of a Scene's rows, by number."""
    return {k: v[keep] if torch.is_tensor(v) else [v[i] for i in keep] for k, v in scene.items()}


def joined(scenes):
    """Batched Scenes as one, in order; or dictionaries of numbers (B,) as one of (N,)."""
    found = {}
    for key, first in scenes[0].items():
        values = [scene[key] for scene in scenes]
        found[key] = torch.cat(values) if torch.is_tensor(first) else sum(values, [])
    return found


def in_grey(scene):
    """The Scene with images that show nothing: what can be known without looking?"""
    return scene | {"images": torch.full_like(scene["images"], 127)}


def without_route(scene):
    """The Scene without its route: the driver has to guess where to turn."""
    return {key: value for key, value in scene.items() if key != "route"}


def seed_of(seed, step, part=None):
    """The seed of a step of a run, or of one part of it: a process, or a piece of the batch.

    A resumed run thus draws the numbers of an uninterrupted one."""
    number = 1_000_003 * seed + step
    return number if part is None else 1_003 * number + part


# --------------------------------------------------------------------------------------------------
# Scenes of the world: two seconds of history, the present, 6.4 seconds of the expert's future


def ticks_of(seconds):
    """How many steps of the world these seconds are; 0 where that is no whole number."""
    if not doors.finite(seconds):
        return 0
    ticks = round(seconds / DT)
    return ticks if abs(ticks * DT - seconds) < 1e-6 else 0


SIDE = 2048  # pixels: the most that an image may be high or wide


@dataclass
class View:
    """How a scene is shown; ValueError where that is impossible."""

    camera_ids: tuple = (0, 1, 2, 6)
    size: tuple = (64, 128)  # H, W in pixels
    frames: int = 4
    frame_dt: float = 0.5  # s, a multiple of 0.1

    def __post_init__(self):
        self.camera_ids = tuple(sorted(doors.whole_numbers("camera_ids", self.camera_ids)))
        self.size = doors.whole_numbers("size", self.size, 1, SIDE)
        self.frames = doors.whole_number("frames", self.frames, 1)
        self.every = ticks_of(self.frame_dt)
        known = RIG.keys() & self.camera_ids
        if not known or len(known) < len(self.camera_ids):
            raise ValueError(
                f"camera_ids: the rig has the cameras {*RIG,}, each once, not {self.camera_ids}"
            )
        if len(self.size) != 2 or self.size[0] % 2:
            raise ValueError(
                "size: expected H, W, with H even, as the horizon lies between two rows, "
                f"not {self.size}"
            )
        if self.every < 1 or (self.frames - 1) * self.every > PAST:
            raise ValueError(
                f"frames, frame_dt: expected steps of {DT} s in {PAST * DT:g} s, "
                f"not {self.frames} of {self.frame_dt} s"
            )
        self.frame_dt = round(self.every * DT, 1)

    def shows(self, age):
        """Whether a Scene shows what was seen `age` ticks before it."""
        return age % self.every == 0 and age // self.every < self.frames


class Recorder:
    """What the cars of a World have seen and done: `note` every tick, then ask for the `scene`."""

    def __init__(self, world, view):
        self.world = world
        self.view = view
        cameras = [rig_camera(i, *view.size) for i in view.camera_ids]
        intrinsics, poses = zip(*cameras, strict=True)
        self.rig = {  # the same in all scenes
            "camera_ids": torch.tensor(view.camera_ids),
            "camera_to_ego": torch.stack(poses),
            "intrinsics": torch.stack(intrinsics),
        }
        self.images = {}  # tick: (n, cameras, 3, H, W)
        self.track = []  # a tick each: x, y, yaw (3, n) in the world's frame
        self.controls = []  # a tick each: speed, acceleration, steering angle (n, 3)

    def note(self, look):
        """Write down where the ego is; look: also what its cameras see."""
        world = self.world
        now = len(self.track)
        if look:
            self.images[now] = images_of(world, self.view.camera_ids, self.view.size)
        self.images.pop(now - PAST - 1, None)  # too old for any Scene
        self.track.append(torch.stack([world.x, world.y, world.yaw]))
        steering = torch.atan(WHEELBASE * world.curvature)
        self.controls.append(torch.stack([world.speed, world.accel, steering], -1))

    def local(self, last, origin):
        """The last poses, xyz (n, last, 3) and rot (n, last, 3, 3).

        They are in the ego frame of the tick `origin`."""
        x, y, yaw = torch.stack(self.track[-last:], -1)  # (n, last) each, world frame
        x0, y0, turn = self.track[origin][..., None]  # (n, 1) each
        x = x - x0
        y = y - y0
        cos, sin = torch.cos(turn), torch.sin(turn)
        ahead = cos * x + sin * y
        left = cos * y - sin * x
        xyz = torch.stack([ahead, left, torch.zeros_like(x)], -1)
        return xyz, rot_of(yaw - turn)

    def scene(self):
        """The batched Scene of the last tick, without its future."""
        world = self.world
        n = len(world.x)
        now = len(self.track) - 1
        shown = [seen for tick, seen in self.images.items() if self.view.shows(now - tick)]
        controls = torch.stack(self.controls[-PAST:], 1)  # (n, 20, 3)
        signal = world.scene.signal[:, None, None].expand(-1, PAST, 1)
        scene = {key: v.to(world.device).expand(n, *v.shape) for key, v in self.rig.items()}
        scene["images"] = torch.stack(shown, 2)
        scene["ego_history_xyz"], scene["ego_history_rot"] = self.local(HISTORY, origin=now)
        scene["ego_kinematics"] = torch.cat([controls, signal], -1)
        scene["reasoning"] = [label.trace for label in labels_of(world)]
        scene["route"] = [ROUTES[way] for way in world.route()]
        scene["name"] = [one.situation for one in world.draws]
        return scene


def make_scenes(seeds, device="cpu", **view):
    """A batched Scene of these seeds. view: the options of `View`."""
    view = View(**view)
    world = World(seeds, device)
    recorder = Recorder(world, view)
    world.catch_up()
    for tick in range(PAST):
        recorder.note(look=view.shows(PAST - tick))
        world.step(*world.expert())
    recorder.note(look=True)  # t0
    scene = recorder.scene()
    for _ in range(FUTURE):
        world.step(*world.expert())
        recorder.note(look=False)
    scene["ego_future_xyz"], scene["ego_future_rot"] = recorder.local(FUTURE, origin=PAST)
    return scene


# --------------------------------------------------------------------------------------------------
# Driving in the world: of a plan, what comes of it; of a policy, in closed loop


@torch.no_grad()
def drive_plans(seeds, plans, device="cpu"):
    """What comes of m plans of each scene, each driven from t0 to its end: what `drive` says of a
    drive but `ran`, {name: (n, m)}, and `beside` (n, m, T), metres to the left of the line to
    drive on.

    plans: (n, m, T, 2), m/s^2 and 1/m. The others react, see World.step. ValueError,
    FloatingPointError where plans are none."""
    seeds = doors.whole_numbers("seeds", seeds)
    world = World(seeds, device)
    require_controls("plans", plans, seeds, dims=4)
    world.catch_up()
    for _ in range(PAST):
        world.step(*world.expert())
    m, T = plans.shape[1:3]
    whole = way_of_expert(world, T).repeat_interleave(m)
    world = world.repeat(m)
    tally = Tally(world, T * DT)
    beside = []
    controls = plans.to(device).flatten(0, 1)  # (n * m, T, 2)
    for accel, curvature in controls.permute(1, 2, 0):
        world.step(accel, curvature)
        tally.add(world.judge(), world)
        beside.append(locate(world.x, world.y, world.scene.route)[1])
    require_finite("plans: the ego", seeds, world.x, world.y, world.yaw, world.speed)
    found = {name: value.view(-1, m) for name, value in tally.result(whole).items()}
    return found | {"beside": torch.stack(beside, -1).view(-1, m, T)}


def require_controls(name, controls, seeds, dims, least=1):
    """ValueError or FloatingPointError unless controls are finite floats (n, ..., T, 2)."""
    shape = tuple(controls.shape) if torch.is_tensor(controls) else ()
    fits = len(shape) == dims and shape[0] == len(seeds) and shape[-2] >= least and shape[-1] == 2
    if not fits or not controls.numel() or not controls.is_floating_point():
        kind = controls.dtype if shape else type(controls).__name__
        plans = "m, " * (dims == 4)
        raise ValueError(
            f"{name}: expected controls, floats ({len(seeds)}, {plans}{least} or more, 2), "
            f"not {kind} {shape}"
        )
    require_finite(name, seeds, controls)


def require_finite(name, seeds, *values):
    """FloatingPointError unless the values of all scenes are finite. It names the first seed."""
    of_scenes = torch.cat([value.reshape(len(seeds), -1) for value in values], 1)
    bad = (~of_scenes.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(f"{name}: not finite in scene {bad[0]}, seed {seeds[bad[0]]}")


HOUR = 36_000  # steps: the longest drive
GRACE = 1.0  # s: how long after a scenario's end a collision still counts as its
ENOUGH = 0.8  # of the expert's way: who gets so far has the full score (AlpaSim's)


class Tally:
    """What came of n drives so far; `alive` (n,) bool says which of them go on."""

    def __init__(self, world, seconds):
        self.alive = torch.ones_like(world.x, dtype=torch.bool)
        self.ended = torch.full_like(world.x, seconds)  # s
        self.metres = torch.zeros_like(world.x)
        self.start = world.on_route()[0]  # m along the route
        self.s = self.start
        self.met = {}
        self.driven = []  # a tick each: speed, accel, curvature, alive (n, 4)
        self.time = 0.0  # s since t0

    def add(self, now, world):
        """Count one tick more, at which {name: (n,) bool} is met."""
        watched = self.watched()
        for name, value in now.items():
            counts = watched if name == "collision" else self.alive
            self.met[name] = (value & counts) | self.met.get(name, False)
        self.metres += DT * world.speed * self.alive
        self.s = world.on_route()[0].where(self.alive, self.s)
        felt = [world.speed, world.accel, world.curvature, self.alive.float()]
        self.driven.append(torch.stack(felt, -1))
        self.time = len(self.driven) * DT
        ends = self.alive & (now["close"] | now["off_road"])
        self.ended[ends] = self.time
        self.alive = self.alive & ~ends

    def watched(self):
        """Which of the drives still matter, (n,) bool: those that go on, and GRACE after an end."""
        return self.alive | (self.time < self.ended + GRACE)

    def result(self, whole):
        """What `drive` returns. whole (n,): how far the expert gets in all the time, m."""
        speed, accel, curvature, alive = torch.stack(self.driven, 1).unbind(-1)  # (n, T) each
        bounds = comfort_of(speed, accel, curvature).values()
        held = torch.stack([(ok | (alive == 0)).all(1) for ok in bounds])  # (6, n)
        progress = ((self.s - self.start) / whole).clamp(0, 1)
        progress = progress.where(whole >= 1, 1)  # where the expert waits, nobody has to go on
        failed = self.met["collision"] | self.met["off_road"]
        return self.met | {
            "score": (progress / ENOUGH).clamp(max=1) * ~failed,
            "progress": progress,
            "km": self.metres / 1000,
            "comfort": held.float().mean(0),
            "seconds": self.ended,
        }


def way_of_expert(world, ticks):
    """How far the expert gets along the routes of a World in so many ticks, (n,) m."""
    expert = world.repeat(1)
    start = expert.on_route()[0]
    for _ in range(ticks):
        expert.step(*expert.expert())
    return expert.on_route()[0] - start


def plan_of(policy, scene, asked, seeds, least):
    """The controls (n, T, 2) of a policy for the scenes that are asked, (n,) bool; 0 for others."""
    rows = asked.nonzero()[:, 0].tolist()
    some = scene if len(rows) == len(asked) else rows_of(scene, rows)
    said = policy(some)
    require_controls("policy", said, [seeds[i] for i in rows], dims=3, least=least)
    plan = said.new_zeros(len(asked), *said.shape[1:])
    plan[rows] = said
    return plan


@torch.no_grad()
def drive(
    policy, seeds, seconds=20.0, replan=0.5, device="cpu", film=None, ask_all=False, **view,
):  # fmt: skip
    """Let a policy drive n scenes of the world in closed loop, and judge it.

    policy: a function of a batched Scene (without a future) that returns controls (n, T, 2) in
    m/s^2 and 1/m. Those of the next `replan` seconds are driven; then it is asked again, with fresh
    images. None is the expert, who also drives up to t0 and does not know the cause yet. The other
    cars react, see World.step. A scenario ends at its first close encounter or when the ego leaves
    the road (as AlpaSim's do), else after `seconds`. A collision counts until GRACE seconds later.
    The policy is not asked about scenarios that are over, unless it wants to (ask_all) or there is
    a film: called with the World, the Scene and the controls at every replanning. view: the options
    of `View`.

    Returns {name: (n,)}:
        score       AlpaSim's: 0 after a collision or off the road, else progress / ENOUGH, at most
                    1. A close encounter alone does not make it 0, but ends the way
        collision, close, off_road    bool, see World.judge
        ran         bool: crossed a stop line at a red light, or at a sign without having stood
        progress    along the route until the end, as a share, from 0 to 1, of the expert's way in
                    all the `seconds`; 1 where that is less than a metre
        comfort     share of the six motion.COMFORT_BOUNDS that held until the end
        km, seconds    until the end
    ValueError where steps or controls do not fit, FloatingPointError where these are not finite."""
    every = ticks_of(replan)
    ticks = ticks_of(seconds)
    if not 1 <= every <= FUTURE or not 1 <= ticks <= HOUR:
        raise ValueError(
            f"seconds, replan: expected steps of {DT} s, seconds at most {HOUR * DT:g}, "
            f"replan at most {FUTURE * DT:g}, not {seconds} and {replan}"
        )
    seeds = doors.whole_numbers("seeds", seeds)
    world = World(seeds, device)
    view = View(**view)
    recorder = Recorder(world, view)
    pace = math.gcd(every, view.every)  # looks at every image that some Scene will show
    for tick in range(-PAST, 0):
        recorder.note(look=policy and tick % pace == 0)
        world.step(*world.expert())

    whole = way_of_expert(world, ticks)
    tally = Tally(world, seconds)
    for tick in range(ticks):
        # Look
        recorder.note(look=policy and tick % pace == 0)
        # Plan
        if policy and tick % every == 0:
            scene = recorder.scene()
            asked = tally.watched() | bool(film or ask_all)
            plan = plan_of(policy, scene, asked, seeds, every).to(device)
            if film:
                film(world, scene, plan)
        controls = plan[:, tick % every].unbind(-1) if policy else world.expert()
        # Step
        waits = world.held & (world.bumper() < world.scene.stop)
        world.step(*controls)
        # Judge
        ran = waits & (world.bumper() >= world.scene.stop)
        tally.add(world.judge() | {"ran": ran}, world)
        if not tally.watched().any():
            break
    require_finite("policy: the ego", seeds, world.x, world.y, world.yaw, world.speed)
    return tally.result(whole)


@torch.no_grad()
def own_scenes(policy, seeds, seconds=20.0, **view):
    """Scenes that a policy got itself into, each with the expert's way on from there.

    This is DAgger (Ross et al. 2011), not the paper's: who only saw an expert drive never saw how
    to mend a mistake of its own. Returns a batched Scene for each replanning after the first. It
    leaves out whose ego is near something or off the road, or whose expert cannot keep clear."""
    found = []

    def film(world, scene, plan):
        if world.time[0] > DT / 2:  # at t0 it has done nothing yet
            future, safe = way_on(world)
            found.append(rows_of(scene | future, safe.nonzero()[:, 0].tolist()))

    drive(policy, seeds, seconds, film=film, **view)
    return found


def way_on(world):
    """What the expert would do from here: a Scene's future, and (n,) bool, whether it is safe.

    It does not err on purpose, as the drivers of lessons do."""
    ahead = world.repeat(1)
    ahead.scene.lapse[:, 0] = 0  # m
    recorder = Recorder(ahead, View())
    recorder.note(look=False)
    met = ahead.judge()
    harm = met["close"] | met["off_road"]
    for _ in range(FUTURE):
        ahead.step(*ahead.expert())
        recorder.note(look=False)
        met = ahead.judge()
        harm |= met["close"] | met["off_road"]
    xyz, rot = recorder.local(FUTURE, origin=0)
    return {"ego_future_xyz": xyz, "ego_future_rot": rot}, ~harm


# --------------------------------------------------------------------------------------------------
# The world on disk: made once, memory-mapped ever after

SPLITS = tuple(SEEDS)[:-1]  # train, val, and what training never shows: tail, rare
TEXTS = ("reasoning", "route", "name")  # the entries of a Scene that are lists of str
BATCH = 32  # scenes that a worker makes at a time,
ROOM = 2**26  # or fewer, if they have more bytes of images than this

# All that a seed's scene depends on: world/, two sections of this page, four names of the model.
# They are read as this process begins: who edits them later does not change what it runs.
HERE = Path(__file__)
SECTIONS = re.split("^# -+\n", HERE.read_text("utf-8"), flags=re.MULTILINE)
SOURCES = [
    *(page.read_text("utf-8") for page in sorted(HERE.parent.glob("world/*.py"))),
    *(one for one in SECTIONS if one.startswith(("# The words", "# Scenes of the world"))),
    *(f"{DT = }", f"{HORIZON = }", inspect.getsource(rot_of), inspect.getsource(project)),
]


@functools.cache
def sources():
    """A short hash of SOURCES, in which comments, docstrings and layout do not count."""
    return store.hash_of(SOURCES)


def arrays_of(view):
    """What a Scene of a View has of each scene: {name: (type, shape)}."""
    cameras = len(view.camera_ids)
    return {
        "images": (np.uint8, (cameras, view.frames, 3, *view.size)),
        "camera_ids": (np.int64, (cameras,)),
        "ego_history_xyz": (np.float32, (HISTORY, 3)),
        "ego_history_rot": (np.float32, (HISTORY, 3, 3)),
        "ego_kinematics": (np.float32, (PAST, 4)),
        "ego_future_xyz": (np.float32, (FUTURE, 3)),
        "ego_future_rot": (np.float32, (FUTURE, 3, 3)),
        "camera_to_ego": (np.float32, (cameras, 4, 4)),
        "intrinsics": (np.float32, (cameras, 10)),
    }


class WorldSet:
    """Scenes of the world on disk: len(set), set.batch(indices), set.reasoning, set.names."""

    def __init__(self, folder, seeds, view, form):
        self.folder = folder
        self.seeds = seeds
        self.texts, self.arrays = store.open_set(folder, form)
        self.reasoning = self.texts["reasoning"]
        self.names = self.texts["name"]
        if not (self.arrays["camera_ids"] == view.camera_ids).all():
            raise ValueError(f"{folder}/camera_ids.npy: expected {view.camera_ids} in each row")

    def __len__(self):
        return len(self.names)

    def batch(self, indices):
        """The Scene of these scenes; no other rows are read from disk."""
        indices = [int(i) for i in indices]
        scene = {}
        for key, array in self.arrays.items():
            scene[key] = torch.from_numpy(np.asarray(array[indices]))
        for key, values in self.texts.items():
            scene[key] = [values[i] for i in indices]
        return scene

    def drive_plans(self, indices, plans):
        """`drive_plans` of scenes number `indices`."""
        return drive_plans([self.seeds[int(i)] for i in indices], plans)


class Together(WorldSet):
    """Several WorldSets as one: the scenes of the first, then those of the second, and so on."""

    def __init__(self, sets):
        self.places = [(one, i) for one in sets for i in range(len(one))]
        self.seeds = [seed for one in sets for seed in one.seeds]
        self.names = [name for one in sets for name in one.names]
        self.reasoning = [text for one in sets for text in one.reasoning]

    def batch(self, indices):
        places = [self.places[int(i)] for i in indices]
        return joined([one.batch([i]) for one, i in places])


def load_world(split="train", scenes=16000, start=0, folder="data", workers=None, **view):
    """The built-in world's scenes [start, start + scenes) of a split, as a WorldSet.

    The first call makes them (393 KB a scene of 16 images of 64 x 128), later ones read them from
    `folder`. All that they depend on is in the set's name, the world's sources too. An interrupted
    call leaves no half set; of two calls at once, one waits for the other.
    workers: processes that make scenes, by default one a core; 0 makes them in this one.
    view: the options of `View`."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, not {split!r}")
    most = SEEDS["val"]
    scenes = doors.whole_number("scenes", scenes, 1, most)
    start = doors.whole_number("start", start, 0, most - scenes)
    workers = os.cpu_count() if workers is None else workers
    workers = doors.whole_number("workers", workers, 0, 1024)
    view = View(**view)
    cameras = "".join(map(str, view.camera_ids))
    size = "x".join(map(str, view.size))
    shown = f"{size}-c{cameras}-f{view.frames}x{view.frame_dt:g}"
    made_by = f"world{WORLD_VERSION}-{sources()}"
    done = os.path.join(folder, f"{made_by}-{split}-{start}+{scenes}-{shown}")
    first = SEEDS[split] + start
    signs = {"options": asdict(view), "first_seed": first}
    form = store.Form(scenes, signs, TEXTS, arrays_of(view))
    if not os.path.exists(done):
        store.tell_of_others(folder, made_by)
        step = max(1, min(BATCH, ROOM // math.prod(form.arrays["images"][1])))
        jobs = []
        for row in range(0, scenes, step):
            last = min(row + step, scenes)
            jobs.append([row, first + row, first + last, asdict(view), sources()])
        store.make_set(done, form, "data.make_part", jobs, workers)
    try:
        return WorldSet(done, range(first, first + scenes), view, form)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; without its folder, the set is made again") from None


def make_part(folder, row, first, last, view, made_by):
    """Make the scenes of seeds [first, last), write their tensors from a row on; returns texts."""
    if made_by != sources():
        raise ValueError("the world's sources have changed since this began: start again")
    scene = make_scenes(range(first, last), **view)
    for key in scene.keys() - set(TEXTS):
        store.write_rows(f"{folder}/{key}.npy", row, scene[key].numpy())
    return {key: scene[key] for key in TEXTS}


def own_set(done, policy, first, scenes, **view):
    """`own_scenes` from the train seed `first` on, as a WorldSet on disk: the folder `done`."""
    view = View(**view)
    signs = {"options": asdict(view), "first_seed": first}
    form = store.Form(scenes, signs, TEXTS, arrays_of(view))
    if not os.path.exists(done):
        with store.making(done) as folder:
            if folder:
                fill_own_set(folder, form, policy, first, view)
    return WorldSet(done, [None] * scenes, view, form)  # no seed alone leads to such a scene


def fill_own_set(folder, form, policy, first, view):
    """Let the policy drive until there are as many scenes as the Form has rows, and write them."""
    store.create_arrays(folder, form.whole())
    texts = {name: [] for name in TEXTS}
    name = os.path.basename(folder).partition(".")[0]
    with tqdm(desc=f"driving for {name}", total=form.rows, unit="scene") as bar:
        while bar.n < form.rows:
            seeds = range(first, first + min(BATCH, form.rows - bar.n))
            for scene in own_scenes(policy, seeds, **asdict(view)):
                rows = range(min(len(scene["name"]), form.rows - bar.n))
                for key, value in rows_of(scene, list(rows)).items():
                    if key in TEXTS:
                        texts[key] += value
                    elif len(rows):
                        store.write_rows(f"{folder}/{key}.npy", bar.n, value.numpy())
                bar.update(len(rows))
            first = seeds.stop
    doors.write_json(f"{folder}/set.json", form.signs | {"texts": texts})


# --------------------------------------------------------------------------------------------------
# One door


def load(source, **options):
    """Scenes of a source: len(set), set.batch(indices) -> Scene, set.names, set.reasoning.

    "world" is the built-in one, with the options of `load_world`. Any other source is a folder of
    real clips, with the options of `load_clips`."""
    return load_world(**options) if source == "world" else load_clips(source, **options)


# --------------------------------------------------------------------------------------------------
# The command line


def main():
    parser = doors.Flags(
        "Make scenes of the built-in world, or read those that are there.",
        argument_default=argparse.SUPPRESS,  # a flag not given keeps load_world's default
    )
    add = parser.add_argument
    pixels = doors.whole(1, SIDE)
    add("--split", choices=SPLITS, help="whose seeds to use (train)")
    add("--scenes", type=doors.whole(1, SEEDS["val"]), help="how many scenes to make (16000)")
    add("--start", type=doors.whole(), help="the first scene of the split (0)")
    add("--size", type=pixels, nargs=2, metavar=("H", "W"), help="pixels of an image (64 128)")
    add("--camera-ids", type=doors.whole(), nargs="+", help="cameras of the rig (0 1 2 6)")
    add("--frames", type=doors.whole(1), help="frames a camera (4)")
    add("--frame-dt", type=doors.real(), help="seconds between frames (0.5)")
    add("--folder", help="where sets are kept (data)")
    add("--workers", type=doors.whole(0, 1024),
        help="processes that make scenes, 0 for none but this one (one a core)")  # fmt: skip
    begin = time.perf_counter()
    made = load_world(**vars(parser.parse_args()))
    print(f"{made.folder}: {len(made)} scenes in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    doors.run(main)

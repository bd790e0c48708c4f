"""
Scenes, and where they come from.

A Scene is the one thing that crosses between data and model: a dictionary, batched first.

    images            (B, cameras, frames, 3, H, W) uint8, oldest frame first
    camera_ids        (B, cameras) long, ascending: 0 cross left, 1 front wide, 2 cross right, 6 front tele
    ego_history_xyz   (B, 16, 3)       10 Hz, in the ego frame at t0; the last one is t0: origin and identity
    ego_history_rot   (B, 16, 3, 3)
    ego_kinematics    (B, 20, 4)       t0-1.9 .. t0: speed m/s, acceleration m/s^2, steering angle rad,
                                       turn signal (-1 right, 0 off, 1 left)
    ego_future_xyz    (B, 64, 3)       t0+0.1 .. t0+6.4 s
    ego_future_rot    (B, 64, 3, 3)
    reasoning, name   lists of B str:  why the driver does what it does; the situation, or the clip and its time
    camera_to_ego     (B, cameras, 4, 4)
    intrinsics        (B, cameras, 10) see `project`

Ego frame: origin at the rear axle on the ground, x forward, y left, z up; metres, seconds, yaw left-positive.
Camera axes: z out of the lens, x right, y down. All numbers are float32 unless said.

The world is our own traffic: it needs no download, and because we made the cause of every scene we know its label.
The page reads in the data's order: cameras, the words, roads, what a seed draws, the world that moves and drives,
its renderer, scenes, their cache on disk; then real clips, of NVIDIA, of KITTI and of one's own (see `read_folder`).

    python data.py --scenes 16000 --size 64 128             # make a training set, print scenes/s by part
    python data.py --look sheet.png --seeds 0 12            # look at twelve scenes
"""

import argparse
import csv
import functools
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

WORLD_VERSION = 1       # raise it whenever a seed gives another scene: caches carry it in their name
DT = 0.1                # s, the step of everything
HISTORY, FUTURE = 16, 64
PAST = 20               # steps of a scene before t0
WHEELBASE = 2.8         # m
FRONT, WIDTH, LENGTH = 3.7, 1.9, 4.7    # m: rear axle to front bumper, and the ego's size
LANE = 3.5              # m
LEFT, RIGHT = 1, -1     # sides are signs, as y is


# ----------------------------------------------------------------------------------------------------------------------
# Cameras: one `project` for all

# The world's cameras: id -> (position in the ego frame, yaw, horizontal field of view), images twice as wide as high.
# They are equi-angular (f-theta with pixel radius = f * angle): a pinhole of 120 degrees would spend its pixels on the
# rim and leave four for a pedestrian ahead.
RIG = {
    0: ((1.6, 0.9, 1.5), math.radians(55), math.radians(120)),
    1: ((1.6, 0.0, 1.5), 0.0, math.radians(120)),
    2: ((1.6, -0.9, 1.5), math.radians(-55), math.radians(120)),
    6: ((1.6, 0.0, 1.5), 0.0, math.radians(30)),
}


def project(points, intrinsics):
    """
    Pixels of points. points (..., 3) in camera axes; intrinsics (10,), or any (..., 10) that broadcasts to points:
    [kind, width, height, cx, cy, a0, a1, a2, a3, a4]. Kind 0 is f-theta: pixel radius = a0 + a1 th + .. + a4 th^4 with
    th the angle off the optical axis in rad. Kind 1 is a pinhole: a0 = fx, a1 = fy.
    Returns pixels (..., 2), u right and v down with pixel centres at integer + 0.5, and visible (...) bool.
    """
    kind, width, height, cx, cy, a0, a1, a2, a3, a4 = intrinsics.unbind(-1)
    x, y, z = points.unbind(-1)
    rho = torch.hypot(x, y)
    th = torch.atan2(rho, z)                                    # 0 ahead, pi behind: no division by z
    radius = a0 + th * (a1 + th * (a2 + th * (a3 + th * a4)))
    slope = a1 + th * (2 * a2 + th * (3 * a3 + th * 4 * a4))    # where it turns back the polynomial means nothing
    scale = torch.where(rho > 0, radius / rho.clamp(min=1e-9), 0)
    depth = z.clamp(min=1e-6)
    pinhole = kind == 1
    u = cx + torch.where(pinhole, a0 * x / depth, scale * x)
    v = cy + torch.where(pinhole, a1 * y / depth, scale * y)
    ahead = torch.where(pinhole, z > 1e-6, (slope > 0) & (th < 2.0))     # no lens here sees 115 degrees off its axis
    visible = ahead & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return torch.stack([u, v], -1), visible


def rays(intrinsics, H, W):
    """The inverse of `project` at every pixel centre: unit directions (H, W, 3) in camera axes."""
    kind, width, height, cx, cy, a0, a1, a2, a3, a4 = intrinsics.double().tolist()
    v, u = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    x, y = (u * (width / W) - cx).double(), (v * (height / H) - cy).double()
    if kind == 1:
        direction = torch.stack([x / a0, y / a1, torch.ones_like(x)], -1)
    else:
        radius = torch.hypot(x, y)
        th = (radius - a0) / a1                                 # exact when equi-angular; Newton does the rest
        for _ in range(10):
            error = a0 + th * (a1 + th * (a2 + th * (a3 + th * a4))) - radius
            th = th - error / (a1 + th * (2 * a2 + th * (3 * a3 + th * 4 * a4)))
        side = torch.sin(th) / radius.clamp(min=1e-9)
        direction = torch.stack([x * side, y * side, torch.cos(th)], -1)
    return torch.nn.functional.normalize(direction, dim=-1).float()


def rig_camera(camera_id, H, W, rig=RIG):
    """intrinsics (10,) and camera_to_ego (4, 4) of a camera of the rig at H x W pixels."""
    if camera_id not in rig:
        raise ValueError(f"camera_ids: the rig has the cameras {tuple(rig)}, not {camera_id}")
    position, yaw, fov = rig[camera_id]
    c, s = math.cos(yaw), math.sin(yaw)
    pose = torch.eye(4)
    pose[:3, :3] = torch.tensor([[s, 0, c], [-c, 0, s], [0, -1, 0]])     # columns: right, down, out
    pose[:3, 3] = torch.tensor(position)
    return torch.tensor([0, W, H, W / 2, H / 2, 0, W / fov, 0, 0, 0]), pose


# ----------------------------------------------------------------------------------------------------------------------
# The words: a closed set of decisions (Table 1 of the paper), an open reason

# situation -> longitudinal decision, lateral decision, reason. {side} is the side of the cause, {other} the other one.
# Table 1 calls them: keep speed = set speed tracking, follow = lead obstacle following, adapt speed = speed adaptation
# (road events), yield = yield (agent right-of-way), stop = stop for static constraints; keep lane = lane keeping,
# nudge = in-lane or out-of-lane nudge, turn = turn.
CAUSES = {
    "free": ("keep speed", "keep lane", "the road ahead is free"),
    "curve": ("adapt speed", "keep lane", "the road bends {side} ahead"),
    "slower lead": ("follow", "keep lane", "the car ahead is slower"),
    "braking lead": ("follow", "keep lane", "the car ahead is braking"),
    "stopped lead": ("follow", "keep lane", "the car ahead has stopped"),
    "red light": ("stop", "keep lane", "the light ahead is red"),
    "green light": ("keep speed", "keep lane", "the light ahead is green"),
    "pedestrian": ("yield", "keep lane", "a pedestrian crosses from the {side}"),
    "cut-in": ("yield", "keep lane", "a car cuts in from the {side}"),
    "cones": ("keep speed", "nudge {other}", "cones block the {side} side of the lane"),
    "parked car": ("keep speed", "nudge {other}", "a parked car blocks the {side} side of the lane"),
    "turn": ("adapt speed", "turn {side}", "the signal is set at the crossing"),
}
SITUATIONS = tuple(CAUSES)
LONGITUDINAL = ("keep speed", "follow", "adapt speed", "yield", "stop")
LATERAL = ("keep lane", "nudge left", "nudge right", "turn left", "turn right")


def sentence(situation, side):
    """The reasoning of a situation whose cause is at `side` (LEFT or RIGHT)."""
    side, other = ("left", "right")[::side]
    longitudinal, lateral, reason = CAUSES[situation]
    return f"{longitudinal} and {lateral} since {reason}.".format(side=side, other=other).capitalize()


def decisions(text):
    """The (longitudinal, lateral) decisions of a reasoning text, names of the closed set; None if it has none."""
    longitudinal, _, lateral = text.partition(" since ")[0].strip().lower().partition(" and ")
    return (longitudinal, lateral) if longitudinal in LONGITUDINAL and lateral in LATERAL else None


# ----------------------------------------------------------------------------------------------------------------------
# Roads: a line is straight, then an arc, then straight again. s runs along it, d is the distance to its left.
# Roads and the ego's route are lines (..., 3): where the arc starts (m), its curvature (1/m, never 0), its length (m).
# A straight line is one whose arc has length 0. s = d = 0 is where the ego is at t0, but for its wander.

def place(s, d, line):
    """World x, y and heading of the road coordinates s, d."""
    start, k, length = line.unbind(-1)
    arc = torch.minimum((s - start).clamp(min=0), length)
    rest = s - start - arc                                      # along the tangent: < 0 before the arc, > 0 after it
    heading = k * arc
    cos, sin = torch.cos(heading), torch.sin(heading)
    return start + sin / k + rest * cos - d * sin, (1 - cos) / k + rest * sin + d * cos, heading


def locate(x, y, line):
    """The inverse of `place`: s, d and the line's heading there. Arcs bend by 90 degrees at most."""
    start, k, length = line.unbind(-1)
    x = x - start
    arc = torch.minimum((torch.atan2(k * x, 1 - k * y) / k).clamp(min=0), length)
    heading = k * arc
    cos, sin = torch.cos(heading), torch.sin(heading)
    dx, dy = x - sin / k, y - (1 - cos) / k
    return start + arc + dx * cos + dy * sin, dy * cos - dx * sin, heading


# ----------------------------------------------------------------------------------------------------------------------
# What a seed draws: a road, a cause, and a crowd of things that ask for no reaction

NOTHING, CAR, PEDESTRIAN, LIGHT, CONE, BUILDING, TREE, RAIL = range(8)
OFF, BLINK_LEFT, BLINK_RIGHT, HAZARD, RED, GREEN = range(6)
NEVER, FAR = 1e3, 1e4                           # s and m: "not in this scene", and still tame in float32
FILLET, SIDE_ROAD = 6.0, LANE                   # m: radius of a crossing's corners, half width of its side road
STRAIGHT = (0.0, 0.01, 0.0)
CAR_SIZE, PERSON_SIZE, LIGHT_SIZE, CONE_SIZE = (4.4, 1.8, 1.5), (0.5, 0.7, 1.8), (0.4, 1.2, 3.8), (0.5, 0.5, 1.0)
CAR_COLOURS = ((0.9, 0.9, 0.9), (0.15, 0.15, 0.17), (0.55, 0.56, 0.6), (0.15, 0.25, 0.6), (0.1, 0.4, 0.25))
CLOTHES = ((0.95, 0.1, 0.6), (1.0, 0.9, 0.1), (0.1, 0.9, 0.95), (0.95, 0.95, 0.95), (0.6, 0.1, 0.9), (0.2, 0.35, 1.0))
WALLS = ((0.62, 0.42, 0.34), (0.68, 0.64, 0.55), (0.5, 0.52, 0.56), (0.75, 0.7, 0.66), (0.45, 0.38, 0.36))


class Thing(NamedTuple):
    """Anything that stands on the ground. It follows its script: brake once, drift sideways once."""
    kind: int = NOTHING
    s: float = 0.0                              # m, the centre in road coordinates when the scene starts, at t0 - 2 s
    d: float = 0.0
    v: float = 0.0                              # m/s, along the road or, if oncoming, against it
    oncoming: float = 0.0
    size: tuple = (1.0, 1.0, 1.0)               # m, length width height
    colour: tuple = (1.0, 0.45, 0.0)
    signal: int = OFF
    accel: float = 0.0                          # m/s^2 from time t_accel on, until the speed is v_end
    t_accel: float = NEVER
    v_end: float = 0.0
    drift: float = 0.0                          # m/s to the left from time t_drift on, until d is d_end
    t_drift: float = NEVER
    d_end: float = 0.0


@dataclass
class Draw:
    """All that is fixed about one scene."""
    situation: str
    side: int                                   # LEFT or RIGHT: where the cause is
    cruise: float                               # m/s
    react: float                                # s after t0: before it the expert does not know the cause
    wander: tuple                               # speed amplitude, rate, phase; lateral amplitude, rate, phase
    daylight: float
    urban: float                                # 1 has a pavement, 0 has grass
    shoulder: float                             # m, paved
    lanes: tuple = (0, 1, 0)                    # how many: with us, left of ours; oncoming; with us, right of ours
    road: tuple = STRAIGHT                      # lines, see `place`
    route: tuple = STRAIGHT
    crossing: float = FAR                       # s of the side road's centre
    stop: float = FAR                           # s of the stop line
    halt: float = FAR                           # s that the expert may not pass: a stop line whose light is red
    nudge: tuple = (0.0, 0.0, 1.0, 2.0, 3.0)    # offset to the left; s where it begins, is full, ends, is gone
    things: list = field(default_factory=list)  # the cause is the first one

    def braking(self, decel, v_end=0.0):
        """Metres of road that braking takes, with half a second to get going."""
        return (self.cruise ** 2 - v_end ** 2) / (2 * decel) + 0.5 * self.cruise


def draw(seed):
    """The scene of a seed. It depends on nothing else."""
    rng = np.random.default_rng(seed)
    situation = _pick(rng, SITUATIONS)
    scene = Draw(
        situation, side=RIGHT if situation == "parked car" else _pick(rng, (LEFT, RIGHT)),
        # One cruise speed and one reaction time for all situations, and no reaction before t0: else a blind model would
        # read the answer off the kinematics.
        cruise=rng.uniform(8, 14), react=rng.uniform(0, 0.2),
        wander=tuple(rng.uniform((0, 0.5, 0, 0, 0.8, 0), (0.4, 1.5, 6.3, 0.15, 1.6, 6.3))),
        daylight=rng.uniform(0.75, 1.05), urban=float(rng.random() < 0.5), shoulder=rng.uniform(1, 2.5))
    _draw_road(scene, rng)
    _draw_cause(scene, rng)
    _draw_crossing(scene, rng)
    _draw_others(scene, rng)
    return scene


def _lines(lanes):
    """d of the outermost lane lines, right and left. lanes (..., 3) as in Draw."""
    left, oncoming, right = lanes.unbind(-1) if torch.is_tensor(lanes) else lanes
    return -LANE * (right + 0.5), LANE * (left + oncoming + 0.5)


def _pick(rng, items):
    return items[rng.integers(len(items))]


def _car(rng, s, d, v, oncoming=0.0, **script):
    """A car whose centre is at s, d at t0 if it keeps its speed."""
    start = s - (1 - 2 * oncoming) * v * PAST * DT
    return Thing(CAR, start, d, v, oncoming, CAR_SIZE, _pick(rng, CAR_COLOURS), **script)


def _person(rng, s, d, **script):
    return Thing(PEDESTRIAN, s, d, size=PERSON_SIZE, colour=_pick(rng, CLOTHES), **script)


def _draw_road(scene, rng):
    """Two lanes; or four, with ours on the right or on the left of our two. Some roads bend."""
    narrow, rightmost, leftmost = (0, 1, 0), (1, 2, 0), (0, 2, 1)
    at_side = leftmost if scene.side == LEFT else rightmost
    scene.lanes = _pick(rng, {
        "curve": [narrow],                      # the inside of a sharp bend has no room for more
        "turn": [narrow, at_side],
        "cut-in": [rightmost if scene.side == LEFT else leftmost],
        "red light": [narrow, rightmost],       # what stands at the right stands right beside our lane
        "green light": [narrow, rightmost],
        "parked car": [narrow, rightmost]}.get(scene.situation, [narrow, rightmost, leftmost]))
    if scene.situation == "curve":              # 2 m/s^2 sideways is half to three quarters of the cruise speed in it
        radius = min(max((scene.cruise * rng.uniform(0.5, 0.72)) ** 2 / 2, 12), 45)
        start = scene.braking(rng.uniform(1.8, 2.6), math.sqrt(2 * radius))
        scene.road = (start, scene.side / radius, radius * rng.uniform(0.9, 1.5))
    elif scene.situation in ("red light", "green light", "turn") or rng.random() < 0.25:
        scene.crossing = 0.0                    # there is one; `_draw_crossing` says where
    elif rng.random() < 0.5:                    # a bend so gentle that it asks for nothing
        scene.road = (rng.uniform(-20, 60), _pick(rng, (LEFT, RIGHT)) / rng.uniform(150, 500), rng.uniform(50, 120))
    scene.route = scene.road


def _draw_cause(scene, rng):
    """What the driver has to answer to, near enough to ask for it within 6.4 s and far enough to do it in comfort."""
    v, side, uniform, rear = scene.cruise, scene.side, rng.uniform, FRONT + CAR_SIZE[0] / 2
    if scene.situation == "slower lead":        # no lights
        slower = uniform(3.5, 6)
        gap = 3 + 0.8 * (v - slower) + slower ** 2 / (2 * uniform(1.2, 2.2)) + 0.5 * slower
        scene.things = [_car(rng, rear + gap, 0, v - slower)]
    elif scene.situation == "braking lead":     # for 0.6 s at least, with its brake lights on
        decel, since, v_end = uniform(2.2, 3.2), uniform(0.6, 1.2), v * uniform(0, 0.4)
        gap = max(10, scene.braking(3, v_end) - ((v - decel * since) ** 2 - v_end ** 2) / (2 * decel) + 4)
        scene.things = [_car(rng, rear + gap + decel * since ** 2 / 2, 0, v, accel=-decel, t_accel=-since, v_end=v_end)]
    elif scene.situation == "stopped lead":     # hazard lights, not brake lights: those say that it is braking
        scene.things = [_car(rng, rear + 3 + scene.braking(uniform(2.4, 3.2)), 0, 0, signal=HAZARD)]
    elif scene.situation == "pedestrian":       # on the road or at its edge, ahead of the car when that gets there
        where = FRONT + 4 + scene.braking(uniform(2.4, 3.1))
        right, left = (abs(line) + scene.shoulder for line in _lines(scene.lanes))      # m to the road's edges
        near, far = (left, right) if side == LEFT else (right, left)
        away = uniform(2.2, min(5, near + 0.3))
        walk = min(max((away + uniform(-0.8, 0.6)) / ((where - FRONT) / v), 0.8), 2.0)
        scene.things = [_person(rng, where, side * (away + walk * PAST * DT),
                                drift=-side * walk, t_drift=-NEVER, d_end=-side * (far + 1))]
    elif scene.situation == "cut-in":           # signals and starts about now, or is on its way without a signal
        slower, signals = uniform(1.5, 3.5), rng.random() < 0.5
        gap = 5 + slower ** 2 / 2 + 0.5 * slower + uniform(0, 4)
        scene.things = [_car(rng, rear + gap, side * LANE, v - slower, drift=-side * uniform(0.9, 1.3),
                             t_drift=uniform(-0.4, 0.2) if signals else uniform(-1.4, -1.0),
                             signal=(BLINK_RIGHT if side == LEFT else BLINK_LEFT) if signals else OFF)]
    elif scene.situation in ("cones", "parked car"):
        first = FRONT + 2 + v * uniform(1.9, 2.4)
        if scene.situation == "cones":
            step = uniform(2, 3)
            scene.things = [Thing(CONE, first + i * step, side * (1.5 - 0.22 * i), size=CONE_SIZE) for i in range(5)]
            last = first + 4 * step
        else:
            scene.things = [_car(rng, first + CAR_SIZE[0] / 2, side * uniform(1.9, 2.3), 0)]
            last = first + CAR_SIZE[0]
        begin, full, end = 0.2 * v, first - FRONT - 1, last + 2     # after the latest reaction; back as gently as out
        scene.nudge = (-side * 1.3, begin, full, end, end + full - begin)
    elif scene.situation == "turn":
        radius = uniform(10, 12) if side == LEFT else uniform(7, 8.5)
        start = scene.braking(uniform(2.3, 3.0), math.sqrt(2 * radius))
        scene.route = (start, side / radius, radius * math.pi / 2)


def _draw_crossing(scene, rng):
    """Where the side road is, and what its light says. A green light may stand anywhere but on a free road."""
    if scene.crossing == FAR:
        return
    scene.stop = FRONT + 3 + scene.braking(rng.uniform(2.3, 3.1))
    light = {"red light": RED, "green light": GREEN, "free": OFF}.get(scene.situation, _pick(rng, (OFF, GREEN)))
    if scene.situation == "turn":               # the turn ends in the side road's right lane
        start, k, _ = scene.route
        scene.stop = start + 1 / abs(k) - scene.side * LANE / 2 - SIDE_ROAD - FILLET - 0.5
    elif scene.situation not in ("red light", "green light"):
        scene.stop += rng.uniform(15, 45)       # beyond the cause
    scene.crossing = scene.stop + 0.5 + FILLET + SIDE_ROAD
    if light == RED:
        scene.halt = scene.stop
    if light != OFF:
        scene.things.append(Thing(
            LIGHT, scene.stop + 1, _lines(scene.lanes)[0] - 1.4, size=LIGHT_SIZE, colour=(0.1, 0.1, 0.1), signal=light))


def _draw_others(scene, rng):
    """The crowd. Nobody gets in the way of the cause, of the ego or of one another."""
    v, situation, uniform = scene.cruise, scene.situation, rng.uniform
    things = scene.things = scene.things or [Thing()]
    cause = things[0].s
    (right_line, left_line), nudged = _lines(scene.lanes), scene.nudge[0]
    right_edge, left_edge = right_line - scene.shoulder, left_line + scene.shoulder

    # Other traffic. No car comes from beyond `closed`, or drives beside us to it.
    closed = scene.halt
    if situation == "pedestrian":
        closed = cause
    elif situation == "turn" and scene.side == LEFT:
        closed = scene.route[0]
    left, oncoming, right = scene.lanes
    for lane in [1] * left + [-1] * right:
        if rng.random() < 0.5 and closed == FAR and lane * nudged <= 0 and situation != "cut-in":
            things.append(_car(rng, uniform(-6, 40), lane * LANE, v + uniform(-2, 2)))
    for lane in range(left + 1, left + oncoming + 1):
        hides = situation == "pedestrian" and scene.side == LEFT
        if rng.random() < 0.5 and lane * nudged != nudged and closed > 16 and not hides:
            things.append(_car(rng, uniform(8, min(90, closed - 6)), lane * LANE, uniform(7, 14), oncoming=1.0))
    if situation in ("free", "green light", "pedestrian", "cut-in", "cones", "parked car") and rng.random() < 0.4:
        passed = cause + 16 + 2 * v if situation in ("pedestrian", "cones", "parked car") else 0
        things.append(_car(rng, max(FRONT + 45, passed) + uniform(0, 25), 0, v))        # far ahead, as fast as we are

    # What stands beside the road, but not in the side road, and not in a sharp bend: its inside has no room.
    limit = scene.road[0] if situation == "curve" else 70

    def put(count, low, high, make, length=0.0):
        for s in uniform(low, high, count):
            if abs(s - scene.crossing) > SIDE_ROAD + FILLET + length / 2:
                things.append(make(s))

    put(rng.integers(0, 4), 8, limit, lambda s: _person(
        rng, s, _pick(rng, (left_edge + uniform(2, 4), right_edge - uniform(2, 4)))))
    if situation not in ("pedestrian", "parked car"):                                   # parked clear of the lane
        put(rng.integers(0, 3), 8, limit, lambda s: _car(rng, s, right_line - CAR_SIZE[1] / 2 - uniform(0.9, 1.6), 0))
    if situation != "pedestrian" and rng.random() < 0.3:
        put(3, 8, limit, lambda s: Thing(CONE, s, right_line - uniform(0.9, 1.6), size=CONE_SIZE))
    for edge, sign in ((left_edge, LEFT), (right_edge, RIGHT)):
        far = max(0, limit - 15) if situation == "curve" and sign == scene.side else 100
        put(3 if scene.urban else rng.integers(0, 2), -10, far, length=20, make=lambda s: Thing(
            BUILDING, s, edge + sign * uniform(11, 18), size=tuple(uniform((9, 8, 5), (20, 12, 14))),
            colour=_pick(rng, WALLS)))
        put(rng.integers(0, 3), 0, far, lambda s: Thing(
            TREE, s, edge + sign * uniform(4, 6), size=(2.4, 2.4, uniform(4, 6)),
            colour=(0.13, uniform(0.3, 0.45), 0.12)))
    if situation == "curve":                    # a red and white rail along the outside: bends are seen from afar
        start, k, length = scene.road
        outside, piece = (right_edge - 0.8 if scene.side == LEFT else left_edge + 0.8), length / 6
        things.extend(Thing(
            RAIL, start + (i + 0.5) * piece, outside, size=(piece * (1 + abs(outside * k)), 0.3, 1.1),
            colour=((0.9, 0.1, 0.1), (0.95, 0.95, 0.95))[i % 2]) for i in range(6))


# ----------------------------------------------------------------------------------------------------------------------
# The world that moves

MAX_ACCEL, COMFORT, HEADWAY, JERK = 1.5, 3.0, 0.8, 6.0      # m/s^2, m/s^2, s, m/s^3: the expert's manners


class World:
    """
    n scenes, one a seed, that advance in lockstep from t0 - 2 s on. What a seed drew is in `scene` (n,) or (n, k);
    the ego in x, y (m), yaw (rad), speed (m/s) and the last accel (m/s^2) and curvature (1/m), each (n,); everything
    else in `things` (n, things), of which s, d (m) and v (m/s) change. `step` moves all, `expert` drives, `render`
    looks.
    """

    def __init__(self, seeds, device="cpu"):
        draws = [draw(int(seed)) for seed in seeds]
        most = max(len(one.things) for one in draws)
        rows = [one.things + [Thing()] * (most - len(one.things)) for one in draws]
        tensor = functools.partial(torch.tensor, dtype=torch.float32, device=device)
        fixed = [f.name for f in fields(Draw) if f.name not in ("situation", "things")]
        self.scene = SimpleNamespace(**{f: tensor([getattr(one, f) for one in draws]) for f in fixed})
        self.things = SimpleNamespace(**{
            f: tensor([[getattr(thing, f) for thing in row] for row in rows]) for f in Thing._fields})
        self.situations, self.sides = [one.situation for one in draws], [one.side for one in draws]
        self.case = {name: tensor([one.situation == name for one in draws]) > 0 for name in SITUATIONS}     # (n,) bool
        self.device, self.time = device, -PAST * DT                             # s after t0
        # The ego starts at its cruise speed, on its wandering line.
        speed, lateral = self._wander()
        self.speed = self.scene.cruise + speed
        self.x, self.y, self.yaw = place(self.time * self.scene.cruise, lateral, self.scene.route)
        self.accel, self.curvature = torch.zeros_like(self.x), torch.zeros_like(self.x)

    def _wander(self):
        """Nobody drives like a ruler: small waves in speed (m/s) and in lateral offset (m), now."""
        a, rate_a, phase_a, b, rate_b, phase_b = self.scene.wander.unbind(-1)
        return a * torch.sin(rate_a * self.time + phase_a), b * torch.sin(rate_b * self.time + phase_b)

    def reasoning(self):
        """Why the expert does what it does: n sentences."""
        return [sentence(situation, side) for situation, side in zip(self.situations, self.sides)]

    def step(self, accel, curvature):
        """One tick of DT: the ego by the unicycle with accel (n,) and curvature (n,), the things by their scripts."""
        speed = (self.speed + DT * accel).clamp(min=0)
        accel = (speed - self.speed) / DT                                       # as driven: no car brakes backwards
        yaw = self.yaw + DT * curvature * self.speed + DT ** 2 / 2 * curvature * accel
        self.x = self.x + DT / 2 * (self.speed * torch.cos(self.yaw) + speed * torch.cos(yaw))
        self.y = self.y + DT / 2 * (self.speed * torch.sin(self.yaw) + speed * torch.sin(yaw))
        self.yaw, self.speed, self.accel, self.curvature = yaw, speed, accel, curvature
        t = self.things
        braking = (self.time >= t.t_accel - DT / 2) & (t.v > t.v_end)
        v = torch.where(braking, torch.maximum(t.v + DT * t.accel, t.v_end), t.v)
        t.s, t.v = t.s + DT / 2 * (t.v + v) * (1 - 2 * t.oncoming), v
        t.d = t.d + DT * self._drift()
        self.time = round(self.time + DT, 6)

    def _drift(self):
        """Lateral speed of the things (n, things): a script's drift ends in the middle of our lane, or across it."""
        t = self.things
        return torch.where((self.time >= t.t_drift - DT / 2) & (t.drift * (t.d_end - t.d) > 0), t.drift, 0)

    def expert(self):
        """
        accel (n,) and curvature (n,) of a driver who knows the cause from `react` on: the intelligent driver model
        (Treiber 2000) behind whatever it has to respect, speed that suits the bend, and a steady hand on the line.
        """
        scene, v = self.scene, self.speed
        cause = SimpleNamespace(**{f: x[:, 0] for f, x in vars(self.things).items()})           # (n,) each
        wander_speed, wander_lateral = self._wander()
        s, d, heading = locate(self.x, self.y, scene.route)
        start, k, length = scene.route.unbind(-1)

        # Speed. `gap` is how far the front bumper is from what it must not touch, which moves at `lead`.
        bumper = s + FRONT
        follow = self.case["slower lead"] | self.case["braking lead"] | self.case["stopped lead"] | self.case["cut-in"]
        crosses = self.case["pedestrian"] & (cause.d * scene.side > -2.2) & (cause.s > bumper - 1)      # not yet across
        gap = scene.halt - 1 - bumper
        gap = torch.where(follow, cause.s - cause.size[:, 0] / 2 - bumper, gap)
        gap = torch.where(crosses, cause.s - 2 - bumper, gap).clamp(min=0.5)
        lead = torch.where(follow, cause.v, 0)
        want = 2 + (v * HEADWAY + v * (v - lead) / (2 * math.sqrt(MAX_ACCEL * COMFORT))).clamp(min=0)   # m
        free = MAX_ACCEL * (1 - (v / (scene.cruise + wander_speed)) ** 4)
        bend = -(v ** 2 - 2 / k.abs()) / (2 * torch.maximum(start - s, v / 2).clamp(min=0.5))  # to 2 m/s^2 sideways
        bend = torch.where((s < start + length) & (length > 0), bend, MAX_ACCEL)
        known = torch.minimum(free - MAX_ACCEL * (want / gap) ** 2, bend).clamp(-4, MAX_ACCEL)
        accel = torch.where(self.time >= scene.react, known, free)
        accel = self.accel + (accel - self.accel).clamp(-JERK * DT, JERK * DT)

        # Steering: the line's curvature a moment ahead, the nudge's, and a pull back to where the ego should be.
        soon = s + 0.3 * v                                                                      # hands take time
        (target, slope, _), (_, _, bow) = self._nudge(s), self._nudge(soon)
        ahead = torch.where((soon > start) & (soon < start + length), k / (1 - k * d), 0)
        reach = (0.7 * v).clamp(min=3)                                                          # m
        curvature = ahead + bow - (d - target - wander_lateral) / reach ** 2 - 2 * (self.yaw - heading - slope) / reach
        limit = (3 / v.clamp(min=1) ** 2).clamp(max=0.2)
        return accel, self.curvature + 0.33 * (curvature.clamp(-limit, limit) - self.curvature)

    def _nudge(self, s):
        """Where in its lane the ego should be at s (n,): offset (m), its slope and its bow (1/m): half cosines."""
        offset, begin, full, end, gone = self.scene.nudge.unbind(-1)
        length = full - begin
        phase = (math.pi / length * torch.where(s < end, s - begin, gone - s)).clamp(0, math.pi)    # 0 in, pi out
        rate = math.pi / length * torch.where(s < end, 1, -1)
        return (offset / 2 * (1 - torch.cos(phase)), offset / 2 * torch.sin(phase) * rate,
                torch.where((phase > 0) & (phase < math.pi), offset / 2 * torch.cos(phase) * rate ** 2, 0))

    def render(self, camera_ids, size):
        """What the cameras see now: images (n, cameras, 3, H, W) uint8; size is (H, W)."""
        (H, W), ids, boxes = size, tuple(camera_ids), _boxes(self)
        view, fine = _view(ids, H, W, self.device), _view(ids, FINE * H, FINE * W, self.device)
        images = torch.empty(len(self.x), len(ids), 3, H, W, dtype=torch.uint8, device=self.device)
        chunk = max(1, CHUNK // (len(ids) * H * W * FINE ** 2))                 # scenes at a time: stay in the cache
        for i in range(0, len(self.x), chunk):
            part = slice(i, i + chunk)
            painted = _paint_boxes(_paint_ground(self, part, view), {f: x[part] for f, x in boxes.items()}, fine)
            images[part] = painted.movedim(0, 2)
        return images


# ----------------------------------------------------------------------------------------------------------------------
# The renderer: a ray a pixel. The ground's pixels are constants of a camera; boxes are tried only where they may be.

CHUNK = 2 ** 18         # rays at a time
FINE = 2                # rays a pixel for boxes, each way: what is far and thin fades and does not flicker
HAZE = 205              # grey of the horizon, 0 .. 255
# Two boxes a thing. Each: how far back, length and width, from and to which height, all as shares of the thing's size.
PARTS = torch.tensor([
    [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],                             # nothing
    [[0, 1, 1, 0.13, 0.62], [0.06, 0.55, 0.86, 0.62, 1]],           # car: body, cabin
    [[0, 1, 1, 0, 0.85], [0, 0.6, 0.5, 0.85, 1]],                   # pedestrian: body, head
    [[0, 1, 1, 0.6, 1], [0, 0.4, 0.15, 0, 0.6]],                    # light: housing, pole
    [[0, 1, 1, 0, 0.5], [0, 0.6, 0.6, 0.5, 1]],                     # cone: foot, tip
    [[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]],                             # building
    [[0, 1, 1, 0.35, 1], [0, 0.15, 0.15, 0, 0.35]],                 # tree: crown, trunk
    [[0, 1, 1, 0.3, 1], [0, 0, 0, 0, 0]],                           # rail
])


@functools.lru_cache
def _view(camera_ids, H, W, device):
    """What never changes about the cameras: they look level, so the lower half of a picture is the ground."""
    intrinsics, pose = (torch.stack(x) for x in zip(*(rig_camera(i, H, W) for i in camera_ids)))
    half = H // 2
    direction = torch.stack([rays(k, H, W) @ p[:3, :3].T for k, p in zip(intrinsics, pose)])    # (cameras, H, W, 3) ego
    down = direction[:, half:]
    reach = pose[:, 2, 3, None, None] / -down[..., 2]                                   # m along the ray to the ground
    ground = [pose[:, i, 3, None, None] + reach * down[..., i] for i in (0, 1)]
    pixel = 1 / intrinsics[:, 6, None, None]                                            # rad
    view = SimpleNamespace(
        intrinsics=intrinsics, pose=pose, size=(H, W), half=half,
        direction=direction.permute(3, 0, 1, 2).flatten(1).contiguous(),                # (3, cameras * H * W)
        ground=torch.stack(ground), across=reach * pixel, along=reach ** 2 * pixel / pose[:, 2, 3, None, None],
        haze=1 - torch.exp(-reach / 150), sky=torch.exp(-6 * direction[:, :half, :, 2].clamp(min=0)))
    for name, value in vars(view).items():
        if torch.is_tensor(value):
            setattr(view, name, value.to(device))
    return view


def _paint_ground(world, part, view):
    """Sky and ground of some scenes: (3, m, cameras, H, W) float in 0 .. 255. The ground is shaded, not traced:
    a pixel's point on it is known, its road coordinates follow, and lines are where d and s say."""
    scene = SimpleNamespace(**{f: x[part].unflatten(0, (-1, 1, 1, 1)) for f, x in vars(world.scene).items()})
    x, y, yaw = (value[part, None, None, None] for value in (world.x, world.y, world.yaw))
    cos, sin = torch.cos(yaw), torch.sin(yaw)
    gx, gy = view.ground                                                                # (cameras, H/2, W) ego frame
    s, d, _ = locate(x + cos * gx - sin * gy, y + sin * gx + cos * gy, scene.road)      # (m, cameras, H/2, W)

    def cover(distance, width, footprint):      # a stripe's share of a pixel: thin ones fade, they do not flicker
        return ((width + footprint) / 2 - distance.abs()).clamp(min=0).minimum(footprint.clamp(max=width)) / footprint

    # What it is made of. Outside both roads, a corner is asphalt up to a quarter circle.
    (right_line, left_line), centre = _lines(scene.lanes), LANE * (scene.lanes[..., 0] + 0.5)
    out = torch.maximum(d - left_line, right_line - d) - scene.shoulder                 # m beyond the main road
    aside = (s - scene.crossing).abs() - SIDE_ROAD                                      # m beyond the side road
    asphalt = (FILLET - out).clamp(0, FILLET) ** 2 + (FILLET - aside).clamp(0, FILLET) ** 2 >= FILLET ** 2 - 1e-3
    pavement = (torch.minimum(out, aside) < 2.5) & (scene.urban > 0)
    grey = torch.where(asphalt, 78., torch.where(pavement, 150., 0.))                   # 0 where it is grass
    # What is painted on it: lane lines (solid at the edges and between the directions), stop line, zebra.
    line = torch.round((d - LANE / 2) / LANE) * LANE + LANE / 2                         # d of the nearest lane line
    middle = (line - centre).abs() < 0.1
    solid = middle | ((line - left_line).abs() < 0.1) | ((line - right_line).abs() < 0.1)
    lined = (solid | (torch.remainder(s, 9) < 4)) & (out < 0.5 - scene.shoulder) & (aside > FILLET)
    white = cover(d - line, 0.18, view.across) * lined
    beyond = s - scene.stop
    white = torch.where((d < centre) & (d > right_line), white.maximum(cover(beyond, 0.6, view.along)), white)
    zebra = (beyond > 1) & (beyond < 4) & (out < -scene.shoulder) & (torch.remainder(d, 1.2) < 0.6)
    white, yellow = torch.where(zebra, 0.9, white), middle & (beyond.abs() > 1) & ~zebra
    image = torch.empty(3, *s.shape[:2], *view.size, device=s.device)
    for i, (grass, paint, sky) in enumerate(((92, 235, 110), (120, 215, 160), (62, 120, 230))):     # red, green, blue
        base = torch.where(grey > 0, grey, grass)
        ground = (base + white * (torch.where(yellow, paint, 235) - base)) * scene.daylight
        image[i, :, :, view.half:] = ground + view.haze * (HAZE - ground)
        image[i, :, :, :view.half] = sky + view.sky * (HAZE - sky)
    return image


def _boxes(world):
    """Everything that stands, as boxes in the ego frame: a dictionary of (n, 2 things) and (n, 2 things, 3)."""
    t = world.things
    x, y, yaw = place(t.s, t.d, world.scene.road[:, None])                              # (n, things), world frame
    swerve = torch.atan2(world._drift(), t.v.clamp(min=0.1)) * (t.kind == CAR)
    yaw = (yaw + math.pi * t.oncoming + swerve - world.yaw[:, None])[..., None]         # (n, things, 1), ego frame
    x, y = x - world.x[:, None], y - world.y[:, None]
    cos, sin = torch.cos(world.yaw)[:, None], torch.sin(world.yaw)[:, None]
    x, y = (cos * x + sin * y)[..., None], (cos * y - sin * x)[..., None]
    cos, sin, size = torch.cos(yaw), torch.sin(yaw), t.size[:, :, None]
    back, length, width, low, high = PARTS.to(world.device)[t.kind.long()].unbind(-1)   # (n, things, 2)
    back = back * size[..., 0]
    boxes = dict(
        centre=torch.stack([x - back * cos, y - back * sin, (low + high) / 2 * size[..., 2]], -1),
        half=torch.stack([length, width, high - low], -1) * size / 2, cos=cos, sin=sin, colour=t.colour[:, :, None],
        part=2 * t.kind.long()[..., None] + torch.tensor([0, 1], device=world.device), signal=t.signal[..., None],
        braking=((t.accel < 0) & (world.time >= t.t_accel - DT / 2))[..., None],
        light=world.scene.daylight[:, None, None])
    return {name: value.expand(*back.shape, *value.shape[3:]).flatten(1, 2) for name, value in boxes.items()}


def _rectangles(boxes, view):
    """
    Where boxes (m, boxes) may be in the pictures: scene, camera, box, left, top, width, height, each (pairs,) long.
    The corners' pixels say, and a margin, since straight edges are bows through such a lens.
    """
    H, W = view.size
    origin, to_camera = view.pose[:, :3, 3], view.pose[:, :3, :3].mT[:, None, None]     # (cameras, 3), (.., 3, 3)
    sign = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], device=origin.device)
    x, y, z = (sign * boxes["half"][:, :, None]).unbind(-1)                             # (m, boxes, 8)
    cos, sin = boxes["cos"][..., None], boxes["sin"][..., None]
    corner = torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1) + boxes["centre"][:, :, None]
    corner = corner[:, None] - origin[:, None, None]                                    # (m, cameras, boxes, 8, 3)
    pixel, _ = project((to_camera @ corner[..., None])[..., 0], view.intrinsics[:, None, None])
    low, high = pixel.amin(-2), pixel.amax(-2)                                          # (m, cameras, boxes, 2)
    margin, edge = 1 + 0.1 * (high - low), torch.tensor([W, H], device=origin.device)
    low = (low - margin).floor().clamp(min=0).minimum(edge).long()
    high = (high + margin).ceil().clamp(min=0).minimum(edge).long()
    # Drop what lies outside the cone of 1.2 rad that holds all the pictures, whole: pixels mean little behind a lens.
    offset = boxes["centre"][:, None] - origin[:, None]
    distance, radius = offset.norm(dim=-1), boxes["half"].norm(dim=-1)[:, None]
    angle = torch.acos(((offset @ view.pose[:, :3, 2, None])[..., 0] / distance).clamp(-1, 1))
    seen = (angle - torch.asin((radius / distance).clamp(max=1)) < 1.2) & (radius > 0)
    size = (high - low) * seen[..., None]
    index = size.prod(-1).nonzero(as_tuple=True)                                        # scene, camera, box
    return *index, *low[index].unbind(-1), *size[index].unbind(-1)


def _paint_boxes(image, boxes, view):
    """Draw boxes (m, boxes) over image (3, m, cameras, H, W), in place, by the rays of a view FINE times as fine."""
    (H, W), (_, scenes, cameras, _, _) = view.size, image.shape
    origin = view.pose[:, :3, 3]                                                        # (cameras, 3)
    # The tests: each box with each pixel of its rectangle.
    scene, camera, box, left, top, width, height = _rectangles(boxes, view)             # (pairs,)
    area = width * height
    pair = torch.repeat_interleave(area)                                                # (tests,)
    nth = torch.arange(len(pair), device=image.device) - (area.cumsum(0) - area)[pair]
    row = nth // width[pair]
    at = ((camera * H + top) * W + left)[pair] + row * W + nth - row * width[pair]      # in view.direction
    # Slab test, in the box's own axes.
    cos, sin, half = boxes["cos"][scene, box], boxes["sin"][scene, box], boxes["half"][scene, box]
    x, y, z = (origin[camera] - boxes["centre"][scene, box]).unbind(-1)
    constant = torch.stack([cos, sin, cos * x + sin * y, cos * y - sin * x, z, *half.unbind(-1)])       # (8, pairs)
    cos, sin, ox, oy, oz, hx, hy, hz = constant.index_select(1, pair)                   # (tests,)
    dx, dy, dz = view.direction.index_select(1, at)
    dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    near, far = torch.zeros_like(dx), torch.full_like(dx, 1e9)
    for o, d, h in ((ox, dx, hx), (oy, dy, hy), (oz, dz, hz)):
        inverse = 1 / d
        middle, reach = -o * inverse, h * inverse.abs()
        near, far = torch.maximum(near, middle - reach), torch.minimum(far, middle + reach)
    hit = ((near < far) & (near > 0)).nonzero()[:, 0]
    # Nearest wins. Positive floats sort as integers, so depth and test number fit one integer, whose minimum is both.
    key = near[hit].view(torch.int32).long() << 32 | hit
    target = scene[pair[hit]] * (cameras * H * W) + at[hit]                             # pixel of (m, cameras, H, W)
    nobody = torch.iinfo(torch.long).max
    best = torch.full((scenes * cameras * H * W,), nobody, device=image.device)
    best.scatter_reduce_(0, target, key, "amin")
    target = (best < nobody).nonzero()[:, 0]
    test = best[target] & 0xFFFFFFFF
    # Colour: by the face that was hit, then what is painted on it. qx, qy, qz run from -1 to 1 over the box.
    owner, depth = pair[test], near[test]
    qx, qy, qz = ((o[test] + depth * d[test]) / h[test] for o, d, h in ((ox, dx, hx), (oy, dy, hy), (oz, dz, hz)))
    end = qx.abs() > torch.maximum(qy.abs(), qz.abs())                                  # rear or front
    side = ~end & (qy.abs() > qz.abs())
    part, signal, braking, light, colour = (boxes[name][scene, box][owner]
                                            for name in ("part", "signal", "braking", "light", "colour"))
    paint = _livery(part, signal, braking, qx, qy, qz, end, side)
    *painted, glow = PAINTS.to(image.device).T[:, paint]                                # (hits,) each
    shade = torch.where(end, 0.8, torch.where(side, 0.62, 1.05)) * light
    shade = torch.where(glow > 0, 1, shade)
    fade = torch.exp(-depth / 400) * 255
    # Each ray owns a share of a pixel; the ground keeps the rest.
    row, column = target // W, target % W
    pixel = row // FINE * (W // FINE) + column // FINE                                  # in image's (m, cameras, H, W)
    covered = torch.bincount(pixel, minlength=image[0].numel()).view(image[0].shape) / FINE ** 2
    image *= 1 - covered
    for i, channel in enumerate(image):
        value = torch.where(paint > 0, painted[i], colour[:, i]) * shade
        channel.view(-1).index_add_(0, pixel, value.clamp(max=1) * fade + HAZE * (1 - fade / 255), alpha=1 / FINE ** 2)
    return image


# Paints: red, green, blue, and whether they glow, that is, keep their colour in the shade.
(WINDOW, TYRE, DULL_LAMP, HEADLAMP, BRAKE_LAMP, AMBER, RED_LAMP, GREEN_LAMP,
 WOOD, TROUSERS, SKIN, WHITE, PANE) = range(1, 14)
PAINTS = torch.tensor([
    [0.00, 0.00, 0.00, 0], [0.12, 0.15, 0.20, 0], [0.08, 0.08, 0.08, 0], [0.35, 0.03, 0.03, 0], [0.95, 0.95, 0.85, 0],
    [1.00, 0.08, 0.05, 1], [1.00, 0.65, 0.00, 1], [1.00, 0.05, 0.05, 1], [0.05, 1.00, 0.35, 1], [0.30, 0.28, 0.26, 0],
    [0.10, 0.10, 0.25, 0], [0.85, 0.65, 0.50, 0], [0.95, 0.95, 0.95, 0], [0.25, 0.30, 0.38, 0]])


def _livery(part, signal, braking, qx, qy, qz, end, side):
    """The paint (hits,) of points q on boxes, each coordinate from -1 to 1; 0 is the thing's own colour. end and side
    say whether a point is on its box's rear or front, or on its left or right; else it is on the top."""
    paint = torch.zeros_like(part)

    def put(where, colour):                     # later coats cover earlier ones
        paint.masked_fill_(where, colour)

    rear, front, wide, low = end & (qx < 0), end & (qx > 0), qy.abs() > 0.45, qz < -0.4
    body, cabin, housing = part == 2 * CAR, part == 2 * CAR + 1, (part == 2 * LIGHT) & rear & (qy.abs() < 0.85)
    put(cabin & (end | side) & (qz.abs() < 0.75), WINDOW)
    put(body & low, TYRE)
    lamp = body & wide & ~low
    put(lamp & rear, DULL_LAMP)
    put(lamp & front, HEADLAMP)
    put(((lamp & rear) | (cabin & rear & (qz < -0.3))) & braking, BRAKE_LAMP)
    blinks = torch.where(qy > 0, signal == BLINK_LEFT, signal == BLINK_RIGHT) | (signal == HAZARD)
    put(((lamp & end) | (body & ~low & side & (qx.abs() > 0.8))) & blinks, AMBER)
    put(housing & (signal == RED) & (qz > 0) & (qz < 0.9), RED_LAMP)
    put(housing & (signal == GREEN) & (qz < 0) & (qz > -0.9), GREEN_LAMP)
    put((part == 2 * LIGHT + 1) | (part == 2 * TREE + 1), WOOD)
    put((part == 2 * PEDESTRIAN) & (qz < -0.15), TROUSERS)
    put(part == 2 * PEDESTRIAN + 1, SKIN)
    put((part == 2 * CONE + 1) & (qz < -0.2), WHITE)
    put((part == 2 * BUILDING) & (end | side) & (torch.remainder(qz * 3, 1) < 0.45), PANE)
    return paint


# ----------------------------------------------------------------------------------------------------------------------
# Scenes of the world: two seconds of history, the present, 6.4 seconds of the expert's future

def make_scenes(seeds, camera_ids=(0, 1, 2, 6), size=(64, 128), frames=4, frame_dt=0.5, device="cpu"):
    """A batched Scene of these seeds; frames at t0 - k frame_dt, which must be steps of 0.1 s within the last 2 s."""
    camera_ids, every = sorted(camera_ids), round(frame_dt / DT)
    if size[0] < 2 or size[0] % 2 or size[1] < 1:
        raise ValueError(f"size: expected an even height, as the horizon lies between two rows, not {tuple(size)}")
    if frames < 1 or every < 1 or abs(every * DT - frame_dt) > 1e-6 or (frames - 1) * every > PAST:
        raise ValueError(f"frames, frame_dt: expected steps of {DT} s in {PAST * DT:g} s, not {frames} of {frame_dt} s")
    world = World(seeds, device)
    images, track, controls = [], [], []
    for step in range(PAST + FUTURE + 1):
        track.append(torch.stack([world.x, world.y, world.yaw]))
        controls.append(torch.stack([world.speed, world.accel, torch.atan(WHEELBASE * world.curvature)], -1))
        if step <= PAST and (PAST - step) % every == 0 and (PAST - step) // every < frames:
            images.append(world.render(camera_ids, size))
        world.step(*world.expert())
    x, y, yaw = torch.stack(track, -1)                                                  # (B, 85) each, world frame
    turn = yaw[:, PAST, None]
    x, y, yaw = x - x[:, PAST, None], y - y[:, PAST, None], yaw - turn
    cos, sin, zero = torch.cos(turn), torch.sin(turn), torch.zeros_like(x)
    xyz = torch.stack([cos * x + sin * y, cos * y - sin * x, zero], -1)                 # (B, 85, 3), ego frame at t0
    cos, sin = torch.cos(yaw), torch.sin(yaw)
    rot = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, zero + 1], -1).unflatten(-1, (3, 3))
    past, future = slice(PAST + 1 - HISTORY, PAST + 1), slice(PAST + 1, None)
    signal = (world.case["turn"] * world.scene.side)[:, None, None].expand(-1, PAST, 1)
    kinematics = torch.cat([torch.stack(controls[1:PAST + 1], 1), signal], -1)          # (B, 20, 4)
    intrinsics, pose = (torch.stack(value) for value in zip(*(rig_camera(i, *size) for i in camera_ids)))
    many = lambda value: value.to(device).expand(len(x), *value.shape)                  # all scenes have the same rig
    return dict(
        images=torch.stack(images, 2), camera_ids=many(torch.tensor(camera_ids)),
        ego_history_xyz=xyz[:, past], ego_history_rot=rot[:, past], ego_kinematics=kinematics,
        ego_future_xyz=xyz[:, future], ego_future_rot=rot[:, future],
        camera_to_ego=many(pose), intrinsics=many(intrinsics), reasoning=world.reasoning(), name=world.situations)


# ----------------------------------------------------------------------------------------------------------------------
# The world on disk: made once, memory-mapped ever after

SEEDS = {"train": 0, "val": 10_000_000}         # where a split's seeds begin
BATCH = 32                                      # scenes that a worker makes at a time


def _make_part(job):
    """Make scenes [first, last) of a set and write them where they belong."""
    folder, first, last, start, options = job
    scene = make_scenes(range(start + first, start + last), **options)
    for key, value in scene.items():
        if torch.is_tensor(value):
            np.load(f"{folder}/{key}.npy", mmap_mode="r+")[first:last] = value.numpy()
    return first, scene["reasoning"], scene["name"]


class WorldSet:
    """Scenes of the world on disk: `len(set)`, `set.batch(indices)` -> Scene, `set.reasoning` and `set.names`."""

    def __init__(self, folder):
        with open(f"{folder}/set.json") as file:
            text = json.load(file)
        self.folder, self.reasoning, self.names = folder, text["reasoning"], text["name"]
        self.arrays = {name[:-4]: np.load(f"{folder}/{name}", mmap_mode="r")
                       for name in sorted(os.listdir(folder)) if name.endswith(".npy")}

    def __len__(self):
        return len(self.names)

    def batch(self, indices):
        indices = [int(i) for i in indices]
        # Indexing a memory map reads these rows and no others.
        scene = {key: torch.from_numpy(np.asarray(array[indices])) for key, array in self.arrays.items()}
        return scene | {"reasoning": [self.reasoning[i] for i in indices], "name": [self.names[i] for i in indices]}


def load_world(split="train", scenes=16000, camera_ids=(0, 1, 2, 6), size=(64, 128), frames=4, frame_dt=0.5,
               folder="data", start=0, workers=2):
    """
    The built-in world's scenes [start, start + scenes) of a split, as a WorldSet. The first call makes them (393 KB a
    scene of 16 images of 64 x 128), later ones read them from `folder`; all that they depend on is in the set's name.
    An interrupted making starts anew and never leaves half a set. workers = 0 makes it in this process.
    """
    if split not in SEEDS:
        raise ValueError(f"split: expected one of {tuple(SEEDS)}, not {split!r}")
    if scenes < 1 or start < 0 or start + scenes > SEEDS["val"]:
        raise ValueError(f"scenes, start: expected scenes within 0 .. {SEEDS['val']}, not {scenes} from {start} on")
    options = dict(camera_ids=tuple(sorted(camera_ids)), size=tuple(size), frames=frames, frame_dt=frame_dt)
    cameras = "".join(map(str, options["camera_ids"]))
    name = f"world{WORLD_VERSION}-{split}-{start}+{scenes}-{size[0]}x{size[1]}-c{cameras}-f{frames}x{frame_dt:g}"
    done = os.path.join(folder, name)
    if not os.path.exists(done):
        _make_set(done, SEEDS[split] + start, scenes, options, workers)
    return WorldSet(done)


def _make_set(done, first_seed, scenes, options, workers):
    making = f"{done}.making-{os.getpid()}"
    os.makedirs(making)
    # Processes of one thread each: threads that share cores with other threads are many times slower.
    pool = multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) if workers else None
    try:
        for key, value in make_scenes([first_seed], **options).items():      # one scene tells shapes and types
            if torch.is_tensor(value):
                np.lib.format.open_memmap(f"{making}/{key}.npy", "w+", value.numpy().dtype, (scenes, *value.shape[1:]))
        jobs = [(making, i, min(i + BATCH, scenes), first_seed, options) for i in range(0, scenes, BATCH)]
        text = {"reasoning": [""] * scenes, "name": [""] * scenes}
        parts = pool.imap_unordered(_make_part, jobs) if pool else map(_make_part, jobs)
        with pool or nullcontext(), tqdm(total=scenes, desc=f"making {os.path.basename(done)}", unit="scene") as bar:
            for first, reasoning, names in parts:
                text["reasoning"][first:first + BATCH], text["name"][first:first + BATCH] = reasoning, names
                bar.update(len(names))
        with open(f"{making}/set.json", "w") as file:
            json.dump({"options": options, "first_seed": first_seed, **text}, file)
        if not os.path.exists(done):            # else another process was quicker
            os.rename(making, done)             # a set appears whole or not at all
    finally:
        shutil.rmtree(making, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# Real clips: NVIDIA's PhysicalAI-AV, KITTI raw, a folder of one's own
#
# A reader turns what lies on the disk into Clips: a Motion (poses at their own times), Cameras (images at their own
# times) and texts. From there on all clips are alike, and ClipScenes cuts Scenes out of them.

CAMERAS = {"cross_left_120fov": 0, "front_wide_120fov": 1, "cross_right_120fov": 2, "rear_left_70fov": 3,
           "rear_tele_30fov": 4, "rear_right_70fov": 5, "front_tele_30fov": 6}
USED = (0, 1, 2, 6)     # the cameras that the release looks through
KINEMATICS = ("speed", "acceleration", "steering", "turn_signal")   # the columns of a Scene's ego_kinematics
TICK = 5e-7             # s, half a microsecond of NVIDIA's clock: times closer than this are the same time


class Camera(NamedTuple):
    read: Callable      # times (frames,) in s -> (frames, H, W, 3) uint8, for each the last image at or before it
    first: float        # s, the first image
    last: float
    intrinsics: torch.Tensor | None         # (10,), see `project`; None where unknown
    camera_to_ego: torch.Tensor | None      # (4, 4)


class Clip(NamedTuple):
    name: str
    motion: "Motion"
    cameras: dict       # camera id -> Camera
    reasoning: dict     # time in s -> text
    starts: list        # s, the t0 that the data itself names; empty: every half second


def load_clips(path, t0=None, camera_ids=None, frames=4, frame_dt=0.1, size=None, rig=None, future=True):
    """
    Scenes of the real clips in a folder -> ClipScenes: `len(set)`, `set.batch(indices)` -> Scene, `set.names`.

    path        NVIDIA's layout (it holds features.csv), a drive of KITTI raw (oxts), or a folder of one's own
                (egomotion.csv): see read_nvidia, read_kitti, read_folder
    t0          a time or a list of times in s on the clip's own clock; left out: its key frames, the times that have
                reasoning, or else every half second. There must be more than 1.6 s of poses before t0, as in the
                release, and 6.4 s after it
    camera_ids  left out: those of 0, 1, 2 and 6 that there are
    frames      images of each camera, frame_dt s apart, the last one at t0
    rig, size   RIG or the like, and (H, W): all images are turned into what the cameras of the rig would see, for
                models that know only the world. Left out, images keep their size, which must be one for all
    future      False asks for no poses after t0; the Scenes then have no ego_future_xyz and ego_future_rot

    A Scene has camera_to_ego and intrinsics where all its cameras are calibrated.
    Raises ValueError or FileNotFoundError: one line that names the file and what was expected of it.
    """
    path = Path(path)
    readers = {"features.csv": read_nvidia, "oxts": read_kitti, "egomotion.csv": read_folder}
    found = [reader for entry, reader in readers.items() if (path / entry).exists()]
    if not found:
        raise FileNotFoundError(f"{path}: no ego motion in it, expected one of {', '.join(readers)}")
    if (rig is None) != (size is None):
        raise ValueError("rig and size go together: without a rig, images keep their own size")
    return ClipScenes(found[0](path), t0, camera_ids, frames, frame_dt, size, rig, future)


class ClipScenes:
    """The Scenes cut out of clips, see load_clips. `names` and `reasoning` have a str for each."""

    def __init__(self, clips, t0, camera_ids, frames, frame_dt, size, rig, future):
        self.camera_ids, self.size, self.rig, self.future = camera_ids, size, rig, future
        self.ages = frame_dt * np.arange(frames - 1, -1, -1)                # (frames,) s before t0, oldest first
        self.cuts, refused = [], []                                         # (clip, t0) of each Scene; reasons
        for clip in clips:
            first, last = clip.motion.times[[0, -1]]
            every_half = np.arange(first + 2, max(last, first + 2.1), 0.5)  # never empty: a short clip is to be told
            for start in (clip.starts or every_half) if t0 is None else np.atleast_1d(t0):
                reason = self.refusal(clip, float(start))
                if reason:
                    refused.append(reason)
                else:
                    self.cuts.append((clip, float(start)))
        if refused and (t0 is not None or not self.cuts):                   # asked for in vain, or nothing left
            raise ValueError(refused[0])
        self.names = [f"{clip.name} at {start:.1f} s" for clip, start in self.cuts]
        self.reasoning = [next((text for at, text in clip.reasoning.items() if abs(at - start) < DT / 2), "")
                          for clip, start in self.cuts]

    def __len__(self):
        return len(self.cuts)

    def batch(self, indices):
        """Scenes number `indices` -> one Scene. ValueError where their cameras or the sizes of their images differ."""
        indices = [int(i) for i in indices]
        scenes = [self.scene(i) for i in indices]
        for i, scene in zip(indices, scenes):
            ours, first = [(*s["camera_ids"].tolist(), *s["images"].shape, *s) for s in (scene, scenes[0])]
            if ours != first:
                raise ValueError(f"{self.names[i]} cannot be batched with {self.names[indices[0]]}: cameras, sizes of "
                                 "images or calibration differ; choose camera_ids or a rig")
        lists = {key: [scene[key] for scene in scenes] for key in scenes[0]}
        return {key: torch.stack(values) if torch.is_tensor(values[0]) else values for key, values in lists.items()}

    def scene(self, index):
        """Scene number `index`, not batched."""
        clip, t0 = self.cuts[index]
        views = {}                                  # camera id -> images (frames, 3, H, W), intrinsics, camera_to_ego
        for camera_id, camera in self.sources(clip).items():
            images = torch.from_numpy(camera.read(t0 - self.ages)).permute(0, 3, 1, 2)
            width, height = images.shape[3], images.shape[2]
            if camera.intrinsics is not None and camera.intrinsics[1:3].tolist() != [width, height]:
                raise ValueError(f"{clip.name}: images of camera {camera_id} are {width} x {height} pixels, but its "
                                 "intrinsics are for {:g} x {:g}".format(*camera.intrinsics[1:3]))
            views[camera_id] = images, camera.intrinsics, camera.camera_to_ego
        if self.rig:
            views = reproject(self.rig, views, self.camera_ids, self.size)
        images, intrinsics, poses = zip(*views.values())
        sizes = {camera_id: tuple(view.shape[2:]) for camera_id, view in zip(views, images)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{clip.name}: images must be of one size, by camera they are {sizes}; choose camera_ids")
        scene = clip.motion.scene(t0, self.future)
        scene["images"], scene["camera_ids"] = torch.stack(images), torch.tensor(list(views))
        if all(lens is not None for lens in intrinsics):
            scene["intrinsics"], scene["camera_to_ego"] = torch.stack(intrinsics), torch.stack(poses)
        scene["reasoning"], scene["name"] = self.reasoning[index], self.names[index]
        return scene

    def sources(self, clip):
        """The cameras that its Scenes are made of: {id: Camera}, ids ascending."""
        ids = sorted(self.camera_ids) if self.camera_ids and not self.rig else [i for i in USED if i in clip.cameras]
        if not ids or not set(ids) <= set(clip.cameras):
            raise ValueError(f"{clip.name}: has the cameras {sorted(clip.cameras)}, not {ids or list(USED)}")
        unknown = [i for i in ids if clip.cameras[i].intrinsics is None]
        if self.rig and unknown:
            raise ValueError(f"{clip.name}: a rig needs calibrated cameras, camera {unknown[0]} is not")
        return {i: clip.cameras[i] for i in ids}

    def refusal(self, clip, t0):
        """In a line, what the clip is too short for; None if it is not."""
        first, last = clip.motion.times[[0, -1]]
        start, end = t0 - HISTORY * DT, t0 + FUTURE * DT * self.future
        if not first < start - TICK or end > last + TICK:
            hint = f" ({t0:.2f} s with future=False)" if self.future else ""
            return (f"{clip.motion.where}: too short for t0 = {t0:.2f} s, which needs poses from before {start:.2f} s "
                    f"to {end:.2f} s{hint}; there are {first:.2f} to {last:.2f} s")
        for camera_id, camera in self.sources(clip).items():
            start = t0 - self.ages[0]
            if start < camera.first - TICK or t0 > camera.last + TICK:
                return (f"{clip.name}: too short for t0 = {t0:.2f} s, which needs images of camera {camera_id} from "
                        f"{start:.2f} s to {t0:.2f} s; there are {camera.first:.2f} to {camera.last:.2f} s")


def reproject(rig, views, camera_ids, size):
    """
    What the cameras of a rig would see: the images of real cameras, turned but not moved.

    views {id: (images (frames, 3, h, w) uint8, intrinsics, camera_to_ego)} -> the same for the rig's cameras, images
    (frames, 3, *size). A pixel takes its colour from the first real camera that sees in its direction, the one of the
    same id before all others, and is black where none does. To turn a camera takes no depths, to move it would: so
    camera_to_ego has the rig's direction, but the place of the real camera. camera_ids left out: those of the rig whose
    centre is seen.
    """
    turned = {}
    for camera_id in sorted(camera_ids or rig):
        intrinsics, pose = rig_camera(camera_id, *size, rig)
        directions = rays(intrinsics, *size) @ pose[:3, :3].T                               # (H, W, 3), ego axes
        frames = next(iter(views.values()))[0].shape[0]
        picture, unseen = torch.zeros(frames, 3, *size), torch.ones(size, dtype=torch.bool)
        for _, (images, source, source_pose) in sorted(views.items(), key=lambda view: view[0] != camera_id):
            pixels, visible = project(directions @ source_pose[:3, :3], source)
            visible &= unseen
            if not visible.any():
                continue
            if unseen.all():
                pose[:3, 3] = source_pose[:3, 3]
            # Average first, so that no pixel of the source is skipped: by the ratio of pixels per radian on the axis.
            focal = source[6] if source[0] == 0 else source[5]
            small = [max(1, round(n / max(1, float(focal / intrinsics[6])))) for n in images.shape[2:]]
            images = torch.nn.functional.interpolate(images.float(), small, mode="area")
            grid = (2 * pixels / source[1:3] - 1).expand(frames, -1, -1, -1)                # the picture is -1 .. 1
            colours = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
            picture = torch.where(visible, colours, picture)
            unseen &= ~visible
        if camera_ids or not unseen[size[0] // 2, size[1] // 2]:
            turned[camera_id] = picture.round().byte(), intrinsics, pose
    if not turned:
        raise ValueError(f"no camera of the rig looks where cameras {list(views)} do; choose camera_ids")
    return turned


class Motion:
    """
    Where the rear axle was, at its own times and, by interpolation, between them.

    where: the file to name in errors. times (N,) s; xyz (N, 3) m and rot (N, 3, 3) in any fixed frame with z up;
    measured: those of KINEMATICS that were recorded, each (N,) in the units of a Scene.
    Raises ValueError where there are fewer than 4 poses, a number is not finite or times do not increase.
    """

    def __init__(self, where, times, xyz, rot, **measured):
        if len(times) < 4:
            raise ValueError(f"{where}: {len(times)} poses, expected 4 or more")
        for field, values in dict(time=times, position=xyz, rotation=rot, **measured).items():
            for row in np.argwhere(~np.isfinite(values))[:1, 0]:
                raise ValueError(f"{where}: {field} of pose {row} is not a finite number")
        require_increasing(where, times)
        self.where, self.times, self.xyz, self.rot, self.measured = where, times, xyz, rot, measured
        self.slopes = spline_slopes(times, xyz)                             # (N, 3) m/s

    def pose(self, t):
        """t (T,) s -> xyz (T, 3), rot (T, 3, 3), velocity (T, 3) m/s: cubic spline and slerp, as in NVIDIA's kit."""
        i = np.clip(np.searchsorted(self.times, t, side="right") - 1, 0, len(self.times) - 2)
        seconds = (self.times[i + 1] - self.times[i])[:, None]
        u = (t - self.times[i])[:, None] / seconds                          # 0 at pose i, 1 at pose i + 1
        mean, start, end = (self.xyz[i + 1] - self.xyz[i]) / seconds, self.slopes[i], self.slopes[i + 1]
        a, b = 3 * mean - 2 * start - end, start + end - 2 * mean           # of u^2 and u^3, so that slopes meet
        xyz = self.xyz[i] + seconds * u * (start + u * (a + u * b))
        return xyz, slerp(self.rot[i], self.rot[i + 1], u[:, 0]), start + u * (2 * a + u * 3 * b)

    def speed(self, t):
        """Speed (T,) in m/s at t (T,), negative in reverse."""
        if "speed" in self.measured:
            return np.interp(t, self.times, self.measured["speed"])
        _, rot, velocity = self.pose(t)
        return (velocity * rot[:, :, 0]).sum(-1)

    def kinematics(self, t0):
        """
        The Scene's ego_kinematics (20, 4). What was not measured is derived from the poses, with slopes over 0.6 s that
        end at t0 at the latest: a model reads this. Where a clip starts less than 1.9 s before t0, its first values
        are repeated.
        """
        t = np.maximum(t0 + DT * np.arange(1 - PAST, 1), self.times[0])     # (20,)
        before, after = np.maximum(t - 0.3, self.times[0]), np.minimum(t + 0.3, t0)
        speed, gained = self.speed(t), self.speed(after) - self.speed(before)
        turned = np.swapaxes(self.pose(before)[1], 1, 2) @ self.pose(after)[1]
        yaw_rate = np.arctan2(turned[:, 1, 0], turned[:, 0, 0]) / (after - before)
        derived = {"speed": speed, "acceleration": gained / (after - before),
                   "steering": steering_angle(speed, yaw_rate / np.where(speed == 0, 1, speed)), "turn_signal": 0 * t}
        kinematics = derived | {field: np.interp(t, self.times, values) for field, values in self.measured.items()}
        if "turn_signal" in self.measured:                                  # a switch has no values between
            last = np.searchsorted(self.times, t + TICK, side="right") - 1
            kinematics["turn_signal"] = self.measured["turn_signal"][last]
        return np.stack([kinematics[field] for field in KINEMATICS], -1)

    def scene(self, t0, future):
        """The Scene's entries about motion at t0, in the ego frame at t0; ego_future_* only with `future`."""
        (origin,), (facing,), _ = self.pose(np.array([t0]))

        def local(steps):
            xyz, rot, _ = self.pose(t0 + DT * steps)
            return (xyz - origin) @ facing, facing.T @ rot

        scene = {"ego_kinematics": self.kinematics(t0)}
        scene["ego_history_xyz"], scene["ego_history_rot"] = local(np.arange(1 - HISTORY, 1))
        if future:
            scene["ego_future_xyz"], scene["ego_future_rot"] = local(np.arange(1, FUTURE + 1))
        return {key: torch.from_numpy(value).float() for key, value in scene.items()}


def steering_angle(speed, curvature):
    """rad. A car that hardly moves shows no curvature: below 0.6 m/s the angle is 0."""
    return np.arctan(WHEELBASE * np.where(np.abs(speed) < 0.6, 0.0, curvature))


def spline_slopes(x, y):
    """
    Slopes (N, D) at its knots x (N,) of the cubic spline through y (N, D), with "not-a-knot" ends; N >= 4.

    A tridiagonal system. Inner rows say that the second derivative is continuous at a knot; the first and the last say
    that the third is too at the knot next to the end, the unknown beyond that knot being eliminated.
    """
    h = np.diff(x)                                                          # (N - 1,)
    chord = np.diff(y, axis=0) / h[:, None]                                 # (N - 1, D)

    def end(h0, h1, chord0, chord1):                                        # right side, seen from that end
        return ((3 * h0 + 2 * h1) * h1 * chord0 + h0 ** 2 * chord1) / (h0 + h1)

    inner = 3 * (h[1:, None] * chord[:-1] + h[:-1, None] * chord[1:])
    right = np.stack([end(h[0], h[1], chord[0], chord[1]), *inner, end(h[-1], h[-2], chord[-1], chord[-2])])
    below = np.array([0, *h[1:], h[-1] + h[-2]])
    diagonal = np.array([h[1], *2 * (h[:-1] + h[1:]), h[-2]])
    above = np.array([h[0] + h[1], *h[:-1], 0])
    for i in range(1, len(x)):                                              # eliminate downwards,
        factor = below[i] / diagonal[i - 1]
        diagonal[i] -= factor * above[i - 1]
        right[i] -= factor * right[i - 1]
    slopes = right / diagonal[:, None]
    for i in reversed(range(len(x) - 1)):                                   # substitute upwards
        slopes[i] -= above[i] / diagonal[i] * slopes[i + 1]
    return slopes


def slerp(first, second, share):
    """Rotations (N, 3, 3) a share (N,) of the way from first to second (N, 3, 3), which are less than 180 deg apart."""
    turn = np.swapaxes(first, 1, 2) @ second
    odd = (turn - np.swapaxes(turn, 1, 2)) / 2                              # sin(angle) [axis]x
    sin = np.sqrt((odd ** 2).sum((1, 2)) / 2)
    angle = share * np.arctan2(sin, (np.trace(turn, axis1=1, axis2=2) - 1) / 2)
    cross = odd / np.maximum(sin, 1e-12)[:, None, None]                     # [axis]x, the cross product as a matrix
    sin, cos = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return first @ (np.eye(3) + sin * cross + (1 - cos) * cross @ cross)    # Rodrigues


def rotation(yaw, pitch, roll):
    """Rz(yaw) Ry(pitch) Rx(roll): each (N,) rad -> (N, 3, 3). y is left, so a positive pitch is nose down."""
    (cy, sy), (cp, sp), (cr, sr) = [(np.cos(angle), np.sin(angle)) for angle in (yaw, pitch, roll)]
    return np.stack([cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr,
                     sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr,
                     -sp, cp * sr, cp * cr], -1).reshape(-1, 3, 3)


def require_increasing(where, times):
    """ValueError unless times (N,) increase."""
    for i in np.flatnonzero(np.diff(times) <= 0)[:1]:
        raise ValueError(f"{where}: times must increase, but {times[i]} s is followed by {times[i + 1]} s")


# The three readers.

def read_folder(path):
    """
    A folder of one's own -> [Clip].

        egomotion.csv       header time,x,y,yaw: s, m, m, rad of the rear axle in any fixed frame, x forward where
                            yaw = 0; at about 10 Hz or more. Optional columns: z, roll, pitch (rad, nose down is
                            positive), speed, acceleration, steering (rad, left is positive), turn_signal (-1, 0, 1)
        front_wide_120fov/  a folder for each camera there is, with png or jpg images in the order of their names;
                            cross_left_120fov, front_tele_30fov ...: the names in CAMERAS, take the most similar one
            times.csv       header time: s on the clock of egomotion.csv, a line for each image; or header file,time
        cameras.json        optional, a rig needs it: {"front_wide_120fov": {"kind": "pinhole", "width": 1920,
                            "height": 1080, "cx": 960, "cy": 540, "coefficients": [1000, 1000], "camera_to_ego": 4 x 4
                            rows, from x right, y down, z out to the ego frame}}; see `project`, kind may be "ftheta"
        reasoning.json      optional: [{"time": 3.2, "text": "Stop and keep lane since the light ahead is red."}]
    """
    file, names = path / "egomotion.csv", ("time", "x", "y", "yaw")
    columns = read_csv(file, names, ("z", "roll", "pitch", *KINEMATICS))
    times, x, y, yaw = [columns[name] for name in names]
    z, roll, pitch = [columns.get(name, 0 * times) for name in ("z", "roll", "pitch")]
    motion = Motion(file, times, np.stack([x, y, z], -1), rotation(yaw, pitch, roll),
                    **{field: columns[field] for field in KINEMATICS if field in columns})
    calibrations = read_json(path / "cameras.json")
    cameras = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        if folder.name not in CAMERAS:
            raise ValueError(f"{folder}: unknown camera, expected one of {', '.join(CAMERAS)}")
        columns = read_csv(folder / "times.csv", ("time",), ("file",))
        images = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in (".png", ".jpg", ".jpeg"))
        images = [folder / name for name in columns["file"]] if "file" in columns else images
        known = camera_of_json(path / "cameras.json", calibrations, folder.name) if calibrations else (None, None)
        cameras[CAMERAS[folder.name]] = image_camera(folder / "times.csv", images, columns["time"], *known)
    reasoning = read_json(path / "reasoning.json") or []
    if not all(isinstance(entry, dict) and {"time", "text"} <= entry.keys() for entry in reasoning):
        raise ValueError(f'{path / "reasoning.json"}: expected a list of {{"time": s, "text": str}}')
    reasoning = {entry["time"]: entry["text"] for entry in reasoning}
    return [Clip(path.name, motion, cameras, reasoning, list(reasoning))]


def camera_of_json(file, calibrations, name):
    """intrinsics (10,) and camera_to_ego (4, 4) of the camera in cameras.json."""
    entry, kinds = calibrations.get(name, {}), {"ftheta": (0, 5), "pinhole": (1, 2)}    # coefficients of each
    if entry.get("kind") not in kinds:
        raise ValueError(f"{file}: {name} needs kind, one of {', '.join(kinds)}; it has {entry.get('kind')}")
    kind, count = kinds[entry["kind"]]
    shapes = {"width": (1,), "height": (1,), "cx": (1,), "cy": (1,), "coefficients": (count,), "camera_to_ego": (4, 4)}
    numbers = []
    for field, shape in shapes.items():
        try:
            numbers.append(torch.tensor(entry[field], dtype=torch.float32).reshape(shape))
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise ValueError(f"{file}: {name} needs {field}, numbers of shape {shape}") from None
    *lens, camera_to_ego = numbers
    return torch.cat([torch.tensor([kind]), *lens, torch.zeros(5 - count)]), camera_to_ego


def read_kitti(path):
    """
    A drive of KITTI's raw data, synced and rectified -> [Clip]: oxts for motion, image_02 as the front wide camera.

    The ego frame has the axes of the inertial unit. From the unit the camera is 1.08 m ahead, 0.25 m to the right and
    0.73 m up; the ego's origin is 1.60 m behind the camera, 0.06 m to its right (the centre line) and 1.65 m below.
    The calibration is calib_cam_to_cam.txt in the folder or its parent, else that of 2011_09_26. Time 0 is the first
    pose.
    """
    clock = read_timestamps(path / "oxts" / "timestamps.txt")
    rows = np.array([read_oxts(file) for file in sorted((path / "oxts" / "data").glob("*.txt"))])   # (N, 30)
    if len(rows) != len(clock):
        raise ValueError(f"{path / 'oxts'}: {len(rows)} files in data, but {len(clock)} lines in timestamps.txt")
    latitude, longitude, up, roll, pitch, yaw = rows[:, :6].T
    latitude, longitude = np.radians(latitude), np.radians(longitude)
    scale = 6378137 * np.cos(latitude[0])                                   # Mercator, true to scale at the start
    unit = np.stack([scale * longitude, scale * np.log(np.tan(np.pi / 4 + latitude / 2)), up], -1)
    rot = rotation(yaw, pitch, roll)
    motion = Motion(path / "oxts", (clock - clock[0]) / np.timedelta64(1, "s"),
                    unit - unit[0] + rot @ (-0.52, -0.31, -0.92), rot, speed=rows[:, 8], acceleration=rows[:, 14])
    file = path / "image_02" / "timestamps.txt"
    times = (read_timestamps(file) - clock[0]) / np.timedelta64(1, "s")
    images = sorted((path / "image_02" / "data").glob("*.png"))
    pose = rig_camera(1, 1, 1)[1]                                           # looks ahead, level
    pose[:3, 3] = torch.tensor([1.6, 0.06, 1.65])
    camera = image_camera(file, images, times, None, pose)
    camera = camera._replace(intrinsics=kitti_intrinsics(path, *read_image(images[0]).shape[:2]))
    return [Clip(path.name, motion, {CAMERAS["front_wide_120fov"]: camera}, {}, [])]


def kitti_intrinsics(path, height, width):
    """The pinhole (10,) of image_02, scaled to images of this size. KITTI's pixel centres are at integers."""
    sizes, projection = (1242, 375), (721.5377, 0, 609.5593, 0, 0, 721.5377, 172.854, 0)
    for file in (path / "calib_cam_to_cam.txt", path.parent / "calib_cam_to_cam.txt"):
        if file.exists():
            lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
            try:
                sizes, projection = [[float(n) for n in lines[key].split()] for key in ("S_rect_02", "P_rect_02")]
            except (KeyError, ValueError):
                raise ValueError(f"{file}: expected lines S_rect_02 and P_rect_02 of numbers") from None
            break
    right, down = width / sizes[0], height / sizes[1]
    fx, cx, fy, cy = [projection[i] for i in (0, 2, 5, 6)]
    return torch.tensor([1, width, height, (cx + 0.5) * right, (cy + 0.5) * down, fx * right, fy * down, 0, 0, 0])


def read_nvidia(path):
    """
    NVIDIA's PhysicalAI-AV data set, as far as its chunks are in the folder, through NVIDIA's kit -> [Clip].

    t0 are the events of reasoning/ood_reasoning.parquet, with their texts, or else event_t0s of clip_index.parquet, or
    else 5.1 s, the release's default. Clips of which there is no egomotion here are left out, as are the invalid ones.
    """
    try:
        import pandas
        from physical_ai_av import PhysicalAIAVDatasetInterface
    except ImportError as error:
        raise ImportError(f"{path}: NVIDIA's layout is read by its kit, pip install physical_ai_av ({error})") from None

    class Kit(PhysicalAIAVDatasetInterface):
        """The kit asks the Hugging Face hub what there is; this one asks the folder."""

        def is_file_cached(self, filename):
            return (path / filename).exists()

        _has_file = is_file_cached

        def download_file(self, filename):
            if not self.is_file_cached(filename):
                raise FileNotFoundError(f"{path / filename}: no such file")
            return path / filename

        def open_file(self, filename, mode="rb", maybe_stream=False):
            return open(self.download_file(filename), mode)

    kit = Kit(revision="local")

    def has(chunk, feature):
        features = kit.features
        return feature in features.ALL and kit.is_file_cached(features.get_chunk_feature_filename(chunk, feature))

    def read(clip, feature):
        try:
            return kit.get_clip_feature(clip, feature)
        except KeyError:
            raise ValueError(f"{path}: clip {clip} has no {feature}") from None

    def video(clip, feature):
        def frames(times):
            try:
                return read(clip, feature).decode_images_from_timestamps(np.round(1e6 * times).astype(np.int64))[0]
            except ValueError as error:                                     # the kit's errors have several lines
                raise ValueError(f"{path}: {feature} of clip {clip}: {' '.join(str(error).split())}") from None
        return frames

    index = kit.clip_index[kit.clip_index["clip_is_valid"]]
    chunks = {chunk for chunk in index["chunk"].unique() if has(chunk, "egomotion")}
    index = index[index["chunk"].isin(chunks)]
    if not len(index):
        raise FileNotFoundError(f"{path}: none of the clips of clip_index.parquet has its egomotion here")
    events, file = {}, path / "reasoning" / "ood_reasoning.parquet"
    if file.exists():
        for clip, entries in pandas.read_parquet(file)["events"].items():
            entries = json.loads(entries) if isinstance(entries, str) else entries
            events[clip] = {entry["event_start_timestamp"] / 1e6: entry["cot"] for entry in entries}
    clips = []
    for clip, row in index.iterrows():
        chunk, ego = row["chunk"], read(clip, "egomotion")
        state, rot = ego.values, ego.values.pose.rotation.as_matrix()
        speed = (state.velocity * rot[:, :, 0]).sum(-1)                     # vectors are in the frame of the poses
        motion = Motion(f"{path}: egomotion of clip {clip}", ego.timestamps / 1e6, state.pose.translation, rot,
                        speed=speed, acceleration=(state.acceleration * rot[:, :, 0]).sum(-1),
                        steering=steering_angle(speed, state.curvature[:, 0]))
        calibrated = has(chunk, "camera_intrinsics") and has(chunk, "sensor_extrinsics")    # the release needs neither
        lenses = read(clip, "camera_intrinsics").camera_models if calibrated else {}
        places = read(clip, "sensor_extrinsics").sensor_poses if calibrated else {}
        cameras = {}
        for name, camera_id in [("camera_" + name, camera_id) for name, camera_id in CAMERAS.items()]:
            if not has(chunk, name):
                continue
            intrinsics = camera_to_ego = None
            if name in lenses and name in places:
                lens, camera_to_ego = lenses[name], torch.tensor(places[name].as_matrix(), dtype=torch.float32)
                numbers = [0, lens.width, lens.height, *lens.principal_point, *lens.th2r.coef]
                intrinsics = torch.tensor(numbers, dtype=torch.float32)
            # The kit knows when its images are from, and refuses times before and after them.
            cameras[camera_id] = Camera(video(clip, name), -math.inf, math.inf, intrinsics, camera_to_ego)
        starts = list(events.get(clip, [])) or [start / 1e6 for start in row.get("event_t0s", [])] or [5.1]
        clips.append(Clip(clip, motion, cameras, events.get(clip, {}), starts))
    return clips


# Files.

def image_camera(file, images, times, intrinsics, camera_to_ego):
    """A Camera whose images (paths, oldest first) were taken at times (N,); file: where the times are from."""
    if len(images) == 0 or len(images) != len(times):
        raise ValueError(f"{file}: {len(times)} times for {len(images)} images, expected one for each")
    require_increasing(file, times)

    def read(t):
        pictures = [read_image(images[i]) for i in np.searchsorted(times, t + TICK, side="right") - 1]
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError(f"{images[0].parent}: the images of a camera must be of one size")
        return np.stack(pictures)

    return Camera(read, times[0], times[-1], intrinsics, camera_to_ego)


def read_image(file):
    """An image file -> (H, W, 3) uint8."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images are read by Pillow: pip install pillow") from None
    try:
        with Image.open(file) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file}: not a readable image ({error})") from None


def read_csv(file, required, optional):
    """A CSV file with a header -> {name: (N,) float}; a column `file` stays a list of str."""
    with open(file, newline="") as lines:
        header, *rows = list(csv.reader(lines)) or [[]]
    header = [name.strip() for name in header]
    if not set(required) <= set(header) <= {*required, *optional}:
        raise ValueError(f"{file}: header is {','.join(header)}; expected {','.join(required)}, "
                         f"optional are {','.join(optional)}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{file}: line {number} has {len(row)} fields, the header {len(header)}")
    columns = {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}
    for name in columns.keys() - {"file"}:
        try:
            columns[name] = np.array(columns[name], float)
        except ValueError as error:
            raise ValueError(f"{file}: column {name} must be numbers ({error})") from None
    return columns


def read_json(file):
    """What a JSON file holds; None where there is no file."""
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None


def read_timestamps(file):
    """KITTI's lines of date and time -> (N,) datetime64[ns]."""
    try:
        return np.array(file.read_text().strip().splitlines(), "datetime64[ns]")
    except ValueError as error:
        raise ValueError(f"{file}: expected lines like 2011-09-26 13:02:25.964000000 ({error})") from None


def read_oxts(file):
    """A file of KITTI's oxts -> (30,): latitude, longitude, altitude, roll, pitch, yaw, ..."""
    try:
        return np.array(file.read_text().split(), float).reshape(30)
    except ValueError:
        raise ValueError(f"{file}: expected 30 numbers") from None


# ----------------------------------------------------------------------------------------------------------------------
# One door

def load(source, **options):
    """
    Scenes of a source: "world" is the built-in one, with the options of `load_world`; any other is the folder of real
    clips, with those of `load_clips`. Either way: len(set), set.batch(indices) -> Scene, set.names, set.reasoning.
    """
    return load_world(**options) if source == "world" else load_clips(source, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Command line

def look(path, seeds, size):
    """A contact sheet: a row a scene, the cameras at t0, and the expert's path from above."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    order = (1, 6, 0, 2)
    scene = make_scenes(seeds, size=size, frames=1)
    at = [scene["camera_ids"][0].tolist().index(i) for i in order]
    figure, axes = plt.subplots(len(seeds), 5, figsize=(17, 2.1 * len(seeds)), squeeze=False, layout="constrained")
    for i, row in enumerate(axes):
        for ax, camera in zip(row, at):
            ax.imshow(scene["images"][i, camera, -1].permute(1, 2, 0), interpolation="nearest")
            ax.axis("off")
        row[0].set_title(f"{seeds[i]} {scene['name'][i]}: {scene['reasoning'][i]}", loc="left", fontsize=9)
        x, y, _ = torch.cat([scene["ego_history_xyz"][i], scene["ego_future_xyz"][i]]).unbind(-1)
        row[4].plot(x[:HISTORY], y[:HISTORY], "0.6", x[HISTORY:], y[HISTORY:], "C0.", markersize=3)
        row[4].set(xlim=(-25, 95), ylim=(-30, 30), aspect="equal")
        row[4].grid(alpha=0.3)
        row[4].tick_params(labelsize=6)
    figure.savefig(path, dpi=100)


def measure(size, scenes=32):
    """Scenes per second of each part of the making, in this process with one thread."""
    torch.set_num_threads(1)
    clock = [time.perf_counter()]
    world = World(range(scenes))
    clock.append(time.perf_counter())
    for _ in range(PAST + FUTURE):
        world.step(*world.expert())
    clock.append(time.perf_counter())
    for _ in range(4):
        world.render((0, 1, 2, 6), size)
    clock.append(time.perf_counter())
    return {part: scenes / (b - a) for part, a, b in zip(("draw", "drive", "render 16 images"), clock, clock[1:])}


def main():
    parser = argparse.ArgumentParser(description="Make scenes of the built-in world, or look at them.")
    parser.add_argument("--split", default="train", choices=tuple(SEEDS), help="whose seeds to use")
    parser.add_argument("--scenes", type=int, default=16000, help="how many scenes to make")
    parser.add_argument("--start", type=int, default=0, help="the first scene of the split")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="pixels of an image")
    parser.add_argument("--camera-ids", type=int, nargs="+", default=(0, 1, 2, 6), help="cameras of the rig")
    parser.add_argument("--frames", type=int, default=4, help="frames a camera")
    parser.add_argument("--frame-dt", type=float, default=0.5, help="seconds between frames")
    parser.add_argument("--folder", default="data", help="where sets are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes that make scenes, 0 for none but this one")
    parser.add_argument("--look", metavar="PNG", help="draw a contact sheet of the seeds instead of making a set")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 12), metavar=("FROM", "TO"), help="seeds to look at")
    args = parser.parse_args()
    if args.look:
        look(args.look, range(*args.seeds), args.size)
        return
    measure(args.size, scenes=4)                                                        # warm up
    print("one thread, scenes/s:", ", ".join(f"{part} {rate:.0f}" for part, rate in measure(args.size).items()))
    begin = time.perf_counter()
    made = load("world", split=args.split, scenes=args.scenes, camera_ids=args.camera_ids, size=args.size,
                frames=args.frames, frame_dt=args.frame_dt, folder=args.folder, start=args.start, workers=args.workers)
    print(f"{made.folder}: {len(made)} scenes in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()

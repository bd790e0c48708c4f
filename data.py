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
its renderer, scenes, their cache on disk.

    python data.py --scenes 16000 --size 64 128             # make a training set, print scenes/s by part
    python data.py --look sheet.png --seeds 0 12            # look at twelve scenes
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import shutil
import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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


def rig_camera(camera_id, H, W):
    """intrinsics (10,) and camera_to_ego (4, 4) of a camera of the RIG at H x W pixels."""
    if camera_id not in RIG:
        raise ValueError(f"camera_ids: the world has the cameras {tuple(RIG)}, not {camera_id}")
    position, yaw, fov = RIG[camera_id]
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
CAR_COLOURS = ((0.9, 0.9, 0.9), (0.15, 0.15, 0.17), (0.55, 0.56, 0.6), (0.15, 0.25, 0.6), (0.1, 0.4, 0.25), (0.7, 0.65, 0.5))
CLOTHES = ((0.95, 0.1, 0.6), (1.0, 0.9, 0.1), (0.1, 0.9, 0.95), (0.95, 0.95, 0.95), (0.6, 0.1, 0.9), (0.2, 0.35, 1.0))
WALLS = ((0.62, 0.42, 0.34), (0.68, 0.64, 0.55), (0.5, 0.52, 0.56), (0.75, 0.7, 0.66), (0.45, 0.38, 0.36))


class Thing(NamedTuple):
    """Anything that stands on the ground. It follows its script: speed up or brake once, drift sideways once."""
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


class Draw(NamedTuple):
    """All that is fixed about one scene."""
    situation: int
    side: int                                   # LEFT or RIGHT: where the cause is
    cruise: float                               # m/s
    react: float                                # s after t0: before it the expert does not know the cause
    wander: tuple                               # speed amplitude, rate, phase; lateral amplitude, rate, phase
    road: tuple                                 # lines, see `place`
    route: tuple
    lanes: tuple                                # lanes of our direction left of ours, oncoming lanes, lanes right of ours
    shoulder: float                             # m, paved
    crossing: float                             # s of the side road's centre, FAR if there is none
    stop: float                                 # s of the stop line, FAR if there is none
    halt: float                                 # s that the expert may not pass: the stop line if its light is red
    nudge: tuple                                # offset to the left, and s where it starts, is full, ends, is gone
    urban: float                                # 1 has a pavement, 0 has grass
    daylight: float
    things: list                                # the cause is the first one


def draw(seed):
    """The scene of a seed. It depends on nothing else."""
    rng = np.random.default_rng(seed)
    uniform, chance, pick = rng.uniform, lambda p: rng.random() < p, lambda items: items[rng.integers(len(items))]
    situation = pick(SITUATIONS)
    side = RIGHT if situation == "parked car" else pick((LEFT, RIGHT))
    v, react = uniform(8, 14), uniform(-0.3, 0.2)
    wander = (uniform(0, 0.4), uniform(0.5, 1.5), uniform(0, 6.3), uniform(0, 0.15), uniform(0.8, 1.6), uniform(0, 6.3))

    def braking(decel, v_end=0.0):              # m of road that braking takes, with half a second to get going
        return (v * v - v_end * v_end) / (2 * decel) + 0.5 * v

    def car(s, d, v, oncoming=0.0, **script):   # s, d: its centre at t0
        return Thing(CAR, s - (1 - 2 * oncoming) * v * PAST * DT, d, v, oncoming, CAR_SIZE, pick(CAR_COLOURS), **script)

    def person(s, d, **script):
        return Thing(PEDESTRIAN, s, d, size=PERSON_SIZE, colour=pick(CLOTHES), **script)

    # The road. Two lanes; or four, with ours on the right or on the left of our two.
    layouts = [(0, 1, 0), (1, 2, 0), (0, 2, 1)]
    if situation == "curve":
        layouts = layouts[:1]                   # the inside of a sharp bend has no room for more
    elif situation == "cut-in":
        layouts = [(1, 2, 0) if side == LEFT else (0, 2, 1)]
    elif situation == "turn":                   # one turns from the lane at that side
        layouts = [(0, 1, 0), (0, 2, 1) if side == LEFT else (1, 2, 0)]
    elif situation == "parked car":
        layouts = layouts[:2]
    lanes = pick(layouts)
    shoulder, urban = uniform(1.0, 2.5), float(chance(0.5))
    left_line, right_line = LANE * (lanes[0] + lanes[1] + 0.5), -LANE * (lanes[2] + 0.5)
    left_edge, right_edge = left_line + shoulder, right_line - shoulder
    crossing = situation in ("red light", "green light", "turn") or (situation != "curve" and chance(0.25))
    road = STRAIGHT
    if situation == "curve":
        radius = min(max((v * uniform(0.5, 0.72)) ** 2 / 2, 12), 45)
        road = (braking(uniform(1.8, 2.6), math.sqrt(2 * radius)), side / radius, radius * uniform(0.9, 1.5))
    elif not crossing and chance(0.5):          # a bend so gentle that it asks for nothing
        road = (uniform(-20, 60), pick((-1, 1)) / uniform(150, 500), uniform(50, 120))
    route = road

    # The cause.
    cause, nudge, walk = [], (0.0, 0.0, 1.0, 2.0, 3.0), 0.0
    where = FRONT + v * uniform(1.9, 2.4) + 2   # m ahead: time enough to nudge
    if situation == "slower lead":
        slower = uniform(3.5, 6)
        gap = 3 + 0.8 * (v - slower) + slower ** 2 / (2 * uniform(1.2, 2.2)) + 0.5 * slower
        cause = [car(FRONT + gap + CAR_SIZE[0] / 2, 0, v - slower)]
    elif situation == "braking lead":           # for 0.6 s at least, with its brake lights on
        decel, since, v_end = uniform(2.2, 3.2), uniform(0.6, 1.2), v * uniform(0, 0.4)
        speed = v - decel * since               # at t0
        gap = max(10, braking(3, v_end) - (speed ** 2 - v_end ** 2) / (2 * decel) + 4)
        cause = [car(FRONT + gap + CAR_SIZE[0] / 2 + decel * since ** 2 / 2, 0, v, accel=-decel, t_accel=-since, v_end=v_end)]
    elif situation == "stopped lead":           # hazard lights, not brake lights: those say that it is braking
        cause = [car(FRONT + 3 + braking(uniform(2.4, 3.2)) + CAR_SIZE[0] / 2, 0, 0, signal=HAZARD)]
    elif situation == "pedestrian":             # would be in front of the car when the car gets there
        where = FRONT + 4 + braking(uniform(2.4, 3.1))
        far = uniform(2.2, min(5, (left_edge if side == LEFT else -right_edge) + 0.3))
        walk = min(max((far + uniform(-0.8, 0.6)) / ((where - FRONT) / v), 0.8), 2.0)
        cause = [person(where, side * (far + walk * PAST * DT), drift=-side * walk, t_drift=-NEVER, d_end=-side * 9.0)]
    elif situation == "cut-in":                 # signals and starts about now, or is already on its way without
        slower, signals = uniform(1.5, 3.5), chance(0.5)
        gap = 5 + slower ** 2 / 2 + 0.5 * slower + uniform(0, 4)
        cause = [car(FRONT + gap + CAR_SIZE[0] / 2, side * LANE, v - slower, drift=-side * uniform(0.9, 1.3),
                     t_drift=uniform(-0.4, 0.2) if signals else uniform(-1.4, -1.0),
                     signal=(BLINK_RIGHT if side == LEFT else BLINK_LEFT) if signals else OFF)]
    elif situation == "cones":
        step = uniform(2, 3)
        cause = [Thing(CONE, where + i * step, side * (1.5 - 0.22 * i), size=CONE_SIZE) for i in range(5)]
        nudge = (-side * 1.3, where, where + 4 * step)
    elif situation == "parked car":
        cause = [car(where + CAR_SIZE[0] / 2, -uniform(1.9, 2.3), 0)]
        nudge = (1.3, where, where + CAR_SIZE[0])
    elif situation == "turn":
        radius = uniform(10, 12) if side == LEFT else uniform(7, 8.5)
        route = (braking(uniform(2.3, 3.0), math.sqrt(2 * radius)), side / radius, radius * math.pi / 2)
    if len(nudge) == 3:                         # out while the cause is ahead, back in the same length
        offset, first, last = nudge
        begin, full, end = v * 0.2, first - FRONT - 1, last + 2
        nudge = (offset, begin, full, end, end + full - begin)

    # The crossing, and its light. A green light that is no cause may stand anywhere but on a free road.
    light = {"red light": RED, "green light": GREEN}.get(situation, GREEN if chance(0.5) and situation != "free" else OFF)
    stop = FRONT + 3 + braking(uniform(2.3, 3.1))
    if situation == "turn":
        stop = route[0] + abs(1 / route[1]) - side * LANE / 2 - SIDE_ROAD - FILLET - 0.5
    elif situation not in ("red light", "green light"):
        stop = stop + 15 + uniform(0, 30)
    if crossing and light:
        cause.append(Thing(LIGHT, stop + 1, right_edge - 0.8, size=LIGHT_SIZE, colour=(0.1, 0.1, 0.1), signal=light))
    middle = stop + 0.5 + FILLET + SIDE_ROAD if crossing else FAR
    stop = stop if crossing else FAR

    # The others. Nobody may get in the way of the cause, of the ego or of one another.
    things = cause or [Thing()]
    blocked = {"red light": stop, "pedestrian": where}.get(situation, route[0] if situation == "turn" and side == LEFT else FAR)
    for lane in [1] * lanes[0] + [-1] * lanes[2]:               # beside us, in our direction
        nudged = situation in ("cones", "parked car") and lane * nudge[0] > 0
        if chance(0.5) and blocked == FAR and not nudged and situation != "cut-in":
            things.append(car(uniform(-6, 40), lane * LANE, v + uniform(-2, 2)))
    for lane in range(lanes[0] + 1, lanes[0] + lanes[1] + 1):   # oncoming
        nudged = situation in ("cones", "parked car") and nudge[0] > 0 and lane == 1
        hides = situation == "pedestrian" and side == LEFT
        if chance(0.5) and not nudged and not hides and blocked > 16:
            things.append(car(uniform(8, min(90, blocked - 6)), lane * LANE, uniform(7, 14), oncoming=1.0))
    if situation in ("free", "green light", "pedestrian", "cut-in", "cones", "parked car") and chance(0.4):
        ahead = where + 20 if situation in ("pedestrian", "cones", "parked car") else 0
        things.append(car(max(FRONT + 45, ahead) + uniform(0, 25), 0, v))           # far ahead, as fast as we are

    limit = road[0] if situation == "curve" else 70                                 # room is short inside a bend

    def beside(low, high, length=0.0):          # an s that is not in the side road, or None
        s = uniform(low, high)
        return s if abs(s - middle) > SIDE_ROAD + FILLET + length / 2 else None

    def put(count, low, high, make, length=0.0):
        for _ in range(count):
            s = beside(low, high, length)
            if s is not None:
                things.append(make(s))

    put(rng.integers(0, 4), 8, limit, lambda s: person(
        s, left_edge + uniform(2, 4) if chance(0.5) else right_edge - uniform(2, 4)))
    if situation not in ("pedestrian", "parked car"):
        put(rng.integers(0, 3), 8, limit, lambda s: car(s, right_line - CAR_SIZE[1] / 2 - uniform(0.9, 1.6), 0))
    if chance(0.3):
        first, d = uniform(8, limit), right_line - uniform(0.9, 1.6)
        if abs(first + 4 - middle) > SIDE_ROAD + FILLET + 4:
            things.extend(Thing(CONE, first + 3 * i, d, size=CONE_SIZE) for i in range(3))
    for edge, sign in ((left_edge, LEFT), (right_edge, RIGHT)):
        far = max(0, limit - 15) if situation == "curve" and sign == side else 100  # nothing stands in the bend
        put(3 if urban else rng.integers(0, 2), -10, far, length=20, make=lambda s: Thing(
            BUILDING, s, edge + sign * uniform(11, 18), size=(uniform(9, 20), uniform(8, 12), uniform(5, 14)),
            colour=pick(WALLS)))
        put(rng.integers(0, 3), 0, far, lambda s: Thing(
            TREE, s, edge + sign * uniform(4, 6), size=(2.4, 2.4, uniform(4, 6)), colour=(0.13, uniform(0.3, 0.45), 0.12)))
    if situation == "curve":                    # a rail along the outside, red and white: how far bends are seen
        outside, pieces = (right_edge - 0.8, 6) if side == LEFT else (left_edge + 0.8, 6)
        length = road[2] / pieces
        things.extend(Thing(RAIL, road[0] + (i + 0.5) * length, outside, colour=((0.9, 0.1, 0.1), (0.95, 0.95, 0.95))[i % 2],
                            size=(length * (1 + abs(outside * road[1])), 0.3, 1.1)) for i in range(pieces))
    return Draw(SITUATIONS.index(situation), side, v, react, wander, road, route, lanes, shoulder, middle, stop,
                stop if light == RED else FAR, nudge, urban, uniform(0.75, 1.05), things)


# ----------------------------------------------------------------------------------------------------------------------
# The world that moves

MAX_ACCEL, COMFORT, HEADWAY, JERK = 1.5, 3.0, 0.8, 6.0      # m/s^2, m/s^2, s, m/s^3: the expert's manners


class World:
    """
    n scenes, one a seed, that advance in lockstep from t0 - 2 s on. What a seed drew is in `scene` (n,) or (n, k);
    the ego in x, y (m), yaw (rad), speed (m/s) and the last accel (m/s^2) and curvature (1/m), each (n,); everything
    else in `things` (n, things), of which s, d (m) and v (m/s) change. `step` moves all, `expert` drives, `render` looks.
    """

    def __init__(self, seeds, device="cpu"):
        draws = [draw(int(seed)) for seed in seeds]
        most = max(len(one.things) for one in draws)
        rows = [one.things + [Thing()] * (most - len(one.things)) for one in draws]
        tensor = functools.partial(torch.tensor, dtype=torch.float32, device=device)
        self.scene = SimpleNamespace(**{f: tensor([getattr(one, f) for one in draws]) for f in Draw._fields[:-1]})
        self.things = SimpleNamespace(**{f: tensor([[getattr(t, f) for t in row] for row in rows]) for f in Thing._fields})
        self.situations = [SITUATIONS[one.situation] for one in draws]
        self.sides = [one.side for one in draws]
        self.device, self.time = device, -PAST * DT
        self.is_ = {name: self.scene.situation == i for i, name in enumerate(SITUATIONS)}           # (n,) bool each
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
        scene, cause, v = self.scene, SimpleNamespace(**{f: x[:, 0] for f, x in vars(self.things).items()}), self.speed
        wander_speed, wander_lateral = self._wander()
        s, d, heading = locate(self.x, self.y, scene.route)
        start, k, length = scene.route.unbind(-1)

        # Speed. `gap` is how far the front bumper is from what the expert must not touch, which moves at `lead`.
        gap, lead = scene.halt - 1 - (s + FRONT), torch.zeros_like(v)
        follow = self.is_["slower lead"] | self.is_["braking lead"] | self.is_["stopped lead"] | self.is_["cut-in"]
        gap = torch.where(follow, cause.s - cause.size[:, 0] / 2 - (s + FRONT), gap)
        lead = torch.where(follow, cause.v, lead)
        crosses = self.is_["pedestrian"] & (cause.d * scene.side > -2.2) & (cause.s > s + FRONT - 1)    # not yet across
        gap = torch.where(crosses, cause.s - 2 - (s + FRONT), gap).clamp(min=0.5)
        want = 2 + (v * HEADWAY + v * (v - lead) / (2 * math.sqrt(MAX_ACCEL * COMFORT))).clamp(min=0)   # m
        free = MAX_ACCEL * (1 - (v / (scene.cruise + wander_speed)) ** 4)
        bend = -(v ** 2 - 2 / k.abs()) / (2 * torch.maximum(start - s, v / 2).clamp(min=0.5))  # to 2 m/s^2 sideways
        bend = torch.where((s < start + length) & (length > 0), bend, MAX_ACCEL)
        known = torch.minimum(free - MAX_ACCEL * (want / gap) ** 2, bend).clamp(-4, MAX_ACCEL)
        accel = torch.where(self.time >= scene.react, known, free)
        accel = self.accel + (accel - self.accel).clamp(-JERK * DT, JERK * DT)

        # Steering: the line's curvature a moment ahead, the nudge's, and a pull back to where the ego should be.
        soon = s + 0.25 * v                                                                     # hands take time
        (target, slope, _), (_, _, bow) = self._nudge(s), self._nudge(soon)
        ahead = torch.where((soon > start) & (soon < start + length), k / (1 - k * d), 0)
        reach = (0.7 * v).clamp(min=3)                                                          # m
        curvature = ahead + bow - (d - target - wander_lateral) / reach ** 2 - 2 * (self.yaw - heading - slope) / reach
        limit = (3 / v.clamp(min=1) ** 2).clamp(max=0.2)
        return accel, self.curvature + 0.4 * (curvature.clamp(-limit, limit) - self.curvature)

    def _nudge(self, s):
        """Where in its lane the ego should be at s (n,): offset (m), its slope and its bow (1/m): half cosines."""
        offset, begin, full, end, gone = self.scene.nudge.unbind(-1)
        length = full - begin
        phase = math.pi / length * torch.where(s < end, s - begin, gone - s).clamp(min=0)
        phase = torch.minimum(phase, torch.full_like(phase, math.pi))                           # 0 at rest, pi when out
        rate = math.pi / length * torch.where(s < end, 1, -1)
        return (offset / 2 * (1 - torch.cos(phase)), offset / 2 * torch.sin(phase) * rate,
                torch.where((phase > 0) & (phase < math.pi), offset / 2 * torch.cos(phase) * rate ** 2, 0))


    def render(self, camera_ids, size):
        """What the cameras see now: images (n, cameras, 3, H, W) uint8; size is (H, W)."""
        (H, W), ids, boxes = size, tuple(camera_ids), self._boxes()
        view, fine = _view(ids, H, W, self.device), _view(ids, FINE * H, FINE * W, self.device)
        images = torch.empty(len(self.x), len(ids), 3, H, W, dtype=torch.uint8, device=self.device)
        chunk = max(1, CHUNK // (len(ids) * H * W * FINE ** 2))                 # scenes at a time: stay in the cache
        for i in range(0, len(self.x), chunk):
            part = slice(i, i + chunk)
            ground = self._paint_ground(part, view).repeat_interleave(FINE, -1).repeat_interleave(FINE, -2)
            painted = _paint_boxes(ground, {f: x[part] for f, x in boxes.items()}, fine)
            images[part] = F.avg_pool2d(painted.flatten(0, 1), FINE).view(-1, len(ids), 3, H, W)
        return images

    def _paint_ground(self, part, view):
        """Sky and ground of some scenes: (m, cameras, 3, H, W) float in 0 .. 255. The ground is shaded, not traced:
        a pixel's point on it is known, its road coordinates follow, and lines are where d and s say."""
        scene = SimpleNamespace(**{f: x[part].unflatten(0, (-1, 1, 1, 1)) for f, x in vars(self.scene).items()})
        x, y, yaw = (value[part, None, None, None] for value in (self.x, self.y, self.yaw))
        cos, sin = torch.cos(yaw), torch.sin(yaw)
        gx, gy = view.ground                                                    # (cameras, H/2, W) in the ego frame
        s, d, _ = locate(x + cos * gx - sin * gy, y + sin * gx + cos * gy, scene.road)      # (m, cameras, H/2, W)

        def cover(distance, width, footprint):  # share of a pixel that a stripe covers: thin ones fade, they do not flicker
            return ((width + footprint) / 2 - distance.abs()).clamp(min=0).minimum(footprint.clamp(max=width)) / footprint

        ours, theirs, right = scene.lanes.unbind(-1)
        left_line, right_line, centre = LANE * (ours + theirs + 0.5), -LANE * (right + 0.5), LANE * (ours + 0.5)
        out = torch.maximum(d - left_line, right_line - d) - scene.shoulder     # m beyond the main road's edge
        along = (s - scene.crossing).abs()
        aside = along - SIDE_ROAD                                               # m beyond the side road's edge
        asphalt = (FILLET - out).clamp(0, FILLET) ** 2 + (FILLET - aside).clamp(0, FILLET) ** 2 >= FILLET ** 2 - 1e-3
        pavement = (torch.minimum(out, aside) < 2.5) & (scene.urban > 0)
        grey = torch.where(asphalt, 78., torch.where(pavement, 150., 0.))
        line = torch.round((d - LANE / 2) / LANE) * LANE + LANE / 2             # the d of the nearest line
        edge = (line - left_line).abs().minimum((line - right_line).abs()) < 0.1
        middle = (line - centre).abs() < 0.1
        dash = edge | middle | (torch.remainder(s, 9) < 4)
        white = cover(d - line, 0.18, view.across) * (dash & (out < -scene.shoulder + 0.5) & (aside > FILLET))
        to_stop = s - scene.stop
        white = torch.where((d < centre) & (d > right_line), white.maximum(cover(to_stop, 0.6, view.along)), white)
        zebra = (to_stop > 1) & (to_stop < 4) & (out < -scene.shoulder) & (torch.remainder(d, 1.2) < 0.6)
        white = torch.where(zebra, 0.9, white)
        image = torch.empty(*s.shape[:2], 3, 2 * s.shape[2], s.shape[3], device=s.device)
        for i, (grass, paint, sky) in enumerate(((92, 235, 150), (120, 215, 185), (62, 120, 230))):
            tint = torch.where(middle & ~zebra & (to_stop.abs() > 1), paint, 235)           # the middle line is yellow
            base = torch.where(grey > 0, grey, grass)
            ground = (base + white * (tint - base)) * scene.daylight
            image[:, :, i, view.half:] = ground + view.haze * (205 - ground)
            image[:, :, i, :view.half] = (sky + view.sky * (205 - sky)) * scene.daylight.clamp(max=1)
        return image

    def _boxes(self):
        """Everything that stands, as boxes in the ego frame: a dictionary of (n, 2 things) or (n, 2 things, 3)."""
        t = self.things
        x, y, heading = place(t.s, t.d, self.scene.road[:, None])
        yaw = heading + math.pi * t.oncoming + torch.atan2(self._drift(), t.v.clamp(min=0.1)) * (t.kind == CAR)
        x, y = x - self.x[:, None], y - self.y[:, None]
        cos, sin = torch.cos(self.yaw)[:, None], torch.sin(self.yaw)[:, None]
        part = PARTS.to(self.device)[t.kind.long()]                             # (n, things, 2, 5)
        back, length, width, low, high = part.unbind(-1)
        size = t.size[:, :, None]                                               # (n, things, 1, 3)
        turn = (yaw - self.yaw[:, None])[..., None].expand_as(back)
        shift = -back * size[..., 0]
        centre = torch.stack([(cos * x + sin * y)[..., None] + shift * torch.cos(turn),
                              (cos * y - sin * x)[..., None] + shift * torch.sin(turn),
                              (low + high) / 2 * size[..., 2]], -1)
        half = torch.stack([length * size[..., 0], width * size[..., 1], (high - low) * size[..., 2]], -1) / 2
        braking = (t.accel < 0) & (self.time >= t.t_accel - DT / 2)
        head = torch.tensor([0, 1], device=self.device).expand_as(back)
        both = lambda value: value[:, :, None].expand_as(back)
        boxes = dict(centre=centre, half=half, cos=torch.cos(turn), sin=torch.sin(turn), part=2 * both(t.kind).long() + head,
                     signal=both(t.signal), braking=both(braking), light=both(self.scene.daylight[:, None].expand_as(t.s)),
                     colour=t.colour[:, :, None].expand_as(half))
        return {name: value.flatten(1, 2) for name, value in boxes.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The renderer: a ray a pixel. The ground's pixels are constants of a camera; boxes are tried only where they may be.

CHUNK = 2 ** 18         # rays at a time
FINE = 2                # rays a pixel for boxes, each way: what is far and thin fades and does not flicker
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
    direction = torch.stack([rays(k, H, W) @ p[:3, :3].T for k, p in zip(intrinsics, pose)])    # (cameras, H, W, 3) ego axes
    half = H // 2
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


def _paint_boxes(image, boxes, view):
    """Draw boxes (m, boxes) over image (m, cameras, 3, H, W), and return it."""
    (H, W), cameras = view.size, len(view.pose)
    # Where may a box be? Its corners' pixels say, and a margin, since straight edges are bows through such a lens.
    to_camera = view.pose[:, :3, :3].mT[:, None, None]                                  # (cameras, 1, 1, 3, 3)
    sign = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], device=image.device)
    lx, ly, lz = (sign * boxes["half"][:, :, None]).unbind(-1)                          # (m, boxes, 8)
    cos, sin = boxes["cos"][..., None], boxes["sin"][..., None]
    corner = torch.stack([cos * lx - sin * ly, sin * lx + cos * ly, lz], -1) + boxes["centre"][:, :, None]
    origin = view.pose[:, :3, 3]                                                        # (cameras, 3)
    seen = corner[:, None] - origin[:, None, None]                                      # (m, cameras, boxes, 8, 3)
    pixel, _ = project((to_camera @ seen[..., None])[..., 0], view.intrinsics[:, None, None])
    low, high = pixel.amin(-2), pixel.amax(-2)                                          # (m, cameras, boxes, 2)
    margin = 1 + 0.1 * (high - low)
    edge = torch.tensor([W, H], device=image.device)
    low = (low - margin).floor().clamp(min=0).minimum(edge).long()
    high = (high + margin).ceil().clamp(min=0).minimum(edge).long()
    offset = boxes["centre"][:, None] - origin[:, None]                                 # (m, cameras, boxes, 3)
    distance = offset.norm(dim=-1)
    angle = torch.acos(((offset @ view.pose[:, :3, 2, None])[..., 0] / distance).clamp(-1, 1))
    radius = boxes["half"].norm(dim=-1)[:, None]
    ahead = angle - torch.asin((radius / distance).clamp(max=1)) < 1.2                  # rad: the pictures' corners
    width, height = ((high - low) * (ahead & (radius > 0))[..., None]).unbind(-1)

    # The list of (box, pixel) that may meet.
    scene, camera, box = (width * height).nonzero(as_tuple=True)                        # (pairs,)
    width, height = width[scene, camera, box], height[scene, camera, box]
    left, top = low[scene, camera, box].unbind(-1)
    area = width * height
    pair = torch.repeat_interleave(area)                                                # (tests,)
    nth = torch.arange(len(pair), device=image.device) - (area.cumsum(0) - area)[pair]
    row = nth // width[pair]
    at = (camera * H + top) * W + left                                                  # of a rectangle's first pixel
    at = at[pair] + row * W + nth - row * width[pair]                                   # in view.direction
    # Slab test, in the box's own axes.
    cos, sin, half = boxes["cos"][scene, box], boxes["sin"][scene, box], boxes["half"][scene, box]
    x, y, z = (origin[camera] - boxes["centre"][scene, box]).unbind(-1)
    constant = torch.stack([cos, sin, cos * x + sin * y, cos * y - sin * x, z, *half.unbind(-1)])   # (8, pairs)
    cos, sin, ox, oy, oz, hx, hy, hz = constant[:, pair]                                # (tests,)
    dx, dy, dz = view.direction[:, at]
    dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    near, far = torch.zeros_like(dx), torch.full_like(dx, 1e9)
    for o, d, h in ((ox, dx, hx), (oy, dy, hy), (oz, dz, hz)):
        inverse = 1 / d
        middle, reach = -o * inverse, h * inverse.abs()
        near, far = torch.maximum(near, middle - reach), torch.minimum(far, middle + reach)
    hit = ((near < far) & (near > 0)).nonzero()[:, 0]
    # Nearest wins: depth and list index in one integer, so that the minimum is both. (Positive floats sort as integers.)
    key = near[hit].view(torch.int32).long() << 32 | hit
    target = scene[pair[hit]] * (cameras * H * W) + at[hit]                             # pixel of (m, cameras, H, W)
    nobody = torch.iinfo(torch.long).max
    best = torch.full((len(image) * cameras * H * W,), nobody, device=image.device)
    best.scatter_reduce_(0, target, key, "amin")
    target = (best < nobody).nonzero()[:, 0]
    test = best[target] & 0xFFFFFFFF
    # Colour: by the face that was hit, then what is painted on it. qx, qy, qz run from -1 to 1 over the box.
    depth, owner = near[test], pair[test]
    qx, qy, qz = ((o[test] + depth * d[test]) / h[test] for o, d, h in ((ox, dx, hx), (oy, dy, hy), (oz, dz, hz)))
    of = {name: boxes[name][scene, box][owner] for name in ("part", "signal", "braking", "light", "colour")}
    face_x = qx.abs() > torch.maximum(qy.abs(), qz.abs())
    top = ~face_x & (qz.abs() > qy.abs())
    shade = torch.where(face_x, 0.8, torch.where(top, 1.05, 0.62))
    colour, glow = _livery(of, qx, qy, qz, face_x, face_x | top)
    colour = torch.where(glow, colour, colour * shade * of["light"]).clamp(max=1) * 255                     # (3, hits)
    fade = torch.exp(-depth / 400)
    image = image.movedim(2, 0).flatten(1)                                              # (3, m * cameras * H * W)
    image[:, target] = colour * fade + 205 * (1 - fade)
    return image.view(3, -1, cameras, H, W).movedim(0, 2)


def _livery(of, qx, qy, qz, face_x, not_side):
    """Colours (3, hits) in 0 .. 1 and whether they glow, of points on boxes."""
    colour, part, signal = of["colour"].T, of["part"], of["signal"]
    glow = torch.zeros_like(face_x)

    def paint(where, rgb, shines=False):
        nonlocal colour, glow
        colour = torch.where(where, torch.tensor(rgb, device=qx.device)[:, None], colour)
        glow = glow | where if shines else glow & ~where

    body, cabin = part == 2 * CAR, part == 2 * CAR + 1
    rear, front = face_x & (qx < 0), face_x & (qx > 0)
    paint(cabin & (qz.abs() < 0.75) & ((not_side & face_x) | ~not_side), (0.12, 0.15, 0.2))               # windows
    paint(body & (qz < -0.55), (0.08, 0.08, 0.08))                                                         # tyres, shadow
    lamp = body & (qy.abs() > 0.45) & (qz > -0.4)
    paint(lamp & rear, (0.35, 0.03, 0.03))
    paint(lamp & front, (0.95, 0.95, 0.85))
    paint(((lamp & rear) | (cabin & rear & (qz < -0.3))) & of["braking"], (1.0, 0.08, 0.05), True)
    blinks = (signal == HAZARD) | (signal == torch.where(qy > 0, BLINK_LEFT, BLINK_RIGHT))
    corner = body & (qz > -0.4) & torch.where(face_x, qy.abs() > 0.45, ~not_side & (qx.abs() > 0.8))
    paint(corner & blinks & ((signal == BLINK_LEFT) | (signal == BLINK_RIGHT) | (signal == HAZARD)), (1.0, 0.65, 0.0), True)
    housing = (part == 2 * LIGHT) & rear & (qy.abs() < 0.85)
    paint(housing & (signal == RED) & (qz > 0) & (qz < 0.9), (1.0, 0.05, 0.05), True)
    paint(housing & (signal == GREEN) & (qz < 0) & (qz > -0.9), (0.05, 1.0, 0.35), True)
    paint((part == 2 * LIGHT + 1) | (part == 2 * TREE + 1), (0.3, 0.28, 0.26))
    paint((part == 2 * PEDESTRIAN) & (qz < -0.15), (0.1, 0.1, 0.25))                                       # trousers
    paint(part == 2 * PEDESTRIAN + 1, (0.85, 0.65, 0.5))
    paint((part == 2 * CONE + 1) & (qz < -0.2), (0.95, 0.95, 0.95))
    paint((part == 2 * BUILDING) & ~(not_side & ~face_x) & (torch.remainder(qz * 3, 1) < 0.45), (0.25, 0.3, 0.38))
    return colour, glow


def make_scenes(seeds, camera_ids=(0, 1, 2, 6), size=(64, 128), frames=4, frame_dt=0.5, device="cpu"):
    """A batched Scene of these seeds; frames at t0 - k frame_dt, which must be steps of 0.1 s within the last 2 s."""
    camera_ids = sorted(camera_ids)
    every = round(frame_dt / DT)
    if abs(every * DT - frame_dt) > 1e-6 or every < 1 or (frames - 1) * every > PAST:
        raise ValueError(f"frames, frame_dt: {frames} frames {frame_dt} s apart must be steps of {DT} s within {PAST * DT} s")
    world = World(seeds, device)
    images, track, controls = [], [], []
    for step in range(PAST + FUTURE + 1):
        track.append(torch.stack([world.x, world.y, world.yaw]))
        controls.append(torch.stack([world.speed, world.accel, torch.atan(WHEELBASE * world.curvature)], -1))
        if step <= PAST and (PAST - step) % every == 0 and (PAST - step) // every < frames:
            images.append(world.render(camera_ids, size))
        world.step(*world.expert())
    x, y, yaw = torch.stack(track, -1)                                                  # (B, 85) each, world frame
    x, y, yaw = x - x[:, PAST, None], y - y[:, PAST, None], yaw - yaw[:, PAST, None]
    turn = torch.stack(track)[PAST, 2][:, None]
    cos, sin, zero = torch.cos(turn), torch.sin(turn), torch.zeros_like(x)
    xyz = torch.stack([cos * x + sin * y, cos * y - sin * x, zero], -1)                 # (B, 85, 3) ego frame at t0
    cos, sin, one = torch.cos(yaw), torch.sin(yaw), torch.ones_like(x)
    rot = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).unflatten(-1, (3, 3))
    past, future = slice(PAST + 1 - HISTORY, PAST + 1), slice(PAST + 1, None)
    signal = world.is_["turn"] * world.scene.side                                       # (B,)
    kinematics = torch.stack(controls, 1)[:, 1:PAST + 1]                                # (B, 20, 3)
    intrinsics, pose = (torch.stack(v).expand(len(x), *[-1] * (v[0].dim() + 1))
                        for v in zip(*(rig_camera(i, *size) for i in camera_ids)))
    return dict(
        images=torch.stack(images, 2), camera_ids=torch.tensor(camera_ids).expand(len(x), -1),
        ego_history_xyz=xyz[:, past], ego_history_rot=rot[:, past], ego_future_xyz=xyz[:, future], ego_future_rot=rot[:, future],
        ego_kinematics=torch.cat([kinematics, signal[:, None, None].expand(-1, PAST, 1)], -1),
        camera_to_ego=pose, intrinsics=intrinsics, reasoning=world.reasoning(), name=world.situations)


# ----------------------------------------------------------------------------------------------------------------------
# The world on disk: made once, memory-mapped ever after

SEEDS = {"train": 0, "val": 10_000_000}         # where a split's seeds begin
BATCH = 32                                      # scenes that a worker makes at a time


def _make_part(job):
    """Make scenes [first, last) of a set and write them where they belong."""
    folder, first, last, start, options = job
    torch.set_num_threads(1)                    # two workers of one thread each: two threads each would be slower
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
        scene = {key: torch.from_numpy(array[indices]) for key, array in self.arrays.items()}   # reads these rows only
        return scene | {"reasoning": [self.reasoning[i] for i in indices], "name": [self.names[i] for i in indices]}


def load_world(split="train", scenes=16000, camera_ids=(0, 1, 2, 6), size=(64, 128), frames=4, frame_dt=0.5,
               folder="data", start=0, workers=2):
    """
    The built-in world's scenes [start, start + scenes) of a split, as a WorldSet. Made on the first call (393 KB a scene
    at 64 x 128 with 16 images), read from `folder` later; everything that the scenes depend on is in the set's name.
    An interrupted making leaves nothing that looks like a set. workers = 0 makes it in this process.
    """
    if split not in SEEDS:
        raise ValueError(f"split: expected one of {tuple(SEEDS)}, not {split!r}")
    if scenes < 1 or start < 0 or start + scenes > SEEDS["val"]:
        raise ValueError(f"scenes, start: expected 1 scene or more of seeds 0 .. {SEEDS['val']}, not {scenes} from {start}")
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
    try:
        for key, value in make_scenes([first_seed], **options).items():                 # shapes and types from one scene
            if torch.is_tensor(value):
                np.lib.format.open_memmap(f"{making}/{key}.npy", "w+", value.numpy().dtype, (scenes, *value.shape[1:]))
        jobs = [(making, i, min(i + BATCH, scenes), first_seed, options) for i in range(0, scenes, BATCH)]
        text = {"reasoning": [""] * scenes, "name": [""] * scenes}
        pool = multiprocessing.get_context("spawn").Pool(workers) if workers else None
        parts = pool.imap_unordered(_make_part, jobs) if pool else map(_make_part, jobs)
        with tqdm(total=scenes, desc=f"making {os.path.basename(done)}", unit="scene") as bar:
            for first, reasoning, names in parts:
                text["reasoning"][first:first + BATCH], text["name"][first:first + BATCH] = reasoning, names
                bar.update(len(names))
        if pool:
            pool.close()
            pool.join()
        with open(f"{making}/set.json", "w") as file:
            json.dump({"options": options, "first_seed": first_seed, **text}, file)
        os.rename(making, done)                                                         # a set appears whole or not at all
    finally:
        shutil.rmtree(making, ignore_errors=True)


def load(source, **options):
    """Scenes of a source: "world" is the built-in one, with the options of `load_world`."""
    if source != "world":
        raise ValueError(f'source: expected "world", not {source!r}')
    return load_world(**options)


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


def speed(size, scenes=32):
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
    speed(args.size)                                                                    # warm up
    print("one thread, scenes/s:", ", ".join(f"{part} {rate:.0f}" for part, rate in speed(args.size).items()))
    begin = time.perf_counter()
    made = load("world", split=args.split, scenes=args.scenes, camera_ids=args.camera_ids, size=args.size,
                frames=args.frames, frame_dt=args.frame_dt, folder=args.folder, start=args.start, workers=args.workers)
    print(f"{made.folder}: {len(made)} scenes in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()

"""
A small world of traffic, for machines that have no data: it needs no download, and because it made the cause of every
scene it knows the label. It also knows what it never shows in training: the long tail.

The page reads in the data's order: cameras, roads, what a seed draws, the world that moves, drives and judges, its
renderer. To add a situation: a function that draws its things, its name in DRAW_CAUSE, its words in data.py's CAUSES,
and, if it can end or become another, a line in World.causes.
Ego frame: origin at the rear axle on the ground, x forward, y left, z up; metres, seconds, yaw left-positive.
"""
import copy
import functools
import math
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from alpamayo import DT, HORIZON, project

WORLD_VERSION = 2       # raise it whenever a seed gives another scene: caches carry it in their name
HISTORY, FUTURE = 16, HORIZON           # steps of a Scene, up to t0 and after it
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
# What a seed draws: a road, its causes, and a crowd of things that ask for no reaction

# The long tail: what no training seed ever draws. Known causes (see DRAW_CAUSE) in new combinations, and known causes
# by other things.
COMBINATIONS = {
    "pedestrian behind a parked car": ("double-parked car", "pedestrian"),
    "pedestrian at a speed bump": ("speed bump", "pedestrian"),
    "pedestrian at a green light": ("green light", "pedestrian"),
    "cut-in at a red light": ("red light", "cut-in"),
    "cones in a curve": ("curve", "cones"),
    "braking lead in a curve": ("curve", "braking lead"),
    "dusk and rain": (),                        # any one cause, in both at once
}
RARE = {"deer": "pedestrian", "cyclist": "pedestrian", "debris": "cones"}       # what it does as
SEEDS = {"train": 0, "val": 10_000_000, "tail": 20_000_000, "rare": 30_000_000, "end": 40_000_000}  # where splits begin

(NOTHING, CAR, PEDESTRIAN, LIGHT, CONE, BUILDING, TREE, RAIL, BUMP, SIGN, CYCLIST, DEER, DEBRIS, BARRIER,
 TRUCK) = range(15)
OFF, BLINK_LEFT, BLINK_RIGHT, HAZARD, RED, GREEN, YELLOW = range(7)
CAR_SIZE, PERSON_SIZE, LIGHT_SIZE, CONE_SIZE = (4.4, 1.8, 1.5), (0.5, 0.7, 1.8), (0.4, 1.2, 3.8), (0.5, 0.5, 1.0)
TRUCK_SIZE, CYCLIST_SIZE, DEER_SIZE = (8.0, 2.4, 3.0), (1.7, 0.5, 1.75), (1.7, 0.5, 1.6)
BUMP_SIZE, SIGN_SIZE, DEBRIS_SIZE, BARRIER_SIZE = (1.2, 3.4, 0.12), (0.1, 1.0, 2.6), (0.8, 0.9, 0.7), (0.4, 1.8, 1.1)
DEER_COLOUR, CRATE = (0.52, 0.34, 0.18), (0.72, 0.52, 0.28)
NEVER, FAR = 1e3, 1e4                           # s and m: "not in this scene", and still tame in float32
FILLET, SIDE_ROAD = 6.0, LANE                   # m: radius of a crossing's corners, half width of its side road
STRAIGHT = (0.0, 0.01, 0.0)
CAR_COLOURS = ((0.9, 0.9, 0.9), (0.15, 0.15, 0.17), (0.55, 0.56, 0.6), (0.15, 0.25, 0.6), (0.1, 0.4, 0.25))
CLOTHES = ((0.95, 0.1, 0.6), (1.0, 0.9, 0.1), (0.1, 0.9, 0.95), (0.95, 0.95, 0.95), (0.6, 0.1, 0.9), (0.2, 0.35, 1.0))
WALLS = ((0.62, 0.42, 0.34), (0.68, 0.64, 0.55), (0.5, 0.52, 0.56), (0.75, 0.7, 0.66), (0.45, 0.38, 0.36))


class Thing(NamedTuple):
    """Anything that stands on the ground. It follows its script: change speed once, drift sideways once, change its
    signal once. A car that drives also keeps its distance, see World.step."""
    kind: int = NOTHING
    s: float = 0.0                              # m, the centre in road coordinates when the scene starts, at t0 - 2 s
    d: float = 0.0
    v: float = 0.0                              # m/s, along the road or, if oncoming, against it
    oncoming: float = 0.0
    size: tuple = (1.0, 1.0, 1.0)               # m, length width height
    colour: tuple = (1.0, 0.45, 0.0)
    signal: int = OFF
    t_signal: float = NEVER                     # when the signal becomes the next one
    next_signal: int = OFF
    accel: float = 0.0                          # m/s^2 from time t_accel on, until the speed is v_end
    t_accel: float = NEVER
    v_end: float = 0.0
    t_go: float = NEVER                         # when it takes up its first speed again
    drift: float = 0.0                          # m/s to the left from time t_drift on, until d is d_end
    t_drift: float = NEVER
    d_end: float = 0.0
    cause: float = 0.0                          # 1: the driver does not know of it before `react`
    blocks: float = 0.0                         # 1: the driver holds until it has passed


class Cause(NamedTuple):
    """Why the driver does what it does."""
    name: str                                   # of SITUATIONS or RARE, or "aside", see World.causes
    side: int
    thing: int                                  # its first thing; -1: it has none
    until: float                                # m, s of the route from which on the rear axle has it behind


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
    visibility: float = 150.0                   # m: how far haze lets one see
    rain: float = 0.0                           # 0 dry .. 1 heavy
    dusk: float = 0.0                           # 0 day .. 1 dusk
    lanes: tuple = (0, 1, 0)                    # how many: with us, left of ours; oncoming; with us, right of ours
    road: tuple = STRAIGHT                      # lines, see `place`
    route: tuple = STRAIGHT
    crossing: float = FAR                       # s of the side road's centre
    stop: float = FAR                           # s of the stop line
    hold: float = FAR                           # s not to be passed while something holds, see World._release
    bump: float = FAR                           # s of a speed bump
    nudge: tuple = (0.0, 0.0, 1.0, 2.0, 3.0)    # offset to the left; s where it begins, is full, ends, is gone
    standing: float = 0.0                       # 1: the ego stands at first
    signal: float = 0.0                         # the ego's turn signal
    late: float = 0.0                           # s after t0 at which the scene is shown
    lapse: tuple = (0.0, NEVER, NEVER)          # offset to the left (m), from when to when (s) the driver aims beside
    causes: list = field(default_factory=list)
    things: list = field(default_factory=list)

    def braking(self, decel, v_end=0.0):
        """Metres of road that braking takes, with half a second to get going."""
        return (self.cruise ** 2 - v_end ** 2) / (2 * decel) + 0.5 * self.cruise

    def add(self, name, things=(), until=FAR, side=None):
        """A cause, and the things that are it."""
        first = len(self.things) if things else -1
        self.causes.append(Cause(name, self.side if side is None else side, first, until))
        self.things += [thing._replace(cause=1.0) for thing in things]


def split_of(seed):
    """The split that a seed belongs to."""
    for name, start in reversed(SEEDS.items()):
        if seed >= start:
            break
    if not 0 <= seed < SEEDS["end"]:
        raise ValueError(f"seed: expected 0 .. {SEEDS['end'] - 1}, not {seed}")
    return name


def draw(seed):
    """The scene of a seed. It depends on nothing else."""
    split = split_of(seed)
    rng = np.random.default_rng(seed)
    situation = _pick(rng, {"tail": tuple(COMBINATIONS), "rare": tuple(RARE)}.get(split, SITUATIONS))
    names = COMBINATIONS.get(situation) or (_pick(rng, SITUATIONS) if situation == "dusk and rain" else situation,)
    only = {"parked car": RIGHT, "double-parked car": RIGHT, "oncoming car": RIGHT, "cut-in at a red light": LEFT}
    side = [only[name] for name in (situation, *names) if name in only] or (LEFT, RIGHT)
    scene = Draw(
        situation, side=_pick(rng, side),
        # One cruise speed and one reaction time for all situations, and no reaction before t0: else a blind model would
        # read the answer off the kinematics.
        cruise=rng.uniform(8, 14), react=rng.uniform(0, 0.2),
        wander=tuple(rng.uniform((0, 0.5, 0, 0, 0.8, 0), (0.4, 1.5, 6.3, 0.15, 1.6, 6.3))),
        daylight=rng.uniform(0.75, 1.05), urban=float(rng.random() < 0.5), shoulder=rng.uniform(1, 2.5))
    does = [RARE.get(name, name) for name in names]
    _draw_weather(scene, rng)
    _draw_road(scene, does, rng)
    for name in does:
        DRAW_CAUSE[name](scene, does, rng)
    if situation in RARE:
        _make_rare(scene, situation)
    _draw_crossing(scene, does, rng)
    _draw_others(scene, does, rng)
    if split == "train":
        _draw_lesson(scene, rng)
    return scene


def _draw_lesson(scene, rng):
    """
    Training scenes only. An expert who never errs teaches nobody to correct an error, and one who is only seen at t0
    not what comes after the first answer. So some scenes are shown later, and in most of them the driver drifts aside
    for a while, at most 1.3 m, and is back on his line or on the way there at t0: what a learner will need in closed
    loop, where its own small errors add up.
    """
    if rng.random() < 0.4:
        scene.late = round(rng.uniform(0.5, 9), 1)
    if rng.random() < 0.75:
        aside = scene.nudge[0]                  # only further away from what one goes around
        most = 0.4 if abs(scene.route[1] * scene.route[2]) > 0.5 else 1.3                # m; less where it is narrow
        offset = math.copysign(rng.uniform(0.1, 0.5), aside) if aside else rng.uniform(-most, most)
        scene.lapse = (offset, scene.late - rng.uniform(0.5, 3), scene.late + rng.uniform(-0.9, scene.react))


def _lines(lanes):
    """d of the outermost lane lines, right and left. lanes (..., 3) as in Draw."""
    left, oncoming, right = lanes.unbind(-1) if torch.is_tensor(lanes) else lanes
    return -LANE * (right + 0.5), LANE * (left + oncoming + 0.5)


def _pick(rng, items):
    return items[rng.integers(len(items))]


def _car(rng, s, d, v, oncoming=0.0, size=CAR_SIZE, **script):
    """A car whose centre is at s, d at t0 if it keeps its speed."""
    start = s - (1 - 2 * oncoming) * v * PAST * DT
    return Thing(CAR, start, d, v, oncoming, size, _pick(rng, CAR_COLOURS), **script)


def _person(rng, s, d, **script):
    return Thing(PEDESTRIAN, s, d, size=PERSON_SIZE, colour=_pick(rng, CLOTHES), **script)


def _draw_weather(scene, rng):
    """Half of all scenes are in plain daylight; dusk and rain meet in the long tail alone."""
    both = scene.situation == "dusk and rain"
    weather = _pick(rng, ("day", "day", "day", "dusk", "rain", "haze"))
    if both or weather == "dusk":
        scene.dusk, scene.daylight = rng.uniform(0.6, 1), scene.daylight * rng.uniform(0.5, 0.65)
    if both or weather == "rain":
        scene.rain, scene.visibility = rng.uniform(0.5, 1), rng.uniform(80, 120)
    elif weather == "haze":
        scene.visibility = rng.uniform(45, 75)


def _draw_road(scene, does, rng):
    """Two lanes; or four, with ours on the right or on the left of our two. Some roads bend."""
    narrow, rightmost, leftmost = (0, 1, 0), (1, 2, 0), (0, 2, 1)
    choices = {
        "curve": [narrow],                      # the inside of a sharp bend has no room for more
        "turn": [narrow, leftmost if scene.side == LEFT else rightmost],
        "cut-in": [rightmost if scene.side == LEFT else leftmost],
        "lane closed": [rightmost if scene.side == LEFT else leftmost],     # its side is where one can go
        "gap search": [rightmost if scene.side == LEFT else leftmost],
        "red light": [narrow, rightmost],       # what stands at the right stands right beside our lane
        "resume": [narrow, rightmost],
        "green light": [narrow, rightmost],
        "stop sign": [narrow, rightmost],
        "parked car": [narrow, rightmost], "double-parked car": [narrow, rightmost], "oncoming car": [narrow],
        "swerving car": [narrow]}
    every = [narrow, rightmost, leftmost]
    scene.lanes = _pick(rng, [lanes for lanes in every if all(lanes in choices.get(name, every) for name in does)])
    if "curve" in does:                         # 2 m/s^2 sideways is half to three quarters of the cruise speed in it
        radius = min(max((scene.cruise * rng.uniform(0.5, 0.72)) ** 2 / 2, 12), 45)
        start = scene.braking(rng.uniform(1.8, 2.6), math.sqrt(2 * radius))
        scene.road = (start, scene.side / radius, radius * rng.uniform(0.9, 1.5))
    elif {"red light", "resume", "green light", "stop sign", "turn"}.intersection(does) or rng.random() < 0.25:
        scene.crossing = 0.0                    # there is one; `_draw_crossing` says where
    elif rng.random() < 0.5:                    # a bend so gentle that it asks for nothing
        scene.road = (rng.uniform(-20, 60), _pick(rng, (LEFT, RIGHT)) / rng.uniform(150, 500), rng.uniform(50, 120))
    scene.route = scene.road


# How each cause is drawn: near enough to ask for an answer within 6.4 s, far enough to give it in comfort. `does` are
# the names of all that the scene combines.
REAR = FRONT + CAR_SIZE[0] / 2                  # m: the centre of a car that touches our front bumper


def _free(scene, does, rng):
    scene.add("free")


def _curve(scene, does, rng):
    start, _, length = scene.road
    scene.add("curve", until=start + length)


def _slower_lead(scene, does, rng):             # no lights
    v, slower = scene.cruise, rng.uniform(3.5, 6)
    gap = 3 + 0.8 * (v - slower) + slower ** 2 / (2 * rng.uniform(1.2, 2.2)) + 0.5 * slower
    scene.add("slower lead", [_car(rng, REAR + gap, 0, v - slower)])


def _braking_lead(scene, does, rng):            # for 0.6 s at least, with its brake lights on
    v = scene.cruise
    decel, since, v_end = rng.uniform(2.2, 3.2), rng.uniform(0.6, 1.2), v * rng.uniform(0, 0.4)
    gap = max(10, scene.braking(3, v_end) - ((v - decel * since) ** 2 - v_end ** 2) / (2 * decel) + 4)
    scene.add("braking lead", [_car(
        rng, REAR + gap + decel * since ** 2 / 2, 0, v, accel=-decel, t_accel=-since, v_end=v_end,
        t_go=rng.uniform(7, 10))])


def _stopped_lead(scene, does, rng):            # hazard lights, not brake lights: those say that it is braking
    scene.add("stopped lead", [_car(rng, REAR + 3 + scene.braking(rng.uniform(2.4, 3.2)), 0, 0, signal=HAZARD)])


def _light(scene, s, signal, **script):
    d = _lines(scene.lanes)[0] - 1.4
    return Thing(LIGHT, s + 1, d, size=LIGHT_SIZE, colour=(0.1, 0.1, 0.1), signal=signal, **script)


def _red_light(scene, does, rng):               # some are stood at; all turn green, after all that a Scene shows
    scene.standing = float("cut-in" not in does and rng.random() < 0.35)
    room = LENGTH + 8 if "cut-in" in does else 3                    # for the car that will be before us
    scene.stop = scene.hold = FRONT + (
        rng.uniform(2, 5) if scene.standing else room + scene.braking(rng.uniform(2.3, 3.1)))
    green = dict(t_signal=rng.uniform(7.5, 11), next_signal=GREEN)
    scene.add("red light", [_light(scene, scene.stop, RED, **green)], until=scene.stop - FRONT)


def _resume(scene, does, rng):                  # red until a moment ago
    scene.standing, scene.stop = 1.0, FRONT + rng.uniform(2, 5)
    scene.hold = scene.stop
    scene.add("resume", [_light(scene, scene.stop, RED, t_signal=rng.uniform(-0.9, -0.1), next_signal=GREEN)],
              until=scene.stop - FRONT)


def _green_light(scene, does, rng):             # with a pedestrian, before him
    scene.stop = FRONT + 3 + scene.braking(rng.uniform(2.3, 3.1))
    scene.add("green light", [_light(scene, scene.stop, GREEN)], until=scene.stop - FRONT)


def _stop_sign(scene, does, rng):
    scene.stop = scene.hold = FRONT + 3 + scene.braking(rng.uniform(2.3, 3.1))
    sign = Thing(SIGN, scene.stop + 0.5, _lines(scene.lanes)[0] - 1.2, size=SIGN_SIZE)
    scene.add("stop sign", [sign], until=scene.stop - FRONT)


def _pedestrian(scene, does, rng):              # on the road or at its edge, ahead of the car when that gets there
    v, side, where = scene.cruise, scene.side, FRONT + 4 + scene.braking(rng.uniform(2.4, 3.1))
    right, left = (abs(line) + scene.shoulder for line in _lines(scene.lanes))          # m to the road's edges
    near, far = (left, right) if side == LEFT else (right, left)
    away = rng.uniform(2.2, min(5, near + 0.3))
    walk = min(max((away + rng.uniform(-0.8, 0.6)) / ((where - FRONT) / v), 0.8), 2.0)
    since = PAST * DT                           # he walked all the while
    if "double-parked car" in does:             # just steps out, from behind the front of it
        car = scene.things[0]
        where, walk, since = car.s + CAR_SIZE[0] / 2 + rng.uniform(0.7, 1.2), rng.uniform(1, 1.5), 0.6
        away = -car.d - CAR_SIZE[1] / 2 - 0.3   # so that he can be seen beside it at t0
    elif "green light" in does:
        where = scene.stop + 2.5
    elif "speed bump" in does:
        where = scene.bump + rng.uniform(1.5, 4)
    scene.add("pedestrian", [_person(
        rng, where, side * (away + walk * since), drift=-side * walk, t_drift=-NEVER if since > 1 else -since,
        d_end=-side * (far + 1))], until=where + 1)


def _waiting_pedestrian(scene, does, rng):      # at the edge of the road; he does not walk
    where = FRONT + 6 + scene.cruise * rng.uniform(1.2, 2.6)
    line = _lines(scene.lanes)[0 if scene.side == RIGHT else 1]
    scene.add("waiting pedestrian", [_person(rng, where, line + scene.side * rng.uniform(0.5, 1))], until=where + 1)


def _cut_in(scene, does, rng):                  # signals and starts about now, or is on its way without a signal
    v, side, slower, signals = scene.cruise, scene.side, rng.uniform(1.5, 3.5), rng.random() < 0.5
    s = REAR + 5 + slower ** 2 / 2 + 0.5 * slower + rng.uniform(0, 4)
    script = {}
    if "red light" in does:                     # it has to stop, too
        way = scene.stop - 1 - s - CAR_SIZE[0] / 2 - (v - slower) * 0.5
        script = dict(accel=-(v - slower) ** 2 / (2 * max(way, 5)), t_accel=0.5, t_go=scene.things[0].t_signal + 0.5)
    scene.add("cut-in", [_car(
        rng, s, side * LANE, v - slower, drift=-side * rng.uniform(0.9, 1.3),
        t_drift=rng.uniform(-0.4, 0.2) if signals else rng.uniform(-1.4, -1.0),
        signal=(BLINK_RIGHT if side == LEFT else BLINK_LEFT) if signals else OFF, **script)])


def _go_around(scene, name, things, offset, first, last, begin):
    """A cause to go around: out before `first`, back after `last` (s of its ends), as gently back as out. Once the ego
    is out the decision is done."""
    full, end = first - FRONT - 1, last + 2
    scene.nudge = (offset, begin, full, end, end + full - begin)
    scene.add(name, things, until=full)


def _cones(scene, does, rng):
    v, side, step = scene.cruise, scene.side, rng.uniform(2, 3)
    first, begin = FRONT + 2 + v * rng.uniform(1.9, 2.4), 0.2 * v   # after the latest reaction
    if "curve" in does:
        first = max(scene.road[0] + rng.uniform(0, 0.3) * scene.road[2], FRONT + 18)
        begin = first - FRONT - 13
    cones = [Thing(CONE, first + i * step, side * (1.5 - 0.2 * i), size=CONE_SIZE) for i in range(5)]
    _go_around(scene, "cones", cones, -side * (1.1 if "curve" in does else 1.3), first, first + 4 * step, begin)


def _parked_car(scene, does, rng):              # reaches into the lane a little: there is room to pass within it
    first = FRONT + 2 + scene.cruise * rng.uniform(1.9, 2.4)
    parked = _car(rng, first + CAR_SIZE[0] / 2, RIGHT * rng.uniform(2.3, 2.5), 0)
    _go_around(scene, "parked car", [parked], LEFT * 0.7, first, first + CAR_SIZE[0], 0.2 * scene.cruise)


def _double_parked_car(scene, does, rng):       # half in the lane: one has to leave it
    first = FRONT + 2 + scene.cruise * rng.uniform(2.3, 2.8)
    if "pedestrian" in does:
        first = FRONT + 4 + scene.braking(rng.uniform(2.4, 3.1)) - CAR_SIZE[0]
    parked = _car(rng, first + CAR_SIZE[0] / 2, RIGHT * rng.uniform(1.5, 1.9), 0, signal=HAZARD)
    _go_around(scene, "double-parked car", [parked], LEFT * 1.6, first, first + CAR_SIZE[0], 0.2 * scene.cruise)


def _oncoming_car(scene, does, rng):            # comes while we would be in its lane
    hold = scene.braking(rng.uniform(2.2, 2.8))
    scene.hold, first, faster = hold + FRONT + 3, hold + FRONT + 17, rng.uniform(8, 12)
    parked = _car(rng, first + CAR_SIZE[0] / 2, RIGHT * rng.uniform(1.5, 1.9), 0, signal=HAZARD)
    oncoming = _car(rng, hold + faster * rng.uniform(2.5, 4.5), LANE, faster, oncoming=1.0, blocks=1.0)
    _go_around(scene, "oncoming car", [parked, oncoming], LEFT * 1.6, first, first + CAR_SIZE[0], hold + 2)


def _barriers(s):
    return [Thing(BARRIER, s, d, size=BARRIER_SIZE) for d in (-0.85, 0.85)]


def _lane_closed(scene, does, rng):
    begin = 0.2 * scene.cruise
    full = begin + scene.cruise * rng.uniform(2.7, 3.2)
    scene.add("lane closed", _barriers(full + FRONT + 4), until=full + FRONT + 4)
    scene.nudge = (scene.side * LANE, begin, full, FAR, FAR + 1)


def _gap_search(scene, does, rng):              # a car beside us, soon past us
    hold = scene.braking(rng.uniform(2, 2.4))
    scene.hold = hold + FRONT + 3
    s = hold + FRONT + 36
    beside = _car(rng, rng.uniform(-1.8, 3), scene.side * LANE, scene.cruise + rng.uniform(0.5, 2.5), blocks=1.0)
    scene.add("gap search", [*_barriers(s), beside], until=s)
    scene.nudge = (scene.side * LANE, hold + 2, hold + 30, FAR, FAR + 1)


def _speed_bump(scene, does, rng):
    scene.bump = FRONT + scene.braking(rng.uniform(1.8, 2.6), BUMP_SPEED)
    if "pedestrian" in does:
        scene.bump = FRONT + 2 + scene.braking(rng.uniform(2.4, 3.1))
    sign = Thing(SIGN, scene.bump - 3, _lines(scene.lanes)[0] - 1.2, size=SIGN_SIZE, signal=YELLOW)   # a warning
    scene.add("speed bump", [Thing(BUMP, scene.bump, 0.0, size=BUMP_SIZE), sign], until=scene.bump)


def _swerving_car(scene, does, rng):            # comes towards us, over the line
    v, faster = scene.cruise, rng.uniform(8, 12)
    meet = v * rng.uniform(3, 3.6) + FRONT
    scene.add("swerving car", [_car(
        rng, meet + faster * (meet - FRONT) / v, LANE, faster, oncoming=1.0, drift=-rng.uniform(0.8, 1.2),
        t_drift=rng.uniform(-1.2, -0.7), d_end=rng.uniform(1.7, 1.9))], until=FAR, side=LEFT)
    scene.nudge = (RIGHT * 0.65, 0.2 * v, meet - 12, meet + 10, meet + 30)


def _turn(scene, does, rng):                    # half of the drivers forget to signal: then only the route tells
    radius = rng.uniform(10, 12) if scene.side == LEFT else rng.uniform(7, 8.5)
    start = scene.braking(rng.uniform(2.3, 3.0), math.sqrt(2 * radius))
    scene.route = (start, scene.side / radius, radius * math.pi / 2)
    scene.signal = float(scene.side * (rng.random() < 0.5))
    scene.add("turn", until=start + radius * math.pi / 2)


# What asks a driver for an answer, after the paper's tables of key frames (Table 3). Each is shown alone in training.
DRAW_CAUSE = {
    "free": _free, "curve": _curve, "slower lead": _slower_lead, "braking lead": _braking_lead,
    "stopped lead": _stopped_lead, "red light": _red_light, "resume": _resume, "green light": _green_light,
    "stop sign": _stop_sign, "pedestrian": _pedestrian, "waiting pedestrian": _waiting_pedestrian, "cut-in": _cut_in,
    "cones": _cones, "parked car": _parked_car, "double-parked car": _double_parked_car, "oncoming car": _oncoming_car,
    "lane closed": _lane_closed, "gap search": _gap_search, "speed bump": _speed_bump, "swerving car": _swerving_car,
    "turn": _turn}
SITUATIONS = tuple(DRAW_CAUSE)


def _make_rare(scene, name):
    """The cause's things become those of a class that no training scene has."""
    kind, size, colour = {"deer": (DEER, DEER_SIZE, DEER_COLOUR), "cyclist": (CYCLIST, CYCLIST_SIZE, (0.9, 0.3, 0.1)),
                          "debris": (DEBRIS, DEBRIS_SIZE, CRATE)}[name]
    scene.things = [thing._replace(kind=kind, size=size, colour=colour) for thing in scene.things[:2]]
    scene.causes = [cause._replace(name=name) for cause in scene.causes]


def _draw_crossing(scene, does, rng):
    """Where the side road is. Lights that ask for nothing are green or off, and beyond the cause; with a pedestrian
    there is none, since green and a pedestrian is of the long tail."""
    if scene.crossing == FAR:
        return
    own = {"red light", "resume", "green light", "stop sign"}.intersection(does)
    light = OFF if own or does == ["free"] or "pedestrian" in does else _pick(rng, (OFF, GREEN))
    if "turn" in does:                          # the turn ends in the side road's right lane
        start, k, _ = scene.route
        scene.stop = start + 1 / abs(k) - scene.side * LANE / 2 - SIDE_ROAD - FILLET - 0.5
    elif not own:
        last = max([thing.s for thing in scene.things if thing.cause and not thing.oncoming] + [scene.nudge[3] % FAR])
        scene.stop = max(FRONT + 3 + scene.braking(2.5), last) + rng.uniform(15, 45)
    scene.crossing = scene.stop + 0.5 + FILLET + SIDE_ROAD
    if light != OFF:
        scene.things.append(_light(scene, scene.stop, light))


def _draw_others(scene, does, rng):
    """The crowd. Nobody gets in the way of the cause or of the ego."""
    v, uniform, does = scene.cruise, rng.uniform, set(does)
    things = scene.things
    (right_line, left_line), nudged = _lines(scene.lanes), scene.nudge[0]
    right_edge, left_edge = right_line - scene.shoulder, left_line + scene.shoulder

    # Other traffic. No car comes from beyond `closed`, or drives beside us to it.
    closed = scene.stop if does & {"red light", "resume", "stop sign"} else FAR
    if "pedestrian" in does:
        closed = min(thing.s for thing in things if thing.cause)
    elif "turn" in does and scene.side == LEFT:
        closed = scene.route[0]
    left, oncoming, right = scene.lanes
    moving = not scene.standing and not does & {"cut-in", "gap search"}
    for lane in [1] * left + [-1] * right:
        if rng.random() < 0.5 and closed == FAR and lane * nudged <= 0 and moving:
            things.append(_car(rng, uniform(-6, 40), lane * LANE, v + uniform(-2, 2)))
    for lane in range(left + 1, left + oncoming + 1):
        in_the_way = (lane == 1 and nudged > 0) or does & {"swerving car", "oncoming car"}
        hides = "pedestrian" in does and scene.side == LEFT
        if rng.random() < 0.5 and closed > 16 and not in_the_way and not hides:
            size = TRUCK_SIZE if rng.random() < 0.2 and closed > 30 else CAR_SIZE
            things.append(_car(rng, uniform(8, min(110, closed - 6)), lane * LANE, uniform(7, 14), 1.0, size))
    ahead = does <= {"free", "green light", "waiting pedestrian", "pedestrian", "cut-in", "cones", "parked car"}
    if ahead and rng.random() < 0.4:                                        # far ahead, as fast as we are
        passed = max([thing.s for thing in things if thing.cause] + [0]) + 16 + 2 * v
        things.append(_car(rng, max(FRONT + 45, passed) + uniform(0, 25), 0, v))
    if moving and "lane closed" not in does and rng.random() < 0.35:        # behind us, seen by no camera of ours
        things.append(_car(rng, uniform(-26, -14), 0, v))

    # What stands beside the road, but not in the side road, and not in a sharp bend: its inside has no room.
    limit = scene.road[0] if "curve" in does else 70

    def put(count, low, high, make, length=0.0):
        for s in uniform(low, high, count):
            one = make(s)
            apart = lambda t: (abs(one.s - t.s) > (one.size[0] + t.size[0]) / 2
                               or abs(one.d - t.d) > (one.size[1] + t.size[1]) / 2)
            free = all(apart(t) for t in things if t.v == 0)
            if free and abs(s - scene.crossing) > SIDE_ROAD + FILLET + length / 2:
                things.append(one)

    put(rng.integers(0, 4), 8, limit, lambda s: _person(
        rng, s, _pick(rng, (left_edge + uniform(2, 4), right_edge - uniform(2, 4)))))
    if not does & {"pedestrian", "waiting pedestrian", "parked car", "double-parked car", "oncoming car"}:
        put(rng.integers(0, 3), 8, limit, lambda s: _car(           # parked clear of the lane
            rng, s, right_line - CAR_SIZE[1] / 2 - uniform(0.9, 1.6), 0))
    if "pedestrian" not in does and nudged >= 0 and rng.random() < 0.3:
        put(3, 8, limit, lambda s: Thing(CONE, s, right_line - uniform(0.9, 1.6), size=CONE_SIZE))
    for edge, sign in ((left_edge, LEFT), (right_edge, RIGHT)):
        far = max(0, limit - 15) if "curve" in does and sign == scene.side else 100
        put(3 if scene.urban else rng.integers(0, 2), -10, far, length=20, make=lambda s: Thing(
            BUILDING, s, edge + sign * uniform(11, 18), size=tuple(uniform((9, 8, 5), (20, 12, 14))),
            colour=_pick(rng, WALLS)))
        put(rng.integers(0, 3), 0, far, lambda s: Thing(
            TREE, s, edge + sign * uniform(4, 6), size=(2.4, 2.4, uniform(4, 6)),
            colour=(0.13, uniform(0.3, 0.45), 0.12)))
    if "curve" in does:                         # a red and white rail along the outside: bends are seen from afar
        start, k, length = scene.road
        outside, piece = (right_edge - 0.8 if scene.side == LEFT else left_edge + 0.8), length / 6
        things.extend(Thing(
            RAIL, start + (i + 0.5) * piece, outside, size=(piece * (1 + abs(outside * k)), 0.3, 1.1),
            colour=((0.9, 0.1, 0.1), (0.95, 0.95, 0.95))[i % 2]) for i in range(6))


# ----------------------------------------------------------------------------------------------------------------------
# The world that moves

MAX_ACCEL, COMFORT, JERK, HEADWAY, LEAST = 1.5, 3.0, 4.0, 0.8, 2.0  # m/s^2, m/s^2, m/s^3, s, m: the expert's manners
BUMP_SPEED, MARGIN, FORESIGHT = 4.5, 0.3, 4.0               # m/s over a bump; m and s: what counts as in its way
LONG_STOP, NEAR, ASIDE = 1.0, 0.25, 0.4                     # s at a stop sign; m: a close encounter, off one's line
IMMATERIAL = (NOTHING, LIGHT, SIGN, BUMP)                   # kinds that nobody can run into


def follow(gap, v, lead):
    """How much a driver slows for what is `gap` m ahead and moves at `lead` m/s, v being its own speed: the second term
    of the intelligent driver model (Treiber 2000), m/s^2, never positive."""
    want = LEAST + (v * HEADWAY + v * (v - lead) / (2 * math.sqrt(MAX_ACCEL * COMFORT))).clamp(min=0)   # m
    return -MAX_ACCEL * (want / gap.clamp(min=0.5)) ** 2


class World:
    """
    n scenes, one a seed, that advance in steps of 0.1 s from t0 - 2 s on. What a seed drew is in `scene` (n,) or (n, k)
    and in `draws`; the ego in x, y (m), yaw (rad), speed (m/s) and the last accel (m/s^2) and curvature (1/m), each
    (n,); everything else in `things` (n, things), of which s, d (m) and v (m/s) change; `time` (n,) is s after t0.
    `step` moves all, `expert` drives, `causes` says why, `judge` says how it went, `render` looks.
    """

    def __init__(self, seeds, device="cpu"):
        draws = self.draws = [draw(int(seed)) for seed in seeds]
        if not draws:
            raise ValueError("seeds: expected one or more")
        most = max(1, *(len(one.things) for one in draws))
        rows = [one.things + [Thing()] * (most - len(one.things)) for one in draws]
        tensor = functools.partial(torch.tensor, dtype=torch.float32, device=device)
        fixed = [f.name for f in fields(Draw) if f.name not in ("situation", "things", "causes")]
        self.scene = SimpleNamespace(**{f: tensor([getattr(one, f) for one in draws]) for f in fixed})
        self.things = SimpleNamespace(**{
            f: tensor([[getattr(thing, f) for thing in row] for row in rows]) for f in Thing._fields})
        self.things.start_v, self.things.slows = self.things.v, torch.zeros_like(self.things.v)
        self.device, self.time = device, torch.full((len(draws),), -PAST * DT, device=device)
        # The ego starts at its cruise speed, on its wandering line.
        speed, lateral = self._wander()
        moves = 1 - self.scene.standing
        self.speed = (self.scene.cruise + speed) * moves
        self.x, self.y, self.yaw = place(self.time * self.scene.cruise * moves, lateral, self.scene.route)
        self.accel, self.curvature = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.held, self.stood = self.scene.hold < FAR, torch.zeros_like(self.x)     # (n,) bool, s at a stop sign

    def repeat(self, m):
        """The World with each scene m times, side by side, as it is now."""
        tensors = lambda part: {name: value for name, value in vars(part).items() if torch.is_tensor(value)}
        again = lambda part: {name: value.repeat_interleave(m, 0) for name, value in tensors(part).items()}
        many = copy.copy(self)
        many.__dict__ |= again(self)
        many.scene, many.things = SimpleNamespace(**again(self.scene)), SimpleNamespace(**again(self.things))
        many.draws = [one for one in self.draws for _ in range(m)]
        return many

    def catch_up(self):
        """Scenes that are shown late drive ahead, so that all of them arrive at their t0 together."""
        late = (self.scene.late / DT).round()
        for left in range(int(late.max()), 0, -1):
            self.step(*self.expert(), which=late >= left)

    def _wander(self):
        """Nobody drives like a ruler: small waves in speed (m/s) and in lateral offset (m), now."""
        a, rate_a, phase_a, b, rate_b, phase_b = self.scene.wander.unbind(-1)
        offset, since, until = self.scene.lapse.unbind(-1)
        lapse = torch.where((self.time >= since) & (self.time < until), offset, 0)
        return a * torch.sin(rate_a * self.time + phase_a), b * torch.sin(rate_b * self.time + phase_b) + lapse

    def _since(self, time):
        """Whether a time (n, things) of a script has come."""
        return self.time[:, None] >= time - DT / 2

    def signals(self):
        """What the things signal now, (n, things)."""
        return torch.where(self._since(self.things.t_signal), self.things.next_signal, self.things.signal)

    def braking(self):
        """Which of the things show brake lights, (n, things) bool."""
        t = self.things
        braking = self._since(t.t_accel) & ~self._since(t.t_go) & (t.accel < 0)
        return (braking & ((t.v > t.v_end + 0.1) | (t.v < 0.1))) | (t.slows > 0)

    def _drift(self):
        """Lateral speed of the things (n, things), m/s to the left: a script's drift ends at d_end."""
        t = self.things
        return torch.where(self._since(t.t_drift) & (t.drift * (t.d_end - t.d) > 0), t.drift, 0)

    def bumper(self):
        """s of the ego's front bumper along its route, (n,)."""
        return locate(self.x, self.y, self.scene.route)[0] + FRONT

    def poses(self):
        """World x, y and heading of the things (n, things); what drives, rides or runs sideways faces where it goes."""
        t = self.things
        x, y, yaw = place(t.s, t.d, self.scene.road[:, None])
        swerve = torch.atan2(self._drift(), t.v.clamp(min=0.1)) * ((t.kind == CAR) | (t.kind == CYCLIST))
        swerve = torch.where(t.kind == DEER, torch.atan2(t.drift, t.v), swerve)
        return x, y, yaw + math.pi * t.oncoming + swerve

    def to_ego(self, x, y):
        """Points x, y (n, k) of the world's frame in the ego's: x, y (n, k), m."""
        x, y = x - self.x[:, None], y - self.y[:, None]
        cos, sin = torch.cos(self.yaw)[:, None], torch.sin(self.yaw)[:, None]
        return cos * x + sin * y, cos * y - sin * x

    def poses_to_ego(self):
        """`poses` in the ego frame: x, y (m) and yaw (rad), (n, things) each."""
        x, y, yaw = self.poses()
        return *self.to_ego(x, y), yaw - self.yaw[:, None]

    def solid(self, kind):
        """Which kinds one can run into: (...) bool."""
        return ~torch.isin(kind, torch.tensor(IMMATERIAL, device=self.device).float())

    def step(self, accel, curvature, which=None):
        """One tick of 0.1 s: the ego by the unicycle (Eq. 5) with accel (n,) and curvature (n,), the things by their
        scripts, the cars among them with an eye on what is before them. which (n,) bool: scenes that move, the others
        wait."""
        which = torch.ones_like(self.held) if which is None else which
        ego = ("x", "y", "yaw", "speed", "accel", "curvature", "held", "stood", "time")
        before = {name: getattr(self, name) for name in ego}
        things = {name: getattr(self.things, name) for name in ("s", "d", "v", "slows")}
        self._step_things()
        speed = (self.speed + DT * accel).clamp(min=0)
        accel = (speed - self.speed) / DT                                       # as driven: no car brakes backwards
        yaw = self.yaw + DT * curvature * self.speed + DT ** 2 / 2 * curvature * accel
        self.x = self.x + DT / 2 * (self.speed * torch.cos(self.yaw) + speed * torch.cos(yaw))
        self.y = self.y + DT / 2 * (self.speed * torch.sin(self.yaw) + speed * torch.sin(yaw))
        self.yaw, self.speed, self.accel, self.curvature = yaw, speed, accel, curvature
        self.time = self.time + DT
        self._release()
        if not which.all():
            for name, old in before.items():
                setattr(self, name, torch.where(which, getattr(self, name), old))
            for name, old in things.items():
                setattr(self.things, name, torch.where(which[:, None], getattr(self.things, name), old))

    def _step_things(self):
        """The things' scripts, and the manners of the cars that drive: they slow for the nearest thing, or the ego,
        that is before them in their lane, and speed up again behind it."""
        t = self.things
        begun = self._since(t.t_accel) & ~self._since(t.t_go)
        want = torch.where(begun, t.v_end, t.start_v)
        rate = torch.where(begun & (t.v * t.accel.sign() < t.v_end * t.accel.sign()), t.accel, 0)      # the script's
        change = torch.where(rate == 0, (want - t.v) / DT, rate)                # what is left of it; catching up
        change = torch.where((rate == 0) & (change > 0), change.clamp(max=MAX_ACCEL), change)
        # Drivers: (k,) cars that move or want to, against all things and the ego.
        n, i = ((t.kind == CAR) & (want.maximum(t.v) > 0)).nonzero(as_tuple=True)
        if len(n):
            ego_s, ego_d, heading = locate(self.x, self.y, self.scene.road)
            heading = self.yaw - heading
            ahead = (FRONT - LENGTH / 2) * torch.cos(heading)
            push = lambda values, own: torch.cat([values, own[:, None]], 1)[n]              # (k, things + 1)
            way = 1 - 2 * t.oncoming[n, i, None]                                # which way the road runs for them
            s, d = push(t.s, ego_s + ahead), push(t.d, ego_d + (FRONT - LENGTH / 2) * torch.sin(heading))
            along = push(t.v * (1 - 2 * t.oncoming), self.speed * torch.cos(heading)) * way
            length, width = push(t.size[..., 0], 0 * ego_s + LENGTH), push(t.size[..., 1], 0 * ego_s + WIDTH)
            kind = push(t.kind, 0 * ego_s + CAR)
            gap = (s - t.s[n, i, None]) * way
            gap = torch.where(gap > 0, gap - (length + t.size[n, i, 0, None]) / 2, FAR)
            beside = (d - t.d[n, i, None]).abs() > (width + t.size[n, i, 1, None]) / 2 + 0.2
            gap = torch.where(beside | ~self.solid(kind), FAR, gap)
            v = t.v[n, i]
            slow = follow(gap, v[:, None], along).amin(1)
            free = MAX_ACCEL * (1 - (v / want[n, i].clamp(min=1)) ** 4)
            change = change.clone()
            change[n, i] = torch.where(slow < -0.3, change[n, i].minimum((free + slow).clamp(min=-8)), change[n, i])
        v = (t.v + DT * change).clamp(min=0)
        v = torch.where(rate > 0, v.minimum(t.v_end), torch.where(rate < 0, v.maximum(t.v_end.minimum(t.v)), v))
        v = torch.where((rate < 0) & (change < rate), (t.v + DT * change).clamp(min=0), v)  # manners go further
        t.slows = ((t.v - v) / DT > 0.7).float()
        t.s, t.v = t.s + DT / 2 * (t.v + v) * (1 - 2 * t.oncoming), v
        t.d = t.d + DT * self._drift()

    def _release(self):
        """What holds the ego at `hold`: a red light until it is green, a stop sign until one has stood, a car that
        blocks the way around something until it is past."""
        t, scene = self.things, self.scene
        s, _, _ = locate(self.x, self.y, scene.route)
        at_line = (self.speed < 0.15) & ((scene.hold - s - FRONT).abs() < 5)
        self.stood = self.stood + DT * at_line
        red = ((t.kind == LIGHT) & (self.signals() == RED)).any(1)
        sign = ((t.kind == SIGN) & (t.signal != YELLOW)).any(1) & (self.stood < LONG_STOP)
        rear, bumper = t.s - t.size[..., 0] / 2, (s + FRONT)[:, None]
        past = torch.where(t.oncoming > 0, rear + t.size[..., 0] < bumper, rear > bumper + 6)
        blocked = ((t.blocks > 0) & ~past).any(1)
        self.held = self.held & (red | sign | blocked)

    def route(self):
        """Where the driver is told to go: n of LEFT, RIGHT and 0, straight on."""
        left = locate(self.x, self.y, self.scene.route)[0] < self.scene.route[:, 0] + self.scene.route[:, 2]
        return [one.side if "turn" in [cause.name for cause in one.causes] and to_come else 0
                for one, to_come in zip(self.draws, left.tolist())]

    def causes(self):
        """
        What the driver of each scene has to answer to now: n lists of Causes. Nothing of the future is looked at. What
        is over is gone, and some causes become others: a car that has cut in is a slower lead. Where nothing else asks
        for anything, a car that is ASIDE of its line has to go back to it.
        """
        s, d, _ = locate(self.x, self.y, self.scene.route)
        s, d, aside = s.tolist(), d.tolist(), (d - self._nudge(s)[0]).tolist()
        thing = {name: getattr(self.things, name).tolist() for name in ("s", "d", "v")}
        thing["brakes"] = self.braking().tolist()
        signals, held, speed = self.signals().tolist(), self.held.tolist(), self.speed.tolist()
        every = []
        for i, scene in enumerate(self.draws):
            now = []
            for cause in scene.causes:
                name, j = cause.name, cause.thing
                its = {key: value[i][j] for key, value in thing.items()}
                if s[i] > cause.until:
                    name = None
                elif name in ("pedestrian", "deer", "cyclist"):                 # until across
                    name = None if its["d"] * cause.side < -(WIDTH / 2 + 1) else name
                elif name == "cut-in":
                    name = "slower lead" if abs(its["d"]) < 0.6 else name
                elif name == "braking lead":
                    name = "stopped lead" if its["v"] < 0.1 else name if its["brakes"] else "slower lead"
                elif name == "red light":
                    name = name if signals[i][j] == RED else "resume" if speed[i] < 3 else "green light"
                elif name == "stop sign":
                    name = name if held[i] else None
                elif name == "oncoming car":
                    name = name if held[i] else "double-parked car"
                elif name == "gap search":
                    name = name if held[i] else "lane closed"
                elif name == "swerving car":
                    name = name if its["s"] > s[i] else None
                if name == "lane closed":
                    name = None if d[i] * cause.side > LANE - 0.8 else name
                if name and its["s"] - s[i] > 75 and name.endswith("lead"):     # it has got away
                    name = None
                if name and name != "free":
                    now.append(cause._replace(name=name))
            if not now and abs(aside[i]) > ASIDE:
                now = [Cause("aside", LEFT if aside[i] > 0 else RIGHT, -1, FAR)]
            every.append(now or [Cause("free", scene.side, -1, FAR)])
        return every

    def expert(self):
        """
        accel (n,) and curvature (n,) of a driver who knows the causes from `react` on: the intelligent driver model
        behind whatever is or will be in its way, speed that suits bend and bump, and a steady hand on the line.
        """
        scene, v = self.scene, self.speed
        aware = self.time >= scene.react
        wander_speed, wander_lateral = self._wander()
        s, d, heading = locate(self.x, self.y, scene.route)
        start, k, length = scene.route.unbind(-1)

        # Speed. Each constraint is an acceleration; the least of them wins.
        bumper = s + FRONT
        gap, lead = self._in_the_way(bumper, aware)                                             # (n, things) each
        slow = follow(gap, v[:, None], lead).amin(1)
        needed = ((v[:, None] - lead).clamp(min=0) ** 2 / (2 * gap)).amax(1)                    # m/s^2, to hit nothing
        line = torch.where(self.held & (scene.hold > bumper - 0.5), scene.hold - 1 - bumper, FAR)
        slow = slow.minimum(follow(line, v, 0 * v))
        free = MAX_ACCEL * (1 - (v / (scene.cruise + wander_speed)) ** 4)
        bend = -(v ** 2 - 2 / k.abs()) / (2 * torch.maximum(start - s, v / 2).clamp(min=0.5))  # to 2 m/s^2 sideways
        bend = torch.where((s < start + length) & (length > 0), bend, MAX_ACCEL)
        bump = -(v ** 2 - BUMP_SPEED ** 2) / (2 * (scene.bump - bumper).maximum(v / 2).clamp(min=0.5))
        bump = torch.where((s < scene.bump + 1) & (scene.bump < FAR), bump, MAX_ACCEL)
        known = torch.minimum(free + slow, bend).minimum(bump).clamp(max=MAX_ACCEL)
        known = known.maximum(-(1.3 * needed).clamp(4, 8))
        accel = torch.where(aware, known, torch.where(scene.standing > 0, -v / DT, free))
        accel = self.accel + (accel - self.accel).clamp(-JERK * DT, JERK * DT)

        # Steering: the line's curvature a moment ahead, the nudge's, and a pull back to where the ego should be.
        soon = s + 0.3 * v                                                                      # hands take time
        (target, slope, _), (_, _, bow) = self._nudge(s), self._nudge(soon)
        ahead = torch.where((soon > start) & (soon < start + length), k / (1 - k * d), 0)
        reach = (0.7 * v).clamp(min=3)                                                          # m
        curvature = ahead + bow - (d - target - wander_lateral) / reach ** 2 - 2 * (self.yaw - heading - slope) / reach
        limit = (3 / v.clamp(min=1) ** 2).clamp(max=0.2)
        return accel, self.curvature + 0.33 * (curvature.clamp(-limit, limit) - self.curvature)

    def _in_the_way(self, bumper, aware):
        """Gap (m, FAR if there is none) and speed (m/s, along the route) of each thing (n, things) that is where the
        ego will drive, or will have walked or drifted there within FORESIGHT, and that it knows of."""
        t, scene = self.things, self.scene
        x, y, yaw = self.poses()
        s, d, heading = locate(x, y, scene.route[:, None])
        turned = yaw - heading
        cos, sin, long, wide = torch.cos(turned).abs(), torch.sin(turned).abs(), t.size[..., 0] / 2, t.size[..., 1] / 2
        half, room = cos * long + sin * wide, sin * long + cos * wide + WIDTH / 2 + MARGIN
        offset, drift = self._nudge(s)[0], self._drift()
        aside = d - offset
        arrives = torch.where(aside * drift < 0, (aside.abs() - room) / drift.abs().clamp(min=0.1), FAR)      # s
        stays_out = ((t.d_end - offset).abs() > room) & ((t.d_end - offset) * aside > 0)
        comes = (aside.abs() < room) | ((arrives < FORESIGHT) & ~stays_out)
        walks = (t.kind == PEDESTRIAN) | (t.kind == CYCLIST) | (t.kind == DEER)
        ahead = torch.where(walks, s > bumper[:, None] - 1, s > bumper[:, None] - FRONT)
        obstacle = self.solid(t.kind) & comes & ahead & (aware[:, None] | (t.cause == 0))
        gap = torch.where(obstacle, (s - half - 2 * walks - bumper[:, None]).clamp(min=0.5), FAR)
        return gap, t.v * torch.cos(turned)

    def _nudge(self, s):
        """Where in its lane the ego should be at s (n,) or (n, k): offset (m), its slope and its bow (1/m): half
        cosines."""
        offset, begin, full, end, gone = self.scene.nudge.T.view(5, -1, *[1] * (s.ndim - 1))
        length = full - begin
        phase = (math.pi / length * torch.where(s < end, s - begin, gone - s)).clamp(0, math.pi)    # 0 in, pi out
        rate = math.pi / length * torch.where(s < end, 1, -1)
        return (offset / 2 * (1 - torch.cos(phase)), offset / 2 * torch.sin(phase) * rate,
                torch.where((phase > 0) & (phase < math.pi), offset / 2 * torch.cos(phase) * rate ** 2, 0))

    def judge(self):
        """
        How the ego fares at this moment, a dictionary of (n,) bool:
            collision   its rectangle and that of a thing overlap
            close       they would if the ego were NEAR (m) larger on every side: a close encounter. The paper does not
                        define its own; this is ours
            at_fault    close, unless the thing came from behind or the ego stood still
            off_road    a corner of it is beyond asphalt
        """
        t, (x, left, turned) = self.things, self.poses_to_ego()
        ahead = x - (FRONT - LENGTH / 2)                                                    # of the middle of the ego
        long, wide = t.size[..., 0] / 2, t.size[..., 1] / 2
        c, s = torch.cos(turned), torch.sin(turned)
        along, beside = c * ahead + s * left, c * left - s * ahead                                      # the thing's
        c, s = c.abs(), s.abs()

        def apart(grown):                       # rectangles are apart if they are along one of their four axes
            a, b = LENGTH / 2 + grown, WIDTH / 2 + grown
            return ((ahead.abs() > a + c * long + s * wide) | (left.abs() > b + s * long + c * wide)
                    | (along.abs() > long + c * a + s * b) | (beside.abs() > wide + s * a + c * b))

        solid = self.solid(t.kind)
        near = solid & ~apart(NEAR)
        from_behind = (ahead < -LENGTH / 2) & (t.v > self.speed[:, None])
        cos, sin = torch.cos(self.yaw), torch.sin(self.yaw)
        corners = [(FRONT, WIDTH / 2), (FRONT, -WIDTH / 2), (FRONT - LENGTH, WIDTH / 2), (FRONT - LENGTH, -WIDTH / 2)]
        paved = [self.paved(self.x + cos * a - sin * b, self.y + sin * a + cos * b) for a, b in corners]
        return dict(collision=(solid & ~apart(0.0)).any(1), close=near.any(1),
                    at_fault=(near & ~from_behind).any(1) & (self.speed > 0.1), off_road=~torch.stack(paved).all(0))

    def paved(self, x, y):
        """Whether there is asphalt at x, y (n,): on the main road, the side road, or in the round corners between."""
        s, d, _ = locate(x, y, self.scene.road)
        right_line, left_line = _lines(self.scene.lanes)
        out = torch.maximum(d - left_line, right_line - d) - self.scene.shoulder            # m beyond the main road
        aside = (s - self.scene.crossing).abs() - SIDE_ROAD                                 # m beyond the side road
        return (FILLET - out).clamp(0, FILLET) ** 2 + (FILLET - aside).clamp(0, FILLET) ** 2 >= FILLET ** 2 - 1e-3

    def render(self, camera_ids, size):
        """What the cameras see now: images (n, cameras, 3, H, W) uint8; size is (H, W)."""
        (H, W), ids, air = size, tuple(camera_ids), _air(self.scene)
        view, fine = _view(ids, H, W, self.device), _view(ids, FINE * H, FINE * W, self.device)
        images = torch.empty(len(self.x), len(ids), 3, H, W, dtype=torch.uint8, device=self.device)
        # A few scenes at a time. Most have no bend, no crossing, or neither, and are spared the mathematics of it.
        bends, crosses = self.scene.road[:, 2] > 0, torch.minimum(self.scene.crossing, self.scene.stop) < FAR
        dusk = bool((self.scene.dusk > 0).any())
        chunk = max(1, CHUNK[images.is_cuda] // (len(ids) * H * W))
        parts = [(part, bend, cross) for bend in (False, True) for cross in (False, True)
                 for part in ((bends == bend) & (crosses == cross)).nonzero()[:, 0].split(chunk) if len(part)]
        done = 0
        best = torch.full((chunk * fine.direction.shape[1],), NOBODY, device=self.device)
        for (part, bend, cross), pairs in zip(parts, _pairs(_boxes(self), [part for part, _, _ in parts], fine)):
            local = {name: value[part] for name, value in air.items()}
            image = _paint_ground(self, local, part, bend, cross, dusk, view)
            _paint_boxes(image, pairs, local, dusk, best, fine)
            _paint_rain(image, self.scene, self.time, part, view)
            images[done:done + len(part)] = image.movedim(0, 2)
            done += len(part)
        return images.index_select(0, torch.cat([part for part, _, _ in parts]).argsort())


# ----------------------------------------------------------------------------------------------------------------------
# The renderer: a ray a pixel. The ground's pixels are constants of a camera; boxes are tried only where they may be.
# A scene looks the same whatever is rendered beside it, and no sum depends on the order of its terms.

CHUNK = 2 ** 17, 2 ** 23        # pixels at a time: on a CPU they should stay in its cache, on a GPU fill it
NOBODY = 2 ** 63 - 1            # what a ray meets if it meets no box: it is as far as can be
FINE = 2                        # rays a pixel for boxes, each way: what is far and thin fades and does not flicker
# Red, green, blue of the sky above, and of the haze that everything fades into and that is the horizon's.
SKY, DUSK_SKY, RAIN_SKY = (110, 160, 230), (38, 42, 88), (120, 126, 135)
HAZE, DUSK_HAZE, RAIN_HAZE = (205, 205, 205), (165, 104, 70), (168, 172, 178)
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
    [[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]],                             # bump
    [[0, 1, 1, 0.6, 1], [0, 1, 0.1, 0, 0.6]],                       # sign: plate, pole
    [[0, 1, 0.5, 0, 0.5], [0.05, 0.35, 1, 0.5, 1]],                 # cyclist: bicycle and legs, body and head
    [[0.1, 0.8, 1, 0, 0.72], [-0.38, 0.24, 0.6, 0.6, 1]],           # deer: trunk and legs, neck and head
    [[0, 1, 1, 0, 0.4], [0, 0.6, 0.6, 0.4, 1]],                     # debris: tyre, crate
    [[0, 0.3, 1, 0.4, 1], [0, 1, 0.8, 0, 0.4]],                     # barrier: board, feet
    [[0.12, 0.76, 1, 0.12, 1], [-0.39, 0.22, 0.94, 0.1, 0.8]],      # truck: load, cab
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
    camera, row, column = torch.meshgrid(*(torch.arange(n) for n in (len(pose), H // FINE, W // FINE)), indexing="ij")
    pixel_of = (camera * (H // FINE) + row) * (W // FINE) + column                     # of the coarser view
    pixel_of = pixel_of.repeat_interleave(FINE, 1).repeat_interleave(FINE, 2)
    view = SimpleNamespace(
        intrinsics=intrinsics, pose=pose, size=(H, W), half=half, pixel_of=pixel_of.flatten().int(),
        direction=direction.permute(3, 0, 1, 2).flatten(1).contiguous(),                # (3, cameras * H * W)
        ground=torch.stack(ground), lane=_stripe(0.18, reach * pixel),
        bar=_stripe(0.6, reach ** 2 * pixel / pose[:, 2, 3, None, None]),
        reach=reach, sky=torch.exp(-6 * direction[:, :half, :, 2].clamp(min=0)), beam=_beam(*ground),
        streak=_streaks(camera_ids, H, W))
    for name, value in vars(view).items():
        if torch.is_tensor(value):
            setattr(view, name, value.to(device))
    return view


def _stripe(width, footprint):
    """For `_cover`: of a stripe of this width (m), seen by pixels that are footprint (m) wide."""
    return torch.stack([(width + footprint) / 2 / footprint, 1 / footprint, footprint.clamp(max=width) / footprint])


def _cover(distance, stripe):
    """The stripe's share of a pixel at this distance (m) from its middle: thin ones fade, they do not flicker."""
    edge, slope, most = stripe
    return torch.addcmul(edge, distance.abs(), slope, value=-1).clamp_(min=0).minimum(most)


def _beam(x, y):
    """How much of the light of our head lamps reaches points x, y (m) of the ego frame: 0 .. 1."""
    ahead = (x - FRONT).clamp(min=0)
    return torch.exp(-ahead / 35) * torch.exp(-(y / (1.5 + 0.12 * ahead)) ** 2) * (ahead > 0)


def _streaks(camera_ids, H, W):
    """
    Where rain falls: a number (cameras, H, W) that grows by one with each 1 / 64 of the height, from a start that is
    its column's own, modulo 256. `_paint_rain` adds how far the rain has fallen and draws where the sum is small.
    """
    column = torch.tensor(camera_ids)[:, None] * 96 + torch.arange(W) * 96 // W            # (cameras, W)
    start = (column * 40503 + 977) * (column + 71) // 8
    return (start[:, None] - torch.arange(H)[:, None] * 64 // H) & 255


def _air(scene):
    """Light and air: colours (n, 3) in 0 .. 255 of sky and haze, of light as shares; visibility (m) and dusk (n, 1)."""
    def mix(day, dusk, rain):
        day, dusk, rain = (torch.tensor(colour, dtype=torch.float32, device=at.device) for colour in (day, dusk, rain))
        colour = day + at * (dusk - day)
        return colour + wet * (rain * (1 - 0.6 * at) - colour)

    at, wet, daylight = (value[:, None] for value in (scene.dusk, scene.rain, scene.daylight))
    warm = torch.tensor([0.25, 0.32, 0.38], device=at.device)
    return dict(
        sky=mix(SKY, DUSK_SKY, RAIN_SKY), haze=mix(HAZE, DUSK_HAZE, RAIN_HAZE),
        light=daylight * (1 - at * warm) * (1 - 0.15 * wet), visibility=scene.visibility[:, None], dusk=at)


def _paint_ground(world, air, part, bend, cross, dusk, view):
    """
    Sky and ground of the scenes part (m,): (3, m, cameras, H, W) float in 0 .. 255. The ground is shaded, not traced:
    a pixel's point on it is known, its road coordinates follow, and lines are where d and s say. bend, cross
    and dusk: is there any bend, any side road or stop line, any dusk.
    """
    scene = SimpleNamespace(**{f: x[part].unflatten(0, (-1, 1, 1, 1)) for f, x in vars(world.scene).items()})
    air = {name: value.mT[..., None, None, None] for name, value in air.items()}        # (3 or 1, m, 1, 1, 1)
    x, y, yaw = (value[part, None, None, None] for value in (world.x, world.y, world.yaw))
    cos, sin = torch.cos(yaw), torch.sin(yaw)
    gx, gy = view.ground                                                                # (cameras, H/2, W) ego frame
    s, d = x + cos * gx - sin * gy, y + sin * gx + cos * gy                             # (m, cameras, H/2, W)
    if bend:
        s, d, _ = locate(s, d, scene.road)

    # What it is made of, and its lane lines: solid at the edges and between the directions. What is true or false is
    # 1 or 0 in float: torch compares, multiplies and takes the maximum of floats in place much faster than of bools.
    (right_line, left_line), centre = _lines(scene.lanes), LANE * (scene.lanes[..., 0] + 0.5)
    out = torch.maximum(d - left_line, right_line - d).sub_(scene.shoulder)             # m beyond the main road
    corner = (FILLET - out).clamp_(0, FILLET).square_()
    line = ((d - LANE / 2) / LANE).round_().mul_(LANE).add_(LANE / 2)                   # d of the nearest lane line
    yellow = (line - centre).abs_().lt_(0.1)
    lined = s * (1 / 9)
    lined = (lined - lined.floor()).lt_(4 / 9).maximum(yellow)
    lined = lined.maximum((line - right_line).lt_(0.1)).maximum((line - left_line).gt_(-0.1))
    lined *= (out + scene.shoulder).lt_(0.5)
    beside = out
    if cross:       # Outside both roads, a corner is asphalt up to a quarter circle.
        aside = (s - scene.crossing).abs_().sub_(SIDE_ROAD)                             # m beyond the side road
        corner += (FILLET - aside).clamp_(0, FILLET).square_()
        beside = torch.minimum(out, aside)
        lined *= aside.gt_(FILLET)
    white = _cover(d - line, view.lane).mul_(lined)
    if cross:
        beyond = s - scene.stop
        ours = (centre - d).gt_(0).mul_((d - right_line).gt_(0))
        white = white.maximum(_cover(beyond, view.bar).mul_(ours))
        zebra = torch.remainder(d, 1.2).lt_(0.6).mul_((beyond - 2.5).abs_().lt_(1.5))
        zebra *= (out + scene.shoulder).lt_(0)
        white.lerp_(zebra.new_tensor(0.9), zebra)
        yellow.mul_(beyond.abs_().gt_(1)).mul_(1 - zebra)
    asphalt = corner.ge_(FILLET ** 2 - 1e-3)
    pavement = (beside - 2.5).lt_(0).mul_(scene.urban).mul_(1 - asphalt)

    # Shares of what the eye gets: of the paint, of what is bare, of that the grass, and the haze's.
    clear = (view.reach / -scene.visibility).exp_()
    white *= clear
    bare, haze = clear - white, 1 - clear
    grass = (1 - asphalt).sub_(pavement).mul_(bare)
    base = asphalt.mul_(78).add_(pavement, alpha=150).mul_(1 - 0.35 * scene.rain).mul_(bare).add_(white, alpha=235)
    yellow *= white
    lamps = 0.45 * view.beam * scene.dusk if dusk else 0
    image = torch.empty(3, *s.shape[:2], *view.size, device=s.device)
    for i, (green, paint) in enumerate(((92, 235), (120, 215), (62, 120))):             # red, green, blue
        torch.add(base, grass, alpha=green, out=image[i, :, :, view.half:])
        if paint < 235:
            image[i, :, :, view.half:].add_(yellow, alpha=paint - 235)
        image[i, :, :, view.half:].mul_(air["light"][i] + lamps).addcmul_(haze, air["haze"][i])
        torch.addcmul(air["sky"][i], view.sky, air["haze"][i] - air["sky"][i], out=image[i, :, :, :view.half])
    return image


def _boxes(world):
    """Everything that stands, as boxes in the ego frame: a dictionary of (n, 2 things) and (n, 2 things, 3)."""
    t = world.things
    x, y, yaw = (value[..., None] for value in world.poses_to_ego())                    # (n, things, 1)
    kind = torch.where((t.kind == CAR) & (t.size[..., 2] > 2.2), TRUCK, t.kind).long()  # a high car is a truck
    cos, sin, size = torch.cos(yaw), torch.sin(yaw), t.size[:, :, None]
    back, length, width, low, high = PARTS.to(world.device)[kind].unbind(-1)   # (n, things, 2)
    back = back * size[..., 0]
    boxes = dict(
        centre=torch.stack([x - back * cos, y - back * sin, (low + high) / 2 * size[..., 2]], -1),
        half=torch.stack([length, width, high - low], -1) * size / 2, cos=cos, sin=sin, colour=t.colour[:, :, None],
        part=2 * kind[..., None] + torch.tensor([0, 1], device=world.device), signal=world.signals()[..., None],
        braking=world.braking()[..., None])
    return {name: value.expand(*back.shape, *value.shape[3:]).flatten(1, 2) for name, value in boxes.items()}


def _rectangles(boxes, view):
    """
    Where boxes (n, boxes) may be in the pictures: scene, camera, box, left, top, width, height, each (pairs,) long.
    The pixels of corners and edges' middles say, and a margin, since straight edges are bows through such a lens.
    """
    H, W = view.size
    origin, focal = view.pose[:, :3, 3], view.intrinsics[:, 6, None, None]              # (cameras, 3), pixels per rad
    scene, box = (boxes["half"].amin(-1) > 0).nonzero(as_tuple=True)                    # (k,)
    centre, half, cos, sin = (boxes[name][scene, box] for name in ("centre", "half", "cos", "sin"))
    sign = torch.cartesian_prod(*[torch.tensor([-1., 0, 1], device=origin.device)] * 3)
    x, y, z = (sign[sign.abs().sum(-1) > 1] * half[:, None]).unbind(-1)                 # (k, 20)
    cos, sin = cos[:, None], sin[:, None]
    point = torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1) + centre[:, None]
    point = (point - origin[:, None, None]) @ view.pose[:, None, :3, :3]                # (cameras, k, 20, 3)
    pixel, _ = project(point, view.intrinsics[:, None, None])
    low, high = pixel.amin(-2), pixel.amax(-2)                                          # (cameras, k, 2)
    # An arc of a rad, up to 1.2 rad off the axis, bows by less than 0.08 a^2 rad; half an edge by a quarter of it.
    margin = 1 + 0.04 * (high - low).square().sum(-1, keepdim=True) / focal
    edge = torch.tensor([W, H], device=origin.device)
    # Drop what lies outside the cone of 1.2 rad that holds all the pictures, whole: pixels mean little behind a lens.
    # A box that is near enough to surround the camera may be anywhere.
    offset = centre - origin[:, None]                                                   # (cameras, k, 3)
    distance, radius = offset.norm(dim=-1), half.norm(dim=-1)
    angle = torch.acos(((offset @ view.pose[:, :3, 2, None])[..., 0] / distance).clamp(-1, 1))
    around = distance <= radius
    seen = around | (angle - torch.asin((radius / distance).clamp(max=1)) < 1.2)
    low = (low - margin).floor().clamp(min=0).minimum(edge).long().masked_fill(around[..., None], 0)
    high = torch.where(around[..., None], edge, (high + margin).ceil().clamp(min=0).minimum(edge).long())
    size = (high - low) * seen[..., None]
    camera, k = size.prod(-1).nonzero(as_tuple=True)
    return scene[k], camera, box[k], *low[camera, k].unbind(-1), *size[camera, k].unbind(-1)


def _pairs(boxes, parts, view):
    """
    Boxes and the cameras that may see them, for each of parts, lists of scenes (m,). They come sorted by what they are
    parts of, with all that a ray wants to know about its box: see `_paint_boxes`.
    """
    scene, camera, box, left, top, width, height = _rectangles(boxes, view)             # (pairs,)
    place, among = torch.empty(2, len(boxes["half"]), dtype=torch.long, device=box.device)
    for i, part in enumerate(parts):
        place[part], among[part] = i, torch.arange(len(part), device=part.device)
    group = place[scene] * 2 * len(PARTS) + boxes["part"][scene, box]
    group, order = group.sort(stable=True)
    scene, camera, box, left, top, width, height = (
        value[order] for value in (scene, camera, box, left, top, width, height))
    own = {name: value[scene, box] for name, value in boxes.items()}
    x, y, z = (view.pose[camera, :3, 3] - own["centre"]).unbind(-1)
    cos, sin = own["cos"], own["sin"]
    own |= dict(
        scene=among[scene].int(), width=width.int(), height=height.int(),
        first=((camera * view.size[0] + top) * view.size[1] + left).int(),
        slab=torch.stack([cos, sin, cos * x + sin * y, cos * y - sin * x, z, *own["half"].unbind(-1)], -1))
    counts = torch.bincount(group // (2 * len(PARTS)), minlength=len(parts)).tolist()
    chunks = zip(*(value.split(counts) for value in own.values()))
    return [SimpleNamespace(**dict(zip(own, chunk))) for chunk in chunks]


def _paint_boxes(image, pairs, air, dusk, best, view):
    """
    Draw boxes over image (3, m, cameras, H, W), in place, by the rays of a view FINE times as fine. dusk: is there any.
    best is a buffer (m * rays or more,) full of NOBODY, and is left so.
    """
    device, W, count = image.device, view.size[1], view.direction.shape[1]
    ahead = lambda value: value.cumsum(0, dtype=torch.int32) - value                    # the sum of all before
    arange = lambda value: torch.arange(len(value), dtype=torch.int32, device=device)
    # The tests: each pair, each row of its rectangle, each ray of the row.
    pair = torch.repeat_interleave(pairs.height)                                        # (rows,)
    first = pairs.first[pair] + (arange(pair) - ahead(pairs.height)[pair]) * W
    row = torch.repeat_interleave(pairs.width[pair])                                    # (tests,)
    at = arange(row) + (first - ahead(pairs.width[pair])).index_select(0, row)
    pair = pair.index_select(0, row)
    # Slab test, in the box's own axes. Where a ray meets a slab first, and where last; it hits where it meets all.
    slab = pairs.slab.T.contiguous()                                                    # (8, pairs)
    cos, sin, *origin = slab[:5].index_select(1, pair)                                  # (tests,)
    x, y, z = view.direction.index_select(1, at)
    direction = cos * x + sin * y, cos * y - sin * x, z
    near = far = None
    for o, d, h in zip(origin, direction, slab[5:].index_select(1, pair)):
        inverse = d.reciprocal()
        middle, reach = o.mul_(inverse).neg_(), inverse.abs_().mul_(h)
        enter, leave = middle - reach, middle.add_(reach)
        near, far = (enter, leave) if near is None else (near.maximum(enter), far.minimum(leave))
    test = ((near < far) & (near > 0)).nonzero()[:, 0]
    # Nearest wins. Positive floats sort as integers, so depth and test number fit one integer, whose minimum is both.
    pair, at, near = (value.index_select(0, test) for value in (pair, at, near))        # (hits,)
    key = near.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(test)
    ray = (pairs.scene * count).index_select(0, pair).add_(at).long()
    best.scatter_reduce_(0, ray, key, "amin")
    won = (best.index_select(0, ray) == key).nonzero()[:, 0]
    best.index_fill_(0, ray, NOBODY)
    pair, at, depth, test = (value.index_select(0, won) for value in (pair, at, near, test))
    # Colour: by the face that was hit, then what is painted on it. q runs from -1 to 1 over the box.
    qx, qy, qz = (
        (d.index_select(0, test).mul_(depth).add_(o)).div_(h)
        for d, o, h in zip(direction, slab[2:5].index_select(1, pair), slab[5:].index_select(1, pair)))
    wide, high = qy.abs(), qz.abs()
    end = qx.abs() > torch.maximum(wide, high)                                          # rear or front
    side = (wide > high).logical_and_(~end)
    paint = pair + len(PAINTS)                                                          # a palette with each box's own
    palette = torch.cat([PAINTS.to(device), torch.nn.functional.pad(pairs.colour, (0, 1))]).T.contiguous()
    dark = air["dusk"].gt(0.3)[:, 0][pairs.scene] if dusk else None
    sizes = torch.bincount(pair, minlength=len(pairs.part))
    sizes = torch.zeros(2 * len(PARTS), dtype=torch.long, device=device).index_add_(0, pairs.part, sizes).tolist()
    for part, hits in enumerate(zip(*(value.split(sizes) for value in (paint, pair, qx, qy, qz, end, side)))):
        if len(hits[0]):
            _livery(part, pairs, dark, *hits)
    *painted, glow = palette.index_select(1, paint)                                     # (hits,) each
    light, haze, visibility = (air[name][pairs.scene].T.contiguous().index_select(1, pair)
                               for name in ("light", "haze", "visibility"))
    if dusk:                                                                            # what our head lamps light
        reach = view.direction[0].index_select(0, at).clamp_(min=0).pow_(16) * torch.exp(-depth / 60)
        light += 0.7 * air["dusk"][pairs.scene, 0].index_select(0, pair) * reach
    shade = 1.05 - 0.25 * end.float() - 0.43 * side.float()
    fade = torch.exp(depth / (visibility[0] * (-8 / 3)))
    # Each ray owns a share of a pixel; the ground keeps the rest. Multiples of 2^-12 add up exactly in any order.
    size = image[0, 0].numel()
    pixel = (pairs.scene * size).index_select(0, pair) + view.pixel_of.index_select(0, at)      # in (m, cameras, H, W)
    share = torch.full_like(depth, FINE ** -2)
    image *= 1 - torch.zeros_like(image[0]).view(-1).index_add_(0, pixel, share).view(image[0].shape)
    for i, channel in enumerate(image):
        value = torch.lerp(shade * light[i], glow.new_tensor(1), glow).mul_(painted[i]).clamp_(max=1).mul_(255)
        value = value.sub_(haze[i]).mul_(fade).add_(haze[i]).mul_(1024).round_().div_(1024 * FINE ** 2)
        channel += torch.zeros_like(channel).view(-1).index_add_(0, pixel, value).view(channel.shape)


def _paint_rain(image, scene, time, part, view):
    """Rain before image (3, m, cameras, H, W), in place: a veil, and streaks that the scene and the time place."""
    rain, dusk = scene.rain[part], scene.dusk[part]
    own = (scene.wander[part, 2] * 1024).long() + (time[part] / DT).round().long() * 23     # what has fallen
    for i in rain.nonzero()[:, 0].tolist():
        fallen = (view.streak + own[i]) & 255
        veil = rain[i] * (0.08 + 0.17 * (fallen < 9))
        image[:, i] += veil * ((200 - 90 * dusk[i]) - image[:, i])


# Paints: red, green, blue, and whether they glow, that is, keep their colour in the shade.
(WINDOW, TYRE, DULL_LAMP, HEADLAMP, BRAKE_LAMP, AMBER, RED_LAMP, GREEN_LAMP, WOOD, TROUSERS, SKIN, WHITE, PANE,
 YELLOW_LAMP, TAIL_LAMP, BRIGHT_LAMP, LIT_PANE, STRIPE, BETWEEN, BOARD_RED) = range(1, 21)
PAINTS = torch.tensor([
    [0.00, 0.00, 0.00, 0], [0.12, 0.15, 0.20, 0], [0.08, 0.08, 0.08, 0], [0.35, 0.03, 0.03, 0], [0.95, 0.95, 0.85, 0],
    [1.00, 0.08, 0.05, 1], [1.00, 0.65, 0.00, 1], [1.00, 0.05, 0.05, 1], [0.05, 1.00, 0.35, 1], [0.30, 0.28, 0.26, 0],
    [0.10, 0.10, 0.25, 0], [0.85, 0.65, 0.50, 0], [0.95, 0.95, 0.95, 0], [0.25, 0.30, 0.38, 0], [1.00, 0.80, 0.05, 1],
    [0.55, 0.03, 0.03, 1], [1.00, 0.97, 0.80, 1], [1.00, 0.78, 0.40, 1], [1.00, 0.80, 0.00, 0], [0.45, 0.45, 0.45, 0],
    [0.85, 0.05, 0.05, 0]])


def _livery(part, pairs, dark, paint, pair, qx, qy, qz, end, side):
    """
    Write the paint (hits,) of points q on boxes, each coordinate from -1 to 1, over the thing's own colour. All are of
    the same part, an index of PARTS' boxes. end and side say whether a point is on its box's rear or front, or on its
    left or right; else it is on the top. Each of pairs knows its signal; dark (pairs,) or None: where lamps are on.
    """
    def put(where, colour, only=True):          # later coats cover earlier ones
        if only is not None:
            paint.masked_fill_(where & only, colour)

    kind, first = part // 2, part % 2 == 0
    rear, front = end & (qx < 0), end & (qx > 0)
    signal = pairs.signal.index_select(0, pair)
    dark = None if dark is None else dark.index_select(0, pair)
    if kind in (CAR, TRUCK):
        braking, lamp = pairs.braking.index_select(0, pair), qy.abs() > 0.45
        if kind == CAR and not first:
            put((end | side) & (qz.abs() < 0.75), WINDOW)
            put(rear & (qz < -0.3) & braking, BRAKE_LAMP)
            return
        if kind == CAR:
            put(qz < -0.4, TYRE)
            lamp &= qz >= -0.4
            blinker = (lamp & end) | ((qz >= -0.4) & side & (qx.abs() > 0.8))
        else:
            put(qz < -0.65, TYRE)
            lamp &= (qz > -0.65) & (qz < -0.3)
            blinker = lamp & (rear if first else front)
            if not first:
                put((end | side) & (qz > 0), WINDOW)
        if kind == CAR or first:
            put(lamp & rear, DULL_LAMP)
            put(lamp & rear, TAIL_LAMP, dark)
            put(lamp & rear & braking, BRAKE_LAMP)
        if kind == CAR or not first:
            put(lamp & front, HEADLAMP)
            put(lamp & front, BRIGHT_LAMP, dark)
        put(blinker & (torch.where(qy > 0, signal == BLINK_LEFT, signal == BLINK_RIGHT) | (signal == HAZARD)), AMBER)
    elif kind == PEDESTRIAN:
        put(qz < -0.15, TROUSERS) if first else paint.fill_(SKIN)
    elif kind == LIGHT and first:
        housing = rear & (qy.abs() < 0.85)
        put(housing & (signal == RED) & (qz > 0) & (qz < 0.9), RED_LAMP)
        put(housing & (signal == YELLOW) & (qz.abs() < 0.45), YELLOW_LAMP)
        put(housing & (signal == GREEN) & (qz < 0) & (qz > -0.9), GREEN_LAMP)
    elif kind == CONE and not first:
        put(qz < -0.2, WHITE)
    elif kind == BUILDING:
        storey = qz * 3
        floor = storey.floor()
        pane = (storey - floor < 0.45) & (end | side)
        put(pane, PANE)
        if dark is not None:                                                            # every fifth one has a lamp on
            along = torch.where(end, qy, qx) * 4
            put(pane & (torch.remainder(along.floor() + 7 * floor, 5) == 0), LIT_PANE, dark)
    elif kind in (LIGHT, TREE, SIGN, BARRIER) and not first:
        paint.fill_(WOOD)
    elif kind == BUMP:
        paint.fill_(TYRE)
        put(torch.remainder(qy * 1.25 + 0.25, 1) < 0.6, STRIPE)
    elif kind == SIGN:                          # an octagon is a square without its corners
        warns, corner = signal == YELLOW, qy.abs() + qz.abs() > 1.45
        word = (qz.abs() < 0.3) & (qy.abs() < 0.75) & (torch.remainder(qy * 2.6 + 0.3, 1) < 0.6)
        paint.fill_(BOARD_RED)
        put(corner | word, WHITE)
        put(warns, STRIPE)
        put(warns & (qy.abs() < 0.25) & (qz.abs() < 0.65), TYRE)
        put(~rear, WOOD)
    elif kind == CYCLIST:
        if first:
            paint.fill_(TROUSERS)
            put((qz < 0.3) | ~(end | side), TYRE)
            put(side & (qx.abs() < 0.25) & (qz < 0), BETWEEN)                           # as if one saw the road there
            put(side & (qx.abs() > 0.4) & (qz > 0.3), BETWEEN)
            put(rear & (qz > 0.4), TAIL_LAMP, dark)
            put(front & (qz > 0.4), BRIGHT_LAMP, dark)
        else:
            put(qz > 0.45, SKIN)
    elif kind == DEER and first:
        put((qz < -0.1) & (qx.abs() < 0.65) & side, BETWEEN)
    elif kind == DEBRIS and first:
        paint.fill_(TYRE)
    elif kind == BARRIER:
        paint.fill_(WHITE)
        put(torch.remainder(qy * 2 + qz * 0.5, 1) < 0.5, BOARD_RED)

"""
A small world of traffic, for machines that have no data: it needs no download, and because it made the cause of every
scene it knows the label.

The page reads in the data's order: cameras, roads, what a seed draws, the world that moves and drives, its renderer.
Ego frame: origin at the rear axle on the ground, x forward, y left, z up; metres, seconds, yaw left-positive.
"""
import functools
import math
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from alpamayo import project

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
# What a seed draws: a road, a cause, and a crowd of things that ask for no reaction

SITUATIONS = (
    "free", "curve", "slower lead", "braking lead", "stopped lead", "red light", "green light", "pedestrian", "cut-in",
    "cones", "parked car", "turn")
(NOTHING, CAR, PEDESTRIAN, LIGHT, CONE, BUILDING, TREE, RAIL, BUMP, SIGN, CYCLIST, DEER, DEBRIS, BARRIER,
 TRUCK) = range(15)
OFF, BLINK_LEFT, BLINK_RIGHT, HAZARD, RED, GREEN, YELLOW = range(7)
NEVER, FAR = 1e3, 1e4                           # s and m: "not in this scene", and still tame in float32
FILLET, SIDE_ROAD = 6.0, LANE                   # m: radius of a crossing's corners, half width of its side road
STRAIGHT = (0.0, 0.01, 0.0)
CAR_SIZE, PERSON_SIZE, LIGHT_SIZE, CONE_SIZE = (4.4, 1.8, 1.5), (0.5, 0.7, 1.8), (0.4, 1.2, 3.8), (0.5, 0.5, 1.0)
TRUCK_SIZE, CYCLIST_SIZE, DEER_SIZE = (8.0, 2.4, 3.0), (1.7, 0.5, 1.75), (1.7, 0.5, 1.6)
BUMP_SIZE, SIGN_SIZE, DEBRIS_SIZE, BARRIER_SIZE = (1.2, 3.4, 0.12), (0.1, 1.0, 2.6), (0.8, 0.9, 0.7), (0.4, 1.8, 1.1)
DEER_COLOUR, CRATE = (0.52, 0.34, 0.18), (0.72, 0.52, 0.28)
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
    visibility: float = 150.0                   # m, how far haze lets one see
    rain: float = 0.0                           # 0 dry .. 1 heavy
    dusk: float = 0.0                           # 0 day .. 1 dusk
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
    x, y, yaw = place(t.s, t.d, world.scene.road[:, None])                              # (n, things), world frame
    kind = torch.where((t.kind == CAR) & (t.size[..., 2] > 2.2), TRUCK, t.kind).long()  # a high car is a truck
    wheels = (kind == CAR) | (kind == TRUCK) | (kind == CYCLIST)
    swerve = torch.atan2(world._drift(), t.v.clamp(min=0.1)) * wheels
    swerve = torch.where(kind == DEER, torch.atan2(t.drift, t.v), swerve)               # it faces where it will go
    yaw = (yaw + math.pi * t.oncoming + swerve - world.yaw[:, None])[..., None]         # (n, things, 1), ego frame
    x, y = x - world.x[:, None], y - world.y[:, None]
    cos, sin = torch.cos(world.yaw)[:, None], torch.sin(world.yaw)[:, None]
    x, y = (cos * x + sin * y)[..., None], (cos * y - sin * x)[..., None]
    cos, sin, size = torch.cos(yaw), torch.sin(yaw), t.size[:, :, None]
    back, length, width, low, high = PARTS.to(world.device)[kind].unbind(-1)   # (n, things, 2)
    back = back * size[..., 0]
    boxes = dict(
        centre=torch.stack([x - back * cos, y - back * sin, (low + high) / 2 * size[..., 2]], -1),
        half=torch.stack([length, width, high - low], -1) * size / 2, cos=cos, sin=sin, colour=t.colour[:, :, None],
        part=2 * kind[..., None] + torch.tensor([0, 1], device=world.device), signal=t.signal[..., None],
        braking=((t.accel < 0) & (world.time >= t.t_accel - DT / 2))[..., None])
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
    edge = torch.tensor([W, H], device=origin.device)
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
    rain, dusk, own = scene.rain[part], scene.dusk[part], (scene.wander[part, 2] * 1024).long()
    for i in rain.nonzero()[:, 0].tolist():
        fallen = (view.streak + own[i] + round(time / DT) * 23) & 255
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

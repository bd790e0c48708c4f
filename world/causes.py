"""
What a seed draws: a road, its causes, and a crowd of things that ask for no reaction.

A situation is one cause, or several that meet. Each cause has a function here that draws it (see
DRAW_CAUSE), words in data.py, and an end in traffic.py. README.md shows how to add one.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from alpamayo import DT, HORIZON
from doors import whole_number
from world.roads import FAR, FILLET, LANE, NEVER, SIDE_ROAD, STRAIGHT, lane_edges

WORLD_VERSION = 3  # raise it when a seed draws another scene: checkpoints carry it
HISTORY = 16  # steps of a Scene up to t0
FUTURE = HORIZON  # steps after t0
PAST = 20  # steps that are driven before t0
WHEELBASE = 2.8  # m
FRONT = 3.7  # m from the rear axle to the front bumper
WIDTH, LENGTH = 1.9, 4.7  # m, the ego's
LEFT, RIGHT = 1, -1  # sides are signs, as y is
BUMP_SPEED = 4.5  # m/s over a bump

# --------------------------------------------------------------------------------------------------
# Tables: splits, and what things look like

# The first seed of each split
SEEDS = {"train": 0, "val": 10_000_000, "tail": 20_000_000, "rare": 30_000_000, "end": 40_000_000}

# The long tail, which no training seed draws: known causes (see DRAW_CAUSE) that meet ...
COMBINATIONS = {
    "pedestrian behind a parked car": ("double-parked car", "pedestrian"),
    "pedestrian at a speed bump": ("speed bump", "pedestrian"),
    "pedestrian at a green light": ("green light", "pedestrian"),
    "cut-in at a red light": ("red light", "cut-in"),
    "cones in a curve": ("curve", "cones"),
    "braking lead in a curve": ("curve", "braking lead"),
    "dusk and rain": (),  # any one cause, in both at once
}
# ... and known causes by unknown things. A deer does what a pedestrian does.
RARE = {"deer": "pedestrian", "cyclist": "pedestrian", "debris": "cones"}

# Kinds of things
(NOTHING, CAR, PEDESTRIAN, LIGHT, CONE, BUILDING, TREE, RAIL, BUMP, SIGN, CYCLIST, DEER, DEBRIS,
 BARRIER, TRUCK) = range(15)
IMMATERIAL = (NOTHING, LIGHT, SIGN, BUMP)  # nobody can run into these
WALKERS = (PEDESTRIAN, CYCLIST, DEER)  # these cross the road

# What they signal
OFF, BLINK_LEFT, BLINK_RIGHT, HAZARD, RED, GREEN, YELLOW = range(7)

# m: length, width, height
CAR_SIZE = (4.4, 1.8, 1.5)
CAR_LENGTH, CAR_WIDTH, _ = CAR_SIZE
PERSON_SIZE = (0.5, 0.7, 1.8)
LIGHT_SIZE = (0.4, 1.2, 3.8)
CONE_SIZE = (0.5, 0.5, 1.0)
TRUCK_SIZE = (8.0, 2.4, 3.0)
CYCLIST_SIZE = (1.7, 0.5, 1.75)
DEER_SIZE = (1.7, 0.5, 1.6)
BUMP_SIZE = (1.2, 3.4, 0.12)
SIGN_SIZE = (0.1, 1.0, 2.6)
DEBRIS_SIZE = (0.8, 0.9, 0.7)
BARRIER_SIZE = (0.4, 1.8, 1.1)

# Shares of red, green, blue
DEER_COLOUR = (0.52, 0.34, 0.18)
CAR_COLOURS = (
    (0.9, 0.9, 0.9), (0.15, 0.15, 0.17), (0.55, 0.56, 0.6), (0.15, 0.25, 0.6), (0.1, 0.4, 0.25))
CLOTHES = (
    (0.95, 0.1, 0.6), (1.0, 0.9, 0.1), (0.1, 0.9, 0.95), (0.95, 0.95, 0.95), (0.6, 0.1, 0.9),
    (0.2, 0.35, 1.0))
WALLS = (
    (0.62, 0.42, 0.34), (0.68, 0.64, 0.55), (0.5, 0.52, 0.56), (0.75, 0.7, 0.66),
    (0.45, 0.38, 0.36))
RAIL_COLOURS = ((0.9, 0.1, 0.1), (0.95, 0.95, 0.95))
RARE_LOOKS = {
    "deer": dict(kind=DEER, size=DEER_SIZE, colour=DEER_COLOUR),
    "cyclist": dict(kind=CYCLIST, size=CYCLIST_SIZE, colour=(0.9, 0.3, 0.1)),
    "debris": dict(kind=DEBRIS, size=DEBRIS_SIZE, colour=(0.72, 0.52, 0.28)),
}

# Lanes: how many with us, left of ours; oncoming; with us, right of ours
NARROW = (0, 1, 0)
RIGHTMOST = (1, 2, 0)
LEFTMOST = (0, 2, 1)


# --------------------------------------------------------------------------------------------------
# A scene


class Thing(NamedTuple):
    """Anything that stands on the ground, and its script: it brakes once, drifts sideways once and
    changes its signal once. Times are seconds after t0. Cars also keep their distance
    (traffic.py)."""
    kind: int = NOTHING
    s: float = 0.0  # m, its centre when the scene starts, 2 s before t0
    d: float = 0.0
    v: float = 0.0  # m/s along the road; against it if oncoming
    oncoming: float = 0.0
    size: tuple = (1.0, 1.0, 1.0)
    colour: tuple = (1.0, 0.45, 0.0)
    signal: int = OFF
    t_signal: float = NEVER  # from then on it shows next_signal
    next_signal: int = OFF
    accel: float = 0.0  # m/s^2, negative: from t_accel on it brakes until its speed is v_end
    t_accel: float = NEVER
    v_end: float = 0.0
    t_go: float = NEVER  # from then on it goes back to its first speed
    drift: float = 0.0  # m/s to the left, from t_drift on, until d is d_end
    t_drift: float = NEVER
    d_end: float = 0.0
    cause: float = 0.0  # 1: the driver does not know of it before `react`
    blocks: float = 0.0  # 1: the driver holds until it has passed


class Cause(NamedTuple):
    """Why the driver does what it does."""
    name: str  # of SITUATIONS or RARE, or "aside" (see World.causes)
    side: int
    thing: int = -1  # index of its first thing; -1: none
    until: float = FAR  # m, arc length of the route at which the rear axle has passed it


@dataclass
class Draw:
    """All that is fixed about a scene. Times are seconds after t0, s and d are road coordinates in
    m (roads.py). The World turns every number here into a tensor, one row for each scene."""
    rng: np.random.Generator
    situation: str
    combines: set  # names of the causes that meet, keys of DRAW_CAUSE
    side: int  # LEFT or RIGHT: where the cause is
    cruise: float  # m/s
    react: float  # s: the expert does not know the cause before
    wander: tuple  # speed's amplitude, rate, phase; lateral amplitude, rate, phase
    daylight: float
    urban: float  # 1: pavement beside the road, 0: grass
    shoulder: float  # m, paved
    visibility: float = 150.0  # m, in haze
    rain: float = 0.0  # 0 dry .. 1 heavy
    dusk: float = 0.0  # 0 day .. 1 dusk
    lanes: tuple = NARROW
    road: tuple = STRAIGHT  # lines, see `place`
    route: tuple = STRAIGHT
    crossing: float = FAR  # s of the side road's centre
    stop: float = FAR  # s of the stop line
    hold: float = FAR  # s that the ego may not pass while it is held (World._release)
    bump: float = FAR  # s of a speed bump
    # Offset to the left (m); s where it begins, is full, ends, is gone
    nudge: tuple = (0.0, 0.0, 1.0, 2.0, 3.0)
    standing: float = 0.0  # 1: the ego stands at first
    signal: float = 0.0  # the ego's turn signal
    late: float = 0.0  # s: when the scene is shown
    lapse: tuple = (0.0, NEVER, NEVER)  # the driver aims so far to the left (m), from, until (s)
    causes: list = field(default_factory=list)
    things: list = field(default_factory=list)

    def braking(self, decel, v_end=0.0):
        """The distance (m) in which the ego brakes from its cruise speed to v_end (m/s) at decel
        (m/s^2), with half a second of delay."""
        return (self.cruise ** 2 - v_end ** 2) / (2 * decel) + 0.5 * self.cruise

    def line(self, side):
        """d of the outermost lane line on a side, m."""
        right, left = lane_edges(self.lanes)
        return left if side == LEFT else right

    def edge(self, side):
        """d of the asphalt's edge on a side, m."""
        return self.line(side) + side * self.shoulder

    def last(self):
        """s of the farthest thing that is a cause, without oncoming cars, m; 0 if there is none."""
        return max(
            [thing.s for thing in self.things if thing.cause and not thing.oncoming], default=0)

    def settle(self, thing, length=0.0):
        """Add a thing of the roadside, unless its place is taken or it would stand in the side
        road. length (m) is that of a building's front."""
        for other in self.things:
            along = abs(thing.s - other.s) <= (thing.size[0] + other.size[0]) / 2
            across = abs(thing.d - other.d) <= (thing.size[1] + other.size[1]) / 2
            if along and across and other.v == 0:
                return
        if abs(thing.s - self.crossing) > SIDE_ROAD + FILLET + length / 2:
            self.things.append(thing)


def draw(seed):
    """The scene of a seed, a Draw. It depends on nothing else. ValueError beyond the last split."""
    seed = whole_number("seed", seed, 0, SEEDS["end"] - 1)
    split = [name for name, first in SEEDS.items() if first <= seed][-1]
    rng = np.random.default_rng(seed)
    uniform = rng.uniform
    situation = _pick(rng, KINDS[split])
    names = COMBINATIONS.get(situation, (situation,)) or (_pick(rng, SITUATIONS),)
    sides = [ONLY_SIDE[name] for name in (situation, *names) if name in ONLY_SIDE]
    scene = Draw(
        rng,
        situation,
        combines={RARE.get(name, name) for name in names},
        side=_pick(rng, sides or (LEFT, RIGHT)),
        # The same speeds and reaction times in all situations, and no reaction before t0. Else a
        # model without eyes could read the answer off the kinematics.
        cruise=uniform(8, 14),
        react=uniform(0, 0.2),
        wander=tuple(uniform((0, 0.5, 0, 0, 0.8, 0), (0.4, 1.5, 6.3, 0.15, 1.6, 6.3))),
        daylight=uniform(0.75, 1.05),
        urban=float(uniform() < 0.5),
        shoulder=uniform(1, 2.5))
    _draw_weather(scene, uniform)
    _draw_road(scene, uniform)
    for name in names:
        things, until = DRAW_CAUSE[RARE.get(name, name)](scene, uniform)
        if name in RARE:
            things = [thing._replace(**RARE_LOOKS[name]) for thing in things[:2]]
        first = len(scene.things) if things else -1
        scene.causes.append(Cause(name, scene.side, first, until))
        scene.things += [thing._replace(cause=1.0) for thing in things]
    _draw_crossing(scene, uniform)
    _draw_traffic(scene, uniform)
    _draw_roadside(scene, uniform)
    if split == "train":
        _draw_lesson(scene, uniform)
    return scene


def find(situation, split, start=0):
    """The seed of the first scene of a situation in a split, number `start` of the split or later.
    ValueError if the split has no such situation, or none from there on."""
    if split not in KINDS:
        raise ValueError(f"split: expected one of {', '.join(KINDS)}, not {split!r}")
    known = KINDS[split]
    if situation not in known:
        raise ValueError(
            f"situation {situation!r}: not in split {split}; expected one of {', '.join(known)}")
    first = SEEDS[split]
    start = whole_number("start", start, 0, SEEDS["val"] - 1)  # splits are of one size
    for seed in range(first + start, first + SEEDS["val"]):
        if draw(seed).situation == situation:
            return seed
    raise ValueError(f"situation {situation!r}: none in split {split} from {start} on")


# --------------------------------------------------------------------------------------------------
# Road and weather


def _pick(rng, items):
    return items[rng.integers(len(items))]


def _draw_weather(scene, uniform):
    """Half of all scenes are in plain daylight. Dusk and rain meet in the long tail only."""
    both = scene.situation == "dusk and rain"
    weather = _pick(scene.rng, ("day", "day", "day", "dusk", "rain", "haze"))
    if both or weather == "dusk":
        scene.dusk = uniform(0.6, 1)
        scene.daylight *= uniform(0.5, 0.65)
    if both or weather == "rain":
        scene.rain = uniform(0.5, 1)
        scene.visibility = uniform(80, 120)
    elif weather == "haze":
        scene.visibility = uniform(45, 75)


# Some causes are only drawn on one side
ONLY_SIDE = {
    "parked car": RIGHT, "double-parked car": RIGHT, "oncoming car": RIGHT,
    "cut-in at a red light": LEFT}
# These come with a crossing, and say who goes first
CONTROLS = {"red light", "resume", "green light", "stop sign"}


def _lanes_for(name, side):
    """The layouts of lanes in which a cause can be drawn, if it is on this side."""
    if name in ("cut-in", "lane closed", "gap search"):  # on the lane beside ours
        return [RIGHTMOST if side == LEFT else LEFTMOST]
    if name == "turn":  # from the lane next to the side road
        return [NARROW, LEFTMOST if side == LEFT else RIGHTMOST]
    if name in ("curve", "oncoming car", "swerving car"):  # a sharp bend has no room for more
        return [NARROW]
    if name in {"parked car", "double-parked car", *CONTROLS}:  # at the right, next to our lane
        return [NARROW, RIGHTMOST]
    return [NARROW, RIGHTMOST, LEFTMOST]


def _draw_road(scene, uniform):
    """Two lanes, or four with ours on the right or on the left of our two. Some roads bend."""
    lanes = [NARROW, RIGHTMOST, LEFTMOST]
    for name in scene.combines:
        lanes = [layout for layout in lanes if layout in _lanes_for(name, scene.side)]
    scene.lanes = _pick(scene.rng, lanes)
    if "curve" in scene.combines:
        speed = scene.cruise * uniform(0.5, 0.72)  # at which the bend takes 2 m/s^2 sideways
        radius = min(max(speed ** 2 / 2, 12), 45)
        start = scene.braking(uniform(1.8, 2.6), math.sqrt(2 * radius))
        scene.road = (start, scene.side / radius, radius * uniform(0.9, 1.5))
    elif scene.combines & {"turn", *CONTROLS} or uniform() < 0.25:
        scene.crossing = 0.0  # there is one; `_draw_crossing` says where
    elif uniform() < 0.5:  # a bend that asks for nothing
        start = uniform(-20, 60)
        scene.road = (start, _pick(scene.rng, (LEFT, RIGHT)) / uniform(150, 500), uniform(50, 120))
    scene.route = scene.road


def _draw_crossing(scene, uniform):
    """Say where the side road is. A light that asks for nothing is green and lies beyond the cause.
    With a pedestrian there is none: the two meet in the long tail only."""
    if scene.crossing == FAR:
        return
    does = scene.combines
    green = not does & {"free", "pedestrian", *CONTROLS} and _pick(scene.rng, (False, True))
    if "turn" in does:  # which ends in the side road's right lane
        start, k, _ = scene.route
        scene.stop = start + 1 / abs(k) - scene.side * LANE / 2 - SIDE_ROAD - FILLET - 0.5
    elif not does & CONTROLS:
        nudged = scene.nudge[3] % FAR  # a change of lanes, which never ends, counts as 0
        scene.stop = max(FRONT + 3 + scene.braking(2.5), scene.last(), nudged) + uniform(15, 45)
    scene.crossing = scene.stop + 0.5 + FILLET + SIDE_ROAD
    if green:
        scene.things.append(_light(scene, GREEN))


# --------------------------------------------------------------------------------------------------
# Things


def _car(scene, s, d, v, oncoming=0.0, size=CAR_SIZE, **script):
    """A car at v m/s. Its centre is at s, d at t0 if it keeps its speed."""
    start = s - (1 - 2 * oncoming) * v * PAST * DT
    return Thing(CAR, start, d, v, oncoming, size, _pick(scene.rng, CAR_COLOURS), **script)


def _person(scene, s, d, **script):
    return Thing(PEDESTRIAN, s, d, size=PERSON_SIZE, colour=_pick(scene.rng, CLOTHES), **script)


def _light(scene, signal, t_green=NEVER):
    """The light at the stop line. It turns green t_green s after t0."""
    d = scene.line(RIGHT) - 1.4
    return Thing(
        LIGHT, scene.stop + 1, d, size=LIGHT_SIZE, colour=(0.1, 0.1, 0.1), signal=signal,
        t_signal=t_green, next_signal=GREEN)


def _sign(scene, s, signal=OFF):
    """A stop sign; with YELLOW, a warning."""
    return Thing(SIGN, s, scene.line(RIGHT) - 1.2, size=SIGN_SIZE, signal=signal)


def _barriers(s):
    return [Thing(BARRIER, s, d, size=BARRIER_SIZE) for d in (-0.85, 0.85)]


# --------------------------------------------------------------------------------------------------
# Causes: near enough to ask for an answer within 6.4 s, far enough to give it in comfort
#
# Each function returns the things that are the cause, and its `until` (see Cause). It may write
# into the scene where to stop, hold or go aside. uniform(low, high) draws a number.

REAR = FRONT + CAR_LENGTH / 2  # m: s of the centre of a car that touches our front bumper at t0


def _free(scene, uniform):
    return [], FAR


def _curve(scene, uniform):
    start, _, length = scene.road
    return [], start + length


def _slower_lead(scene, uniform):  # without lights
    slower = uniform(3.5, 6)  # m/s less than we
    v = scene.cruise - slower
    gap = 3 + 0.8 * v + slower ** 2 / (2 * uniform(1.2, 2.2)) + 0.5 * slower
    return [_car(scene, REAR + gap, 0, v)], FAR


def _braking_lead(scene, uniform):  # with its brake lights on, for 0.6 s at least
    v = scene.cruise
    decel = uniform(2.2, 3.2)
    since = uniform(0.6, 1.2)  # s before t0
    v_end = v * uniform(0, 0.4)
    to_brake = ((v - decel * since) ** 2 - v_end ** 2) / (2 * decel)  # m that it still rolls
    gap = max(10, scene.braking(3, v_end) - to_brake + 4)
    script = dict(accel=-decel, t_accel=-since, v_end=v_end, t_go=uniform(7, 10))
    s = REAR + gap + decel * since ** 2 / 2
    return [_car(scene, s, 0, v, **script)], FAR


def _stopped_lead(scene, uniform):  # with hazard lights: brake lights would say that it is braking
    s = REAR + 3 + scene.braking(uniform(2.4, 3.2))
    return [_car(scene, s, 0, 0, signal=HAZARD)], FAR


def _red_light(scene, uniform):  # until after all that a Scene shows; at some the ego stands
    cut_in = "cut-in" in scene.combines
    scene.standing = float(not cut_in and uniform() < 0.35)
    if scene.standing:
        away = uniform(2, 5)
    else:
        room = LENGTH + 8 if cut_in else 3  # for the car that will be before us
        away = room + scene.braking(uniform(2.3, 3.1))
    scene.stop = scene.hold = FRONT + away
    return [_light(scene, RED, uniform(7.5, 11))], scene.stop - FRONT


def _resume(scene, uniform):  # red until a moment ago
    scene.standing = 1.0
    scene.stop = scene.hold = FRONT + uniform(2, 5)
    return [_light(scene, RED, uniform(-0.9, -0.1))], scene.stop - FRONT


def _green_light(scene, uniform):  # with a pedestrian, before him
    scene.stop = FRONT + 3 + scene.braking(uniform(2.3, 3.1))
    return [_light(scene, GREEN)], scene.stop - FRONT


def _stop_sign(scene, uniform):
    scene.stop = scene.hold = FRONT + 3 + scene.braking(uniform(2.3, 3.1))
    return [_sign(scene, scene.stop + 0.5)], scene.stop - FRONT


def _pedestrian(scene, uniform):  # on the road when the ego gets there
    side = scene.side
    where = FRONT + 4 + scene.braking(uniform(2.4, 3.1))
    away = uniform(2.2, min(5, abs(scene.edge(side)) + 0.3))  # m beside our line, at t0
    seconds = (where - FRONT) / scene.cruise  # until we are there
    walk = min(max((away + uniform(-0.8, 0.6)) / seconds, 0.8), 2.0)  # m/s
    since = PAST * DT  # he has walked all the while
    if "double-parked car" in scene.combines:  # he steps out from behind its front
        car = scene.things[0]
        where = car.s + CAR_LENGTH / 2 + uniform(0.7, 1.2)
        walk = uniform(1, 1.5)
        since = 0.6
        away = -car.d - CAR_WIDTH / 2 - 0.3  # so he can be seen beside it at t0
    elif "green light" in scene.combines:
        where = scene.stop + 2.5
    elif "speed bump" in scene.combines:
        where = scene.bump + uniform(1.5, 4)
    script = dict(drift=-side * walk, t_drift=-since, d_end=-side * (abs(scene.edge(-side)) + 1))
    return [_person(scene, where, side * (away + walk * since), **script)], where + 1


def _waiting_pedestrian(scene, uniform):  # at the edge of the road; he does not walk
    where = FRONT + 6 + scene.cruise * uniform(1.2, 2.6)
    d = scene.line(scene.side) + scene.side * uniform(0.5, 1)
    return [_person(scene, where, d)], where + 1


def _cut_in(scene, uniform):  # signals and starts about now, or has started without a signal
    side = scene.side
    slower = uniform(1.5, 3.5)  # m/s less than we
    v = scene.cruise - slower
    signals = uniform() < 0.5
    s = REAR + 5 + slower ** 2 / 2 + 0.5 * slower + uniform(0, 4)
    earliest, latest = (-0.4, 0.2) if signals else (-1.4, -1.0)
    script = dict(drift=-side * uniform(0.9, 1.3), t_drift=uniform(earliest, latest))
    if signals:
        script["signal"] = BLINK_RIGHT if side == LEFT else BLINK_LEFT
    if "red light" in scene.combines:  # it has to stop, too
        way = scene.stop - 1 - s - CAR_LENGTH / 2 - v * 0.5  # m
        script["accel"] = -v ** 2 / (2 * max(way, 5))
        script |= dict(t_accel=0.5, t_go=scene.things[0].t_signal + 0.5)
    return [_car(scene, s, side * LANE, v, **script)], FAR


def _go_around(scene, offset, first, length, begin):
    """The ego goes around what stands from s = first on, over a length (m): aside from s = begin
    on, fully before the first, back after the last, as gently back as out.

    Returns the s where it is fully aside. The decision is over there."""
    full = first - FRONT - 1
    end = first + length + 2
    scene.nudge = (offset, begin, full, end, end + full - begin)
    return full


def _cones(scene, uniform):
    side = scene.side
    step = uniform(2, 3)
    first = FRONT + 2 + scene.cruise * uniform(1.9, 2.4)
    begin = 0.2 * scene.cruise  # after the latest reaction
    offset = 1.3
    if "curve" in scene.combines:
        start, _, length = scene.road
        first = max(start + uniform(0, 0.3) * length, FRONT + 18)
        begin = first - FRONT - 13
        offset = 1.1
    cones = [
        Thing(CONE, first + i * step, side * (1.5 - 0.2 * i), size=CONE_SIZE) for i in range(5)]
    return cones, _go_around(scene, -side * offset, first, 4 * step, begin)


def _parked_car(scene, uniform):  # reaches into the lane, which has room to pass
    first = FRONT + 2 + scene.cruise * uniform(1.9, 2.4)
    parked = _car(scene, first + CAR_LENGTH / 2, -uniform(2.3, 2.5), 0)
    return [parked], _go_around(scene, 0.7, first, CAR_LENGTH, 0.2 * scene.cruise)


def _double_parked_car(scene, uniform):  # half in the lane, which the ego has to leave
    first = FRONT + 2 + scene.cruise * uniform(2.3, 2.8)
    if "pedestrian" in scene.combines:
        first = FRONT + 4 + scene.braking(uniform(2.4, 3.1)) - CAR_LENGTH
    parked = _car(scene, first + CAR_LENGTH / 2, -uniform(1.5, 1.9), 0, signal=HAZARD)
    return [parked], _go_around(scene, 1.6, first, CAR_LENGTH, 0.2 * scene.cruise)


def _oncoming_car(scene, uniform):  # comes while we would be in its lane
    hold = scene.braking(uniform(2.2, 2.8))
    scene.hold = hold + FRONT + 3
    first = hold + FRONT + 17
    v = uniform(8, 12)
    parked = _car(scene, first + CAR_LENGTH / 2, -uniform(1.5, 1.9), 0, signal=HAZARD)
    oncoming = _car(scene, hold + v * uniform(2.5, 4.5), LANE, v, oncoming=1.0, blocks=1.0)
    return [parked, oncoming], _go_around(scene, 1.6, first, CAR_LENGTH, hold + 2)


def _lane_closed(scene, uniform):
    begin = 0.2 * scene.cruise
    full = begin + scene.cruise * uniform(2.7, 3.2)
    s = full + FRONT + 4
    scene.nudge = (scene.side * LANE, begin, full, FAR, FAR + 1)
    return _barriers(s), s


def _gap_search(scene, uniform):  # a car beside us, soon past us
    hold = scene.braking(uniform(2, 2.4))
    scene.hold = hold + FRONT + 3
    scene.nudge = (scene.side * LANE, hold + 2, hold + 30, FAR, FAR + 1)
    s = hold + FRONT + 36
    beside = _car(
        scene, uniform(-1.8, 3), scene.side * LANE, scene.cruise + uniform(0.5, 2.5), blocks=1.0)
    return [*_barriers(s), beside], s


def _speed_bump(scene, uniform):  # with a warning sign
    scene.bump = FRONT + scene.braking(uniform(1.8, 2.6), BUMP_SPEED)
    if "pedestrian" in scene.combines:
        scene.bump = FRONT + 2 + scene.braking(uniform(2.4, 3.1))
    bump = Thing(BUMP, scene.bump, 0.0, size=BUMP_SIZE)
    return [bump, _sign(scene, scene.bump - 3, YELLOW)], scene.bump


def _swerving_car(scene, uniform):  # comes towards us, over the line
    faster = uniform(8, 12)
    meet = scene.cruise * uniform(3, 3.6) + FRONT
    s = meet + faster * (meet - FRONT) / scene.cruise
    script = dict(drift=-uniform(0.8, 1.2), t_drift=uniform(-1.2, -0.7), d_end=uniform(1.7, 1.9))
    scene.side = LEFT  # wherever else it was drawn
    scene.nudge = (-0.65, 0.2 * scene.cruise, meet - 12, meet + 10, meet + 30)
    return [_car(scene, s, LANE, faster, oncoming=1.0, **script)], FAR


def _turn(scene, uniform):  # half of the drivers do not signal: only the route tells
    radius = uniform(10, 12) if scene.side == LEFT else uniform(7, 8.5)
    start = scene.braking(uniform(2.3, 3.0), math.sqrt(2 * radius))
    length = radius * math.pi / 2
    scene.route = (start, scene.side / radius, length)
    scene.signal = float(scene.side * (uniform() < 0.5))
    return [], start + length


# After the paper's key frames (Table 3). Training shows each alone. The order is that of the draw:
# whoever adds one or moves one changes what every seed draws, and raises WORLD_VERSION.
DRAW_CAUSE = {
    "free": _free,
    "curve": _curve,
    "slower lead": _slower_lead,
    "braking lead": _braking_lead,
    "stopped lead": _stopped_lead,
    "red light": _red_light,
    "resume": _resume,
    "green light": _green_light,
    "stop sign": _stop_sign,
    "pedestrian": _pedestrian,
    "waiting pedestrian": _waiting_pedestrian,
    "cut-in": _cut_in,
    "cones": _cones,
    "parked car": _parked_car,
    "double-parked car": _double_parked_car,
    "oncoming car": _oncoming_car,
    "lane closed": _lane_closed,
    "gap search": _gap_search,
    "speed bump": _speed_bump,
    "swerving car": _swerving_car,
    "turn": _turn,
}
SITUATIONS = tuple(DRAW_CAUSE)
# What is learned last is shown twice as often.
HARD = ("pedestrian", "waiting pedestrian", "cut-in", "oncoming car", "curve", "turn")
KINDS = {
    "train": SITUATIONS + HARD, "val": SITUATIONS, "tail": tuple(COMBINATIONS), "rare": tuple(RARE)}


# --------------------------------------------------------------------------------------------------
# The crowd: nobody gets in the way of the cause or of the ego


NOTHING_AHEAD = {
    "free", "green light", "waiting pedestrian", "pedestrian", "cut-in", "cones", "parked car"}
NO_PARKING = {
    "pedestrian", "waiting pedestrian", "parked car", "double-parked car", "oncoming car"}


def _draw_traffic(scene, uniform):
    """Cars on the side road, beside us, oncoming, far ahead and behind."""
    v = scene.cruise
    does = scene.combines
    things = scene.things
    left, oncoming, right = scene.lanes
    nudged = scene.nudge[0]
    closed = _closed(scene)
    if "red light" in does and "cut-in" not in does:  # then a car stands between
        things += _cross_traffic(scene, uniform)
    moving = not scene.standing and not does & {"cut-in", "gap search"}
    for lane in [LEFT] * left + [RIGHT] * right:
        if uniform() < 0.5 and closed == FAR and lane * nudged <= 0 and moving:
            things.append(_car(scene, uniform(-6, 40), lane * LANE, v + uniform(-2, 2)))
    hides = "pedestrian" in does and scene.side == LEFT
    free = closed > 16 and not hides and not does & {"swerving car", "oncoming car"}
    for lane in range(left + 1, left + oncoming + 1):
        nudged_into = lane == 1 and nudged > 0
        if uniform() < 0.5 and free and not nudged_into:
            size = TRUCK_SIZE if uniform() < 0.2 and closed > 30 else CAR_SIZE
            s = uniform(8, min(110, closed - 6))
            things.append(_car(scene, s, lane * LANE, uniform(7, 14), 1.0, size))
    if does <= NOTHING_AHEAD and uniform() < 0.4:  # as fast as we are
        s = max(FRONT + 45, scene.last() + 16 + 2 * v) + uniform(0, 25)
        things.append(_car(scene, s, 0, v))
    if moving and "lane closed" not in does and uniform() < 0.35:  # behind us, unseen
        things.append(_car(scene, uniform(-26, -14), 0, v))


def _cross_traffic(scene, uniform):
    """Cars that cross while our light is red: who does not stop may meet one of them.

    A car across the road is one that drifts and does not move along it. As part of the cause, none
    is known to the driver before `react`."""
    light = next(thing for thing in scene.things if thing.kind == LIGHT)
    v = uniform(8, 11)
    when = uniform(-1, 1.5)  # s after t0 at which the next one crosses our lane
    cars = []
    while when < light.t_signal - 1.5:
        side = _pick(scene.rng, (LEFT, RIGHT))  # where it comes from; it keeps to its right
        s = scene.crossing - side * LANE / 2
        d = side * v * (when + PAST * DT)
        script = dict(drift=-side * v, t_drift=-PAST * DT, d_end=-side * FAR)
        cars.append(_car(scene, s, d, 0, cause=1.0, **script))
        when += uniform(1.2, 3.5)
    return cars


def _closed(scene):
    """The s at which the other cars are held up, as we are: a crossing pedestrian, a stop line, a
    turn across their lane. FAR if nothing holds them."""
    if "pedestrian" in scene.combines:
        return min(thing.s for thing in scene.things if thing.cause)
    if scene.combines & {"red light", "resume", "stop sign"}:
        return scene.stop
    if "turn" in scene.combines and scene.side == LEFT:
        return scene.route[0]
    return FAR


def _draw_roadside(scene, uniform):
    """People, parked cars and cones beside the road, then the scenery."""
    does = scene.combines
    limit = scene.road[0] if "curve" in does else 70  # m; a sharp bend has no room on its inside
    for s in uniform(8, limit, scene.rng.integers(0, 4)):
        beside = [scene.edge(side) + side * uniform(2, 4) for side in (LEFT, RIGHT)]
        scene.settle(_person(scene, s, _pick(scene.rng, beside)))
    if not does & NO_PARKING:
        for s in uniform(8, limit, scene.rng.integers(0, 3)):  # clear of the lane
            d = scene.line(RIGHT) - CAR_WIDTH / 2 - uniform(0.9, 1.6)
            scene.settle(_car(scene, s, d, 0))
    if "pedestrian" not in does and scene.nudge[0] >= 0 and uniform() < 0.3:
        for s in uniform(8, limit, 3):
            d = scene.line(RIGHT) - uniform(0.9, 1.6)
            scene.settle(Thing(CONE, s, d, size=CONE_SIZE))
    _draw_scenery(scene, uniform, limit)


def _draw_scenery(scene, uniform, limit):
    """Buildings and trees on both sides, more in a town, and a rail along the outside of a sharp
    bend, which shows it from afar. Nothing stands on the inside of the bend from s = limit - 15 m
    on."""
    for side in (LEFT, RIGHT):
        edge = scene.edge(side)
        inside = "curve" in scene.combines and side == scene.side
        far = max(0, limit - 15) if inside else 100
        for s in uniform(-10, far, 3 if scene.urban else scene.rng.integers(0, 2)):
            d = edge + side * uniform(11, 18)
            size = tuple(uniform((9, 8, 5), (20, 12, 14)))
            wall = Thing(BUILDING, s, d, size=size, colour=_pick(scene.rng, WALLS))
            scene.settle(wall, length=20)
        for s in uniform(0, far, scene.rng.integers(0, 3)):
            d = edge + side * uniform(4, 6)
            size = (2.4, 2.4, uniform(4, 6))
            colour = (0.13, uniform(0.3, 0.45), 0.12)
            scene.settle(Thing(TREE, s, d, size=size, colour=colour))
    if "curve" in scene.combines:
        start, k, length = scene.road
        piece = length / 6  # m
        d = scene.edge(-scene.side) - 0.8 * scene.side
        size = (piece * (1 + abs(d * k)), 0.3, 1.1)
        for i in range(6):
            s = start + (i + 0.5) * piece
            scene.things.append(Thing(RAIL, s, d, size=size, colour=RAIL_COLOURS[i % 2]))


# --------------------------------------------------------------------------------------------------
# The lesson of a training scene


def _draw_lesson(scene, uniform):
    """When a training scene is shown, and where its driver errs.

    An expert who never errs does not teach to correct an error, and one who is only seen at t0 does
    not teach what follows. So some scenes are shown later, and in most the driver drifts aside for
    a while, by 1.3 m at most. At t0 he is back on his line or on the way to it. Closed loop needs
    this, where a learner's own small errors add up. Where the cause begins at t0, the lapse before
    must tell nothing of it: it is of the same kind in all situations."""
    if uniform() < 0.4:
        scene.late = round(uniform(0.5, 9), 1)
    if uniform() < 0.75:
        aside = scene.nudge[0]
        most = 0.4 if abs(scene.route[1] * scene.route[2]) > 0.5 else 1.3  # m; less in a turn
        if not scene.late:
            offset = uniform(-0.8, 0.8)
        elif aside:  # only further away from what one goes around, if nobody parks there
            offset = math.copysign(uniform(0.1, 0.5), aside)
            parked = any(
                thing.kind == CAR and not (thing.v or thing.cause) for thing in scene.things)
            if parked and aside < 0:
                offset = 0.0
        else:
            offset = uniform(-most, most)
        since = scene.late - uniform(0.5, 3)
        until = scene.late + uniform(-0.9, scene.react)
        scene.lapse = (offset, since, until)

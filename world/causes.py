"""
What a seed draws: a road, its causes, and a crowd of things that ask for no reaction.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from alpamayo import DT, HORIZON
from world.roads import FAR, FILLET, LANE, NEVER, SIDE_ROAD, STRAIGHT, lane_edges

WORLD_VERSION = 2       # raise it whenever a seed gives another scene: caches carry it in their name
HISTORY, FUTURE = 16, HORIZON           # steps of a Scene, up to t0 and after it
PAST = 20               # steps of a scene before t0
WHEELBASE = 2.8         # m
FRONT, WIDTH, LENGTH = 3.7, 1.9, 4.7    # m: rear axle to front bumper, and the ego's size
LEFT, RIGHT = 1, -1     # sides are signs, as y is
BUMP_SPEED = 4.5  # m/s over a bump

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
    d = lane_edges(scene.lanes)[0] - 1.4
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
    sign = Thing(SIGN, scene.stop + 0.5, lane_edges(scene.lanes)[0] - 1.2, size=SIGN_SIZE)
    scene.add("stop sign", [sign], until=scene.stop - FRONT)


def _pedestrian(scene, does, rng):              # on the road or at its edge, ahead of the car when that gets there
    v, side, where = scene.cruise, scene.side, FRONT + 4 + scene.braking(rng.uniform(2.4, 3.1))
    right, left = (abs(line) + scene.shoulder for line in lane_edges(scene.lanes))          # m to the road's edges
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
    line = lane_edges(scene.lanes)[0 if scene.side == RIGHT else 1]
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
    sign = Thing(SIGN, scene.bump - 3, lane_edges(scene.lanes)[0] - 1.2, size=SIGN_SIZE, signal=YELLOW)   # a warning
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
    (right_line, left_line), nudged = lane_edges(scene.lanes), scene.nudge[0]
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


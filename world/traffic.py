"""
The world that moves: the things' scripts, the cars' manners, the expert that drives and the judge.

The page reads: the World and its start, where everything is now, a tick of 0.1 s, why the driver
does what it does, the expert, the judge.
"""
import copy
import functools
import math
from types import SimpleNamespace

import torch

from alpamayo import DT
from doors import whole_numbers
from world.causes import (
    BUMP_SPEED,
    CAR,
    CYCLIST,
    DEER,
    FRONT,
    IMMATERIAL,
    LEFT,
    LENGTH,
    LIGHT,
    PAST,
    RED,
    RIGHT,
    SIGN,
    WALKERS,
    WIDTH,
    YELLOW,
    Cause,
    Thing,
    draw,
)
from world.roads import FAR, FILLET, LANE, SIDE_ROAD, lane_edges, locate, place, turn

# The expert's manners
MAX_ACCEL = 1.5  # m/s^2
COMFORT = 3.0  # m/s^2, of braking
MAX_JERK = 4.0  # m/s^3
HEADWAY = 0.8  # s
LEAST = 2.0  # m to what stands ahead
MARGIN = 0.3  # m that it keeps free on either side
FORESIGHT = 4.0  # s: it brakes for what will be in its way by then

# The judge and the rules
MIDDLE = FRONT - LENGTH / 2  # m from the rear axle to the middle of the ego
LONG_STOP = 1.0  # s at a stop sign
NEAR = 0.25  # m: nearer is a close encounter
ASIDE = 0.4  # m: farther from its line the ego has to go back


def follow(gap, v, lead):
    """The deceleration (m/s^2, never positive) of a driver at v m/s behind what is `gap` m ahead
    and moves at `lead` m/s: the second term of the intelligent driver model (Treiber 2000)."""
    closing = v * (v - lead) / (2 * math.sqrt(MAX_ACCEL * COMFORT))
    want = LEAST + (v * HEADWAY + closing).clamp(min=0)  # m
    return -MAX_ACCEL * (want / gap.clamp(min=0.5)) ** 2


class World:
    """n scenes, one for each seed, that advance in steps of 0.1 s from t0 - 2 s on.

    draws               what the seeds drew, n Draws
    scene               their numbers as tensors, (n,) or (n, k) each
    things              the things' numbers, (n, things) each; of these s, d (m) and v (m/s) change
    x, y, yaw           the ego in the world's frame, (n,) each, m and rad
    speed               m/s, (n,)
    accel, curvature    the last ones, m/s^2 and 1/m, (n,)
    time                s after t0, (n,)

    `step` moves everything, `expert` drives, `causes` says why, `judge` says how it went, and
    `images_of` (render.py) looks."""

    def __init__(self, seeds, device="cpu"):
        self.draws = [draw(seed) for seed in whole_numbers("seeds", seeds)]
        if not self.draws:
            raise ValueError("seeds: expected one or more")
        self.device = device
        tensor = functools.partial(torch.tensor, dtype=torch.float32, device=device)
        scene = self.scene = SimpleNamespace()
        for name, value in vars(self.draws[0]).items():
            if isinstance(value, (int, float, tuple)):
                setattr(scene, name, tensor([getattr(one, name) for one in self.draws]))

        t = self.things = SimpleNamespace()
        most = max(len(one.things) for one in self.draws) or 1
        rows = [one.things + [Thing()] * (most - len(one.things)) for one in self.draws]
        for name in Thing._fields:
            setattr(t, name, tensor([[getattr(thing, name) for thing in row] for row in rows]))
        t.length, t.width, _ = t.size.unbind(-1)
        t.way = 1 - 2 * t.oncoming  # 1, or -1: along or against the road
        t.start_v = t.v
        t.slows = t.v < 0  # bool: brakes for what is ahead

        # The ego starts at its cruise speed, on its wandering line.
        self.time = torch.full_like(scene.late, -PAST * DT)
        speed, lateral = self._wander()
        moves = 1 - scene.standing
        s = self.time * scene.cruise * moves
        self.x, self.y, self.yaw = place(s, lateral, scene.route)
        self.speed = (scene.cruise + speed) * moves
        self.accel = torch.zeros_like(s)
        self.curvature = torch.zeros_like(s)
        self.held = scene.hold < FAR  # (n,) bool
        self.stood = torch.zeros_like(s)  # s, at the stop sign

    def repeat(self, m):
        """A World with each scene m times, side by side, as it is now: (n * m, ...)."""
        many = copy.deepcopy(self)
        many.draws = [one for one in self.draws for _ in range(m)]
        for part in (many, many.scene, many.things):
            for name, value in vars(part).items():
                if torch.is_tensor(value):
                    setattr(part, name, value.repeat_interleave(m, 0))
        return many

    def catch_up(self):
        """Let scenes that are shown late drive ahead, so all arrive at their t0 together."""
        late = (self.scene.late / DT).round()
        for left in range(int(late.max()), 0, -1):
            ego = copy.copy(self)
            things = copy.copy(self.things)
            self.step(*self.expert())
            _move_only(late >= left, self, ego)
            _move_only((late >= left)[:, None], self.things, things)

    # ----------------------------------------------------------------------------------------------
    # Where everything is now

    def on_route(self):
        """s, d of the ego along its route, and the route's heading there, (n,) each."""
        return locate(self.x, self.y, self.scene.route)

    def bumper(self):
        """s of the ego's front bumper along its route, (n,)."""
        return self.on_route()[0] + FRONT

    def signals(self):
        """What the things signal, (n, things)."""
        t = self.things
        return t.next_signal.where(self._since(t.t_signal), t.signal)

    def braking(self):
        """Which of the things show brake lights, (n, things) bool."""
        t = self.things
        return (self._scripted() & ((t.v > t.v_end + 0.1) | (t.v < 0.1))) | t.slows

    def poses(self):
        """World x, y (m) and heading (rad) of the things, (n, things) each. Cars and cyclists that
        drift look where they go, and so do deer."""
        t = self.things
        x, y, yaw = place(t.s, t.d, self.scene.road[:, None])
        drives = (t.kind == CAR) | (t.kind == CYCLIST)
        swerve = self._drift().atan2(t.v.clamp(min=0.1)) * drives
        swerve = t.drift.atan2(t.v).where(t.kind == DEER, swerve)
        return x, y, yaw + math.pi * t.oncoming + swerve

    def to_ego(self, x, y):
        """Points x, y (n, k) of the world's frame in the ego's: x, y (n, k), m."""
        return turn(x - self.x[:, None], y - self.y[:, None], -self.yaw[:, None])

    def poses_to_ego(self):
        """`poses` in the ego frame: x, y (m) and yaw (rad), (n, things) each."""
        x, y, yaw = self.poses()
        return *self.to_ego(x, y), yaw - self.yaw[:, None]

    def solid(self, kind):
        """Which kinds one can run into: (...) bool."""
        return ~torch.isin(kind, kind.new_tensor(IMMATERIAL))

    def _since(self, time):
        """Whether a time (n, things) of a script has come."""
        return self.time[:, None] >= time - DT / 2

    def _scripted(self):
        """Whether a script holds the speed, (n, things) bool."""
        return self._since(self.things.t_accel) & ~self._since(self.things.t_go)

    def _drift(self):
        """Lateral speed of the things (n, things), m/s to the left. A drift ends at d_end."""
        t = self.things
        drifts = self._since(t.t_drift) & (t.drift * (t.d_end - t.d) > 0)
        return t.drift.where(drifts, 0)

    # ----------------------------------------------------------------------------------------------
    # A tick

    def step(self, accel, curvature):
        """Advance by 0.1 s: the things, and the ego by accel (m/s^2) and curvature (1/m), (n,)."""
        self._step_things()
        self._step_ego(accel, curvature)
        self.time = self.time + DT
        self._release()

    def _step_ego(self, accel, curvature):
        """The unicycle of Eq. 5, with the acceleration and curvature of this step."""
        v = (self.speed + DT * accel).clamp(min=0)
        self.accel = (v - self.speed) / DT  # as driven: no car brakes backwards
        yaw = self.yaw + DT * curvature * self.speed + DT ** 2 / 2 * curvature * self.accel
        x0, y0 = turn(self.speed, 0, self.yaw)  # m/s, before and after
        x1, y1 = turn(v, 0, yaw)
        self.x = self.x + DT / 2 * (x0 + x1)
        self.y = self.y + DT / 2 * (y0 + y1)
        self.yaw = yaw
        self.speed = v
        self.curvature = curvature

    def _step_things(self):
        """The things follow their scripts: a speed to brake to, later their first speed again, and
        a drift. Cars that would run into something brake harder."""
        t = self.things
        scripted = self._scripted()
        target = t.v_end.where(scripted, t.start_v)  # m/s
        brakes = scripted & (t.v > t.v_end)
        catch_up = ((target - t.v) / DT).clamp(max=MAX_ACCEL)
        change = self._keep_distance(t.accel.where(brakes, catch_up), target)
        least = t.v_end.where(brakes & (change >= t.accel), 0)  # where a script stops to brake
        v = (t.v + DT * change).maximum(least)
        t.slows = (t.v - v) / DT > 0.7
        t.s = t.s + DT / 2 * (t.v + v) * t.way
        t.v = v
        t.d = t.d + DT * self._drift()

    def _keep_distance(self, change, target):
        """The accelerations (n, things), m/s^2, of things that wish for `change` on their way to
        the speed `target` (m/s). Cars slow for the nearest thing in their lane, or for the ego."""
        t = self.things
        cars = (t.kind == CAR).nonzero(as_tuple=True)  # scene and thing of each: two (cars,)
        car = SimpleNamespace()  # (cars, 1) each
        other = SimpleNamespace()  # (cars, things) each: all that is in the scene of each
        for name in ("s", "d", "v", "way", "length", "width"):
            value = getattr(t, name)
            setattr(car, name, value[cars][:, None])
            setattr(other, name, value[cars[0]])
        slow = torch.zeros_like(change)  # (n, things)
        slow[cars] = _slow_for(car, other, self.solid(t.kind)[cars[0]]).amin(1)
        s, d, heading = locate(self.x, self.y, self.scene.road)
        heading = self.yaw - heading
        x, y = turn(MIDDLE, 0, heading)  # from the rear axle to the middle
        cos = heading.cos().abs()
        sin = heading.sin().abs()
        ego = SimpleNamespace(way=1)
        ego.length = (cos * LENGTH + sin * WIDTH)[:, None]  # along the road, and across it
        ego.width = (sin * LENGTH + cos * WIDTH)[:, None]
        ego.s = (s + x)[:, None]
        ego.d = (d + y)[:, None]
        ego.v = (self.speed * heading.cos())[:, None]
        slow = slow.minimum(_slow_for(t, ego))
        free = MAX_ACCEL * (1 - (t.v / target.clamp(min=1)) ** 4)
        careful = change.minimum((free + slow).clamp(min=-8))
        return careful.where((t.kind == CAR) & (slow < -0.3), change)

    def _release(self):
        """Keep what is held held, or release it. A light holds until it is green, a stop sign until
        the ego has stood there, and a car that blocks the way until it has passed."""
        t = self.things
        hold = self.scene.hold
        s, _, _ = self.on_route()
        at_line = (self.speed < 0.15) & ((hold - s - FRONT).abs() < 5)
        self.stood = self.stood + DT * at_line
        red = (t.kind == LIGHT) & (self.signals() == RED)
        sign = (t.kind == SIGN) & (t.signal != YELLOW) & (self.stood < LONG_STOP)[:, None]
        bumper = (s + FRONT)[:, None]
        rear = t.s - t.length / 2
        past = torch.where(t.oncoming > 0, rear + t.length < bumper, rear > bumper + 6)
        blocked = (t.blocks > 0) & ~past
        self.held = self.held & (red | sign | blocked).any(1)

    # ----------------------------------------------------------------------------------------------
    # Why: the route and the causes

    def route(self):
        """Where the driver is told to go: n of LEFT, RIGHT and 0, straight on."""
        scene = self.scene
        s, _, _ = self.on_route()
        start, _, length = scene.route.unbind(-1)
        turns = (scene.route != scene.road).any(-1) & (s < start + length)
        return (scene.side * turns).int().tolist()

    def causes(self):
        """What the driver of each scene has to answer to now: n lists of Causes, from what is there
        and nothing of the future. Some causes are over, others have become another. Where nothing
        asks for anything, an ego that is ASIDE of its line has to go back to it."""
        t = self.things
        s, d, _ = self.on_route()
        aside = (d - self._nudge(s)[0]).tolist()
        egos = torch.stack([s, d, self.speed, self.held], -1).tolist()
        things = torch.stack([t.s, t.d, t.v, self.braking(), self.signals()], -1).tolist()
        every = []
        for i, one in enumerate(self.draws):
            now = []
            for cause in one.causes:
                name = _becomes(cause, egos[i], things[i][cause.thing])
                if name not in ("", "free"):
                    now.append(cause._replace(name=name))
            if not now and abs(aside[i]) > ASIDE:
                now = [Cause("aside", LEFT if aside[i] > 0 else RIGHT)]
            every.append(now or [Cause("free", one.side)])
        return every

    # ----------------------------------------------------------------------------------------------
    # The expert

    def expert(self):
        """accel (n,), m/s^2, and curvature (n,), 1/m, of a driver who knows the causes from `react`
        on: the intelligent driver model behind what is or will be in its way, a speed that suits
        bend and bump, and a steady hand on the line."""
        speed, lateral = self._wander()
        s, d, heading = self.on_route()
        return self._pedals(s, speed), self._steer(s, d, heading, lateral)

    def _pedals(self, s, wander):
        """The acceleration (n,), m/s^2. Each constraint allows one, and the least of them wins."""
        scene = self.scene
        v = self.speed
        aware = self.time >= scene.react
        bumper = s + FRONT
        gap, lead = self._in_the_way(bumper[:, None], aware[:, None])  # (n, things) each
        closing = (v[:, None] - lead).clamp(min=0)
        needed = (closing ** 2 / (2 * gap)).amax(1)  # m/s^2 to hit nothing
        stops = self.held & (scene.hold > bumper - 0.5)
        line = (scene.hold - 1 - bumper).where(stops, FAR)
        slow = follow(gap, v[:, None], lead).amin(1)
        slow = slow.minimum(follow(line, v, 0))
        free = MAX_ACCEL * (1 - (v / (scene.cruise + wander)) ** 4)
        start, k, length = scene.route.unbind(-1)
        bends = (s < start + length) & (length > 0)
        bend = self._slow_to(2 / k.abs(), start - s, bends)  # 2 m/s^2 sideways
        bumps = (s < scene.bump + 1) & (scene.bump < FAR)
        bump = self._slow_to(BUMP_SPEED ** 2, scene.bump - bumper, bumps)
        known = (free + slow).minimum(bend).minimum(bump)
        known = known.maximum(-(1.3 * needed).clamp(4, 8))
        accel = known.where(aware, free * (1 - scene.standing))
        return self.accel + (accel - self.accel).clamp(-MAX_JERK * DT, MAX_JERK * DT)

    def _slow_to(self, square, distance, where):
        """The acceleration (n,) that brings the square of the speed (m^2/s^2) down to `square`
        within a distance (m); MAX_ACCEL, which asks for nothing, elsewhere than `where`."""
        v = self.speed
        accel = -(v ** 2 - square) / (2 * distance.maximum(v / 2).clamp(min=0.5))
        return accel.where(where, MAX_ACCEL)

    def _steer(self, s, d, heading, lateral):
        """The curvature (n,), 1/m: the line's a moment ahead, the nudge's once the driver is aware,
        and a pull back to where the ego should be (lateral: its wandering, m)."""
        v = self.speed
        aware = self.time >= self.scene.react
        start, k, length = self.scene.route.unbind(-1)
        soon = s + 0.3 * v  # hands take time
        bends = (soon > start) & (soon < start + length)
        ahead = (k / (1 - k * d)).where(bends, 0)
        target, slope, _ = self._nudge(s)
        _, _, bow = self._nudge(soon)
        bow = bow.where(aware, 0)  # it begins 0.2 s ahead, and hands look 0.3 s ahead
        reach = (0.7 * v).clamp(min=3)  # m
        pull = (d - target - lateral) / reach ** 2
        align = 2 * (self.yaw - heading - slope) / reach
        limit = (3 / v.clamp(min=1) ** 2).clamp(max=0.2)
        curvature = (ahead + bow - pull - align).clamp(-limit, limit)
        return self.curvature + 0.33 * (curvature - self.curvature)

    def _wander(self):
        """Waves in speed (m/s) and lateral offset (m), (n,) each: nobody drives like a ruler."""
        amplitude, rate, phase = self.scene.wander.unflatten(-1, (2, 3)).unbind(-1)  # (n, 2) each
        waves = amplitude * (rate * self.time[:, None] + phase).sin()
        speed, lateral = waves.unbind(-1)
        offset, since, until = self.scene.lapse.unbind(-1)
        lapses = (self.time >= since) & (self.time < until)
        return speed, lateral + offset.where(lapses, 0)

    def _in_the_way(self, bumper, aware):
        """What the driver has to brake for: gap (m, FAR if it need not) and speed (m/s, along the
        route) of each thing (n, things) that it knows of and that is in its way, or will have
        drifted there within FORESIGHT. bumper: s (n, 1), aware: (n, 1) bool."""
        t = self.things
        x, y, yaw = self.poses()
        s, d, heading = locate(x, y, self.scene.route[:, None])
        turned = yaw - heading
        along = turned.cos()
        cos = along.abs()
        sin = turned.sin().abs()
        long = t.length / 2
        wide = t.width / 2
        half = cos * long + sin * wide  # m, along the route
        room = sin * long + cos * wide + WIDTH / 2 + MARGIN  # m beside our line
        offset = self._nudge(s.T)[0].T
        aside = d - offset
        drift = self._drift()
        seconds = (aside.abs() - room) / drift.abs().clamp(min=0.1)  # until it is in our way
        end = t.d_end - offset
        stays_out = (end.abs() > room) & (end * aside > 0)
        comes = (aside * drift < 0) & (seconds < FORESIGHT) & ~stays_out
        walks = torch.isin(t.kind, t.kind.new_tensor(WALKERS))
        ahead = s > bumper - torch.where(walks, 1, FRONT)
        known = aware | (t.cause == 0)
        obstacle = ((aside.abs() < room) | comes) & ahead & known & self.solid(t.kind)
        gap = (s - half - 2 * walks - bumper).clamp(min=0.5)
        return gap.where(obstacle, FAR), t.v * along

    def _nudge(self, s):
        """Where in its lane the ego should be at s (n,) or (k, n): offset to the left (m), its
        slope and its bow (1/m). It goes aside and comes back along half cosines."""
        offset, begin, full, end, gone = self.scene.nudge.unbind(-1)
        rate = math.pi / (full - begin)  # rad/m
        phase = (rate * (s - begin).where(s < end, gone - s)).clamp(0, math.pi)  # pi: out
        rate = rate.where(s < end, -rate)
        moves = (phase > 0) & (phase < math.pi)
        bow = offset / 2 * phase.cos() * rate ** 2
        return (offset / 2 * (1 - phase.cos()), offset / 2 * phase.sin() * rate,
                bow.where(moves, 0))

    # ----------------------------------------------------------------------------------------------
    # The judge

    def judge(self):
        """How the ego fares now, a dictionary of (n,) bool:

        collision   its rectangle and that of a thing overlap
        close       they would if the ego were NEAR (m) larger on every side: a close encounter. The
                    paper does not define its own; this is ours
        off_road    a corner of it is beyond the asphalt

        Every collision is the ego's fault. AlpaSim leaves out those from behind, where the others
        drive as once recorded. Here who is behind the ego brakes in time, so only an ego that comes
        into another's way is hit.
        """
        t = self.things
        x, y, yaw = self.poses_to_ego()
        x = x - MIDDLE  # from the middle of the ego
        solid = self.solid(t.kind)
        hit = solid & _overlap(x, y, yaw, t, 0.0)
        near = solid & _overlap(x, y, yaw, t, NEAR)
        return dict(collision=hit.any(1), close=near.any(1), off_road=self._off_road())

    def _off_road(self):
        """Whether a corner of the ego is beyond the asphalt, (n,) bool."""
        off = False
        for front in (FRONT, FRONT - LENGTH):
            for side in (WIDTH / 2, -WIDTH / 2):
                x, y = turn(front, side, self.yaw)
                off = off | ~self.paved(self.x + x, self.y + y)
        return off

    def paved(self, x, y):
        """Whether there is asphalt at x, y (n,): of either road, or in the corners between."""
        scene = self.scene
        s, d, _ = locate(x, y, scene.road)
        right, left = lane_edges(scene.lanes)
        out = (d - left).maximum(right - d) - scene.shoulder  # m beyond the main road
        aside = (s - scene.crossing).abs() - SIDE_ROAD  # m beyond the side road
        corner = (FILLET - out).clamp(0, FILLET) ** 2 + (FILLET - aside).clamp(0, FILLET) ** 2
        return corner >= FILLET ** 2 - 1e-3


# --------------------------------------------------------------------------------------------------
# What these call

CROSSES = ("pedestrian", "deer", "cyclist")
AFTER_HOLD = {"stop sign": "", "oncoming car": "double-parked car", "gap search": "lane closed"}


def _becomes(cause, ego, its):
    """The name of what a cause has become, "" if it is over. A car that has cut in is a slower
    lead.

    ego: s, d, speed, and whether it is held. its: s, d, speed, brake lights and signal of the
    cause's first thing."""
    ego_s, ego_d, speed, held = ego
    s, d, v, brakes, signal = its
    name = cause.name
    if not held:
        name = AFTER_HOLD.get(name, name)
    if name == "cut-in" and abs(d) < 0.6:
        name = "slower lead"
    elif name == "braking lead" and v < 0.1:
        name = "stopped lead"
    elif name == "braking lead" and not brakes:
        name = "slower lead"
    elif name == "red light" and signal != RED:
        name = "resume" if speed < 3 else "green light"
    across = name in CROSSES and d * cause.side < -(WIDTH / 2 + 1)  # clear of us
    passed = ego_s > cause.until or name == "swerving car" and s <= ego_s
    changed = name == "lane closed" and ego_d * cause.side > LANE - 0.8  # into the other lane
    away = name.endswith("lead") and s - ego_s > 75
    return "" if across or passed or changed or away else name


def _move_only(which, part, before):
    """Give part back its old rows, except of scenes in `which`. before: part before the step."""
    for name, old in vars(before).items():
        new = getattr(part, name)
        if new is not old:
            setattr(part, name, new.where(which, old))


def _slow_for(car, other, solid=True):
    """`follow` (m/s^2) of cars behind others that are solid and ahead of them in their lane."""
    ahead = (other.s - car.s) * car.way
    in_lane = (other.d - car.d).abs() <= (other.width + car.width) / 2 + 0.2
    gap = ahead - (other.length + car.length) / 2
    gap = gap.where((ahead > 0) & in_lane & solid, FAR)
    return follow(gap, car.v, other.v * other.way * car.way)


def _overlap(x, y, yaw, things, margin):
    """Whether things overlap the ego, grown by a margin (m). x, y, yaw (n, things): their poses
    from the middle of the ego. Two rectangles do not overlap if they are apart along one of their
    four axes (separating axis theorem)."""
    a = LENGTH / 2 + margin
    b = WIDTH / 2 + margin
    long = things.length / 2
    wide = things.width / 2
    along, across = turn(x, y, -yaw)  # the same offset in the thing's axes
    cos = yaw.cos().abs()
    sin = yaw.sin().abs()
    ahead = x.abs() <= a + cos * long + sin * wide
    beside = y.abs() <= b + sin * long + cos * wide
    along = along.abs() <= long + cos * a + sin * b
    across = across.abs() <= wide + sin * a + cos * b
    return ahead & beside & along & across

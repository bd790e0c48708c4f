"""
The world that moves: the things' scripts, the cars' manners, the expert who drives and the judge who watches.
"""
import copy
import functools
import math
from dataclasses import fields
from types import SimpleNamespace

import torch

from alpamayo import DT
from world.causes import (
    CAR, CYCLIST, DEER, FRONT, LEFT, LENGTH, LIGHT, NOTHING, BUMP, PAST, PEDESTRIAN, RED, RIGHT, SIGN, WIDTH, YELLOW,
    BUMP_SPEED, Cause, Draw, Thing, draw)
from world.roads import FAR, FILLET, LANE, SIDE_ROAD, lane_edges, locate, place

MAX_ACCEL, COMFORT, JERK, HEADWAY, LEAST = 1.5, 3.0, 4.0, 0.8, 2.0  # m/s^2, m/s^2, m/s^3, s, m: the expert's manners
MARGIN, FORESIGHT = 0.3, 4.0               # m and s: what counts as in its way
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
        right_line, left_line = lane_edges(self.scene.lanes)
        out = torch.maximum(d - left_line, right_line - d) - self.scene.shoulder            # m beyond the main road
        aside = (s - self.scene.crossing).abs() - SIDE_ROAD                                 # m beyond the side road
        return (FILLET - out).clamp(0, FILLET) ** 2 + (FILLET - aside).clamp(0, FILLET) ** 2 >= FILLET ** 2 - 1e-3


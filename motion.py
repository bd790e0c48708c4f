"""
What a path did, in words and in bounds.

Told from poses alone: the meta-actions of every tenth of a second (Table 5), the key frames half a
second before something begins (Table 3), whether the ride was comfortable, and how far a path ends
up from the truth, beside drivers who look at nothing.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from alpamayo import DT, HORIZON, LOW_SPEED, ade, unwrap, yaw_of

# --------------------------------------------------------------------------------------------------
# Meta-actions (Table 5): one longitudinal and one lateral for each tenth of a second. Poses do not
# know lanes, lights or other cars.

LONGITUDINAL_META = (
    "gentle accelerate", "strong accelerate", "gentle decelerate", "strong decelerate",
    "maintain speed", "stop", "reverse",
)  # fmt: skip
LATERAL_META = (
    "steer left", "steer right", "sharp steer left", "sharp steer right",
    "reverse left", "reverse right", "go straight",
)  # fmt: skip

# The paper states no thresholds: all of these are ours, chosen on KITTI, comma2k19 and Argoverse
# drives. Of a pair, the first number begins and ends a stretch, and the second must be reached
# somewhere in it.
SMOOTHING = 0.3  # s, standard deviation of the Gaussian window in which a line is fitted
GENTLE = (0.4, 0.6)  # m/s^2, either way
STRONG = (1.5, 2.0)  # m/s^2
STANDING = (0.3, 0.15)  # m/s, slower than this
REVERSING = (0.15, 0.4)  # m/s backwards
STEER = (0.04, 0.06)  # rad/s of turning; faster than CALM, as much lateral acceleration
SHARP = (0.04, 0.06)  # 1/m: an arc of less than 25 m, and of less than 17 m somewhere
CALM = 8.0  # m/s
SHORTEST = 0.5  # s, a meta-action that ends sooner is not one


def meta_actions(xyz, rot):
    """What a car did at each step: indices into LONGITUDINAL_META and LATERAL_META, (..., T) long.

    Poses (..., T, 3), (..., T, 3, 3) at 10 Hz in any fixed frame. A step's meta-action depends on
    some steps after it too. So a model's path should have its history in front, and its last half
    second is the least certain."""
    speed, acceleration, _, turn_rate = smooth_motion(xyz, rot)
    longitudinal = longitudinal_meta(speed, acceleration)
    return longitudinal, lateral_meta(speed, turn_rate, longitudinal)


def longitudinal_meta(speed, acceleration):
    """The longitudinal meta-actions (..., T) long, from speed m/s and acceleration m/s^2.

    "Stop" is standing still. Braking towards it is to decelerate."""
    index = LONGITUDINAL_META.index
    longitudinal = torch.full_like(speed, index("maintain speed"), dtype=torch.long)
    for word, sign in (("accelerate", 1), ("decelerate", -1)):
        longitudinal[stretches(sign * acceleration, *GENTLE)] = index("gentle " + word)
        longitudinal[stretches(sign * acceleration, *STRONG)] = index("strong " + word)
    slow, standing = STANDING
    longitudinal[stretches(-speed.abs(), -slow, -standing)] = index("stop")
    longitudinal[stretches(-speed, *REVERSING)] = index("reverse")
    return without_short(longitudinal)


def lateral_meta(speed, turn_rate, longitudinal):
    """The lateral meta-actions (..., T) long; turn_rate in rad/s.

    "Reverse left" is the wheel turned left: the tail swings left, the nose right."""
    index = LATERAL_META.index
    lateral = torch.full_like(longitudinal, index("go straight"))
    moving = longitudinal != LONGITUDINAL_META.index("stop")
    reverse = longitudinal == LONGITUDINAL_META.index("reverse")
    wheel = torch.where(reverse, -turn_rate, turn_rate) * moving  # positive: turned to the left
    turning = wheel * (speed.abs() / CALM).clamp(min=1)
    curvature = wheel / speed.abs().clamp(min=LOW_SPEED)
    for side, sign in (("left", 1), ("right", -1)):
        steer = stretches(sign * turning, *STEER)
        sharp = stretches(sign * curvature, *SHARP)
        lateral[steer] = index("steer " + side)
        lateral[steer & sharp] = index("sharp steer " + side)
        lateral[steer & reverse] = index("reverse " + side)
    return without_short(lateral)


def smooth_motion(xyz, rot):
    """Speed m/s (negative in reverse), acceleration m/s^2, heading rad and turn rate rad/s.

    Poses (..., T, 3), (..., T, 3, 3) at 10 Hz in any fixed frame -> (..., T) float64 each. Left is
    positive, the heading has no jumps."""
    require_poses(xyz, rot, 3)
    rot = rot.double()
    _, velocity = line_fit(xyz.double().mT, SMOOTHING / 2)  # (..., 3, T), smoothed again below
    forward = (velocity.mT * rot[..., 0]).sum(-1)  # along the x axis of the car
    speed, acceleration = line_fit(forward)
    yaw, turn_rate = line_fit(unwrap(yaw_of(rot)))
    return speed, acceleration, yaw, turn_rate


def require_poses(xyz, rot, least):
    """ValueError unless poses (..., T, 3), (..., T, 3, 3) are finite, and T at least this."""
    if xyz.shape[-1:] != (3,) or rot.shape != (*xyz.shape, 3) or not xyz.shape[-2] >= least:
        raise ValueError(
            f"poses: expected xyz (..., T, 3) and rot (..., T, 3, 3), T at least {least}, "
            f"not {tuple(xyz.shape)} and {tuple(rot.shape)}"
        )
    if not (xyz.isfinite().all() and rot.isfinite().all()):
        raise ValueError("poses: expected finite numbers, not NaN or infinity")


def line_fit(y, sigma=SMOOTHING):
    """Values and slopes (per s) of lines fitted to y (..., T) at 10 Hz around each step.

    The window is Gaussian. At an end it holds fewer values; a line, unlike a mean, is not bent by
    that."""
    reach = math.ceil(3 * sigma / DT)
    k = torch.arange(-reach, reach + 1, dtype=y.dtype, device=y.device)
    weight = torch.exp(-0.5 * (k * DT / sigma) ** 2)
    window = torch.stack([weight, weight * k, weight * k * k])  # (3, 2 reach + 1)

    def moments(x):
        """Weighted sums of x, k x and k^2 x over each step's window, (..., T) each."""
        rows = x.reshape(-1, 1, x.shape[-1])
        sums = F.conv1d(rows, window[:, None], padding=reach)
        return sums.view(*x.shape[:-1], 3, -1).unbind(-2)

    s0, s1, s2 = moments(torch.ones_like(y))
    b0, b1, _ = moments(y)
    spread = s0 * s2 - s1 * s1
    value = (s2 * b0 - s1 * b1) / spread
    slope = (s0 * b1 - s1 * b0) / spread
    return value, slope / DT


# Both in an example, with edge 0.4 and peak 0.6, and runs of at least three steps:
#     x              0.1  0.5  0.7  0.5  0.1  0.5  0.1  0.7  0.1
#     stretches       .    #    #    #    .    .    .    #    .
#     without_short   #    #    #    #    .    .    .    .    .


def stretches(x, edge, peak):
    """Where x (..., T) is at least `edge`, in stretches that somewhere reach `peak`: bool."""
    inside = x >= edge
    begins = inside[..., 1:] != inside[..., :-1]
    number = F.pad(begins.cumsum(-1), (1, 0))  # (..., T), of the stretch that a step belongs to
    is_peak = (x >= peak).long()
    peaks = torch.zeros_like(number).scatter_add(-1, number, is_peak)  # (..., stretches)
    return inside & (peaks.gather(-1, number) > 0)


def without_short(labels):
    """Labels (..., T) without runs that are shorter than SHORTEST.

    A long run takes over the short ones before it, and the last one also those after it."""
    rows = labels.reshape(-1, labels.shape[-1]).clone()
    for row in rows:
        runs = segments(row)
        long = [run for run in runs if run.end - run.first >= round(SHORTEST / DT)]
        begin = 0
        for run in long or runs[:1]:
            row[begin : run.end] = run.label
            begin = run.end
        row[begin:] = row[begin - 1]
    return rows.view(labels.shape)


class Segment(NamedTuple):
    """Steps [first, end) of one label."""

    label: int
    first: int
    end: int


def segments(labels):
    """The Segments of labels (T,), in order."""
    changes = labels.diff().nonzero().flatten() + 1
    cuts = [0, *changes.tolist(), len(labels)]
    return [Segment(int(labels[a]), a, b) for a, b in pairwise(cuts)]


# --------------------------------------------------------------------------------------------------
# Key frames (Table 3): the moments before a change, at which a driver decides. Which of the table's
# scenarios a key frame belongs to, and who caused it, is left to whoever labels it.

KEY_KINDS = (
    "slow down", "stop", "start", "speed up", "reverse", "leave lane left", "leave lane right",
    "turn left", "turn right", "bend left", "bend right",
)  # fmt: skip
LEAD = 0.5  # s, the paper's: a key frame is half a second before the change. The rest is ours
PAUSE = 1.5  # s, a change that goes on after less than this is one change
SPEED_CHANGE = 1.0  # m/s, a smaller one is no event
TURN_ANGLE = math.radians(45)  # a bigger change of heading is a turn
BEND_ANGLE = math.radians(15)  # a smaller one a bend of the road, below this it is nothing
OFFSET = 0.6  # m beside the old line: the car has left its lane
RETURN = 4.0  # s, in which its heading must be back
SAME = 1.0  # s, key frames closer than this are one
# Events make no difference between gentle and strong, or steer and sharp steer.
SPEEDING_UP, SLOWING, STEADY, STOPPED, BACKING = range(5)
SPEEDS = torch.tensor([SPEEDING_UP, SPEEDING_UP, SLOWING, SLOWING, STEADY, STOPPED, BACKING])
SIDES = torch.tensor([1, -1, 1, -1, 0, 0, 0])  # of LATERAL_META: 1 left, -1 right


def key_frames(xyz, rot):
    """When something begins in a drive: [(step, kinds)], half a second before the change (Table 3).

    Poses (T, 3), (T, 3, 3) at 10 Hz; kinds are of KEY_KINDS. Pairs such as ("slow down",
    "turn left") began within a second. A stop is named where its braking begins. A change that
    began before the first pose is left out, as its beginning is not known."""
    speed, _, yaw, _ = smooth_motion(xyz, rot)
    longitudinal, lateral = meta_actions(xyz, rot)
    events = speed_events(speed, longitudinal) + lateral_events(xyz.double(), yaw, lateral)
    frames = []  # (step, kinds), in order
    for first, kind in sorted(events):
        if first == 0:
            continue
        step = max(0, first - round(LEAD / DT))
        if not frames or step - frames[-1][0] >= round(SAME / DT):
            frames.append((step, set()))
        frames[-1][1].add(kind)
    return [(step, tuple(kind for kind in KEY_KINDS if kind in kinds)) for step, kinds in frames]


def joined(runs):
    """Segments in order; those of one label with less than PAUSE between them become one."""
    out = []
    for run in runs:
        last = out[-1] if out else None
        if last and last.label == run.label and soon(last, run):
            out[-1] = last._replace(end=run.end)
        else:
            out.append(run)
    return out


def soon(run, other):
    """Whether another Segment begins less than PAUSE after one ends."""
    return 0 <= other.first - run.end < round(PAUSE / DT)


def speed_events(speed, longitudinal):
    """[(first step, kind)] of a drive's changes of speed: speed (T,), longitudinal (T,)."""
    runs = segments(SPEEDS[longitudinal.cpu()])
    stops = [run for run in runs if run.label == STOPPED]
    events = [(run.first, "reverse") for run in runs if run.label == BACKING]
    braked = set()  # the stops that braking led to
    changes = [run for run in runs if run.label in (SPEEDING_UP, SLOWING)]
    for run in joined(changes):
        change = float(speed[run.end - 1] - speed[run.first])
        if run.label == SLOWING:
            into = [stop for stop in stops if soon(run, stop)]
            braked.update(into)
            if into:
                events.append((run.first, "stop"))
            elif -change >= SPEED_CHANGE:
                events.append((run.first, "slow down"))
        else:
            out_of = [stop for stop in stops if soon(stop, run)]
            if out_of:
                events.append((out_of[0].end, "start"))
            elif change >= SPEED_CHANGE:
                events.append((run.first, "speed up"))
    rolled = [stop for stop in stops if stop not in braked]
    return events + [(stop.first, "stop") for stop in rolled]


def lateral_events(xyz, yaw, lateral):
    """[(first step, kind)] of a drive's turns, bends and ways out of the lane.

    xyz (T, 3), yaw (T,), lateral (T,). Leaving the lane is what poses can know of a nudge, a lane
    change or a swerve: heading aside, then as before, but OFFSET beside the old line. The way back
    is part of it if it comes at once, else an event of its own."""
    sides = segments(SIDES[lateral.cpu()])
    runs = joined([run for run in sides if run.label])
    events = []
    busy = 0  # until this step the car is on its way back
    for i, run in enumerate(runs):
        word = "left" if run.label > 0 else "right"
        turned = run.label * turn_of(yaw, run)
        if turned >= TURN_ANGLE:
            events.append((run.first, "turn " + word))
            continue
        if run.first < busy:
            continue
        back = way_back(yaw, run)
        if back is None:
            if turned >= BEND_ANGLE:
                events.append((run.first, "bend " + word))
            continue
        busy = back
        # A swing aside before a turn, to take it in a wider arc, does not leave the lane.
        meanwhile = [other for other in runs[i + 1 :] if other.first < back]
        swings = any(-run.label * turn_of(yaw, other) >= TURN_ANGLE for other in meanwhile)
        aside = run.label * offset(xyz, yaw, run.first, back)
        if aside >= OFFSET and not swings:
            events.append((run.first, "leave lane " + word))
    return events


def turn_of(yaw, run):
    """How far the heading turns to the left during a Segment, rad."""
    return float(yaw[run.end - 1] - yaw[run.first])


def way_back(yaw, run):
    """The step after a Segment at which the heading is as before it; None if not within RETURN."""
    after = yaw[run.end : run.end + round(RETURN / DT)]
    left_over = run.label * (after - yaw[run.first])
    back = (left_over <= 0).nonzero().flatten()
    return run.end + int(back[0]) if len(back) else None


def offset(xyz, yaw, first, last):
    """How far left of its heading at the step `first` the car is at the step `last`, m."""
    x, y, _ = (xyz[last] - xyz[first]).tolist()
    heading = float(yaw[first])
    return math.cos(heading) * y - math.sin(heading) * x


# --------------------------------------------------------------------------------------------------
# Comfort

# The release's bounds, in SI units.
COMFORT_BOUNDS = {
    "accel": (-4.05, 2.40),
    "lateral accel": (-4.89, 4.89),
    "jerk": (-8.37, 8.37),
    "longitudinal jerk": (-4.13, 4.13),
    "yaw accel": (-1.93, 1.93),
    "yaw rate": (-0.95, 0.95),
}


def within_bounds(values):
    """Whether each value is within its COMFORT_BOUNDS: {name: (...)} -> {name: (...) bool}."""
    return {n: (values[n] > low) & (values[n] < high) for n, (low, high) in COMFORT_BOUNDS.items()}


def comfort_of(speed, accel, curvature):
    """What a car that really drove felt: {name of COMFORT_BOUNDS: (n, T) bool}, of a drive.

    speed (m/s), accel (m/s^2), curvature (1/m), (n, T) each at 10 Hz. Rates are differences to the
    step before. Jerk is the length of the change of acceleration, longitudinal and lateral."""
    yaw_rate = curvature * speed
    lateral = yaw_rate * speed
    jolt = _change(accel)
    sway = _change(lateral)
    return within_bounds({
        "accel": accel,
        "lateral accel": lateral,
        "jerk": torch.hypot(jolt, sway),
        "longitudinal jerk": jolt,
        "yaw accel": _change(yaw_rate),
        "yaw rate": yaw_rate,
    })  # fmt: skip


def _change(x):
    """Rate of change (n, T) per s; 0 at first."""
    return torch.diff(x, dim=1, prepend=x[:, :1]) / DT


def comfort(xyz, rot):
    """The release's rule for paths (..., T, 3), (..., T, 3, 3): {name: (...) bool}.

    Its verdicts are in tests/golden. Every rate is a forward difference whose last value is
    repeated, also on rates. So a path that still brakes or speeds up when it ends jerks there: more
    than 0.41 m/s^2 in its last step fails "longitudinal jerk", more than 0.84 "jerk"."""
    require_poses(xyz, rot, 2)
    yaw = yaw_of(rot)
    yaw_rate = _rate(unwrap(yaw))
    vx = _rate(xyz[..., 0])
    vy = _rate(xyz[..., 1])
    along = yaw.cos() * vx + yaw.sin() * vy
    across = yaw.cos() * vy - yaw.sin() * vx
    held = within_bounds({
        "accel": _rate(along),
        "lateral accel": _rate(across),
        "jerk": _rate(_rate(torch.hypot(vx, vy))),
        "longitudinal jerk": _rate(_rate(along)),
        "yaw accel": _rate(yaw_rate),
        "yaw rate": yaw_rate,
    })  # fmt: skip
    return {name: ok.all(-1) for name, ok in held.items()}


def _rate(x):
    """Forward difference of x (..., T) per s; the last is repeated."""
    step = x.diff(dim=-1) / DT
    return torch.cat([step, step[..., -1:]], -1)


# --------------------------------------------------------------------------------------------------
# Errors, and drivers who look at nothing


def min_ade(paths, truth):
    """minADE in m, (B,): the best of the n paths (B, n, T, 3) of a scene; truth (B, T, 3)."""
    return ade(paths, truth[:, None]).amin(1)


def baselines(scene):
    """Paths that need no eyes, only the Scene's ego history: {name: (B, 64, 3)}.

    Of the history's positions p0 .. p15 and headings yaw, p15 is at t0: v = |p15 - p14| / dt,
    w = (yaw15 - yaw14) / dt and a = (v - |p14 - p13| / dt) / dt are the last speed, turn rate and
    acceleration. Where the car moved against its heading, speeds are negative. At t seconds from t0
        CV    constant velocity                     speed v, heading 0
        CTRV  constant turn rate and velocity       speed v, heading w t
        CTRA  constant turn rate and acceleration   speed v + a (t + dt / 2) until 0, heading w t
    """
    require_poses(scene["ego_history_xyz"], scene["ego_history_rot"], 3)
    steps = scene["ego_history_xyz"][..., :2].diff(dim=1)
    ahead = (steps * scene["ego_history_rot"][:, 1:, :2, 0]).sum(-1)  # along the x axis of the car
    speeds = steps.norm(dim=-1).copysign(ahead) / DT  # (B, 15); the last is that of t0 - dt / 2
    speed = speeds[:, -1:]  # (B, 1)
    accel = speeds.diff(dim=1)[:, -1:] / DT
    yaw = yaw_of(scene["ego_history_rot"])
    turn_rate = yaw[:, -2:].diff(dim=1) / DT
    t = DT * torch.arange(HORIZON + 1)  # (65,)
    steady = speed.expand(-1, HORIZON + 1)
    changing = speed + accel * (t + DT / 2)
    changing = torch.where(speed < 0, changing.clamp(max=0), changing.clamp(min=0))
    straight = torch.zeros_like(steady)
    return {
        "CV": _path_of(steady, straight),
        "CTRV": _path_of(steady, turn_rate * t),
        "CTRA": _path_of(changing, turn_rate * t),
    }


def _path_of(speed, heading):
    """Positions (B, 64, 3) of a car with this speed and heading (B, 65), from t0 on."""
    vx = speed * heading.cos()
    vy = speed * heading.sin()
    velocity = torch.stack([vx, vy, 0 * speed], -1)
    return torch.cumulative_trapezoid(velocity, dx=DT, dim=1)

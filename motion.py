"""
What a path did, in words and in bounds: meta-actions and key frames (Tables 3 and 5), comfort.
"""
import math

import torch

from alpamayo import DT, LOW_SPEED, unwrap, yaw_of

# The release's comfort: what must stay within bounds, in SI units.
COMFORT_BOUNDS = {
    "accel": (-4.05, 2.40), "lateral accel": (-4.89, 4.89), "jerk": (-8.37, 8.37), "longitudinal jerk": (-4.13, 4.13),
    "yaw accel": (-1.93, 1.93), "yaw rate": (-0.95, 0.95)}


def comfort_of(speed, accel, curvature):
    """Whether each of the quantities of COMFORT_BOUNDS stays within its bounds: {name: (n, T) bool}, of a drive with
    speed (m/s), accel (m/s^2) and curvature (1/m), each (n, T) at 10 Hz. Jerk is the length of the change of the
    acceleration, longitudinal and lateral. The bounds are the release's; this is what a car that really drove felt, while
    `rl.comfort` applies the release's rule to a path."""
    change = lambda x: torch.diff(x, dim=1, prepend=x[:, :1]) / DT
    rate = curvature * speed
    lateral = rate * speed
    values = (accel, lateral, torch.hypot(change(accel), change(lateral)), change(accel), change(rate), rate)
    return {name: (x >= low) & (x <= high) for (name, (low, high)), x in zip(COMFORT_BOUNDS.items(), values)}


#
# What a car did, told from its poses alone: one longitudinal and one lateral meta-action for each tenth of a second,
# and the moments before a change, at which a driver decides. Poses do not know lanes, lights or other cars: which of
# Table 3's scenarios a key frame belongs to, and who caused it, is left to whoever labels it.

LONGITUDINAL_META = ("gentle accelerate", "strong accelerate", "gentle decelerate", "strong decelerate",
                     "maintain speed", "stop", "reverse")
LATERAL_META = ("steer left", "steer right", "sharp steer left", "sharp steer right", "reverse left", "reverse right",
                "go straight")

# The paper states no thresholds: all of these are ours, chosen on KITTI, comma2k19 and Argoverse drives. Of a pair, the
# first number begins and ends a stretch, and the second must be reached somewhere in it.
SMOOTHING = 0.3             # s, standard deviation of the Gaussian window in which a line is fitted
GENTLE = (0.4, 0.6)         # m/s^2, either way
STRONG = (1.5, 2.0)         # m/s^2
STANDING = (0.3, 0.15)      # m/s, slower than this
REVERSING = (0.15, 0.4)     # m/s backwards
STEER = (0.04, 0.06)        # rad/s of turning; from CALM on it takes less, the same lateral acceleration
SHARP = (0.04, 0.06)        # 1/m: an arc of less than 25 m, and of less than 17 m somewhere
CALM = 8.0                  # m/s
SHORTEST = 0.5              # s, a meta-action that ends sooner is not one


def line_fit(y, sigma=SMOOTHING):
    """
    Values and slopes (per s), (..., T) each, of lines fitted to y (..., T) at 10 Hz, in a Gaussian window at each step.

    A window that reaches beyond an end has only what there is in it. The line keeps that from bending the ends.
    """
    reach = math.ceil(3 * sigma / DT)
    k = torch.arange(-reach, reach + 1, dtype=y.dtype, device=y.device)
    w = torch.exp(-0.5 * (k * DT / sigma) ** 2)
    kernels = torch.stack([w, w * k, w * k * k])[:, None]                   # (3, 1, 2 reach + 1)
    rows = torch.stack([torch.ones_like(y), y]).view(2, -1, 1, y.shape[-1])
    sums = torch.nn.functional.conv1d(rows.flatten(0, 1), kernels, padding=reach).view(2, *y.shape[:-1], 3, -1)
    (s0, s1, s2), (b0, b1, _) = [moments.unbind(-2) for moments in sums]
    spread = s0 * s2 - s1 * s1
    return (s2 * b0 - s1 * b1) / spread, (s0 * b1 - s1 * b0) / spread / DT


def smooth_motion(xyz, rot):
    """
    Poses (..., T, 3), (..., T, 3, 3) at 10 Hz in any fixed frame -> speed m/s (negative in reverse), acceleration
    m/s^2, heading rad (without jumps), turn rate rad/s (left is positive), (..., T) float64 each.
    """
    if xyz.shape[-1:] != (3,) or rot.shape != (*xyz.shape, 3) or xyz.shape[-2] < 3:
        raise ValueError(f"poses: expected xyz (..., T, 3) and rot (..., T, 3, 3), T at least 3, "
                         f"not {tuple(xyz.shape)} and {tuple(rot.shape)}")
    xyz, rot = xyz.double(), rot.double()
    velocity = line_fit(xyz.mT, SMOOTHING / 2)[1].mT                        # (..., T, 3), smoothed once more below
    speed, acceleration = line_fit((velocity * rot[..., 0]).sum(-1))        # along the x axis of the car
    yaw, turn_rate = line_fit(unwrap(yaw_of(rot)))
    return speed, acceleration, yaw, turn_rate


def stretches(x, edge, peak):
    """Where x (..., T) is at least `edge`, in stretches that somewhere reach `peak`: hysteresis both ways in time."""
    def since(on, off):                                                     # from an on to the next off
        last = torch.where(on | off, torch.arange(x.shape[-1], device=x.device), -1).cummax(-1).values
        return (last >= 0) & on.gather(-1, last.clamp(min=0))
    on, off = x >= peak, x < edge
    return since(on, off) | since(on.flip(-1), off.flip(-1)).flip(-1)


def without_short(labels, shortest):
    """Labels (..., T), of which those that last less than `shortest` steps become what follows, or else what was."""
    T = labels.shape[-1]
    step = torch.arange(T, device=labels.device).expand(labels.shape)
    new = torch.ones_like(labels, dtype=torch.bool)
    new[..., 1:] = labels[..., 1:] != labels[..., :-1]
    begin = torch.where(new, step, 0).cummax(-1).values
    later = torch.where(new, step, T).flip(-1).cummin(-1).values.flip(-1)   # the first new label at or after a step
    end = torch.cat([later[..., 1:], torch.full_like(later[..., :1], T)], -1)
    long = end - begin >= shortest
    follows = torch.where(long, step, T).flip(-1).cummin(-1).values.flip(-1)
    before = torch.where(long, step, 0).cummax(-1).values
    return labels.gather(-1, torch.where(follows < T, follows, before))


def meta_actions(xyz, rot):
    """
    What a car did at each step: poses (..., T, 3), (..., T, 3, 3) at 10 Hz in any fixed frame -> longitudinal, lateral
    (..., T) long, indices into LONGITUDINAL_META and LATERAL_META (Table 5).

    Offline: a step's meta-action depends on some steps after it too, so a path of a model should have its history in
    front, and its last half second is the least certain. "Stop" is standing still; braking towards it is to
    decelerate. "Reverse left" is the wheel turned left: the tail swings left, the nose right.
    """
    speed, acceleration, _, turn_rate = smooth_motion(xyz, rot)
    name = LONGITUDINAL_META.index
    longitudinal = torch.full_like(speed, name("maintain speed"), dtype=torch.long)
    for word, sign in (("accelerate", 1), ("decelerate", -1)):
        longitudinal[stretches(sign * acceleration, *GENTLE)] = name("gentle " + word)
        longitudinal[stretches(sign * acceleration, *STRONG)] = name("strong " + word)
    longitudinal[stretches(-speed.abs(), *(-v for v in STANDING))] = name("stop")
    longitudinal[stretches(-speed, *REVERSING)] = name("reverse")
    longitudinal = without_short(longitudinal, round(SHORTEST / DT))

    name = LATERAL_META.index
    lateral = torch.full_like(longitudinal, name("go straight"))
    moving = longitudinal != LONGITUDINAL_META.index("stop")
    reverse = longitudinal == LONGITUDINAL_META.index("reverse")
    wheel = torch.where(reverse, -turn_rate, turn_rate) * moving            # sign: where the wheel is turned to
    curvature = wheel / speed.abs().clamp(min=LOW_SPEED)
    for side, sign in (("left", 1), ("right", -1)):
        steer = stretches(sign * wheel * (speed.abs() / CALM).clamp(min=1), *STEER)
        lateral[steer] = name("steer " + side)
        lateral[steer & stretches(sign * curvature, *SHARP)] = name("sharp steer " + side)
        lateral[steer & reverse] = name("reverse " + side)
    return longitudinal, without_short(lateral, round(SHORTEST / DT))


KEY_KINDS = ("slow down", "stop", "start", "speed up", "reverse", "leave lane left", "leave lane right", "turn left",
             "turn right", "bend left", "bend right")
# Table 3 puts a key frame half a second before the change; the rest again is ours.
LEAD = 0.5                  # s
PAUSE = 1.5                 # s, a change that goes on after less than this is one change
SPEED_CHANGE = 1.0          # m/s, a smaller one is no event
TURN_ANGLE = math.radians(45)   # a bigger change of heading is a turn,
BEND_ANGLE = math.radians(15)   # a smaller one a bend of the road, and one smaller than this nothing
OFFSET, RETURN = 0.6, 4.0   # m, s: out of the lane is who heads aside, and as before within this time, so far beside it
SAME = 1.0                  # s, key frames closer than this are one


def segments(labels):
    """Labels (T,) -> [(label, first step, step after the last)]."""
    cuts = [0, *(labels.diff().nonzero().flatten() + 1).tolist(), len(labels)]
    return [(int(labels[a]), a, b) for a, b in zip(cuts, cuts[1:])]


def key_frames(xyz, rot):
    """
    When something begins in a drive: poses (T, 3), (T, 3, 3) at 10 Hz -> [(step, kinds)], half a second before the
    change (Table 3), kinds of KEY_KINDS. Pairs of kinds such as ("slow down", "turn left") began within a second.

    A stop is named where its braking begins. Leaving the lane is what poses can know of a nudge, a lane change or a
    swerve: heading aside, then as before, but OFFSET metres beside the old line; the way back is part of it if it comes
    at once, else of its own. A change that began before the first pose is left out, for its beginning is not known.
    """
    speed, _, yaw, _ = smooth_motion(xyz, rot)
    longitudinal, lateral = meta_actions(xyz, rot)
    events = speed_events(speed, longitudinal) + lateral_events(xyz.double(), yaw, lateral)
    frames = []                                                             # (step, kinds), in order
    for first, kind in sorted(event for event in events if event[0] > 0):
        step = max(0, first - round(LEAD / DT))
        if not frames or step - frames[-1][0] >= round(SAME / DT):
            frames.append((step, set()))
        frames[-1][1].add(kind)
    return [(step, tuple(kind for kind in KEY_KINDS if kind in kinds)) for step, kinds in frames]


def joined(runs):
    """Changes [(label, first, end)] in order; those of one label with less than PAUSE between them become one."""
    out = []
    for label, first, end in runs:
        if out and out[-1][0] == label and first - out[-1][2] < round(PAUSE / DT):
            out[-1] = (label, out[-1][1], end)
        else:
            out.append((label, first, end))
    return out


def speed_events(speed, longitudinal):
    """[(first step, kind)] of a drive's changes of speed: speed (T,), longitudinal (T,)."""
    coarse = torch.tensor([1, 1, -1, -1, 0, 5, 6])[longitudinal.cpu()]      # of LONGITUDINAL_META
    runs, pause = segments(coarse), round(PAUSE / DT)
    stops = [run for run in runs if run[0] == 5]
    events = [(first, "reverse") for label, first, _ in runs if label == 6]
    braked = set()
    for sign, first, end in joined([run for run in runs if run[0] in (1, -1)]):
        change = sign * float(speed[end - 1] - speed[first])
        into = [stop for stop in stops if sign < 0 and -1 <= stop[1] - end < pause]
        out = [stop for stop in stops if sign > 0 and -1 <= first - stop[2] < pause]
        braked.update(into)
        if into:
            events.append((first, "stop"))
        elif out:
            events.append((out[0][2], "start"))
        elif change >= SPEED_CHANGE:
            events.append((first, "speed up" if sign > 0 else "slow down"))
    return events + [(stop[1], "stop") for stop in stops if stop not in braked]     # rolled to a halt


def lateral_events(xyz, yaw, lateral):
    """[(first step, kind)] of a drive's turns, bends and ways out of the lane: xyz (T, 3), yaw (T,), lateral (T,)."""
    side = torch.tensor([1, -1, 1, -1, 0, 0, 0])[lateral.cpu()]             # of LATERAL_META; no reversing
    runs = joined([run for run in segments(side) if run[0]])
    turned = [float(yaw[end - 1] - yaw[first]) for _, first, end in runs]
    events, busy = [], 0
    for i, (sign, first, end) in enumerate(runs):
        word = "left" if sign > 0 else "right"
        if sign * turned[i] >= TURN_ANGLE:
            events.append((first, "turn " + word))
            continue
        if first < busy:                                                    # on the way back
            continue
        after = slice(end, end + round(RETURN / DT))
        back = (sign * (yaw[after] - yaw[first]) <= 0).nonzero().flatten()
        if len(back):
            back = end + int(back[0])
            swing = any(begin < back and -sign * angle >= TURN_ANGLE        # aside, to take a turn in a wider arc
                        for (_, begin, _), angle in zip(runs[i + 1:], turned[i + 1:]))
            move = xyz[back] - xyz[first]
            aside = sign * float(yaw[first].cos() * move[1] - yaw[first].sin() * move[0])
            if aside >= OFFSET and not swing:
                events.append((first, "leave lane " + word))
            busy = back
        elif sign * turned[i] >= BEND_ANGLE:
            events.append((first, "bend " + word))
    return events



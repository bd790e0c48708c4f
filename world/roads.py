"""
The road's own coordinates: s runs along a line, d is the distance to its left, both in m.

Roads and the ego's route are lines (..., 3): where the arc starts (m), its curvature (1/m, never
0) and its length (m). A line is straight, then an arc, then straight again; a straight one has an
arc of length 0. At t0 the ego is at s = d = 0, but for its wandering.
"""
import torch

LANE = 3.5  # m
FILLET = 6.0  # m, radius of a crossing's corners
SIDE_ROAD = LANE  # m, half its width
STRAIGHT = (0.0, 0.01, 0.0)
NEVER = 1e3  # s: not in this scene, and still tame in float32
FAR = 1e4  # m: the same of a place


def turn(x, y, yaw):
    """The vector x, y turned to the left by yaw (rad)."""
    cos = yaw.cos()
    sin = yaw.sin()
    return cos * x - sin * y, sin * x + cos * y


def place(s, d, line):
    """World x, y (m) and heading (rad) of the road coordinates s, d."""
    start, k, length = line.unbind(-1)
    arc = (s - start).clamp(min=0).minimum(length)
    rest = s - start - arc  # along the tangent: before the arc if negative, after it if positive
    heading = k * arc
    cos = heading.cos()
    sin = heading.sin()
    x = start + sin / k + rest * cos - d * sin
    y = (1 - cos) / k + rest * sin + d * cos
    return x, y, heading


def locate(x, y, line):
    """The inverse of `place`: s, d and the line's heading there. Arcs bend by 90 degrees at
    most."""
    start, k, length = line.unbind(-1)
    x = x - start
    arc = (torch.atan2(k * x, 1 - k * y) / k).clamp(min=0).minimum(length)
    heading = k * arc
    cos = heading.cos()
    sin = heading.sin()
    dx = x - sin / k
    dy = y - (1 - cos) / k
    s = start + arc + dx * cos + dy * sin
    return s, dy * cos - dx * sin, heading


def lane_edges(lanes):
    """d (m) of the outermost lane lines, right and left. lanes (..., 3) as in a Draw."""
    left, oncoming, right = lanes.unbind(-1) if torch.is_tensor(lanes) else lanes
    return -LANE * (right + 0.5), LANE * (left + oncoming + 0.5)

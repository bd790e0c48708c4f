"""
The road's own coordinates: s runs along a line, d is the distance to its left.

Roads and the ego's route are lines (..., 3): where the arc starts (m), its curvature (1/m, never 0), its length (m). A
line is straight, then an arc, then straight again; a straight one has an arc of length 0. s = d = 0 is where the ego is
at t0, but for its wander.
"""
import torch

LANE = 3.5  # m
FILLET, SIDE_ROAD = 6.0, LANE  # m: radius of a crossing's corners, half width of its side road
STRAIGHT = (0.0, 0.01, 0.0)
NEVER, FAR = 1e3, 1e4  # s and m: "not in this scene", and still tame in float32


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

def lane_edges(lanes):
    """d of the outermost lane lines, right and left. lanes (..., 3) as in Draw."""
    left, oncoming, right = lanes.unbind(-1) if torch.is_tensor(lanes) else lanes
    return -LANE * (right + 0.5), LANE * (left + oncoming + 0.5)


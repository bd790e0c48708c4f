"""
The renderer: what the cameras see, by FINE x FINE rays a pixel.

    ground   Sky and ground are shaded, not traced. The cameras are fixed to the ego, so a pixel's
             point on the ground never changes; its road coordinates say what is there.
    boxes    Everything that stands is two boxes, see PARTS. Where they may be in a picture is a
             rectangle of rays. A slab test says which rays hit; the nearest hit of a ray wins.
    paint    Liveries paint the hits, light and haze shade them, and a pixel mixes its rays.
    rain     A veil over all, and streaks in it.

A scene looks the same, to the bit, whatever is rendered beside it: no sum depends on the order of
its terms. Rendering is the cost of making data. So floats are changed in place, rays are counted in
int32, and the ground's masks are floats of 0 and 1: torch combines those in place much faster than
bools.
"""

import functools
import math
from types import SimpleNamespace

import torch

from alpamayo import DT, project
from world.cameras import rig_rays
from world.causes import (
    BLINK_LEFT,
    BLINK_RIGHT,
    CAR,
    FRONT,
    GREEN,
    HAZARD,
    RED,
    TRUCK,
    YELLOW,
)
from world.roads import FAR, FILLET, LANE, SIDE_ROAD, lane_edges, locate

CHUNK = 2 ** 17, 2 ** 23  # pixels at a time: what a CPU's cache holds, what fills a GPU
FINE = 2  # rays a pixel, each way: far thin boxes fade and do not flicker
MISS = 2 ** 63 - 1  # sentinel: no hit
ALL = ...  # where a coat of paint covers the whole box

# Red, green, blue by day, at dusk, in rain; of the sky above and of the haze at the horizon.
SKY = torch.tensor([[110.0, 160, 230], [38, 42, 88], [120, 126, 135]])
HAZE = torch.tensor([[205.0, 205, 205], [165, 104, 70], [168, 172, 178]])

# The ground: red, green, blue, or a grey.
GRASS = 92, 120, 62
YELLOW_LINE = 235, 215, 120
WHITE_LINE = 235
PAVEMENT = 150
ASPHALT = 78

# Paint: red, green, blue, and 1 if it glows. A lamp keeps its colour in the shade.
WINDOW = 0.12, 0.15, 0.20, 0
TYRE = 0.08, 0.08, 0.08, 0
WOOD = 0.30, 0.28, 0.26, 0
TROUSERS = 0.10, 0.10, 0.25, 0
SKIN = 0.85, 0.65, 0.50, 0
WHITE = 0.95, 0.95, 0.95, 0
PANE = 0.25, 0.30, 0.38, 0
STRIPE = 1.00, 0.80, 0.00, 0
BOARD_RED = 0.85, 0.05, 0.05, 0
GAP = 0.45, 0.45, 0.45, 0  # as if one saw the road there
DULL_LAMP = 0.35, 0.03, 0.03, 0
HEADLAMP = 0.95, 0.95, 0.85, 0
TAIL_LAMP = 0.55, 0.03, 0.03, 1
BRIGHT_LAMP = 1.00, 0.97, 0.80, 1
BRAKE_LAMP = 1.00, 0.08, 0.05, 1
AMBER = 1.00, 0.65, 0.00, 1
RED_LAMP = 1.00, 0.05, 0.05, 1
YELLOW_LAMP = 1.00, 0.80, 0.05, 1
GREEN_LAMP = 0.05, 1.00, 0.35, 1
LIT_PANE = 1.00, 0.78, 0.40, 1


class Columns(SimpleNamespace):
    """Tensors by name that have their first axes in common."""

    def each(self, change):
        """The Columns with every tensor changed."""
        return Columns(**{name: change(value) for name, value in vars(self).items()})

    def __getitem__(self, index):
        """The rows of every tensor."""
        if torch.is_tensor(index):  # the same, faster
            return self.each(lambda value: value.index_select(0, index))
        return self.each(lambda value: value[index])


def images_of(world, camera_ids, size):
    """What the cameras see now: images (n, cameras, 3, H, W) uint8; size is (H, W)."""
    H, W = size
    camera_ids = tuple(camera_ids)
    backdrop = backdrop_of(camera_ids, H, W, world.device)
    rays = rays_of(camera_ids, FINE * H, FINE * W, world.device)
    scenes = scenes_of(world)
    boxes = boxes_of(world)
    # A few scenes at a time, alike ones together: most need no mathematics of bends or crossings.
    order = (2 * scenes.bends + scenes.crosses).argsort(stable=True)
    chunk = CHUNK[scenes.x.is_cuda] // backdrop.streak.numel()
    images = []
    for part in order.split(max(1, chunk)):
        scene = scenes[part]
        image = paint_ground(scene, backdrop)
        paint_boxes(image, scene, boxes[part], rays)
        paint_rain(image, scene, backdrop)
        images.append(image.movedim(0, 2).byte())
    return torch.cat(images).index_select(0, order.argsort())


def scenes_of(world):
    """The scenes: what was drawn, where the ego is, and the light. Columns (n,) and (n, k).

    right, left, middle: d (m) of the outer lane lines and of the one between the directions.
    sky, haze and light are (n, 3), the light in shares, the others in 0 .. 255."""
    scene = Columns(**vars(world.scene))
    scene.x = world.x
    scene.y = world.y
    scene.yaw = world.yaw
    scene.time = world.time
    scene.bends = scene.road[:, 2] > 0
    scene.crosses = torch.minimum(scene.crossing, scene.stop) < FAR
    scene.right, scene.left = lane_edges(scene.lanes)
    scene.middle = LANE * (scene.lanes[:, 0] + 0.5)
    dusk = scene.dusk[:, None]
    rain = scene.rain[:, None]
    scene.sky = mix(SKY, dusk, rain)
    scene.haze = mix(HAZE, dusk, rain)
    warm = dusk.new_tensor([0.25, 0.32, 0.38])
    scene.light = scene.daylight[:, None] * (1 - dusk * warm)
    scene.light *= 1 - 0.15 * rain
    return scene


def mix(colours, dusk, rain):
    """One colour (n, 3) for each scene, of those by day, at dusk and in rain."""
    day, evening, wet = colours.to(dusk.device)
    colour = day + dusk * (evening - day)
    return colour + rain * (wet * (1 - 0.6 * dusk) - colour)


# --------------------------------------------------------------------------------------------------
# The ground


@functools.lru_cache
def backdrop_of(camera_ids, H, W, device):
    """What never changes about the pixels of sky and ground, (cameras, H / 2, W) each.

    The cameras look level, so the lower half of a picture is ground."""
    intrinsics, pose, direction = rig_rays(camera_ids, H, W)
    sky, ground = direction.tensor_split([H // 2], 1)
    forward, left, height = pose[:, :3, 3, None, None].unbind(1)
    backdrop = Columns(streak=streaks(camera_ids, H, W))
    backdrop.sky = torch.exp(-6 * sky[..., 2].clamp(min=0))
    reach = backdrop.reach = height / -ground[..., 2]  # m along the ray to the ground
    backdrop.x = forward + reach * ground[..., 0]
    backdrop.y = left + reach * ground[..., 1]
    backdrop.beam = headlight(backdrop.x, backdrop.y)
    pixel = 1 / intrinsics[:, 6, None, None]  # rad
    backdrop.lane = stripe(0.18, reach * pixel)
    backdrop.bar = stripe(0.6, reach ** 2 * pixel / height)
    return backdrop.each(lambda value: value.to(device))


def stripe(width, footprint):
    """For `cover`: a stripe of this width (m), seen by pixels that are footprint (m) wide."""
    edge = (width + footprint) / 2 / footprint
    most = footprint.clamp(max=width) / footprint
    return torch.stack([edge, 1 / footprint, most])


def cover(distance, stripe):
    """Share of a pixel that a stripe covers, at this distance (m) from the stripe's middle.

    Far stripes fade and do not flicker."""
    edge, slope, most = stripe
    share = torch.addcmul(edge, distance.abs(), slope, value=-1)
    return share.clamp_(min=0).minimum(most)


def headlight(x, y):
    """Share of our headlamps' light that reaches points x, y (m) of the ego frame."""
    ahead = (x - FRONT).clamp(min=0)
    width = 1.5 + 0.12 * ahead
    across = torch.exp(-((y / width) ** 2))
    return torch.exp(-ahead / 35) * across * (ahead > 0)


def streaks(camera_ids, H, W):
    """Where rain falls: integers (cameras, H, W) modulo 256.

    They grow by one with each 1 / 64 of the height, from a start of the column's own. `paint_rain`
    adds how far the rain has fallen and draws where the sum is small."""
    column = torch.arange(W) * 96 // W
    column = torch.tensor(camera_ids)[:, None] * 96 + column  # (cameras, W)
    start = (column * 40503 + 977) * (column + 71) // 8
    row = torch.arange(H)[:, None] * 64 // H
    return (start[:, None] - row) & 255


def paint_ground(scene, backdrop):
    """Sky and ground of scenes (m,): image (3, m, cameras, H, W), float in 0 .. 255."""
    scene = scene[:, None, None, None]
    s, d = road_coordinates(scene, backdrop)
    out = torch.maximum(d - scene.left, scene.right - d)
    out -= scene.shoulder  # m beyond the main road
    white, yellow = lane_lines(scene, s, d, out, backdrop)
    corner = (FILLET - out).clamp_(0, FILLET).square_()
    beside = out
    if scene.crosses.any():
        aside = (s - scene.crossing).abs_().sub_(SIDE_ROAD)  # m beyond the side road
        beside = torch.minimum(out, aside)
        # Outside both roads, a corner is asphalt up to a quarter circle.
        corner += (FILLET - aside).clamp_(0, FILLET).square_()
        white *= aside.gt_(FILLET)
        stop_lines(white, yellow, scene, s, d, out, backdrop)
    asphalt = corner.ge_(FILLET ** 2 - 1e-3)
    pavement = (beside - 2.5).lt_(0).mul_(scene.urban)
    pavement *= 1 - asphalt
    return shade(asphalt, pavement, white, yellow, scene, backdrop)


def road_coordinates(scene, backdrop):
    """s and d (m, cameras, H / 2, W) of the ground that the pixels see."""
    cos = torch.cos(scene.yaw)
    sin = torch.sin(scene.yaw)
    s = scene.x + cos * backdrop.x - sin * backdrop.y
    d = scene.y + sin * backdrop.x + cos * backdrop.y
    if scene.bends.any():
        s, d, _ = locate(s, d, scene.road)
    return s, d


def lane_lines(scene, s, d, out, backdrop):
    """white: shares of pixels that lane lines cover; yellow: 1 where a line is yellow.

    Lines are solid at the edges and between the directions, dashed between lanes."""
    lane = ((d - LANE / 2) / LANE).round_()
    line = lane.mul_(LANE).add_(LANE / 2)  # d of the nearest line
    yellow = (line - scene.middle).abs_().lt_(0.1)
    dash = s * (1 / 9)
    white = (dash - dash.floor()).lt_(4 / 9).maximum(yellow)
    white = white.maximum((line - scene.right).lt_(0.1))
    white = white.maximum((line - scene.left).gt_(-0.1))
    white *= (out + scene.shoulder).lt_(0.5)
    white *= cover(d - line, backdrop.lane)
    return white, yellow


def stop_lines(white, yellow, scene, s, d, out, backdrop):
    """Add stop lines, and the zebra crossings behind them, to white and yellow in place."""
    beyond = s - scene.stop
    ours = (scene.middle - d).gt_(0)
    ours *= (d - scene.right).gt_(0)
    ours *= cover(beyond, backdrop.bar)
    torch.maximum(white, ours, out=white)
    zebra = torch.remainder(d, 1.2).lt_(0.6)
    zebra *= (beyond - 2.5).abs_().lt_(1.5)
    zebra *= (out + scene.shoulder).lt_(0)
    white.lerp_(zebra.new_tensor(0.9), zebra)
    yellow *= beyond.abs_().gt_(1)
    yellow *= 1 - zebra


def shade(asphalt, pavement, white, yellow, scene, backdrop):
    """The image of `paint_ground`: what each pixel shows, lit, and through the haze."""
    clear = (backdrop.reach / -scene.visibility).exp_()  # share that the haze lets through
    haze = 1 - clear
    white *= clear
    yellow *= white
    bare = clear - white
    grass = 1 - asphalt
    grass -= pavement
    grass *= bare
    grey = asphalt.mul_(ASPHALT).add_(pavement, alpha=PAVEMENT)
    grey *= 1 - 0.35 * scene.rain
    grey *= bare
    grey.add_(white, alpha=WHITE_LINE)
    lamps = 0.45 * backdrop.beam * scene.dusk
    image = grey.new_empty(3, len(grey), *backdrop.streak.shape)
    for i, channel in enumerate(image):
        sky, ground = channel.tensor_split([backdrop.sky.shape[1]], 2)
        above = scene.sky[..., i]
        far = scene.haze[..., i]
        torch.addcmul(above, backdrop.sky, far - above, out=sky)
        torch.add(grey, grass, alpha=GRASS[i], out=ground)
        ground.add_(yellow, alpha=YELLOW_LINE[i] - WHITE_LINE)
        ground *= scene.light[..., i] + lamps
        ground.addcmul_(haze, far)
    return image


def paint_rain(image, scene, backdrop):
    """Rain before the image (3, m, cameras, H, W), in place: a veil, and streaks."""
    ticks = (scene.time / DT).round().long()
    fallen = (scene.wander[:, 2] * 1024).long() + ticks * 23
    for i in scene.rain.nonzero()[:, 0].tolist():
        streak = (backdrop.streak + fallen[i]) & 255
        veil = scene.rain[i] * (0.08 + 0.17 * (streak < 9))
        grey = 200 - 90 * scene.dusk[i]
        image[:, i] += veil * (grey - image[:, i])


# --------------------------------------------------------------------------------------------------
# Boxes, and the rays that hit them


def boxes_of(world):
    """All that stands, in the ego frame: Columns (n, 2 things) and (n, 2 things, 3)."""
    things = Columns()
    things.x, things.y, yaw = world.poses_to_ego()
    things.cos = torch.cos(yaw)
    things.sin = torch.sin(yaw)
    things.size = world.things.size
    things.kind = world.things.kind
    things.colour = world.things.colour
    things.signal = world.signals()
    things.braking = world.braking()
    number = torch.arange(2 * yaw.shape[1], device=yaw.device)
    boxes = things[:, number // 2]
    truck = (boxes.kind == CAR) & (boxes.size[..., 2] > 2.2)  # a high car is a truck
    kind = torch.where(truck, TRUCK, boxes.kind).long()
    boxes.part = 2 * kind + number % 2
    shape = PART_SHAPES.to(yaw.device)[boxes.part]
    back, length, width, low, high = shape.unbind(-1)
    back = back * boxes.size[..., 0]
    x = boxes.x - back * boxes.cos
    y = boxes.y - back * boxes.sin
    z = (low + high) / 2 * boxes.size[..., 2]
    boxes.centre = torch.stack([x, y, z], -1)
    share = torch.stack([length, width, high - low], -1)
    boxes.half = share * boxes.size / 2
    return boxes


@functools.lru_cache
def rays_of(camera_ids, H, W, device):
    """The rays of all cameras, one after the other: direction (3, rays) in the ego frame.

    pixel (rays,): which pixel each belongs to, of pictures FINE times as coarse. edge: (W, H).
    cone (cameras, 1): angle (rad) between a picture's middle and its corners."""
    intrinsics, pose, direction = rig_rays(camera_ids, H, W)
    rays = Columns(intrinsics=intrinsics, edge=torch.tensor([W, H]))
    rays.cone = (math.hypot(H, W) / 2 / intrinsics[:, 6, None]).clamp(max=math.pi)  # all around
    rays.position = pose[:, :3, 3]
    rays.turn = pose[:, :3, :3]
    rays.direction = direction.flatten(0, 2).T.contiguous()
    row = torch.arange(len(pose) * H) // FINE
    column = torch.arange(W) // FINE
    pixel = row[:, None] * (W // FINE) + column
    rays.pixel = pixel.flatten()
    axis = torch.tensor([-1.0, 0, 1])
    rays.grid = torch.cartesian_prod(axis, axis, axis)  # (27, 3): points of a cube
    return rays.each(lambda value: value.to(device))


def paint_boxes(image, scene, boxes, rays):
    """Draw boxes over the image (3, m, cameras, H, W), in place."""
    pairs = pairs_of(boxes, rays)
    hits = slab_test(tests_of(pairs, rays), pairs, rays)
    hits.scene = pairs.scene.index_select(0, hits.pair)
    hits = nearest(hits, image.shape[1], rays)
    colour = colours(hits, pairs, scene, rays)
    pixels = image[0, 0].numel()
    pixel = hits.scene * pixels + rays.pixel.index_select(0, hits.ray)
    blend(image.view(3, -1), pixel, colour)


def pairs_of(boxes, rays):
    """Boxes (m, boxes) with each camera that may see them: Columns (pairs,), sorted by part.

    A pair has a rectangle of height rows of width rays, from column left and row top on. Rows count
    on from camera to camera. slab (8, pairs) is cos, sin, the centre as the camera sees it and half
    the size, both in the box's own axes."""
    scene, box = (boxes.half.amin(-1) > 0).nonzero(as_tuple=True)  # (k,)
    order = boxes.part[scene, box].argsort(stable=True)
    boxes = boxes[scene[order], box[order]]
    boxes.scene = scene[order].int()
    k, camera = in_view(boxes, rays).nonzero(as_tuple=True)  # (pairs,)
    pairs = boxes[k]
    offset = pairs.centre - rays.position[camera]
    low, high = rectangles(pairs, offset, camera, rays)
    pairs.left, top = low.T
    pairs.top = top + camera.int() * rays.edge[1]
    pairs.width, pairs.height = (high - low).T
    x, y, z = offset.T
    cos = pairs.cos
    sin = pairs.sin
    along = cos * x + sin * y
    across = cos * y - sin * x
    pairs.slab = torch.stack([cos, sin, along, across, z, *pairs.half.T])
    return pairs


def in_view(boxes, rays):
    """Whether boxes (k,) may be in the pictures, (k, cameras) bool.

    The sphere around a box must reach into the cone around a picture. Behind a lens pixels mean
    little, so `rectangles` cannot tell."""
    offset = boxes.centre - rays.position[:, None]
    x, y, z = (offset @ rays.turn).unbind(-1)  # (cameras, k)
    outside = torch.cos(rays.cone) * torch.hypot(x, y) - torch.sin(rays.cone) * z  # m
    return (outside <= boxes.half.norm(dim=-1)).T


def rectangles(pairs, offset, camera, rays):
    """Where pairs' boxes may be in their pictures: from and to which column and row, (pairs, 2).

    A grid of points is projected. Straight edges bow through such a lens, hence the margin."""
    x, y, z = (rays.grid * pairs.half[:, None]).unbind(-1)  # (pairs, 27)
    cos = pairs.cos[:, None]
    sin = pairs.sin[:, None]
    point = torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)
    point += offset[:, None]
    point = point @ rays.turn[camera]
    pixel, _ = project(point, rays.intrinsics[camera, None])
    low = pixel.amin(1)
    high = pixel.amax(1)
    # Up to 1.2 rad off the axis an arc of a rad bows by less than 0.08 a^2 rad, and half an edge by
    # a quarter of what the edge does.
    focal = rays.intrinsics[camera, 6]  # pixels per rad
    bow = 0.04 * (high - low).square().sum(-1) / focal
    # A box near enough to surround the camera may be anywhere; so may one that reaches farther off
    # the axis than that, where a picture does.
    around = offset.norm(dim=-1) <= pairs.half.norm(dim=-1)
    if (rays.cone > 1.2).any():
        angle = torch.atan2(torch.hypot(point[..., 0], point[..., 1]), point[..., 2])
        around |= angle.amax(1) > 1.2
    margin = 1 + bow.masked_fill(around, math.inf)[:, None]
    span = torch.stack([low - margin, high + margin + 1])
    return span.clamp(min=0).minimum(rays.edge).int()


def tests_of(pairs, rays):
    """The tests: each ray of each pair's rectangle. Columns pair and ray (tests,), int32."""
    pair, row = runs(pairs.top, pairs.height)  # (rows,)
    first = row * rays.edge[0] + pairs.left.index_select(0, pair)
    line, ray = runs(first, pairs.width.index_select(0, pair))
    return Columns(pair=pair.index_select(0, line), ray=ray)


def runs(first, length):
    """Runs of length integers from first on, laid end to end: each integer's run, and the integer.

    first [7, 0] and length [2, 3] give [0, 0, 1, 1, 1] and [7, 8, 0, 1, 2]."""
    run = torch.repeat_interleave(length)
    before = length.cumsum(0, dtype=torch.int32) - length
    count = torch.arange(len(run), dtype=torch.int32, device=run.device)
    return run, count + (first - before).index_select(0, run)


def slab_test(tests, pairs, rays):
    """The tests that hit, with their depth (m) and x, y, z from -1 to 1 over the box, (hits,) each.

    In its own axes a box is where three slabs meet. A ray enters it with the last slab and leaves
    it with the first."""
    slab = pairs.slab.index_select(1, tests.pair)
    cos, sin = slab[:2]
    centre = slab[2:5]
    half = slab[5:]
    x, y, z = rays.direction.index_select(1, tests.ray)
    direction = torch.stack([cos * x + sin * y, cos * y - sin * x, z])
    inverse = direction.reciprocal()
    middle = centre * inverse
    reach = inverse.abs_().mul_(half)
    near = (middle - reach).amax(0)
    far = middle.add_(reach).amin(0)
    tests.depth = near
    tests.x, tests.y, tests.z = direction.mul_(near).sub_(centre).div_(half)
    hit = (near < far) & (near > 0)
    return tests[hit.nonzero()[:, 0]]


def nearest(hits, scenes, rays):
    """The nearest hit of each ray, in this many scenes.

    Positive floats sort as integers do, so depth and the hit's number fit one integer."""
    count = rays.pixel.numel()
    ray = (hits.scene * count + hits.ray).long()
    key = hits.depth.view(torch.int32).long()
    key <<= 32
    key += torch.arange(len(key), device=key.device)
    best = torch.full((scenes * count,), MISS, device=key.device)
    best.scatter_reduce_(0, ray, key, "amin")
    first = best.index_select(0, ray) == key
    return hits[first.nonzero()[:, 0]]


def blend(image, pixel, colour):
    """Mix rays into pixels of the image (3, pixels), in place: pixel (hits,), colour (3, hits).

    Each ray owns a share of its pixel, the ground keeps the rest. Colours are rounded to multiples
    of 2^-12, which add up exactly in any order."""
    colour.mul_(1024).round_().div_(1024 * FINE ** 2)
    covered = torch.bincount(pixel, minlength=image.shape[1])
    image *= 1 - covered / FINE ** 2
    for i in range(3):
        image[i] += torch.zeros_like(image[i]).index_add_(0, pixel, colour[i])


# --------------------------------------------------------------------------------------------------
# Paint


def colours(hits, pairs, scene, rays):
    """Red, green, blue of hits (3, hits), 0 .. 255: their paint in the light, through the haze."""

    def of_scene(value):
        return value.movedim(0, -1).index_select(-1, hits.scene)

    dusk = of_scene(scene.dusk)
    hits.dark = dusk > 0.3
    add_faces(hits, pairs)
    paint = painted(hits, pairs)
    colour = of_scene(scene.light)
    if scene.dusk.any():  # our headlamps
        ahead = rays.direction[0].index_select(0, hits.ray).clamp_(min=0)
        beam = ahead.pow_(16) * torch.exp(-hits.depth / 60)
        colour += 0.7 * dusk * beam
    colour *= 1.05 - 0.25 * hits.end - 0.43 * hits.side
    colour.masked_fill_(paint[3] > 0, 1)
    colour *= paint[:3]
    colour.clamp_(max=1)
    colour *= 255
    haze = of_scene(scene.haze)
    clear = torch.exp(hits.depth / (of_scene(scene.visibility) * (-8 / 3)))
    colour -= haze
    colour *= clear
    colour += haze
    return colour


def add_faces(hits, pairs):
    """Add to hits the face they are on, and what their things signal."""
    hits.wide = hits.y.abs()
    hits.high = hits.z.abs()
    hits.end = hits.x.abs() > torch.maximum(hits.wide, hits.high)
    hits.rear = hits.end & (hits.x < 0)
    hits.front = hits.end & (hits.x > 0)
    hits.side = (hits.wide > hits.high) & ~hits.end
    hits.wall = hits.end | hits.side
    hits.signal = pairs.signal.index_select(0, hits.pair)
    hits.braking = pairs.braking.index_select(0, hits.pair)


def painted(hits, pairs):
    """The paint (4, hits) of hits, which are sorted by part: coats of liveries over own colours."""
    palette = torch.nn.functional.pad(pairs.colour, (0, 1)).tolist()
    part = pairs.part.index_select(0, hits.pair)
    sizes = torch.bincount(part, minlength=len(PARTS)).tolist()
    hits.paint = hits.pair.clone()
    end = 0
    for size, (*_, livery) in zip(sizes, PARTS):
        end += size
        if livery and size:
            box = hits[end - size : end]
            for where, coat in livery(box):
                box.paint[where] = len(palette)
                palette.append(coat)
    palette = hits.x.new_tensor(palette).view(len(palette), 4)
    return palette.T.contiguous().index_select(1, hits.paint)


# --------------------------------------------------------------------------------------------------
# Liveries: coats of paint, each over those before. A coat is where, (hits,) bool or ALL, and what.


def car(box):
    """The body of a car."""
    yield box.z < -0.4, TYRE
    high = box.z >= -0.4
    lamp = high & (box.wide > 0.45)
    yield from tail_lamps(box, lamp)
    yield from headlamps(box, lamp)
    corner = high & box.side & (box.x.abs() > 0.8)
    yield from blinkers(box, (lamp & box.end) | corner)


def cabin(box):
    """The cabin of a car, with a third brake lamp."""
    yield box.wall & (box.high < 0.75), WINDOW
    yield box.rear & (box.z < -0.3) & box.braking, BRAKE_LAMP


def cargo(box):
    """The load of a truck."""
    yield box.z < -0.65, TYRE
    lamp = truck_lamp(box)
    yield from tail_lamps(box, lamp)
    yield from blinkers(box, lamp & box.rear)


def cab(box):
    """The cab of a truck."""
    yield box.z < -0.65, TYRE
    yield box.wall & (box.z > 0), WINDOW
    lamp = truck_lamp(box)
    yield from headlamps(box, lamp)
    yield from blinkers(box, lamp & box.front)


def truck_lamp(box):
    """Where a truck has lamps."""
    return (box.wide > 0.45) & (box.z > -0.65) & (box.z < -0.3)


def tail_lamps(box, where):
    """Lamps at the rear; brake lights."""
    lamp = where & box.rear
    yield lamp, DULL_LAMP
    yield lamp & box.dark, TAIL_LAMP
    yield lamp & box.braking, BRAKE_LAMP


def headlamps(box, where):
    """Lamps at the front."""
    lamp = where & box.front
    yield lamp, HEADLAMP
    yield lamp & box.dark, BRIGHT_LAMP


def blinkers(box, where):
    """Turn signals, or hazard lights: both."""
    on = torch.where(box.y > 0, box.signal == BLINK_LEFT, box.signal == BLINK_RIGHT)
    yield where & (on | (box.signal == HAZARD)), AMBER


def body(box):
    """A pedestrian, in trousers below."""
    yield box.z < -0.15, TROUSERS


def head(box):
    """A bare head."""
    yield ALL, SKIN


def wood(box):
    """Poles and trunks."""
    yield ALL, WOOD


def rubber(box):
    """A tyre on the road."""
    yield ALL, TYRE


def housing(box):
    """The housing of a traffic light."""
    lamps = box.rear & (box.wide < 0.85) & (box.high < 0.9)
    yield lamps & (box.signal == RED) & (box.z > 0), RED_LAMP
    yield lamps & (box.signal == YELLOW) & (box.high < 0.45), YELLOW_LAMP
    yield lamps & (box.signal == GREEN) & (box.z < 0), GREEN_LAMP


def tip(box):
    """The white top of a cone, below its point."""
    yield box.z < -0.2, WHITE


def building(box):
    """Rows of windows. At dusk every fifth has a lamp on."""
    storey = box.z * 3
    floor = storey.floor()
    pane = (storey - floor < 0.45) & box.wall
    yield pane, PANE
    if box.dark.any():
        column = (torch.where(box.end, box.y, box.x) * 4).floor()
        lit = torch.remainder(column + 7 * floor, 5) == 0
        yield pane & lit & box.dark, LIT_PANE


def bump(box):
    """A striped speed bump."""
    yield ALL, TYRE
    yield torch.remainder(box.y * 1.25 + 0.25, 1) < 0.6, STRIPE


def plate(box):
    """A stop sign, or a yellow warning."""
    yield ALL, BOARD_RED
    yield box.wide + box.high > 1.45, WHITE  # an octagon is a square without its corners
    letter = torch.remainder(box.y * 2.6 + 0.3, 1) < 0.6
    yield letter & (box.wide < 0.75) & (box.high < 0.3), WHITE
    warns = box.signal == YELLOW
    yield warns, STRIPE
    yield warns & (box.wide < 0.25) & (box.high < 0.65), TYRE
    yield ~box.rear, WOOD


def bicycle(box):
    """A bicycle and legs."""
    yield ALL, TROUSERS
    yield (box.z < 0.3) | ~box.wall, TYRE
    long = box.x.abs()
    yield box.side & (long < 0.25) & (box.z < 0), GAP
    yield box.side & (long > 0.4) & (box.z > 0.3), GAP
    lamp = (box.z > 0.4) & box.dark
    yield lamp & box.rear, TAIL_LAMP
    yield lamp & box.front, BRIGHT_LAMP


def rider(box):
    """A cyclist's body and head."""
    yield box.z > 0.45, SKIN


def legs(box):
    """A deer's legs, with a gap between."""
    yield box.side & (box.z < -0.1) & (box.x.abs() < 0.65), GAP


def board(box):
    """Red and white."""
    yield ALL, WHITE
    yield torch.remainder(box.y * 2 + box.z * 0.5, 1) < 0.5, BOARD_RED


# Two boxes for each kind of thing: how far back, length, width, bottom and top, as shares of the
# thing's size, and the livery. Without one a box has the thing's own colour.
NONE = 0, 0, 0, 0, 0, None
PARTS = [
    NONE, NONE,                                                           # nothing
    (0, 1, 1, 0.13, 0.62, car), (0.06, 0.55, 0.86, 0.62, 1, cabin),       # car
    (0, 1, 1, 0, 0.85, body), (0, 0.6, 0.5, 0.85, 1, head),               # pedestrian
    (0, 1, 1, 0.6, 1, housing), (0, 0.4, 0.15, 0, 0.6, wood),             # light
    (0, 1, 1, 0, 0.5, None), (0, 0.6, 0.6, 0.5, 1, tip),                  # cone
    (0, 1, 1, 0, 1, building), NONE,                                      # building
    (0, 1, 1, 0.35, 1, None), (0, 0.15, 0.15, 0, 0.35, wood),             # tree
    (0, 1, 1, 0.3, 1, None), NONE,                                        # rail
    (0, 1, 1, 0, 1, bump), NONE,                                          # bump
    (0, 1, 1, 0.6, 1, plate), (0, 1, 0.1, 0, 0.6, wood),                  # sign
    (0, 1, 0.5, 0, 0.5, bicycle), (0.05, 0.35, 1, 0.5, 1, rider),         # cyclist
    (0.1, 0.8, 1, 0, 0.72, legs), (-0.38, 0.24, 0.6, 0.6, 1, None),       # deer
    (0, 1, 1, 0, 0.4, rubber), (0, 0.6, 0.6, 0.4, 1, None),               # debris
    (0, 0.3, 1, 0.4, 1, board), (0, 1, 0.8, 0, 0.4, wood),                # barrier
    (0.12, 0.76, 1, 0.12, 1, cargo), (-0.39, 0.22, 0.94, 0.1, 0.8, cab),   # truck
]  # fmt: skip
PART_SHAPES = torch.tensor([part[:5] for part in PARTS])

"""
The renderer: a ray a pixel. The ground's pixels are constants of a camera; boxes are tried only where they may be. A scene
looks the same whatever is rendered beside it, and no sum depends on the order of its terms.
"""
import functools
from types import SimpleNamespace

import torch

from alpamayo import DT, project
from world.cameras import rays, rig_camera
from world.causes import (
    BARRIER, BLINK_LEFT, BLINK_RIGHT, BUILDING, BUMP, CAR, CONE, CYCLIST, DEBRIS, DEER, FRONT, GREEN, HAZARD, LIGHT,
    PEDESTRIAN, RED, SIGN, TREE, TRUCK, YELLOW)
from world.roads import FAR, FILLET, LANE, SIDE_ROAD, lane_edges, locate

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



def images_of(world, camera_ids, size):
    """What the cameras see now: images (n, cameras, 3, H, W) uint8; size is (H, W)."""
    (H, W), ids, air = size, tuple(camera_ids), _air(world.scene)
    view, fine = _view(ids, H, W, world.device), _view(ids, FINE * H, FINE * W, world.device)
    images = torch.empty(len(world.x), len(ids), 3, H, W, dtype=torch.uint8, device=world.device)
    # A few scenes at a time. Most have no bend, no crossing, or neither, and are spared the mathematics of it.
    bends, crosses = world.scene.road[:, 2] > 0, torch.minimum(world.scene.crossing, world.scene.stop) < FAR
    dusk = bool((world.scene.dusk > 0).any())
    chunk = max(1, CHUNK[images.is_cuda] // (len(ids) * H * W))
    parts = [(part, bend, cross) for bend in (False, True) for cross in (False, True)
             for part in ((bends == bend) & (crosses == cross)).nonzero()[:, 0].split(chunk) if len(part)]
    done = 0
    best = torch.full((chunk * fine.direction.shape[1],), NOBODY, device=world.device)
    for (part, bend, cross), pairs in zip(parts, _pairs(_boxes(world), [part for part, _, _ in parts], fine)):
        local = {name: value[part] for name, value in air.items()}
        image = _paint_ground(world, local, part, bend, cross, dusk, view)
        _paint_boxes(image, pairs, local, dusk, best, fine)
        _paint_rain(image, world.scene, world.time, part, view)
        images[done:done + len(part)] = image.movedim(0, 2)
        done += len(part)
    return images.index_select(0, torch.cat([part for part, _, _ in parts]).argsort())


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
    (right_line, left_line), centre = lane_edges(scene.lanes), LANE * (scene.lanes[..., 0] + 0.5)
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
    x, y, yaw = (value[..., None] for value in world.poses_to_ego())                    # (n, things, 1)
    kind = torch.where((t.kind == CAR) & (t.size[..., 2] > 2.2), TRUCK, t.kind).long()  # a high car is a truck
    cos, sin, size = torch.cos(yaw), torch.sin(yaw), t.size[:, :, None]
    back, length, width, low, high = PARTS.to(world.device)[kind].unbind(-1)   # (n, things, 2)
    back = back * size[..., 0]
    boxes = dict(
        centre=torch.stack([x - back * cos, y - back * sin, (low + high) / 2 * size[..., 2]], -1),
        half=torch.stack([length, width, high - low], -1) * size / 2, cos=cos, sin=sin, colour=t.colour[:, :, None],
        part=2 * kind[..., None] + torch.tensor([0, 1], device=world.device), signal=world.signals()[..., None],
        braking=world.braking()[..., None])
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
    rain, dusk = scene.rain[part], scene.dusk[part]
    own = (scene.wander[part, 2] * 1024).long() + (time[part] / DT).round().long() * 23     # what has fallen
    for i in rain.nonzero()[:, 0].tolist():
        fallen = (view.streak + own[i]) & 255
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

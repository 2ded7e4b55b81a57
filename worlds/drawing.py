"""The tabletop's pictures: projection, surfaces, solids, shadows, and every thing that lies there.

    canvas = Canvas("A", 64)                       # the static camera; hand=(x, y, z, yaw): wrist's
    paint_scene(canvas, things, held, pose, gap)
    canvas.array()                                 # (64, 64, 3) uint8

All is drawn with pillow at twice the size, from the farthest to the nearest. x points right, y away
from the viewer, z up. A thing has kind, colour, x, y, z, yaw, radius, on and, if it is a drawer or
a button, opened, pressed, tilt: see `Thing` in tabletop.py. Only what can be seen is decided here;
what can be touched is decided there.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# --- what there is to see -------------------------------------------------------------------------

COLOURS = {
    "red": (222, 42, 44), "green": (46, 168, 72), "blue": (38, 98, 226),
    "yellow": (252, 208, 36), "purple": (148, 62, 200), "orange": (248, 126, 28),
}
MOVABLES = ("block", "bar", "ball", "cup", "spoon", "carrot", "eggplant")
TARGETS = ("plate", "towel", "bowl", "basket")
PAINT = COLOURS | {
    "gray": (150, 154, 160), "wood": (150, 108, 72), "dark": (50, 54, 62), "white": (236, 238, 242),
    "leaf": (66, 134, 52), "cap": (64, 92, 48),
}
CABINET_Y, TRAVEL, HANDLE_Z = 0.86, 0.18, 0.075  # front of the closed drawer, its way, its handle

# look: table colour, pattern, wall colour, light (r, g, b), camera jitter (right, up, zoom)
LOOKS = {
    "A": ((226, 214, 196), "planks", (168, 190, 206), (1.00, 1.00, 1.00), (0.000, 0.000, 1.00)),
    "B": ((178, 194, 208), "speckle", (234, 226, 212), (0.98, 1.00, 1.03), (0.012, -0.008, 1.02)),
    "C": ((196, 206, 186), "weave", (214, 190, 176), (1.02, 1.00, 0.94), (-0.012, 0.006, 0.99)),
    "D": ((92, 98, 112), "tiles", (52, 58, 74), (0.92, 0.97, 1.06), (0.010, 0.010, 0.98)),
    "E": ((142, 102, 76), "grain", (96, 82, 92), (1.06, 0.98, 0.86), (-0.016, -0.010, 1.03)),
}


# --- pictures -------------------------------------------------------------------------------------

EYE_Y, EYE_Z = -1.16, 2.03  # the static camera stands in front of the table and looks down on it
DOWN = math.atan2(EYE_Z - 0.05, 0.47 - EYE_Y)
COS, SIN = math.cos(DOWN), math.sin(DOWN)
FOCAL, MIDDLE = 3.05, 0.570  # in picture widths: focal length, height of the optical axis
WRIST_ABOVE, WRIST_FOCAL = 0.45, 1.68  # the wrist camera's height over the fingertips
LIGHT = 2.4  # direction (angle in x, y) from which side faces get more light

_backgrounds = {}
_shades = {}


def shade(colour, factor, look="A"):
    """A paint's (r, g, b) times a brightness, under a look's light."""
    key = (colour, round(factor * 20), look)
    if key not in _shades:
        light = LOOKS[look][3]
        _shades[key] = tuple(
            max(0, min(255, int(c * key[1] / 20 * k))) for c, k in zip(PAINT[colour], light))
    return _shades[key]


def pale(rgb, share):
    """A colour mixed with a share of white."""
    return tuple(int(c + (255 - c) * share) for c in rgb)


def surface(look, x, y):
    """The table's colour at points x, y (any shape) -> (..., 3) floats."""
    base, pattern, _, light, _ = LOOKS[look]
    if pattern == "planks":
        row = np.floor(y * 6)
        wave = 0.020 * np.sin(40 * y + 5 * np.sin(3 * x + 2 * row) + row)
        tone = 1 + 0.03 * np.sin(row * 12.9) + wave - 0.07 * (np.mod(y * 6, 1) < 0.05)
    elif pattern == "speckle":
        tone = 1 + 0.022 * np.sin(61 * x + 7 * np.sin(23 * y)) * np.sin(57 * y + 9 * np.sin(19 * x))
    elif pattern == "weave":
        tone = 1 + 0.020 * np.sign(np.sin(70 * x)) * np.sign(np.sin(70 * y))
    elif pattern == "tiles":
        line = (np.mod(x * 5 + 0.5, 1) < 0.035) | (np.mod(y * 5, 1) < 0.035)
        tone = 1 + 0.05 * np.sin(np.floor(x * 5 + 0.5) * 7 + np.floor(y * 5) * 3) - 0.20 * line
    else:
        tone = 1 + 0.07 * np.sin(26 * x + 6 * np.sin(2.1 * y + 0.8 * np.sin(7 * x)))
    lamp = 1.05 - 0.13 * np.hypot(x - 0.35, y - 0.65)
    return np.clip(np.array(base) * np.array(light) * (tone * lamp)[..., None], 0, 255)


def background(look, size, wrist=False):
    """The empty table, and the same in shadow: pictures of the doubled size (wrist: from above)."""
    key = (look, size, wrist)
    if key in _backgrounds:
        return _backgrounds[key]
    if wrist:  # from above, [-0.6, 1.6] both ways, first row farthest away
        n = min(16 * size, 1600)
        line = (np.arange(n) + 0.5) / n * 2.2 - 0.6
        x, y = np.meshgrid(line, line[::-1])
        outside = (abs(x - 0.5) > 0.62) | (abs(y - 0.46) > 0.54)
        rgb = surface(look, x, y)
        rgb[outside] = np.array(LOOKS[look][2]) * 0.7
    else:
        right, up, zoom = LOOKS[look][4]
        line = (np.arange(2 * size) + 0.5) / (2 * size)
        u, v = np.meshgrid((line - 0.5 - right) / (FOCAL * zoom),
                           (MIDDLE - line - up) / (FOCAL * zoom))
        depth = EYE_Z / (SIN - v * COS)  # along the axis until the ray meets the table
        x, y = 0.5 + u * depth, EYE_Y + depth * (COS + v * SIN)
        rgb = surface(look, x, y)
        fade = (1.02 - 0.35 * np.clip(line * 4, 0, 1))[:, None, None]
        wall = np.array(LOOKS[look][2]) * fade * (1 - 0.12 * abs(u / u.max())[..., None])
        rgb = np.where((y > 1.0)[..., None], wall, rgb)
        edge = (y > 0.985) & (y <= 1.0)
        rgb[edge] *= 0.78
    bright = Image.fromarray(rgb.clip(0, 255).astype(np.uint8))
    dark = Image.fromarray((rgb * 0.60).clip(0, 255).astype(np.uint8))
    _backgrounds[key] = bright, dark
    return bright, dark


class Canvas:
    """One picture in the making: projects (x, y, z) and draws solids, at twice the final size."""

    def __init__(self, look, size, hand=None):
        """hand: None for the static camera, (x, y, z, yaw) for the one on the wrist."""
        self.look, self.size, self.hand = look, size, hand
        bright, self.dark = background(look, size, hand is not None)
        if hand is None:
            right, up, zoom = LOOKS[look][4]
            self.focal, self.squash = 2 * size * FOCAL * zoom, SIN
            self.mid_x, self.mid_y = 2 * size * (0.5 + right), 2 * size * (MIDDLE - up)
            self.image = bright.copy()
        else:
            x, y, z, yaw = hand
            self.focal, self.squash = 2 * size * WRIST_FOCAL, 1.0
            self.mid_x = self.mid_y = float(size)
            self.cos, self.sin = math.cos(yaw), math.sin(yaw)
            k = bright.width / 2.2  # pixels of the table's picture per unit
            s = k * (z + WRIST_ABOVE) / self.focal
            self.turn = (s * self.cos, s * self.sin, k * (x + 0.6), -s * self.sin, s * self.cos,
                         k * (1.6 - y))
            self.image = self._cut(bright)
            self.dark = self._cut(self.dark)
        self.draw = ImageDraw.Draw(self.image)

    def _cut(self, table):
        """The piece of the table below the hand, turned with it."""
        a, b, c, d, e, f = self.turn
        m = self.size
        return table.transform((2 * m, 2 * m), Image.Transform.AFFINE,
                               (a, b, c - (a + b) * m, d, e, f - (d + e) * m))

    def at(self, x, y, z):
        """-> pixel x, pixel y, pixels per unit there."""
        if self.hand is None:
            dy, dz = y - EYE_Y, z - EYE_Z
            s = self.focal / (dy * COS - dz * SIN)
            return self.mid_x + (x - 0.5) * s, self.mid_y - (dy * SIN + dz * COS) * s, s
        hx, hy, hz, _ = self.hand
        s = self.focal / max(0.1, hz + WRIST_ABOVE - z)
        dx, dy = x - hx, y - hy
        return (self.mid_x + (dx * self.cos + dy * self.sin) * s,
                self.mid_y - (dy * self.cos - dx * self.sin) * s, s)

    def sees(self, x, y, z, r):
        """Whether something of radius r may be in the picture."""
        px, py, s = self.at(x, y, z)
        return abs(px - self.size) < self.size + r * s and abs(py - self.size) < self.size + r * s

    def paint(self, colour, factor):
        return shade(colour, factor, self.look)

    def disc(self, x, y, z, r, fill):
        px, py, s = self.at(x, y, z)
        a, b = r * s, r * s * self.squash
        self.draw.ellipse((px - a, py - b, px + a, py + b), fill)

    def polygon(self, points, fill):
        """points: [(x, y, z), ...]"""
        self.draw.polygon([self.at(*p)[:2] for p in points], fill)

    def sphere(self, x, y, z, r, colour):
        px, py, s = self.at(x, y, z)
        for size, shift, factor in ((1.0, 0.0, 0.68), (0.84, 0.13, 1.0), (0.36, 0.36, 1.4)):
            a = r * s * size
            cx, cy = px - shift * r * s, py - shift * r * s
            self.draw.ellipse((cx - a, cy - a, cx + a, cy + a), self.paint(colour, factor))

    def drum(self, x, y, z0, r0, z1, r1, colour, side=0.74, lid=1.05):
        """A round solid, radius r0 at height z0 and r1 at z1."""
        ax, ay, s0 = self.at(x, y, z0)
        bx, by, s1 = self.at(x, y, z1)
        q, r0, r1 = self.squash, r0 * s0, r1 * s1
        fill = self.paint(colour, side)
        self.draw.ellipse((ax - r0, ay - r0 * q, ax + r0, ay + r0 * q), fill)
        nx, ny = ay - by, bx - ax  # across the line between both middles
        n = math.hypot(nx, q * ny)
        if n > 1e-6:
            ex, ey = nx / n, q * q * ny / n
            self.draw.polygon([(ax + r0 * ex, ay + r0 * ey), (bx + r1 * ex, by + r1 * ey),
                               (bx - r1 * ex, by - r1 * ey), (ax - r0 * ex, ay - r0 * ey)], fill)
        self.draw.ellipse((bx - r1, by - r1 * q, bx + r1, by + r1 * q), self.paint(colour, lid))

    def prism(self, base, z0, z1, colour, lid=1.08):
        """An upright solid over the counter-clockwise base [(x, y), ...]."""
        low = [self.at(x, y, z0)[:2] for x, y in base]
        high = [self.at(x, y, z1)[:2] for x, y in base]
        for i in range(len(base)):
            j = (i + 1) % len(base)
            (ax, ay), (bx, by), (cx, cy) = low[i], low[j], high[j]
            if (bx - ax) * (cy - ay) - (by - ay) * (cx - ax) < 0:  # the face looks at the camera
                angle = math.atan2(base[i][0] - base[j][0], base[j][1] - base[i][1])
                self.draw.polygon([low[i], low[j], high[j], high[i]],
                                  self.paint(colour, 0.74 + 0.14 * math.cos(angle - LIGHT)))
        self.draw.polygon(high, self.paint(colour, lid))

    def box(self, x, y, yaw, half_x, half_y, z0, z1, colour, lid=1.08):
        self.prism(corners(x, y, yaw, half_x, half_y), z0, z1, colour, lid)

    def shadows(self, spots):
        """spots: [(x, y, radius, strength 0..1)]: soft and flat, as under a lamp overhead."""
        mask = Image.new("L", (self.size, self.size))
        draw = ImageDraw.Draw(mask)
        for x, y, r, strength in spots:
            if self.hand is not None and not self.sees(x, y, 0.0, r):
                continue
            px, py, s = self.at(x, y, 0.0)
            px, py, a = px / 2, py / 2, r * s / 2
            b = a * self.squash
            draw.ellipse((px - a, py - b, px + a, py + b), int(255 * strength))
        mask = mask.filter(ImageFilter.BoxBlur(self.size / 80))
        self.image.paste(self.dark, mask=mask.resize(self.image.size, Image.Resampling.BILINEAR))

    def array(self):
        """-> (size, size, 3) uint8"""
        return np.asarray(self.image.reduce(2))


class Labels(Canvas):
    """The static camera's picture with a paint of its own for each thing: what hides what."""

    def __init__(self, look, size, things):
        super().__init__(look, size)
        self.things, self.painted = things, None
        self.image.paste((0, 0, 0), (0, 0, 2 * size, 2 * size))

    def shadows(self, spots):
        pass

    def paint(self, colour, factor):
        number = next((i for i, t in enumerate(self.things, 1) if t is self.painted), 0)
        return 10 * number, 0, 0

    def pixels(self):
        """-> how many pixels of the final size show each thing"""
        red, green, _ = np.asarray(self.image, np.float32).reshape(-1, 3).T
        numbers = (red - green) / (1 - np.minimum(green, 254) / 255) / 10  # `pale` adds white
        found = np.bincount(numbers.round().astype(int).clip(0), minlength=len(self.things) + 1)
        return found[1:] / 4


def corners(x, y, yaw, half_x, half_y):
    """The corners of a turned rectangle, counter-clockwise."""
    c, s = math.cos(yaw), math.sin(yaw)
    return [(x + a * half_x * c - b * half_y * s, y + a * half_x * s + b * half_y * c)
            for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


def along(thing, length):
    """(x, y) on a thing's long axis; yaw 0 points away from the viewer."""
    return thing.x - length * math.sin(thing.yaw), thing.y + length * math.cos(thing.yaw)


# --- things ---------------------------------------------------------------------------------------


def paint_thing(c, t):
    if t.kind in MOVABLES:
        paint_movable(c, t)
    elif t.kind in TARGETS:
        paint_target(c, t)
    elif t.kind == "drawer":
        paint_drawer(c, t)
    else:
        paint_button(c, t)


def paint_movable(c, t):
    kind, z = t.kind, t.z
    if kind == "block":
        c.box(t.x, t.y, t.yaw, 0.045, 0.045, z, z + 0.09, t.colour, 1.1)
    elif kind == "bar":
        c.box(t.x, t.y, t.yaw, 0.024, 0.085, z, z + 0.06, t.colour, 1.1)
    elif kind == "ball":
        c.sphere(t.x, t.y, z + 0.045, 0.048, t.colour)
    elif kind == "cup":
        px, py, s = c.at(t.x + 0.045 * math.cos(t.yaw), t.y + 0.045 * math.sin(t.yaw), z + 0.05)
        a = 0.028 * s
        c.draw.ellipse((px - a, py - a, px + a, py + a), outline=c.paint(t.colour, 0.7),
                       width=max(2, int(0.012 * s)))
        c.drum(t.x, t.y, z, 0.034, z + 0.10, 0.043, t.colour, 0.82, 1.2)
        c.disc(t.x, t.y, z + 0.098, 0.034, c.paint(t.colour, 0.4))
    elif kind == "spoon":
        x, y = along(t, -0.025)
        c.box(x, y, t.yaw, 0.011, 0.065, z, z + 0.02, t.colour, 1.0)
        x, y = along(t, 0.055)
        c.drum(x, y, z, 0.03, z + 0.02, 0.036, t.colour, 0.7, 1.1)
        c.disc(x, y, z + 0.02, 0.022, c.paint(t.colour, 0.7))
    elif kind == "carrot":
        x, y = along(t, 0.085)
        for turn in (-0.5, 0.0, 0.5):
            lx, ly = x - 0.03 * math.sin(t.yaw + turn), y + 0.03 * math.cos(t.yaw + turn)
            c.disc(lx, ly, z + 0.03, 0.017, c.paint("leaf", 1.0 + 0.3 * turn))
        (x0, y0), (x1, y1) = along(t, -0.085), along(t, 0.055)
        across = math.cos(t.yaw), math.sin(t.yaw)
        for factor, share, high in ((0.68, 1.0, z + 0.02), (1.05, 0.7, z + 0.04)):
            fill, r0, r1 = c.paint(t.colour, factor), 0.008 * share, 0.034 * share
            c.disc(x0, y0, high, r0, fill)
            c.disc(x1, y1, high, r1, fill)
            c.polygon([(x + k * r * across[0], y + k * r * across[1], high)
                       for x, y, k, r in ((x0, y0, 1, r0), (x1, y1, 1, r1), (x1, y1, -1, r1),
                                          (x0, y0, -1, r0))], fill)
    else:  # an eggplant
        for factor, share in ((0.66, 1.0), (1.0, 0.8)):
            for length, r in ((-0.035, 0.046), (-0.01, 0.042), (0.02, 0.034), (0.042, 0.03)):
                x, y = along(t, length)
                c.disc(x, y, z + 0.03 + 0.015 * factor, r * share, c.paint(t.colour, factor))
        x, y = along(t, -0.04)
        c.disc(x - 0.012, y + 0.012, z + 0.06, 0.012, c.paint(t.colour, 1.5))
        x, y = along(t, 0.06)
        c.disc(x, y, z + 0.045, 0.026, c.paint("cap", 0.9))
        x, y = along(t, 0.088)
        c.disc(x, y, z + 0.045, 0.011, c.paint("cap", 0.7))


def paint_target(c, t):
    """Draws a receptacle; the near wall of a bowl or a basket follows in paint_front."""
    kind, z = t.kind, t.z
    if kind == "plate":
        c.drum(t.x, t.y, z, 0.08, z + 0.012, 0.10, t.colour, 0.66, 1.0)
        c.disc(t.x, t.y, z + 0.012, 0.068, pale(c.paint(t.colour, 1.0), 0.35))
    elif kind == "towel":
        c.box(t.x, t.y, t.yaw, 0.11, 0.11, z, z + 0.008, t.colour, 1.0)
        cos, sin = math.cos(t.yaw), math.sin(t.yaw)
        for d in (-0.075, 0.075):
            quad = corners(t.x - d * sin, t.y + d * cos, t.yaw, 0.11, 0.016)
            c.polygon([(x, y, z + 0.008) for x, y in quad], pale(c.paint(t.colour, 1.0), 0.7))
    elif kind == "bowl":
        c.drum(t.x, t.y, z, 0.068, z + 0.06, 0.09, t.colour, 0.78, 1.2)
        c.disc(t.x, t.y, z + 0.058, 0.08, c.paint(t.colour, 0.5))
        c.disc(t.x, t.y - 0.005, z + 0.03, 0.052, c.paint(t.colour, 0.62))
    else:  # a basket
        outer, inner = corners(t.x, t.y, 0, 0.13, 0.13), corners(t.x, t.y, 0, 0.115, 0.115)
        c.prism(outer, z, z + 0.09, t.colour, 1.12)
        c.polygon([(x, y, z + 0.09) for x, y in inner], c.paint(t.colour, 0.62))
        c.polygon([(x, y, z + 0.01) for x, y in inner], c.paint(t.colour, 0.5))


def paint_front(c, t):
    """The near wall of a bowl or a basket, drawn over what lies inside."""
    if c.hand is not None:  # seen from above a wall hides nothing
        return
    if t.kind == "basket":
        x0, x1, y, z = t.x - 0.13, t.x + 0.13, t.y - 0.13, t.z
        c.polygon([(x0, y, z), (x1, y, z), (x1, y, z + 0.09), (x0, y, z + 0.09)],
                  c.paint(t.colour, 0.8))
        c.polygon([(x0, y, z + 0.09), (x1, y, z + 0.09), (x1, y + 0.015, z + 0.09),
                   (x0, y + 0.015, z + 0.09)], c.paint(t.colour, 1.12))
        for i in range(2):
            h = z + 0.022 + 0.03 * i
            c.polygon([(x0, y, h), (x1, y, h), (x1, y, h + 0.01), (x0, y, h + 0.01)],
                      c.paint(t.colour, 0.62))
    else:
        angles = [math.pi + math.pi * i / 8 for i in range(9)]
        rim = [(t.x + 0.09 * math.cos(a), t.y + 0.09 * math.sin(a), t.z + 0.06) for a in angles]
        foot = [(t.x + 0.068 * math.cos(a), t.y + 0.068 * math.sin(a), t.z) for a in angles]
        c.polygon(rim + foot[::-1], c.paint(t.colour, 0.78))


def paint_drawer(c, t):
    """A cabinet at the back edge whose drawer slides towards the viewer."""
    front = CABINET_Y - TRAVEL * t.opened
    middle, half = (front + CABINET_Y) / 2, (CABINET_Y - front) / 2
    if t.opened > 0.02:
        c.box(t.x, middle, 0, 0.105, half, 0.01, 0.11, "wood", 0.7)
        inner = corners(t.x, middle + 0.006, 0, 0.09, half - 0.006)
        c.polygon([(x, y, 0.11) for x, y in inner], c.paint("wood", 0.35))
    else:
        c.box(t.x, CABINET_Y, 0, 0.105, 0.006, 0.02, 0.12, "wood", 0.9)
    c.box(t.x, CABINET_Y + 0.06, 0, 0.13, 0.06, 0, 0.15, "wood", 1.25)
    c.polygon([(t.x - 0.105, front, 0.015), (t.x + 0.105, front, 0.015),
               (t.x + 0.105, front, 0.115), (t.x - 0.105, front, 0.115)], c.paint("wood", 1.0))
    c.box(t.x, front - 0.02, 0, 0.042, 0.012, HANDLE_Z - 0.012, HANDLE_Z + 0.012, "white", 1.0)


def paint_button(c, t):
    """A coloured cap on a wedge that leans to the right (tilt > 0) or to the left."""
    slope, h, m = math.tan(t.tilt), 0.05, 0.055
    (x0, x1), (y0, y1) = (t.x - m, t.x + m), (t.y - m, t.y + m)
    left, right = h + m * slope, h - m * slope
    for x, high, factor in ((x0, left, 0.95), (x1, right, 0.7)):
        c.polygon([(x, y0, 0), (x, y1, 0), (x, y1, high), (x, y0, high)], c.paint("gray", factor))
    c.polygon([(x0, y0, 0), (x1, y0, 0), (x1, y0, right), (x0, y0, left)], c.paint("gray", 0.8))
    c.polygon([(x0, y0, left), (x1, y0, right), (x1, y1, right), (x0, y1, left)],
              c.paint("gray", 1.15 if t.tilt < 0 else 1.3))
    for r, lift, factor in ((0.04, 0.004, 0.6), (0.04, 0.006 if t.pressed else 0.022, 1.0)):
        ring = []
        for i in range(14):
            a = i * math.tau / 14
            dx = r * math.cos(a) * math.cos(t.tilt) + lift * math.sin(t.tilt)
            ring.append((t.x + dx, t.y + r * math.sin(a),
                         h - dx * slope + lift / math.cos(t.tilt)))
        c.polygon(ring, c.paint(t.colour, factor))
    if t.pressed:  # it lights up
        c.disc(t.x, t.y, h + 0.01, 0.02, (255, 255, 240))


def paint_hand(c, pose, gap):
    """Two fingers, palm and arm, turned about the fingertips; gap: half the space between them."""
    x, y, z, roll, pitch, yaw = pose
    cr, sr, cp, sp = math.cos(roll), math.sin(roll), math.cos(pitch), math.sin(pitch)
    cy, sy = math.cos(yaw), math.sin(yaw)

    def place(a, b, h):  # (across, along, up) of the hand -> table: yaw, then pitch, then roll
        a, b = a * cy - b * sy, a * sy + b * cy
        b, h = b * cp - h * sp, b * sp + h * cp
        return x + a * cr + h * sr, y + b, z + h * cr - a * sr

    def solid(a, half_a, half_b, h0, h1, colour, brightness=1.0):
        p = [place(a + i * half_a, j * half_b, h) for h in (h0, h1)
             for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        q = [c.at(*point)[:2] for point in p]
        for i, j, k, m, factor in ((0, 1, 5, 4, 0.84), (1, 2, 6, 5, 0.66), (2, 3, 7, 6, 0.7),
                                   (3, 0, 4, 7, 0.95), (4, 5, 6, 7, 1.1), (3, 2, 1, 0, 0.5)):
            (ax, ay), (bx, by), (cx, cy) = q[i], q[j], q[k]
            if (bx - ax) * (cy - ay) - (by - ay) * (cx - ax) < 0:
                c.draw.polygon([q[i], q[j], q[k], q[m]], c.paint(colour, factor * brightness))

    sides = (-1, 1) if place(1, 0, 0)[1] <= y else (1, -1)  # the farther finger first
    for side in sides:
        solid(side * (gap + 0.011), 0.011, 0.014, 0.0, 0.10, "dark")
    if c.hand is None:
        solid(0.0, 0.08, 0.026, 0.10, 0.13, "white")
        solid(0.0, 0.027, 0.024, 0.13, 0.40, "white", 0.94)


def paint_scene(c, things, held, pose, gap):
    """Shadows first, then everything from the farthest to the nearest."""
    spots = []
    for t in things:
        high = min(1.0, t.z / 0.4)
        spots.append((t.x + 0.012, t.y - 0.006, t.radius * (1.12 - 0.25 * high), 0.75 - 0.4 * high))
    x, y, z = pose[:3]
    spots.append((x, y, 0.055, 0.65 - 0.6 * z))
    c.shadows(spots)
    jobs = []  # (order, what to draw)
    for t in things:
        if c.hand is not None and not c.sees(t.x, t.y, t.z, 0.35 if t.kind == "drawer" else 0.2):
            continue
        if t.kind in ("plate", "towel"):
            jobs.append((9.0, 0, paint_thing, (c, t)))
        elif t.kind in ("bowl", "basket"):
            jobs.append((t.y + t.radius, 0, paint_thing, (c, t)))
            jobs.append((t.y - t.radius, 0, paint_front, (c, t)))
        else:
            below = t
            while below.on is not None and below.on.kind not in TARGETS:
                below = below.on
            jobs.append((y if t is held else below.y, t.z, paint_thing, (c, t)))
    jobs.append((y, 5.0, paint_hand, (c, pose, gap)))
    if c.hand is not None:  # from above only height counts
        jobs = [(-a[3][1].z if a[2] is not paint_hand else -9.0, 0, *a[2:]) for a in jobs]
    jobs.sort(key=lambda job: (-job[0], job[1]))
    for _, _, draw, args in jobs:
        c.painted = args[1]
        draw(*args)

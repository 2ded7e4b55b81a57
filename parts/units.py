"""What a model is given: numbers between the bounds of its recordings, pictures of its size.

Letters: N rows, A numbers of an action (or a state).
"""

import numpy as np
from PIL import Image

from parts.process import UserError

# --- Numbers --------------------------------------------------------------------------------------


def summary(x):
    """(N, D) -> q01, q99, min, max of each dimension, exact over all N, as lists."""
    places = {"q01": 0.01, "q99": 0.99, "min": 0.0, "max": 1.0}
    columns = (np.asarray(column, np.float64) for column in x.T)  # one at a time in memory
    rows = [np.quantile(column, [*places.values()]).tolist() for column in columns]
    return {name: [row[k] for row in rows] for k, name in enumerate(places)}


def bounds(stats):
    """-> (low, high) float32, q01 and q99, or min and max where stats["how"] is "minmax" or where
    hardly anything moves; one to either side of what never does."""
    q01, q99, low, high = (np.array(stats[k], np.float32) for k in ("q01", "q99", "min", "max"))
    tails = (stats.get("how") != "minmax") & (q99 - q01 >= 1e-6)
    low, high = np.where(tails, q01, low), np.where(tails, q99, high)
    still = high - low < 1e-6
    return low - still, high + still


def normalise(x, stats):
    """(..., A) in the recording's units -> [-1, 1] between the bounds, clipped there; zeros take
    the place of numbers that another robot has and this one has not."""
    return squeeze(x, *bounds(stats))


def squeeze(x, low, high):
    wider = len(low) - np.shape(x)[-1]
    if wider < 0:
        words = f"a state or action of {np.shape(x)[-1]} numbers, trained on {len(low)}"
        raise UserError(f"another robot: {words}")
    x = np.pad(x, [(0, 0)] * (np.ndim(x) - 1) + [(0, wider)]) if wider else x
    return np.clip(2 * (x - low) / (high - low) - 1, -1, 1).astype(np.float32)


def unnormalise(x, stats):
    """The inverse of `normalise` inside the bounds; what never moved stays where it was."""
    low, high = bounds(stats)
    still = np.subtract(stats["max"], stats["min"]) < 1e-6
    return (np.where(still, 0, x) + 1) / 2 * (high - low) + low


# --- Pictures -------------------------------------------------------------------------------------


def resized(image, side):
    """The picture at side x side, bicubic; 0: as it is."""
    if not side or image.shape[:2] == (side, side):
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.BICUBIC))


def shift(image, dx, dy):
    """The picture (height, width, 3) moved by whole pixels, its edge repeated."""
    height, width = image.shape[:2]
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    columns = np.clip(np.arange(width) + dx, 0, width - 1)
    return image[rows][:, columns]


def scaled(images, sides):
    """A picture of each camera, the first at sides[0], the others at sides[1] (0: as they are)."""
    return [resized(image, sides[k > 0]) for k, image in enumerate(images)]

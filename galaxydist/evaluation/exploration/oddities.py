"""Pictures that are not what a picture of a galaxy should be; each check is simple, and the page says what it looks for."""

import numpy as np
from numpy.typing import NDArray

# Grey levels (of 255) that a picture, or a channel, spans at most where nothing is in it.
_LEAST_SPAN = 2
SATURATED_SHARE = 0.05
REPEATED_SHARE = 0.05

# Kind -> what the page says about it.
KINDS = {
    "unreadable": "cannot be read or does not decode",
    "blank": f"blank: all pixels within {_LEAST_SPAN} grey levels of one another",
    "missing channel": f"one channel is constant (within {_LEAST_SPAN} levels) while another is not",
    "saturated": f"more than {100 * SATURATED_SHARE:.0f} % of the pixels are white (255 in a channel)",
    "flat rows": f"more than {100 * REPEATED_SHARE:.0f} % of the rows or of the columns have one single value: a part is missing",
    "repeated rows": f"more than {100 * REPEATED_SHARE:.0f} % of the rows equal the row before: cut short or badly resampled",
    "nothing there": "no source over the sky in the middle of the picture",
}


def find_oddities(image_HWC: NDArray[np.uint8]) -> list[str]:
    """The kinds of oddity that the pixels alone show: none for a sound picture; a blank one is only that.

    Args:
        image_HWC: H x W x 3 uint8.
    """
    channels = [np.ascontiguousarray(image_HWC[..., channel]) for channel in range(3)]  # reducing over a short last axis is slow
    spans = [int(channel_HW.max()) - int(channel_HW.min()) for channel_HW in channels]
    if max(spans) <= _LEAST_SPAN:
        return ["blank"]
    found = []
    if min(spans) <= _LEAST_SPAN:
        found.append("missing channel")
    white_HW = (channels[0] == 255) | (channels[1] == 255) | (channels[2] == 255)
    if white_HW.mean() > SATURATED_SHARE:
        found.append("saturated")
    colour_HW = channels[0].astype(np.uint32) | channels[1].astype(np.uint32) << 8 | channels[2].astype(np.uint32) << 16
    flat_H = (colour_HW == colour_HW[:, :1]).all(axis=1)
    flat_W = (colour_HW == colour_HW[:1]).all(axis=0)
    if max(flat_H.mean(), flat_W.mean()) > REPEATED_SHARE:
        found.append("flat rows")
    repeated = (colour_HW[1:] == colour_HW[:-1]).all(axis=1) & ~flat_H[1:]
    if repeated.sum() > REPEATED_SHARE * len(flat_H):
        found.append("repeated rows")
    return found

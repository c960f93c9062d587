"""The size of images after they are resized: a narrow one, enlarged to the usual width, may not fit in memory."""

from collections.abc import Callable
from typing import TypeVar

from l2ul.common.choices import MAX_IMAGE_PIXELS
from l2ul.common.errors import Reason

Image = TypeVar("Image")  # of Pillow, or a tensor (…, height, width)


class TooLarge(Reason):
    """The image would be too large after resizing."""


def check_resize(width: int, height: int, short_side: int | None) -> None:
    """Raise TooLarge if an image is larger than MAX_IMAGE_PIXELS after its short side is resized, unless it shrinks.

    short_side  length to which the short side is resized; None: the image is not resized, or to a fixed size
    """
    short, long = sorted((width, height))
    if not short_side or not short:
        return
    sides = short_side, int(short_side * long / short)
    count = sides[0] * sides[1]
    if count > max(MAX_IMAGE_PIXELS, width * height):
        raise TooLarge(
            f"{width} x {height} pixels, which resizing the short side to {short_side} enlarges to {count:,}, above "
            f"the limit of {MAX_IMAGE_PIXELS:,}",
            "crop the long side",
        )


def checked(to_pixels: Callable[[Image], object], short_side: int | None) -> Callable[[Image], object]:
    """Return a function that resizes the short side of images with a check of the size before, see `check_resize`."""

    def pixels(image: Image) -> object:
        width, height = reversed(image.shape[-2:]) if hasattr(image, "shape") else image.size
        check_resize(width, height, short_side)
        return to_pixels(image)

    return pixels

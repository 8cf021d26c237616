"""Pictures to bytes. Called on rank 0 when a request's pictures are decoded."""

import io

from PIL import Image

from workers.messages import OutputFormat


def encode_image(image: Image.Image, output_format: OutputFormat, compression: int) -> bytes:
    """The picture in a file format.

    Args:
        image: RGB.
        output_format: "png" is lossless; "jpeg" and "webp" are not.
        compression: quality of jpeg and webp, 0 to 100.
    """
    buffer = io.BytesIO()
    options = {} if output_format == "png" else {"quality": compression}
    image.save(buffer, format=output_format, **options)
    return buffer.getvalue()

"""Fields of bodies that are pictures: a file of a form or a data: URL in JSON comes in, its bytes go out, not decoded.

For `service.api.bodies`; `service.api.pictures` decodes them.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from service.api.pictures import from_data_url

MOST_IMAGES = 10
"""The most pictures of one edit."""


def _picture(given: object) -> object:
    """The bytes of a picture, from a file of a form, a data: URL, or an object with a data: URL."""
    if isinstance(given, dict) and given.keys() == {"file_id"}:
        raise ValueError("is the id of a file, and no files are kept here; send the file, or a data: URL as image_url")
    if isinstance(given, dict) and given.keys() == {"image_url"}:
        given = given["image_url"]
    return from_data_url(given) if isinstance(given, str) else given


def _pictures(given: object) -> object:
    return given if isinstance(given, list) else [given]


DataURL = Annotated[str, Field(pattern="^[dD][aA][tT][aA]:", description="a data: URL in base64")]
Picture = Annotated[
    bytes, BeforeValidator(_picture, DataURL | Annotated[dict[Literal["image_url"], DataURL], Field(min_length=1)])
]
Pictures = Annotated[
    list[Picture], Field(min_length=1, max_length=MOST_IMAGES), BeforeValidator(_pictures, Picture | list[Picture])
]

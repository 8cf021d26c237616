"""The task of a request, by the roles of the pictures and clips that it begins with. For the APIs and the workers."""

from collections.abc import Sequence

from deploy.model_spec import Task


def tasks_of(roles: Sequence[str], makes_video: bool) -> tuple[Task, ...]:
    """The tasks that a request may mean, of which a model has at most one.

    Args:
        roles: the roles of its inputs: `image`, maybe several times, `mask`, `last_image`, `control_image`, `video`.
        makes_video: whether it asks for a video.
    """
    if not roles:
        return ("text-to-video",) if makes_video else ("text-to-image",)
    if makes_video:
        return (_of_videos(roles),)
    if "control_image" in roles:
        return ("control",)
    if "mask" in roles:
        return ("inpaint",)
    return ("edit",) if len(roles) > 1 else ("image-to-image", "edit")


def _of_videos(roles: Sequence[str]) -> Task:
    if "video" in roles:
        return "video-to-video"
    return "first-last-frame-to-video" if "last_image" in roles else "image-to-video"


def makes_video(task: Task) -> bool:
    """Whether the task makes a video."""
    return task.endswith("-to-video")

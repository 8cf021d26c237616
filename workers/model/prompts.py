"""Refuses prompts of a classic pipeline that hold special words of the model, or are so long that its call fails, and
knows where pipelines cut prompts themselves.

Called by `workers.model.adapters.classic` when a request is checked, and by `workers.model.classic_denoising`.
"""

from collections.abc import Iterator
from typing import Any

from diffusers.pipelines.kandinsky5.pipeline_kandinsky_i2i import prompt_clean
from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import split_quotation

from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.model.picture_inputs import read
from workers.model.truncation import cut

PROCESSORS = ("processor", "text_processor")
"""Names of the components that prepare pictures together with prompts."""

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""A few of these are processors, or know the words of one."""

JOY_IMAGE = ("JoyImageEditPipeline", "JoyImageEditPlusPipeline")

MARKS = dict.fromkeys(JOY_IMAGE, ("<image>\n",))
"""Words that a pipeline itself replaces by those with which a processor marks pictures."""

FAILS_ABOVE = ("LongCatImageEditPipeline", "Ideogram4Pipeline")
"""Pipelines that fail if a prompt is too long: the first in its own warning, the second when it encodes."""

BEFORE_PICTURE = "Kandinsky5I2IPipeline"
"""A pipeline that writes the mark of the picture behind the prompt, and fails where it cuts it off."""

MOST_BEFORE_PICTURE = 1024
"""The most tokens that its call reads by default, including those of the picture."""

CUTS_ABOVE = ("LongCatImagePipeline",)
"""Pipelines that join the tokens of a prompt from several parts, and cut them then."""

TEMPLATE = 34
"""Tokens before a prompt, which Qwen-Image and JoyImage-Edit drop again."""

IDEOGRAM_TOKENS = 2048
"""The most tokens that its call reads by default, including the words of the chat around the prompt."""


def check_words(name: str, pipeline: Any, request: GenerationRequest) -> None:
    """Reject prompts that hold words by which a processor marks pictures: it would look for as many pictures.

    Args:
        name: the pipeline's class.
        pipeline: one of it.
        request: its prompts are looked at.

    Raises:
        InvalidParameter: names the prompt and the word.
    """
    marks = {*MARKS.get(name, ()), *_added(pipeline)}
    for field, text in _prompts(request):
        if mark := next((each for each in sorted(marks) if each in text), None):
            word = mark.replace("\n", "\\n")
            raise InvalidParameter(field, f"{field} holds {word}, a word of the model's own; leave it out")


def check_length(name: str, pipeline: Any, request: GenerationRequest) -> None:
    """Reject prompts that are too long for a pipeline that fails instead of cutting them.

    Args:
        name: the pipeline's class.
        pipeline: one of it.
        request: its prompts are looked at.

    Raises:
        InvalidParameter: names the prompt and how many tokens it has.
    """
    if name in FAILS_ABOVE:
        for field, count, most in _too_long(name, pipeline, request):
            raise InvalidParameter(field, f"{field} has {count} tokens, this model reads at most {most}; shorten it")
    picture = request.input("image")
    if name == BEFORE_PICTURE and picture and picture.data:  # only the first rank has it
        for field, count, most in _too_long_with(read(picture), pipeline, request):
            raise InvalidParameter(
                field,
                f"{field} has {count} tokens together with the picture's, this model reads at most {most}; shorten it, "
                "or send a smaller picture",
            )


def cut_prompts(name: str, pipeline: Any, request: GenerationRequest) -> Iterator[str]:
    """Warnings of prompts that a pipeline cuts where no tokenizer sees it. Arguments are those of `check_length`."""
    if name in CUTS_ABOVE:
        for field, count, most in _too_long(name, pipeline, request):
            yield cut(field, "text_encoder", most, count)


def _too_long(name: str, pipeline: Any, request: GenerationRequest) -> Iterator[tuple[str, int, int]]:
    """The prompts that have more tokens than a pipeline reads: the field, its tokens, those that are read."""
    chats = name == "Ideogram4Pipeline"
    most = IDEOGRAM_TOKENS if chats else pipeline.tokenizer_max_length
    for field, text in _prompts(request):
        parts = _chat(pipeline.tokenizer, text) if chats else _unquoted(text)
        count = sum(len(pipeline.tokenizer.encode(part, add_special_tokens=False)) for part in parts)
        if count > most:
            yield field, count, most


def _too_long_with(picture: Any, pipeline: Any, request: GenerationRequest) -> Iterator[tuple[str, int, int]]:
    """The same of prompts that are read together with a picture, as Kandinsky 5 writes them."""
    half = picture.resize((picture.width // 2, picture.height // 2))
    for field, text in _prompts(request):
        whole = pipeline.prompt_template.format(prompt_clean(text))
        tokens = pipeline.tokenizer(text=[whole], images=[half], videos=None)["input_ids"][0]
        count = len(tokens) - pipeline.prompt_template_encode_start_idx
        if count > MOST_BEFORE_PICTURE:
            yield field, count, MOST_BEFORE_PICTURE


def _unquoted(text: str) -> Iterator[str]:
    """The parts in which LongCat reads a prompt: quoted text by its characters."""
    return (part for each, quoted in split_quotation(text) for part in (each if quoted else [each]))


def _chat(tokenizer: Any, text: str) -> list[str]:
    """A prompt as Ideogram reads it."""
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    return [tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)]


def _prompts(request: GenerationRequest) -> tuple[tuple[str, str], ...]:
    return ("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")


def _added(pipeline: Any) -> Iterator[str]:
    """The words that were added to the vocabularies of a pipeline's processors."""
    parts = [getattr(pipeline, name, None) for name in PROCESSORS]
    named = (getattr(pipeline, name, None) for name in TOKENIZERS)
    parts += [part for part in named if getattr(part, "image_token", None)]
    for part in parts:
        tokenizer = getattr(part, "tokenizer", part)
        if tokenizer is not None:
            yield from tokenizer.get_added_vocab()

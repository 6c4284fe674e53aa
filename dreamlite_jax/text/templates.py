"""The words around a prompt: task tags, and the chat templates of the large encoder.

All of it is part of the released weights' contract (diffusers `pipelines/dreamlite/pipeline_dreamlite.py`): a model
that was trained with these words has to be asked with them. Both encoders use the same user text.
"""

import unicodedata
from typing import Literal, NamedTuple, get_args

from dreamlite_jax.errors import UserError

Task = Literal["generate", "edit", "null"]
TASKS: tuple[str, ...] = get_args(Task)
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # Hangul fillers and the blank of Braille: letters that show nothing

GENERATE_TAG = "[Generate]: "
EDIT_TAG = (
    "[Edit]: A diptych with two side-by-side images of the same scene. "
    "Compared to the right side, the left one has "
)  # fmt: skip


def clean_prompt(task: str, prompt: object) -> str:
    """The prompt without white space around it, checked against its task; both may come straight from a file.

    Stripping matters: the tag ends in a space, and a leading newline would merge with what stands before it into other
    tokens than the weights know.

    Raises:
        UserError: unknown task; a prompt that is no text, or has a character that none is; no words to generate or edit
            by, or none that can be seen; words in a null prompt.
    """
    if task not in TASKS:
        raise UserError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    if not isinstance(prompt, str):
        raise UserError(f"prompt is {prompt!r}, a {type(prompt).__name__}; it must be text")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"prompt is {_start(prompt)}; its character {error.start + 1} is no text: a byte that is not UTF-8, or "
            "half of a surrogate pair"
        ) from None
    if "\0" in prompt:
        raise UserError(f"prompt is {_start(prompt)}; its character {prompt.index(chr(0)) + 1} is NUL; leave that out")
    prompt = prompt.strip()
    if task == "null" and prompt:
        raise UserError(f"prompt is {prompt!r}; a null prompt is the empty string")
    if task != "null" and not prompt:
        raise UserError(f"prompt is empty; task {task} needs words (the unconditional prompt has task null)")
    if prompt and not any(map(_is_visible, prompt)):
        raise UserError(f"prompt is {prompt[:40]!a}, of which nothing can be seen; task {task} needs words")
    return prompt


def _is_visible(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNPS" and character not in BLANK_LETTERS


def _start(prompt: str) -> str:
    """The beginning of a prompt, printable whatever is in it."""
    return repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")


def user_text(task: Task, prompt: str) -> str:
    """What the encoder reads as the user's words: the tag of the task and the prompt; for null the empty string.

    Raises:
        UserError: see `clean_prompt`.
    """
    prompt = clean_prompt(task, prompt)
    return {"generate": GENERATE_TAG, "edit": EDIT_TAG, "null": ""}[task] + prompt


class ChatTemplate(NamedTuple):
    """A chat around the user text (`{}` in `text`), how many leading tokens are dropped after encoding, how many close
    it after the words."""

    text: str
    dropped_tokens: int
    closing_tokens: int = 5


# Text alone: prompts of task generate, and null prompts without a picture.
GENERATE_CHAT = ChatTemplate(
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    dropped_tokens=34,
)

# A picture and text: prompts of task edit, and null prompts that go with a picture. The 64 tokens end just before
# <|vision_start|>, so the states of the picture are kept.
EDIT_CHAT = ChatTemplate(
    "<|im_start|>system\n"
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    dropped_tokens=64,
)

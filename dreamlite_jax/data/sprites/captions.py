"""Scene -> English. Many phrasings, one meaning: whatever a caption leaves out has its canonical value.

Unmentioned: size medium; colour the object's default one; background plain white; place the centre for one object, left
and right (in the order named) for two, `catalog.ARRANGEMENTS` for two to four equal ones.
"""

import functools
from collections.abc import Sequence

import numpy as np

from dreamlite_jax.data.sprites import catalog
from dreamlite_jax.data.sprites.scenes import TAGS, Object, Scene, pick
from dreamlite_jax.errors import UserError

_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}

_PHOTO = ("a photo of", "a photo of", "a picture of", "an image of", "a drawing of", "this is a picture of")
_GREY_PHOTO = ("a black and white photo of", "a black and white picture of", "a greyscale image of")

# What the background is called: as an attribute ("on a ... background") and as a predicate ("the background is ...").
_ATTRIBUTE = {
    "plain": ("{}", "{}", "plain {}", "solid {}"),
    "gradient": ("{} gradient", "gradient {}"),
    "striped": ("striped {}", "{} striped"),
}
_PREDICATE = {
    "plain": ("{}", "plain {}"),
    "gradient": ("a {} gradient", "a gradient of {}"),
    "striped": ("striped {}", "{} with stripes"),
}


def with_article(phrase: str) -> str:
    """ "orange star" -> "an orange star"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@functools.cache
def place_phrases(position: str) -> tuple[str, ...]:
    """Ways to say that something is at `position`, without naming anything else."""
    if position == "centre":
        return "in the center", "in the middle"
    if position in ("top", "bottom"):
        return f"at the {position}", f"at the {position} in the middle", f"near the {position}"
    if position in ("left", "right"):
        return f"on the {position}", f"on the {position} side", f"at the {position}"
    other = position.replace("top", "upper").replace("bottom", "lower")
    return f"in the {position} corner", f"in the {position}", f"at the {position}", f"in the {other} corner"


def background_attribute(colour: str, texture: str, rng: np.random.Generator) -> str:
    """ "striped blue", to stand before the word background."""
    return pick(rng, _ATTRIBUTE[texture]).format(colour)


def noun(item: Object, rng: np.random.Generator, force_colour: bool = False, plural: bool = False) -> str:
    """ "small red car": the size unless medium, the colour unless it goes without saying, the name."""
    words = [pick(rng, _SIZE_WORDS[item.size])] if item.size != "medium" else []
    if item.colour and (force_colour or item.colour != item.kind.default_colour or rng.random() < 0.15):
        words.append(item.colour)
    return " ".join([*words, item.kind.plural if plural else item.name])


def _counted(scene: Scene) -> bool:
    """Whether the objects are equal but for their places, and stand as that number of equal objects does."""
    alike = {(o.name, o.colour, o.size) for o in scene.objects}
    return len(alike) == 1 and catalog.ARRANGEMENTS.get(len(scene.objects)) == tuple(o.position for o in scene.objects)


def _count_phrase(scene: Scene, rng: np.random.Generator, force_colour: bool) -> str:
    number = NUMBER_WORDS[len(scene.objects)]
    things = noun(scene.objects[0], rng, force_colour, plural=True)
    forms = [f"{number} {things}"] * 3 + [f"exactly {number} {things}", f"a group of {number} {things}"]
    forms += {
        2: [f"two {things} side by side", f"a pair of {things}", f"two {things} next to each other"],
        3: [f"three {things} in a triangle", f"a trio of {things}"],
        4: [f"four {things}, one in each corner", f"four {things} in the corners"],
    }[len(scene.objects)]
    return pick(rng, forms)


def _list(phrases: Sequence[str]) -> str:
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _pair_phrase(first: str, second: str, places: tuple[str, str], tag: str, rng: np.random.Generator) -> str:
    """Two objects side by side or one above the other, in words that need no corner."""
    if places == ("left", "right"):
        plain = [
            f"{first} and {second}",
            f"{first} and {second}",
            f"{first} next to {second}",
            f"{first} beside {second}",
        ]
        related = [
            f"{first} to the left of {second}",
            f"{first} left of {second}",
            f"{second} to the right of {first}",
            f"{second} right of {first}",
            f"{first} on the left and {second} on the right",
            f"{second} on the right and {first} on the left",
        ]
        related_rate = 1.0 if tag == "position" else 0.15
        return pick(rng, related if rng.random() < related_rate else plain)
    return pick(
        rng,
        (
            f"{first} above {second}",
            f"{first} over {second}",
            f"{second} below {first}",
            f"{second} under {first}",
            f"{first} at the top and {second} at the bottom",
            f"{second} at the bottom and {first} at the top",
        ),
    )


def _content(scene: Scene, tag: str, rng: np.random.Generator) -> str:
    """The objects of the scene as one noun phrase."""
    force_colour = tag in ("colors", "color_attr")
    if _counted(scene):
        return _count_phrase(scene, rng, force_colour)
    things = [with_article(noun(o, rng, force_colour)) for o in scene.objects]
    places = tuple(o.position for o in scene.objects)
    if places == ("centre",):
        return f"{things[0]} {pick(rng, place_phrases('centre'))}" if rng.random() < 0.15 else things[0]
    if places in (("left", "right"), ("top", "bottom")):
        return _pair_phrase(things[0], things[1], places, tag, rng)
    placed = [f"{thing} {pick(rng, place_phrases(place))}" for thing, place in zip(things, places, strict=True)]
    if len(placed) == 1:
        return placed[0]
    return _list([placed[i] for i in rng.permutation(len(placed))])


def _surface(scene: Scene, rng: np.random.Generator) -> str:
    """ "a striped blue background" or "a blue background with stripes"."""
    colour, texture = scene.background_colour, scene.texture
    if texture == "striped" and rng.random() < 0.25:
        return f"{with_article(colour)} background with stripes"
    return f"{with_article(background_attribute(colour, texture, rng))} background"


def caption(scene: Scene, tag: str, rng: np.random.Generator) -> str:
    """An English caption that determines the scene, mostly of 5 to 18 words.

    `tag` is one of GenEval's six kinds; it decides what is said explicitly (colours for "colors" and "color_attr", the
    relation for "position"). Any scene has a caption under any tag. Raises UserError for an unknown tag.
    """
    if tag not in TAGS:
        raise UserError(f"tag is {tag!r}; one of {', '.join(TAGS)} would be right")
    content = _content(scene, tag, rng)
    plain_white = (scene.background_colour, scene.texture) == ("white", "plain")
    silent = plain_white and rng.random() < 0.75
    if scene.greyscale:
        content = f"{pick(rng, _GREY_PHOTO)} {content}"
    else:
        draw = rng.random()
        several = content.split()[0] in (*NUMBER_WORDS.values(), "exactly")
        exists = "there are" if several else "there is"
        if draw < 0.08 and not silent:
            return f"on {_surface(scene, rng)} {exists} {content}"
        if draw < 0.2:
            content = f"{exists} {content}"
        elif draw < 0.7 or (silent and len(content.split()) < 5):
            content = f"{pick(rng, _PHOTO)} {content}"
    if silent:
        return content
    predicate = pick(rng, _PREDICATE[scene.texture]).format(scene.background_colour)
    tails = (
        f" on {_surface(scene, rng)}",
        f" on {_surface(scene, rng)}",
        f" with {_surface(scene, rng)}",
        f" against {_surface(scene, rng)}",
        f" in front of {_surface(scene, rng)}",
        f", the background is {predicate.replace('a orange', 'an orange')}",
        f", {background_attribute(scene.background_colour, scene.texture, rng)} background",
    )
    return content + pick(rng, tails)

"""Edits: a scene, an English instruction and the scene that follows from both. Eight operations.

Everything the instruction does not speak of stays bit-equal in the picture.
"""

import dataclasses

import numpy as np

from dreamlite_jax.data.sprites import catalog
from dreamlite_jax.data.sprites.captions import background_attribute, noun, place_phrases, with_article
from dreamlite_jax.data.sprites.scenes import (
    Object,
    Scene,
    free_positions,
    held_out,
    layouts,
    pick,
    sample_background,
    sample_colour,
    sample_names,
    sample_size,
    split_of,
)
from dreamlite_jax.errors import UserError

OPERATIONS: tuple[str, ...] = ("add", "remove", "replace", "recolour", "move", "background", "resize", "style")
# The other operations show nothing in the target that the source does not show, so none of their targets is held out
# unless its source is.
HELD_OUT_OPERATIONS: tuple[str, ...] = ("add", "replace", "recolour", "move")

_SIZES = tuple(catalog.SIZES)
_RELATIONS = {
    (2, 0): ("to the right of", "right of"),
    (-2, 0): ("to the left of", "left of"),
    (0, 2): ("below", "under"),
    (0, -2): ("above", "over"),
}
_STYLE = (
    "turn it into a black and white photo",
    "turn the picture into black and white",
    "make it black and white",
    "make the image greyscale",
    "convert the image to black and white",
    "convert it to a greyscale picture",
    "remove all the colour from the picture",
    "turn this into an old black and white photograph",
    "apply a black and white filter",
    "show the whole picture in shades of grey",
)


@dataclasses.dataclass(frozen=True)
class Edit:
    """`target` is what `instruction` makes of `source`."""

    source: Scene
    target: Scene
    operation: str
    instruction: str


def _the(item: Object, rng: np.random.Generator) -> str:
    """ "the car"; names are unique in a source, so a colour is only an ornament."""
    return f"the {item.colour} {item.name}" if item.colour and rng.random() < 0.25 else f"the {item.name}"


def _swapped(scene: Scene, old: Object, new: Object) -> Scene:
    return dataclasses.replace(scene, objects=tuple(new if o == old else o for o in scene.objects))


def _towards(place: str, start: str, rng: np.random.Generator) -> str:
    """ "to the left" where that is a straight way from `start`, else "to the middle of the left side"."""
    (x, y), (x0, y0) = catalog.POSITIONS[place], catalog.POSITIONS[start]
    if place == "centre":
        return pick(rng, ("to the center", "to the middle", "to the center of the picture"))
    if place in ("top", "bottom"):
        return pick(
            rng, (f"to the {place}", f"to the {place} edge") if x == x0 else (f"to the middle of the {place} edge",)
        )
    if place in ("left", "right"):
        return pick(
            rng, (f"to the {place}", f"to the {place} side") if y == y0 else (f"to the middle of the {place} side",)
        )
    other = place.replace("top", "upper").replace("bottom", "lower")
    return pick(
        rng, (f"to the {place}", f"to the {place} corner", f"into the {place} corner", f"to the {other} corner")
    )


def _destination(place: str, others: tuple[Object, ...], rng: np.random.Generator, start: str | None = None) -> str:
    """Says `place` absolutely (as where to go from `start`), or relative to an object exactly half a canvas away."""
    x, y = catalog.POSITIONS[place]
    near = []
    for other in others:
        ox, oy = catalog.POSITIONS[other.position]
        near += [f"{words} {_the(other, rng)}" for words in _RELATIONS.get((x - ox, y - oy), ())]
    if near and rng.random() < 0.4:
        return pick(rng, near)
    return _towards(place, start, rng) if start else pick(rng, place_phrases(place))


def _new_name(scene: Scene, rng: np.random.Generator) -> str:
    used = {o.name for o in scene.objects}
    return pick(rng, tuple(name for name in catalog.KINDS if name not in used))


def _add(scene: Scene, rng: np.random.Generator):
    free = free_positions(tuple(o.position for o in scene.objects))
    if not free or len(scene.objects) >= 4:
        return None
    name, place = _new_name(scene, rng), pick(rng, free)
    item = Object(name, sample_colour(rng, name, 0.4), place, sample_size(rng))
    thing = with_article(noun(item, rng))
    where = _destination(place, scene.objects, rng)
    forms = (f"add {thing} {where}", f"put {thing} {where}", f"place {thing} {where}", f"draw {thing} {where}")
    return dataclasses.replace(scene, objects=(*scene.objects, item)), pick(rng, (*forms, f"insert {thing} {where}"))


def _remove(scene: Scene, rng: np.random.Generator):
    if len(scene.objects) < 2:
        return None
    item = pick(rng, scene.objects)
    thing = _the(item, rng)
    forms = (f"remove {thing}", f"delete {thing}", f"take {thing} away", f"erase {thing} from the picture")
    forms += (f"get rid of {thing}", f"remove {thing} from the image")
    return dataclasses.replace(scene, objects=tuple(o for o in scene.objects if o != item)), pick(rng, forms)


def _replace(scene: Scene, rng: np.random.Generator):
    item, name = pick(rng, scene.objects), _new_name(scene, rng)
    new = dataclasses.replace(item, name=name, colour=sample_colour(rng, name, 0.4))
    # The size stays and goes without saying.
    old_thing, new_thing = _the(item, rng), with_article(noun(dataclasses.replace(new, size="medium"), rng))
    forms = (
        f"replace {old_thing} with {new_thing}",
        f"swap {old_thing} for {new_thing}",
        f"turn {old_thing} into {new_thing}",
        f"change {old_thing} to {new_thing}",
        f"put {new_thing} in place of {old_thing}",
        f"instead of {old_thing} show {new_thing}",
    )
    return _swapped(scene, item, new), pick(rng, forms)


def _recolour(scene: Scene, rng: np.random.Generator):
    painted = [o for o in scene.objects if o.colour]
    if not painted:
        return None
    item = pick(rng, painted)
    colour = pick(rng, tuple(c for c in catalog.COLOURS if c != item.colour))
    thing = _the(item, rng)
    forms = (
        f"make {thing} {colour}",
        f"paint {thing} {colour}",
        f"turn {thing} {colour}",
        f"change the colour of {thing} to {colour}",
        f"recolour {thing} in {colour}",
        f"change the {item.name} from {item.colour} to {colour}",
        f"the {item.name} should be {colour}",
    )
    return _swapped(scene, item, dataclasses.replace(item, colour=colour)), pick(rng, forms)


def _move(scene: Scene, rng: np.random.Generator):
    item = pick(rng, scene.objects)
    others = tuple(o for o in scene.objects if o != item)
    free = [p for p in free_positions(tuple(o.position for o in others)) if p != item.position]
    if item.size == "large" or not free:
        return None
    place = pick(rng, free)
    thing, where = _the(item, rng), _destination(place, others, rng, start=item.position)
    forms = (f"move {thing} {where}", f"move {thing} {where}", f"shift {thing} {where}", f"bring {thing} {where}")
    return _swapped(scene, item, dataclasses.replace(item, position=place)), pick(rng, forms)


def _background(scene: Scene, rng: np.random.Generator):
    draw = rng.random()
    if draw < 0.25:  # an unmentioned colour stays
        texture = pick(rng, tuple(t for t in catalog.TEXTURES if t != scene.texture))
        forms = {
            "plain": ("make the background plain", "remove the pattern from the background"),
            "gradient": ("make the background a gradient", "turn the background into a gradient"),
            "striped": ("make the background striped", "add stripes to the background", "give the background stripes"),
        }[texture]
        return dataclasses.replace(scene, texture=texture), pick(
            rng, forms[: 1 if scene.texture == "gradient" else None]
        )
    colour, texture = sample_background(rng)  # an unmentioned texture is plain
    if (colour, texture) == (scene.background_colour, scene.texture):
        return None
    called = background_attribute(colour, texture, rng)
    predicate = with_article(f"{colour} gradient") if texture == "gradient" else called
    forms = (
        f"change the background to {predicate}",
        f"make the background {predicate}",
        f"replace the background with {with_article(called)} one",
        f"give it {with_article(called)} background",
        f"use {with_article(called)} background",
        f"put everything on {with_article(called)} background",
    )
    return dataclasses.replace(scene, background_colour=colour, texture=texture), pick(rng, forms)


def _resize(scene: Scene, rng: np.random.Generator):
    item = pick(rng, scene.objects)
    sizes = _SIZES if item.position == "centre" else _SIZES[:2]
    old = sizes.index(item.size)
    new = pick(rng, [i for i in range(len(sizes)) if i != old])
    thing, size = _the(item, rng), sizes[new]
    adjective = {"small": ("small", "tiny"), "medium": ("medium sized",), "large": ("large", "huge")}[size]
    forms = [f"make {thing} {word}" for word in adjective]
    if new - old == 1:
        forms += [
            f"make {thing} bigger",
            f"make {thing} larger",
            f"enlarge {thing}",
            f"increase the size of {thing}",
        ] * 2
    if new - old == -1:
        forms += [f"make {thing} smaller", f"shrink {thing}", f"reduce the size of {thing}", f"scale {thing} down"] * 2
    return _swapped(scene, item, dataclasses.replace(item, size=size)), pick(rng, forms)


def _style(scene: Scene, rng: np.random.Generator):
    if scene.background_colour in ("white", "grey") and all(o.name == "soccer ball" for o in scene.objects):
        return None  # black and white already
    return dataclasses.replace(scene, greyscale=True), pick(rng, _STYLE)


_APPLY = dict(zip(OPERATIONS, (_add, _remove, _replace, _recolour, _move, _background, _resize, _style), strict=True))


def edit_scene(rng: np.random.Generator, source: Scene, operation: str) -> Edit | None:
    """A random edit of `source`, or None where this operation has nothing to do on it (or no room).

    Names must be unique in the source and the source in colour, or the instruction could mean several targets.
    Raises UserError for an unknown operation or such a source.
    """
    if operation not in OPERATIONS:
        raise UserError(f"operation is {operation!r}; one of {', '.join(OPERATIONS)} would be right")
    if source.greyscale or len({o.name for o in source.objects}) < len(source.objects):
        raise UserError(f"source is {source.key!r}; a scene in colour with one object of each name would be right")
    result = _APPLY[operation](source, rng)
    return result and Edit(source, result[0], operation, result[1])


def _sample_source(rng: np.random.Generator) -> Scene:
    """One to three objects of different names at any places where they do not overlap."""
    draw = rng.random()
    count = 1 if draw < 0.3 else 2 if draw < 0.7 else 3
    places = pick(rng, layouts(count))
    if count == 1 and rng.random() < 0.4:
        places = ("centre",)
    if count == 2 and rng.random() < 0.4:
        places = pick(rng, (("left", "right"), ("top", "bottom")))
    names = sample_names(rng, count)
    objects = [
        Object(name, sample_colour(rng, name, 0.4), place, sample_size(rng, large=place == "centre"))
        for name, place in zip(names, places, strict=True)
    ]
    return Scene(*sample_background(rng), tuple(objects))


def sample_edit(rng: np.random.Generator, operation: str) -> Edit:
    """An edit of a random scene of one to three objects. Raises UserError for an unknown operation."""
    while True:
        edit = edit_scene(rng, _sample_source(rng), operation)
        if edit is not None:
            return edit


def split_of_edit(edit: Edit) -> str | None:
    """The split that may hold the edit, or None.

    train: both scenes are training scenes. validation: the target is a validation scene and the source not held out.
    heldout: the target is held out and the source is not.
    """
    if held_out(edit.source):
        return None
    target = split_of(edit.target)
    return None if target == "train" and split_of(edit.source) != "train" else target

"""Counterfactual pairs: drawn scenes, each with the scene in which one word of its caption is another.

Two shapes, one left of, right of, above or below the other; or some shapes of one kind. Each scene is asked
about twice: in its own picture and in that of its counterfactual. What is chosen for one is rejected for the
other, and they differ in one word, so that nothing but the picture can tell them apart.

After CounterCurate (arXiv:2402.13254), with these differences: 1. its pictures are photographs that a
generator changes, ours are drawn; 2. it teaches a contrastive model by both and a generative one by the right
captions alone, ours are pairs for any preference loss; 3. its negatives of nouns and adjectives are not here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

from PIL import Image, ImageDraw

from rlhf.pairs.files import Made, Pair, PairsError

KINDS = ("left/right", "above/below", "count")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (235, 215, 50)}
SHAPES = ("disc", "square", "triangle")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
GRID = 4
"""Cells in each direction; a shape stands somewhere within a cell."""
SMALLEST = 32
QUESTIONS = {
    "left/right": "Is the {0} left or right of the {1}?",
    "above/below": "Is the {0} above or below the {1}?",
    "count": "How many {0}s are there?",
}
CAPTIONS = {
    "left/right": "The {0} is {word} of the {1}.",
    "above/below": "The {0} is {word} the {1}.",
    "count": "There are {word} {0}s.",
}


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in a picture. Example: a red disc left of a blue square, in a picture of 32 by 32 pixels:

    `Scene("left/right", (("red", "disc"), ("blue", "square")), ((1, 10), (17, 2)), 32, (120, 120, 120))`.
    """

    kind: str
    things: tuple[tuple[str, str], ...]
    """Colour and shape: two of them, or with `count` the one of which there are several."""
    places: tuple[tuple[int, int], ...]
    """Left and top of each shape, in pixels; with `count` there are more places than shapes."""
    size: int
    background: tuple[int, int, int]
    numbers: tuple[int, int] = (0, 0)
    """With `count`: how many shapes there are, and how many in the counterfactual."""

    @property
    def word(self) -> str:
        """The word of the caption that the picture decides, as it follows from the places."""
        if self.kind == "count":
            return NUMBERS[self.numbers[0]]
        axis = self.kind == "above/below"
        first, second = self.places
        return self.kind.split("/")[first[axis] > second[axis]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{colour} {shape}" for colour, shape in self.things)

    @property
    def question(self) -> str:
        return QUESTIONS[self.kind].format(*self.names)

    @property
    def caption(self) -> str:
        return CAPTIONS[self.kind].format(*self.names, word=self.word)

    def swapped(self) -> Scene:
        """The counterfactual: the shapes exchange their columns or rows, or their number is the other."""
        if self.kind == "count":
            return replace(self, numbers=self.numbers[::-1])
        (left, top), (other_left, other_top) = self.places
        if self.kind == "left/right":
            return replace(self, places=((other_left, top), (left, other_top)))
        return replace(self, places=((left, other_top), (other_left, top)))

    def draw(self) -> Image.Image:
        """The picture."""
        picture = Image.new("RGB", (self.size, self.size), self.background)
        pen, side = ImageDraw.Draw(picture), _side(self.size) - 1
        drawn = self.things if self.kind != "count" else self.things * self.numbers[0]
        for (colour, shape), (x, y) in zip(drawn, self.places, strict=False):
            box, fill = (x, y, x + side, y + side), COLOURS[colour]
            if shape == "disc":
                pen.ellipse(box, fill=fill)
            elif shape == "square":
                pen.rectangle(box, fill=fill)
            else:
                pen.polygon([(x, y + side), (x + side, y + side), (x + side // 2, y)], fill=fill)
        return picture


@dataclass(frozen=True, slots=True)
class Counter:
    """Makes the pairs of scenes; what scene `number` is depends on it and on the seed alone."""

    seed: int
    kinds: Sequence[str] = KINDS
    size: int = 64
    """Pixels of a side of the pictures."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise PairsError(
                f"--kinds: expected some of {', '.join(KINDS)}, got {', '.join(unknown) or 'none'}"
            )
        if self.size < SMALLEST:
            raise PairsError(f"--size: a picture has at least {SMALLEST} pixels a side, got {self.size}")

    def scene(self, number: int) -> Scene:
        """Scene `number`; the kinds take turns."""
        # random.Random hashes a text by SHA-512, the same everywhere
        rng = random.Random(f"{self.seed}/{number}")
        kind = self.kinds[number % len(self.kinds)]
        grey = rng.randrange(90, 150)
        background = (grey, grey, grey)
        if kind == "count":
            numbers = tuple(rng.sample(list(NUMBERS), 2))
            cells = rng.sample([(x, y) for x in range(GRID) for y in range(GRID)], max(numbers))
            thing = rng.choice(list(COLOURS)), rng.choice(SHAPES)
            places = tuple(self._place(cell, rng) for cell in cells)
            return Scene(kind, (thing,), places, self.size, background, (numbers[0], numbers[1]))
        things = tuple((colour, rng.choice(SHAPES)) for colour in rng.sample(list(COLOURS), 2))
        # along the axis that is asked for no two shapes are in one column or row
        apart, beside = rng.sample(range(GRID), 2), [rng.randrange(GRID) for _ in range(2)]
        cells = zip(apart, beside, strict=True) if kind == "left/right" else zip(beside, apart, strict=True)
        return Scene(kind, things, tuple(self._place(cell, rng) for cell in cells), self.size, background)

    def make(self, number: int) -> Made:
        """The pairs of a scene and of its counterfactual."""
        scene = self.scene(number)
        return Made((_pair(scene, number), _pair(scene.swapped(), number)))

    def settings(self) -> Mapping[str, Any]:
        """All that the pairs depend on."""
        return {"maker": "counter", "seed": self.seed, "kinds": list(self.kinds), "size": self.size}

    def _place(self, cell: tuple[int, int], rng: random.Random) -> tuple[int, int]:
        width = self.size // GRID
        # a pixel is left between shapes of neighbouring cells
        x, y = (at * width + rng.randrange(width - _side(self.size)) for at in cell)
        return x, y


def _side(size: int) -> int:
    """Pixels of a side of a shape in a picture of `size` pixels."""
    return size // GRID * 3 // 4


def _pair(scene: Scene, number: int) -> Pair:
    file = BytesIO()
    scene.draw().save(file, "PNG")
    content = [{"type": "image"}, {"type": "text", "text": scene.question}]
    return Pair(
        [{"role": "user", "content": content}],
        scene.caption,
        scene.swapped().caption,
        (file.getvalue(),),
        {"scene": number, "kind": scene.kind, "answer": scene.word},
    )

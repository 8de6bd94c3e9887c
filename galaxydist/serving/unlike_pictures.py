"""Pictures that are no cutouts of galaxies, on which the detection of pictures unlike the training galaxies is measured.

Photographs come with installed packages: three with base dependencies of this package, more with scikit-image where it is
installed. Everything else is drawn. The same seed gives the same pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from galaxydist.surveys.simulate import observation
from galaxydist.surveys.simulate.components import SIZE, Scene
from galaxydist.surveys.simulate.random_draws import Draws

Pixels = NDArray[np.uint8]

PHOTOGRAPHS, DRAWINGS, STARS, SKY = "photographs", "drawings and text", "star fields", "empty sky"
PLAIN, NOISE, CENTRAL_STAR = "plain colours", "noise", "a bright star in the centre"
# RNG streams of the kinds.
_STREAMS = {
    kind: 0x756E6C696B65 + number for number, kind in enumerate((PHOTOGRAPHS, DRAWINGS, STARS, SKY, PLAIN, NOISE, CENTRAL_STAR))
}
# Numbers of stars in star fields, in turn, as multiples of that around a usual galaxy, and around a star in the centre.
_DENSITIES, _CENTRAL_DENSITY = (2, 5, 20), 5
# Crops of photographs have at least this share of the shorter side.
_LEAST_CROP = 0.3
# Side of drawn pictures in pixels.
_SIDE = 320
# Files of scikit-image that are photographs of things, through a camera or a microscope; its Moon and Hubble field are sky.
_SKIMAGE = (
    *("astronaut", "brick", "cell", "chelsea", "coffee", "coins", "color", "grass", "gravel", "ihc", "motorcycle_left"),
    *("retina", "rocket"),
)


def find_photographs() -> dict[str, Path]:
    """Return the photographs of installed packages by name: scikit-learn's, matplotlib's, and scikit-image's if it is there."""
    from importlib.util import find_spec

    import matplotlib as mpl
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    found = {path.stem: path for path in sorted(folder.glob("*.jpg"))}
    found["grace_hopper"] = Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    spec = find_spec("skimage")
    if spec is not None and spec.origin is not None:
        data = Path(spec.origin).parent / "data"
        found |= {name: path for name in _SKIMAGE for path in sorted(data.glob(f"{name}.*"))}
    return {name: path for name, path in found.items() if path.is_file()}


def draw_photographs(count: int, seed: int = 0, photographs: Sequence[Path] | None = None) -> Iterator[Pixels]:
    """Yield square crops of photographs in turn: first the central square of each, then random ones.

    Args:
        count: number of pictures.
        seed: of the random crops.
        photographs: image files; None: those of installed packages.
    """
    paths = list(find_photographs().values()) if photographs is None else list(photographs)
    opened: dict[Path, Pixels] = {}
    for number in range(count if paths else 0):
        path, draws = paths[number % len(paths)], Draws(seed, _STREAMS[PHOTOGRAPHS], number)
        if path not in opened:
            with Image.open(path) as image:
                opened[path] = np.asarray(image.convert("RGB"))
        pixels = opened[path]
        height, width = pixels.shape[:2]
        side, place = min(height, width), (0.5, 0.5)
        if number >= len(paths):
            side = int(side * draws.uniform(_LEAST_CROP, 1.0))
            place = draws.uniform(), draws.uniform()
        top, left = int(place[0] * (height - side)), int(place[1] * (width - side))
        yield pixels[top : top + side, left : left + side]


def draw_drawings(count: int, seed: int = 0) -> Iterator[Pixels]:
    """Yield plots, shapes and pages of text in turn, on light and on dark ground."""
    draw: tuple[Callable[[Draws, bool], Pixels], ...] = (_plot, _shapes, _page)
    for number in range(count):
        draws = Draws(seed, _STREAMS[DRAWINGS], number)
        yield draw[number % len(draw)](draws, draws.bernoulli(0.3))


def _colour(draws: Draws, low: int = 0, high: int = 255) -> tuple[int, int, int]:
    return draws.integer(low, high), draws.integer(low, high), draws.integer(low, high)


def _plot(draws: Draws, is_dark: bool) -> Pixels:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ground, ink = ("black", "white") if is_dark else ("white", "black")
    figure = Figure(figsize=(3.2, 3.2), dpi=100, facecolor=ground)
    axes: Any = figure.add_subplot(facecolor=ground)
    x = np.linspace(0, 1, 40)
    kind = draws.integer(0, 3)
    for _ in range(draws.integer(1, 4)):
        y = np.cumsum(draws.normals(40)) + draws.uniform(-3, 3)
        colour = np.array(_colour(draws, 40, 230)) / 255
        if kind == 0:
            axes.plot(x, y, color=colour)
        elif kind == 1:
            axes.scatter(draws.uniforms(60), draws.normals(60), s=draws.uniform(4, 40), color=colour)
        elif kind == 2:
            axes.bar(x[::4], np.abs(y[::4]), width=0.08, color=colour)
        else:
            axes.pie(0.1 + draws.uniforms(draws.integer(3, 6)))
    axes.set(title="results", xlabel="time (s)", ylabel="value")
    for item in (axes.title, axes.xaxis.label, axes.yaxis.label):
        item.set_color(ink)
    axes.tick_params(colors=ink)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def _shapes(draws: Draws, is_dark: bool) -> Pixels:
    sheet = Image.new("RGB", (_SIDE, _SIDE), _colour(draws, 0, 60) if is_dark else _colour(draws, 200, 255))
    pen = ImageDraw.Draw(sheet)
    for _ in range(draws.integer(4, 12)):
        x, y, wide, high = (draws.integer(0, _SIDE), draws.integer(0, _SIDE), draws.integer(20, 160), draws.integer(20, 160))
        box, fill = (x - wide // 2, y - high // 2, x + wide // 2, y + high // 2), _colour(draws)
        kind = draws.integer(0, 2)
        if kind == 0:
            pen.rectangle(box, fill=fill, outline="black")
        elif kind == 1:
            pen.ellipse(box, fill=fill, outline="black")
        else:
            pen.line(box, fill=fill, width=draws.integer(1, 6))
    return np.asarray(sheet)


def _page(draws: Draws, is_dark: bool) -> Pixels:
    sheet = Image.new("RGB", (_SIDE, _SIDE), "black" if is_dark else "white")
    pen, size = ImageDraw.Draw(sheet), draws.integer(9, 28)
    font = ImageFont.load_default(size)
    for top in range(6, _SIDE, int(1.4 * size)):
        letters = "".join(chr(97 + int(26 * value)) if value < 0.85 else " " for value in draws.uniforms(80))
        pen.text((8, top), letters, fill="white" if is_dark else "black", font=font)
    return np.asarray(sheet)


def draw_star_fields(count: int, seed: int = 0) -> Iterator[Pixels]:
    """Yield images of stars at random places, without any galaxy, as the simulator of galaxies observes them: 256 x 256 pixels.

    Sparse fields, and dense ones as at low galactic latitudes, in turn.
    """
    for number in range(count):
        draws = Draws(seed, _STREAMS[STARS], number)
        yield _observe(_star_field(draws, _DENSITIES[number % len(_DENSITIES)]), draws, seed, number)


def draw_central_stars(count: int, seed: int = 0) -> Iterator[Pixels]:
    """Yield star fields with a bright star near the centre, as a cutout around a star that is taken for a galaxy."""
    for number in range(count):
        draws = Draws(seed, _STREAMS[CENTRAL_STAR], number)
        scene = _star_field(draws, _CENTRAL_DENSITY)
        red_mag = draws.uniform(15.0, 19.0)
        colours = np.array([[red_mag + 0.6, red_mag, red_mag - 0.3]])
        scene.add_points(draws.uniforms(1) * 4 - 2, draws.uniforms(1) * 4 - 2, observation.to_fluxes(colours))
        yield _observe(scene, draws, seed, number)


def _star_field(draws: Draws, density: int) -> Scene:
    scene = Scene(observation.DECAM_PIXEL)
    for _ in range(density):
        observation.add_stars(scene, draws)
    return scene


def draw_empty_sky(count: int, seed: int = 0) -> Iterator[Pixels]:
    """Yield images of sky noise with the simulator's faint background galaxies, but no galaxy in the centre."""
    for number in range(count):
        draws = Draws(seed, _STREAMS[SKY], number)
        scene = Scene(observation.DECAM_PIXEL)
        observation.add_background(scene, draws)
        yield _observe(scene, draws, seed, number)


def _observe(scene: Scene, draws: Draws, seed: int, number: int) -> Pixels:
    light_CHW = observation.blur(scene.light_CHW, observation.draw_seeing(draws), scene.pixel_scale)
    return observation.to_image(observation.add_noise(light_CHW, draws, scene.pixel_scale, seed, number))


def draw_plain(count: int, seed: int = 0) -> Iterator[Pixels]:
    """Yield pictures of one colour: black, white, grey, then random ones."""
    for number in range(count):
        draws = Draws(seed, _STREAMS[PLAIN], number)
        grey = (0, 255, 128)[number] if number < 3 else None
        colour = (grey, grey, grey) if grey is not None else _colour(draws)
        yield np.full((SIZE, SIZE, 3), colour, np.uint8)


def draw_noise(count: int, seed: int = 0) -> Iterator[Pixels]:
    """Yield noise, independent in each pixel: uniform over all values, or normal around a random level; grey or coloured."""
    for number in range(count):
        draws = Draws(seed, _STREAMS[NOISE], number)
        channels = 1 if draws.bernoulli(0.5) else 3
        values = draws.uniforms(SIZE * SIZE * channels).reshape(SIZE, SIZE, channels) * 256
        if draws.bernoulli(0.5):
            normals = draws.normals(SIZE * SIZE * channels).reshape(SIZE, SIZE, channels)
            values = draws.uniform(20, 230) + draws.uniform(8, 60) * normals
        yield np.broadcast_to(np.clip(values, 0, 255), (SIZE, SIZE, 3)).astype(np.uint8)


# Kinds of pictures, and the function that draws them.
KINDS: dict[str, Callable[[int, int], Iterator[Pixels]]] = {
    PHOTOGRAPHS: draw_photographs,
    DRAWINGS: draw_drawings,
    STARS: draw_star_fields,
    CENTRAL_STAR: draw_central_stars,
    SKY: draw_empty_sky,
    PLAIN: draw_plain,
    NOISE: draw_noise,
}

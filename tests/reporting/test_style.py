import io

import matplotlib
from matplotlib.figure import Figure
from matplotlib.image import imread

from reporting.style import STYLE, png


def draw():
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot([0, 1], [0, 1])
        return png(figure, dpi=150)


def test_a_png_has_the_size_asked_for_and_tells_no_version():
    image = draw()
    assert image.startswith(b"\x89PNG")
    assert imread(io.BytesIO(image)).shape[:2] == (150, 300)
    assert b"Software" not in image


def test_the_same_figure_is_the_same_file():
    assert draw() == draw()

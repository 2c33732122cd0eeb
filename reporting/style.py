"""How every figure looks: one style, PNG, and colours that colour-blind readers can tell apart.

The colours are those of Okabe and Ito (2008); lines that could still be mixed up differ in style or marker, too.
"""

from __future__ import annotations

import io

from matplotlib.figure import Figure  # no pyplot: no global state, no display

from reporting.escape import plain_texts

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY, DARK = "#8A8F98", "#333333"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E7EB",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


def png(figure: Figure, dpi: int) -> bytes:
    """Returns a figure as a PNG file, without the version of what drew it: the same figure is the same file.

    Texts show what they say: dollars in names are no formulas.
    """
    image = io.BytesIO()
    with plain_texts(figure):
        figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    return image.getvalue()

"""Pictures of reports, as the documentation keeps them.

.venv/bin/pytest tests/test_publish.py
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gptcore.studies import publish

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize(("length", "bottom"), [(130, 60), (300, 240)])
def test_a_picture_ends_below_its_last_whole_figure(tmp_path, length, bottom):
    """A figure torn in two, or a page that is shorter than the picture cut for it."""
    pixels = np.full((length, 200, 3), 255, np.uint8)
    pixels[20:60, 50:150] = (200, 30, 30)
    pixels[100:240, 50:150] = (30, 30, 200)
    path = tmp_path / "report.png"
    Image.fromarray(pixels).save(path)
    publish._cut(path)
    image = Image.open(path)
    assert image.size == (100 + 2 * publish.MARGIN - 1, bottom - 1 + publish.MARGIN)
    assert image.mode == "P"
    assert image.convert("RGB").getpixel((60, 40)) == (200, 30, 30)


def test_the_pictures_of_the_documentation_are_small():
    assert sum(path.stat().st_size for path in DOCS.rglob("*.png")) < 5_000_000

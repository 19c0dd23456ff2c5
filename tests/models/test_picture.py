from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

import zoo
from zoo.blocks import kinds
from zoo.models.picture import COLOURS, layer_stack_svg

SVG = "{http://www.w3.org/2000/svg}"


def picture(*overrides: str) -> ElementTree.Element:
    return ElementTree.fromstring(layer_stack_svg(zoo.load_config("configs/models/jamba-tiny.yaml", overrides)))


@pytest.mark.parametrize("num_layers", [1, 8, 40, 41, 200])
def test_every_layer_is_in_the_picture(num_layers: int) -> None:
    root = picture(f"pattern=mamba*{num_layers}")
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert titles == [f"layer {i}: mamba, mamba + mlp" for i in range(num_layers)]
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    places = [(rect.attrib["x"], rect.attrib["y"]) for rect in root.iter(f"{SVG}rect")]
    assert len(set(places)) == len(places)
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height


def test_a_colour_is_a_kind() -> None:
    root = picture("pattern=mamba softmax mamba_moe")
    fills = [[rect.attrib["fill"] for rect in group.iter(f"{SVG}rect")] for group in root.iter(f"{SVG}g")]
    assert fills == [
        [COLOURS["mamba"], COLOURS["mlp"]],
        [COLOURS["attention"], COLOURS["mlp"]],
        [COLOURS["mamba"], COLOURS["moe"]],
    ]
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert words == ["0", "1", "2", "mamba", "attention", "mlp", "moe"]


def test_the_zoo_s_own_kinds_have_different_colours() -> None:
    names = {kind.name for kind in kinds()}
    assert names <= set(COLOURS)
    assert len({COLOURS[name] for name in names}) == len(names)

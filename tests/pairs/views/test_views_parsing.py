import inspect

import pytest

from mmalign_jax.errors import UserError
from mmalign_jax.pairs import views
from mmalign_jax.pairs.views.table import KINDS, Choice


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("black", "black"),
        (" black() ", "black"),
        ("diffusion", "diffusion(t=500,space=normalised)"),
        ("diffusion(800)", "diffusion(t=800,space=normalised)"),
        ("diffusion( 800 , 'pixel' )", "diffusion(t=800,space=pixel)"),
        ("diffusion(space=pixel)", "diffusion(t=500,space=pixel)"),
        ("gaussian_blur(8)", "gaussian_blur(sigma=8.0)"),
        ("gaussian_blur(sigma=8.0)", "gaussian_blur(sigma=8.0)"),
        ("random_crop(0.01, scale_max=.2)", "random_crop(scale_min=0.01,scale_max=0.2,ratio_min=0.75,ratio_max=1.3333333333333333)"),
        ("collage(pip)", "collage(layout=pip)"),
        ("pgd(2,10)", "pgd(eps=2.0,steps=10)"),
        ("pgd(steps=20)", "pgd(eps=2.0,steps=20)"),
    ],
)
def test_texts(text, written):
    view = views.parse(text)
    assert str(view) == written
    assert views.parse(written) == view and hash(views.parse(written)) == hash(view)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("difusion(500)", ["no view 'difusion'", "Did you mean diffusion?", "random_crop"]),
        ("", ["no view"]),
        ("diffusion(500", ["no view", "diffusion(500)"]),
        ("diffusion(1000)", ["t must be a whole number in 0 .. 999", "'1000'", "normalised or pixel"]),
        ("diffusion(5.5)", ["whole number"]),
        ("diffusion(500,raw)", ["space must be normalised or pixel"]),
        ("diffusion(tt=3)", ["no argument 'tt'", "Did you mean t?"]),
        ("diffusion(t=3,t=4)", ["t is given twice"]),
        ("diffusion(500,pixel,1)", ["at most 2 arguments"]),
        ("diffusion(space=pixel,500)", ["'500' without a name"]),
        ("diffusion(,)", ["t must be"]),
        ("black(1)", ["at most 0", "no arguments"]),
        ("gaussian_blur(nan)", ["sigma must be", "0.1 .. 200"]),
        ("gaussian_blur(inf)", ["sigma must be"]),
        ("gaussian_blur(__import__('os'))", ["sigma must be"]),
        ("random_crop(0.5,0.2)", ["scale_min = 0.5 is above scale_max = 0.2"]),
        ("colour_jitter(hue=0.6)", ["hue must be a number in 0 .. 0.5"]),
    ],
)
def test_what_is_wrong_is_named_and_what_is_known_listed(text, says):
    with pytest.raises(UserError) as error:
        views.parse(text, where="config.objective.view")
    assert str(error.value).startswith("config.objective.view: ")
    for words in says:
        assert words in str(error.value)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_table_says_what_the_functions_take(kind):
    parameters = list(inspect.signature(kind.function).parameters.values())[1:]
    assert [(p.name, p.default) for p in parameters] == [(a.name, a.default) for a in kind.arguments]
    for argument in kind.arguments:
        assert argument.default in argument.words if isinstance(argument, Choice) else argument.low <= argument.default <= argument.high
    assert views.parse(str(views.parse(kind.name))) == views.parse(kind.name)
    assert kind.function.__name__ == kind.name and kind.name in views.usage(kind.name)


def test_what_is_drawn_and_what_wants_floats():
    assert {name for name in views.names() if views.parse(name).random} == {
        "random_crop", "diffusion", "colour_jitter", "patch_mask", "collage", "pgd",
    }  # fmt: skip
    assert {name for name in views.names() if views.parse(name).float_pixels} == {"diffusion", "pgd"}

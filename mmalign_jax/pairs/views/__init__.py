"""Corrupted views of images. A view is drawn once a row and step; policy and reference are given the same one.

`parse("random_crop(0.01,0.2)")` reads what a user writes, `View.apply` makes the view. `table.py` lists them all.
"""

from mmalign_jax.pairs.views.crop import crop_box, random_resized_crop, resized_crop
from mmalign_jax.pairs.views.keys import row_keys
from mmalign_jax.pairs.views.parsing import names, parse, usage
from mmalign_jax.pairs.views.view import View

__all__ = ["View", "crop_box", "names", "parse", "random_resized_crop", "resized_crop", "row_keys", "usage"]

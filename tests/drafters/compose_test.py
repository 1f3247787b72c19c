"""Adaptive draft lengths: what they are not for."""

import pytest

from specjax.core import control
from specjax.drafters import Lookup
from specjax.drafters.compose import Adaptive
from specjax.drafters.lookup_tree import LookupTree


def test_trees_have_no_length():
  with pytest.raises(ValueError, match='adaptive draft lengths are for chains'):
    Adaptive(LookupTree(), control.Heuristic())


@pytest.mark.parametrize('widths', [(5,), (-1, 2)])
def test_widths_are_of_the_drafter(widths):
  with pytest.raises(ValueError, match=r'widths \[.*\]: must be in \[0, 4\]'):
    Adaptive(Lookup(4), control.Heuristic(), widths=widths)
  Adaptive(Lookup(4), control.Heuristic(), widths=(0, 4))

"""Drafters: everything that proposes tokens."""

from specjax.drafters.block import BlockSource
from specjax.drafters.chain_lm import ChainLM
from specjax.drafters.compose import Adaptive
from specjax.drafters.copying import Copying
from specjax.drafters.grown_lm import GrownLM
from specjax.drafters.jacobi import Jacobi
from specjax.drafters.lattice import GrownLattice, Lattice
from specjax.drafters.lookup import InputGuided, Lookup
from specjax.drafters.lookup_tree import LookupTree
from specjax.drafters.null import Null
from specjax.drafters.scripted import Scripted, ScriptedTree
from specjax.drafters.tree_lm import TreeLM

__all__ = [
    'Adaptive', 'BlockSource', 'ChainLM', 'Copying', 'GrownLM',
    'GrownLattice', 'InputGuided', 'Jacobi', 'Lattice', 'Lookup',
    'LookupTree', 'Null', 'Scripted', 'ScriptedTree', 'TreeLM']

"""Meshes, logical axis rules, host copies of global arrays."""

from specjax.parallel.mesh import make_mesh

__all__ = ['make_mesh']

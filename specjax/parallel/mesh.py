"""Device meshes."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh
import numpy as np

DATA, MODEL = 'data', 'model'


def make_mesh(shape: tuple[int, int] | None = None) -> Mesh:
  """Returns a mesh with `Auto` axes `('data', 'model')`.

  Args:
    shape: `(data, model)`; -1 once for "the rest". None puts every device of
      every process on `data`.

  Raises:
    ValueError: the shape does not fit the number of devices.
  """
  devices = jax.devices()
  sizes = (-1, 1) if shape is None else tuple(shape)
  if len(sizes) != 2 or not all(isinstance(n, int) for n in sizes):
    raise ValueError(f'mesh {shape}: must be two integers (data, model)')
  data, model = sizes
  if data == -1 and model > 0:
    data = len(devices) // model
  elif model == -1 and data > 0:
    model = len(devices) // data
  if data < 1 or model < 1 or math.prod((data, model)) > len(devices):
    raise ValueError(f'mesh {shape} does not fit {len(devices)} devices')
  used = np.asarray(devices[:data * model]).reshape(data, model)
  # Auto: explicit axes would make every ambiguous scatter an error.
  return Mesh(used, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)

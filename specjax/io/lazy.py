"""A named tensor that stays on disk until it is read."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """One tensor of a weight file, known by its header only.

  Reading is repeatable and keeps no copy, so a checkpoint can be converted
  with the memory of its largest tensor.

  Attributes:
    name: name in the file.
    shape: logical shape; matrices are `(out, in)` as in torch.
    dtype: name of the stored type, for example `Q4_1` or `BF16`.
    load: returns the values, of any dtype; called once for each `read`.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  load: Callable[[], npt.NDArray] = dataclasses.field(
      repr=False, compare=False)

  def read(self) -> npt.NDArray[np.float32]:
    """Returns the values as a fresh, writable float32 array of `shape`."""
    values = np.asarray(self.load(), dtype=np.float32)
    if not values.flags.writeable:  # still a view of the mapped file
      values = values.copy()
    return values.reshape(self.shape)

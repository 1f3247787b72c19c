"""tfds dataset directories with array_record shards, out of rows in memory.

`tfds.builder_from_directory(folder).as_data_source()` reads them, with the
facts about their origin in a JSON file beside. TensorFlow is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import io
import json
from pathlib import Path
import shutil
from typing import Any

from specjax.io import output

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
  """What the datasets of one kind have in common.

  Attributes:
    name: of the dataset, snake case.
    version: of the layout, 'major.minor.patch'.
    facts: name of the JSON file beside the shards.
  """

  name: str
  version: str
  facts: str

  def read_facts(self, folder: str | Path) -> dict[str, Any]:
    """Returns the facts that `write` was given.

    Raises:
      ValueError: the folder holds no such dataset.
    """
    path = Path(folder).expanduser() / self.facts
    try:
      return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
      raise ValueError(
          f'{folder}: not a dataset of {self.name} ({self.facts}: '
          f'{getattr(error, "strerror", None) or error})') from error


def write(
    folder: str | Path, layout: Layout,
    features: Callable[[Any], Mapping[str, Any]],
    splits: Mapping[str, Callable[[], Iterable[Row]]],
    facts: Mapping[str, Any],
) -> Path:
  """Writes a dataset directory, whole or not at all (`io.output.folder`).

  Args:
    folder: must not exist, or be empty.
    layout: of the dataset.
    features: makes the features by name; it is handed `tfds.features`.
    splits: by name, functions that yield the rows, in order.
    facts: JSON values.

  Raises:
    OutputError: the folder is in use, or cannot be written (disk full).
  """
  folder = Path(folder).expanduser()
  with output.folder(folder) as new:
    root = new / 'tfds'
    for path in list(build(root, layout, features, splits).iterdir()):
      path.rename(new / path.name)
    shutil.rmtree(root)  # tfds nests folders for name and version
    output.write_json(new / layout.facts, dict(facts))
  return folder


def build(
    root: Path, layout: Layout,
    features: Callable[[Any], Mapping[str, Any]],
    splits: Mapping[str, Callable[[], Iterable[Row]]],
) -> Path:
  """Runs a tfds builder under `root`; returns the folder that it made."""
  import tensorflow_datasets as tfds

  # The registry of tfds refuses a name that this process has used before.
  class Rows(  # type: ignore[call-arg]
      tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Rows in memory."""

    name = layout.name
    VERSION = tfds.core.Version(layout.version)
    # Nothing is downloaded; looking for checksums needs one more package.
    url_infos: dict[str, Any] = {}

    def _info(self):
      # The usual constructor looks for files of a package.
      return tfds.core.DatasetInfo(
          builder=self, disable_shuffling=True,
          features=tfds.features.FeaturesDict(dict(features(tfds.features))))

    def _split_generators(self, dl_manager):
      del dl_manager
      return {name: self._generate_examples(rows)
              for name, rows in splits.items()}

    def _generate_examples(self, rows) -> Iterator[tuple[int, Row]]:
      yield from enumerate(rows())

  builder = Rows(data_dir=str(root), file_format='array_record')
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloads
    builder.download_and_prepare()
  return Path(str(builder.data_dir))


def source(folder: str | Path, split: str) -> Any:
  """Returns the random-access source of a split that `write` wrote."""
  import tensorflow_datasets as tfds
  folder = Path(folder).expanduser()
  return tfds.builder_from_directory(str(folder)).as_data_source(split)

"""Tiny files of images, of every kind that the readers know."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

COLOURS = {'red': (255, 0, 0), 'green': (0, 128, 0), 'blue': (0, 0, 255)}


def jpeg(image: np.ndarray) -> bytes:
  out = io.BytesIO()
  Image.fromarray(image).save(out, 'jpeg', quality=95)
  return out.getvalue()


def cifar_arrays(num: int = 12, size: int = 32) -> dict[str, np.ndarray]:
  """Returns the arrays of a packed CIFAR-10: image i is of grey 20 * i."""
  files = [jpeg(np.full((size, size, 3), 20 * i, np.uint8))
           for i in range(num)]
  return {
      'blob': np.frombuffer(b''.join(files), np.uint8),
      'offsets': np.cumsum([0, *map(len, files)]),
      'labels': (np.arange(num) % 3).astype(np.uint8),
      'is_test': np.arange(num) % 4 == 3,
      'classes': np.array(['cat', 'dog', 'ship'])}


def folder(root):
  """Fills a folder: two classes, five kinds of images, three bad files."""
  for name in ('b_dogs', 'a_cats'):
    (root / name).mkdir(parents=True)
  cats, dogs = root / 'a_cats', root / 'b_dogs'
  Image.new('RGB', (20, 10), COLOURS['green']).save(cats / '1.png')
  Image.new('L', (9, 9), 77).save(cats / '2.png')
  Image.new('CMYK', (12, 12), (255, 255, 0, 0)).save(cats / '3.jpg')
  Image.new('RGBA', (8, 8), (255, 0, 0, 0)).save(dogs / '1.png')
  Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)).save(dogs / '2.png')
  noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  data = jpeg(noise)
  (dogs / 'cut.jpg').write_bytes(data[:len(data) // 2])
  (dogs / 'notes.txt').write_text('not an image')
  (dogs / '.hidden').write_text('not looked at')
  (root / 'README').write_text('about')
  return root


def icon_set(colour: str, names, **more) -> dict:
  """Returns an iconify set: wide rectangles of one colour."""
  body = f'<rect width="32" height="16" fill="{colour}"/>'
  return {'prefix': 'x', 'width': 32, 'height': 16, **more,
          'icons': {name: {'body': body} for name in names}}


def tarball(path, sets: dict[str, dict]):
  """Writes an npm tarball of icon sets."""
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in sets.items():
      data = json.dumps(content).encode()
      entry = tarfile.TarInfo(f'package/json/{name}.json')
      entry.size = len(data)
      archive.addfile(entry, io.BytesIO(data))
  return path

"""Eight virtual CPU devices, fixed key semantics, the real-weights fixture."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ.setdefault('JAX_THREEFRY_PARTITIONABLE', 'true')

import pathlib  # noqa: E402
import sys  # noqa: E402

import pytest  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # toys


@pytest.fixture(scope='session')
def smollm2_path():
  """Path of the SmolLM2 GGUF; skips where it has not been fetched."""
  from specjax.io import hub
  try:
    return hub.resolve('smollm2-135m-instruct', quiet=True, offline=True)
  except hub.HubError as error:
    pytest.skip(f'weights are not in the cache: {error}')

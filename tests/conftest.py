"""Eight virtual CPU devices, fixed key semantics, the real-weights fixture."""

import gc
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ.setdefault('JAX_THREEFRY_PARTITIONABLE', 'true')

import pathlib  # noqa: E402
import signal
import subprocess  # noqa: E402
import sys  # noqa: E402

import pytest  # noqa: E402

_HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]  # toys; configs, benchmarks


@pytest.fixture(autouse=True)
def _few_mappings():
  """Drops compiled programs before the process runs out of mappings.

  Each compiled program holds some; Linux allows 65,530 a process, and the
  compiler crashes at the limit.
  """
  yield
  try:
    mappings = pathlib.Path('/proc/self/maps').read_bytes().count(b'\n')
  except OSError:
    return
  if mappings > 20_000:
    import jax
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='session')
def command(tmp_path_factory):
  """Returns a function that starts a program of the library.

  One compilation cache for all of them; a single device.
  """
  root = pathlib.Path(__file__).parents[1]
  environment = {
      **os.environ, 'PYTHONPATH': str(root),
      'SPECJAX_CACHE': str(tmp_path_factory.mktemp('cache')),
      'JAX_NUM_CPU_DEVICES': '1'}

  def start(module: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-m', module, *map(str, arguments)], cwd=root,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=_listen)
  return start


def _listen() -> None:
  # Tests in the background of a shell ignore Ctrl-C, and so would programs
  # that they start.
  signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope='session')
def smollm2_path():
  """Path of the SmolLM2 GGUF; skips where it has not been fetched."""
  from specjax.io import hub
  try:
    return hub.resolve('smollm2-135m-instruct', quiet=True, offline=True)
  except hub.HubError as error:
    pytest.skip(f'weights are not in the cache: {error}')

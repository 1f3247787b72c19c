"""Who may import whom, read off the syntax trees."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
HOUSE = ROOT / 'specjax'
FILES = sorted(HOUSE.rglob('*.py'))

# Room -> what its files may import of specjax, itself aside.
MAY = {
    'core': (),
    'verify': ('specjax.core',),
    'drafters': ('specjax.core',),
    # The two of io read files into numpy and import nothing of specjax. What
    # `pipeline` is to models of tokens, `density` is to continuous ones.
    'models': ('specjax.core.types', 'specjax.core.pipeline',
               'specjax.core.density', 'specjax.core.chains',
               'specjax.core.keys', 'specjax.core.tree',
               'specjax.io.errors', 'specjax.io.gguf'),
    'io': ('specjax.core.types', 'specjax.parallel'),
    'parallel': (),
    'data': ('specjax.io',),
    'eval': ('specjax.io',),
    'certificates': ('specjax.core', 'specjax.verify', 'specjax.drafters',
                     'specjax.models'),
    'distill': ('specjax.core', 'specjax.verify', 'specjax.drafters',
                'specjax.models', 'specjax.data', 'specjax.parallel'),
    'fit': ('specjax.distill', 'specjax.models', 'specjax.core.density'),
}
# Of other packages, where the list is closed.
OUTSIDE = {
    'core': {'jax', 'numpy', 'chex', 'flax'},
    # scipy: the linear programme of `transport_plan`, on the host.
    'verify': {'jax', 'numpy', 'chex', 'flax', 'scipy'},
    'drafters': {'jax', 'numpy', 'chex', 'flax'},
    'parallel': {'jax', 'numpy'},
    'eval': {'jax', 'numpy', 'matplotlib'},
}
PROGRAMS = ('specjax.sample', 'specjax.bench', 'specjax.certify',
            'specjax.plan', 'train', 'sample')


def imports(path: pathlib.Path) -> list[str]:
  """Returns the dotted name of everything that a file imports."""
  out = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      out += [name.name for name in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative import'
      out += [f'{node.module}.{name.name}' for name in node.names]
  return out


def within(name: str, packages) -> bool:
  return any(name == p or name.startswith(f'{p}.') for p in packages)


def room(path: pathlib.Path) -> str:
  parts = path.relative_to(HOUSE).parts
  return parts[0] if len(parts) > 1 else ''


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_of(path):
  names, here = imports(path), room(path)
  if here in MAY:
    allowed = (*MAY[here], f'specjax.{here}')
    strangers = [n for n in names if within(n, ['specjax'])
                 and not within(n, allowed)]
    assert not strangers
  if here in OUTSIDE:
    tops = {n.split('.')[0] for n in names} - {'specjax'}
    assert tops - set(sys.stdlib_module_names) <= OUTSIDE[here]
  assert not [n for n in names if within(n, ['flax.nnx'])]
  assert not [n for n in names if within(n, PROGRAMS)]
  if here != 'models':
    assert not [n for n in names if within(n, ['flax.linen'])]
  if here == 'data':
    assert not [n for n in names if within(n, ['jax.numpy'])]


def test_all_rooms_are_known():
  rooms = {room(p) for p in FILES} - {''}
  assert rooms <= {*MAY, 'host'}


def test_uninitialised_memory_is_not_used():
  # 0 * NaN out of a stale slot gets through a mask.
  folders = [HOUSE, ROOT / 'tests', ROOT / 'train', ROOT / 'sample']
  for path in [p for f in folders for p in f.rglob('*.py')]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and node.attr in (
          'empty', 'empty_like') and isinstance(node.value, ast.Name):
        assert node.value.id not in ('jnp', 'lax'), f'{path}:{node.lineno}'


def test_the_loop_does_without_what_only_files_and_training_need():
  heavy = ('ml_collections', 'gguf', 'tensorflow_datasets', 'grain', 'absl',
           'tokenizers', 'orbax', 'optax', 'matplotlib', 'rich')
  # flax brings these along itself.
  lent = ('absl', 'orbax', 'optax', 'rich')
  modules = [
      '.'.join(p.relative_to(ROOT).with_suffix('').parts)
      for p in FILES if room(p) in (
          'core', 'models', 'verify', 'drafters', 'distill')]
  modules = [m.removesuffix('.__init__') for m in modules]
  blocked = [h for h in heavy if h not in lent]
  program = f'''
import importlib, sys
for name in {blocked!r}:
  sys.modules[name] = None
for name in {modules!r}:
  importlib.import_module(name)
'''
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT,
                        capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr

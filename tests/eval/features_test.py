"""EfficientNet-Lite0 against PyTorch layers, and what extractors promise."""

import hashlib
import types

import numpy as np
import pytest

from specjax.eval import features
from specjax.eval.features import Lite0
from specjax.io import hub, pth
from specjax.io.errors import FormatError

RNG = np.random.default_rng(0)


@pytest.fixture(scope='module', name='state')
def _state():
  """Random weights whose activations stay in the range of ReLU6."""
  rng = np.random.default_rng(1)
  found = {}
  for layer in (x for block in features.layers() for x in block):
    inputs = 1 if layer.depthwise else layer.inputs
    shape = (layer.outputs, inputs, layer.kernel, layer.kernel)
    found[f'{layer.conv}.weight'] = rng.normal(
        0, (2 / (inputs * layer.kernel ** 2)) ** 0.5, shape)
    for part, low, high in (
        ('weight', 0.5, 1.5), ('bias', -0.3, 0.6), ('running_mean', -0.2, 0.2),
        ('running_var', 0.3, 1.5)):
      found[f'{layer.norm}.{part}'] = rng.uniform(low, high, layer.outputs)
    found[f'{layer.norm}.num_batches_tracked'] = np.int64(7)
  found['_fc.weight'] = rng.normal(0, 0.05, (1000, 1280))
  found['_fc.bias'] = rng.normal(0, 1, 1000)
  return {k: np.asarray(v, np.int64 if 'num' in k else np.float32)
          for k, v in found.items()}


def images(n=3, side=40):
  """Returns smooth images with some noise."""
  x = RNG.normal(size=(n, 4, 4, 3)).repeat(side // 4, 1).repeat(side // 4, 2)
  x = 128 + 50 * x + 10 * RNG.normal(size=x.shape)
  return np.clip(x, 0, 255).astype(np.uint8)


def test_shape_of_the_network(state):
  assert len(features.layers()) == 18
  assert len(state) == 296  # arrays of the published file
  values = sum(v.size for k, v in state.items() if 'num' not in k)
  assert abs(values - 4.69e6) < 1e4


def torch_network(torch, state):
  """Returns a function of f32[N,3,S,S] to (trunk, pool, logits)."""
  nn, pad = torch.nn, torch.nn.functional.pad

  class Same(nn.Conv2d):
    """Pads as TensorFlow does: the odd pixel goes to the end."""

    def forward(self, x):
      sides = []
      for length in (x.shape[3], x.shape[2]):
        s, k = self.stride[0], self.kernel_size[0]
        total = max((-(-length // s) - 1) * s + k - length, 0)
        sides += [total // 2, total - total // 2]
      return super().forward(pad(x, sides))

  class Block(nn.Module):

    def __init__(self, inputs, outputs, kernel, stride, expand):
      super().__init__()
      wide = inputs * expand
      if expand > 1:
        self._expand_conv = Same(inputs, wide, 1, bias=False)
        self._bn0 = nn.BatchNorm2d(wide, eps=1e-3)
      self._depthwise_conv = Same(
          wide, wide, kernel, stride, groups=wide, bias=False)
      self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
      self._project_conv = Same(wide, outputs, 1, bias=False)
      self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
      self.expand, self.add = expand > 1, stride == 1 and inputs == outputs

    def forward(self, x):
      y = x
      if self.expand:
        y = nn.functional.relu6(self._bn0(self._expand_conv(y)))
      y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
      y = self._bn2(self._project_conv(y))
      return x + y if self.add else y

  class Net(nn.Module):

    def __init__(self):
      super().__init__()
      self._conv_stem = Same(3, 32, 3, 2, bias=False)
      self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
      blocks, inputs = [], 32
      for outputs, repeats, kernel, stride, expand in (
          (16, 1, 3, 1, 1), (24, 2, 3, 2, 6), (40, 2, 5, 2, 6),
          (80, 3, 3, 2, 6), (112, 3, 5, 1, 6), (192, 4, 5, 2, 6),
          (320, 1, 3, 1, 6)):
        for i in range(repeats):
          blocks.append(
              Block(inputs, outputs, kernel, 1 if i else stride, expand))
          inputs = outputs
      self._blocks = nn.Sequential(*blocks)
      self._conv_head = Same(320, 1280, 1, bias=False)
      self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
      self._fc = nn.Linear(1280, 1000)

    def forward(self, x):
      x = nn.functional.relu6(self._bn0(self._conv_stem(x)))
      x = self._blocks(x)
      y = nn.functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
      return x.mean((2, 3)), y, self._fc(y)

  net = Net()
  net.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
  return net.eval()


@pytest.mark.reference
def test_against_torch(state, tmp_path):
  torch = pytest.importorskip('torch')
  net = torch_network(torch, state)
  path = tmp_path / 'lite0.pth'
  torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
  # 72 gives odd sides further down; 40 is resized to it.
  found = Lite0.load(path, size=72, batch=2)
  digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
  assert found.name == f'efficientnet-lite0-{digest}-72-pool'
  assert Lite0.load(path, name='mine').name == 'mine-112-pool'
  x = images(3, 40)
  with torch.no_grad():
    y = torch.tensor(x.transpose(0, 3, 1, 2)).float()
    y = torch.nn.functional.interpolate(
        y, size=(72, 72), mode='bilinear', align_corners=False)
    wanted = [z.numpy() for z in net((y - 127) / 128)]
  got = found.outputs(x)
  for name, value in zip(('trunk', 'pool', 'logits'), wanted, strict=True):
    assert got[name].shape == value.shape and got[name].dtype == np.float32
    scale = np.abs(value).max()
    assert value.std(0).max() > 0.01 * scale  # the images do differ
    np.testing.assert_allclose(got[name], value, atol=2e-4 * scale)
  np.testing.assert_array_equal(found(x), got['pool'])
  np.testing.assert_array_equal(found.logits(x), got['logits'])


def test_batches_sizes_and_layers(state):
  params = features.convert(state)
  x = images(5, 36)[:, :, :24]  # not square
  whole = Lite0(params, size=32, batch=8, layer='trunk', name='random')
  parts = Lite0(params, size=32, batch=2, layer='trunk', name='random')
  assert whole.name == parts.name == 'random-32-trunk'
  assert whole.fid_name == 'FD-EffLite0-trunk'
  a, b = whole(x), parts(x)
  assert a.shape == b.shape == (5, 320) == (5, whole.dim)
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())
  with pytest.raises(ValueError, match='size=16'):
    Lite0(params, size=16)
  with pytest.raises(ValueError, match="layer='top'"):
    Lite0(params, layer='top')
  for bad, text in (
      (x.astype(np.float32), 'must be uint8'), (x[0], 'expected .N,H,W,3'),
      (x[..., :1], 'expected .N,H,W,3'), (x[:0], 'at least 1')):
    with pytest.raises(ValueError, match=text):
      whole(bad)


def test_other_weights_are_refused(state):
  name = '_blocks.3._bn1.running_var'
  for change, text in (
      ({'extra': np.zeros(3)}, "unknown tensor 'extra'"),
      ({name: np.ones(3)}, f"'{name}' has shape"),
      ({name: np.full_like(state[name], np.nan)}, 'finite'),
      ({name: -np.ones_like(state[name])}, 'variance < 0')):
    with pytest.raises(FormatError, match=text):
      features.convert({**state, **change})
  with pytest.raises(FormatError, match=f"'{name}' is missing"):
    features.convert({k: v for k, v in state.items() if k != name})


def test_names_of_metrics():
  def extractor(fid_name, dim):
    return types.SimpleNamespace(name='mine', dim=dim, fid_name=fid_name)
  assert features.names(extractor('FID', 2048)) == ('FID', 'KID', 'IS')
  assert features.names(extractor('FD-self', 9)) == (
      'FD-self', 'KD-self', 'IS-self')
  for fid_name, dim in (('FID', 1280), ('fid', 2048), ('FD-', 9)):
    with pytest.raises(ValueError, match='fid_name='):
      features.names(extractor(fid_name, dim))


@pytest.fixture(scope='module', name='real')
def _real():
  """The published network; skips where it has not been fetched."""
  try:
    return Lite0.load(size=112, batch=16, offline=True, quiet=True)
  except hub.HubError as error:
    pytest.skip(f'weights are not in the cache: {error}')


@pytest.mark.weights
def test_published_weights(real):
  path = hub.resolve(features.SOURCE, quiet=True, offline=True)
  pinned = hub.REGISTRY[features.SOURCE]
  assert hashlib.sha256(path.read_bytes()).hexdigest() == pinned.sha256
  assert len(pth.read(path)) == 296
  assert real.name == 'efficientnet-lite0-112-pool'
  assert Lite0.load(path).name == real.name
  # A traffic light (920) and a flat page, drawn: what is seen, is named.
  x = np.full((2, 112, 112, 3), 200, np.uint8)
  x[0, 10:102, 38:74] = 20
  rows, columns = np.mgrid[:112, :112]
  for centre, colour in ((26, (250, 30, 30)), (56, (250, 200, 30)),
                         (86, (30, 220, 60))):
    x[0, (rows - centre) ** 2 + (columns - 56) ** 2 < 144] = colour
  top = np.argsort(-real.logits(x), axis=1)[:, :5]
  assert 920 in top[0] and 920 not in top[1]

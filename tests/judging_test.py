"""The judge of decoded images: scores, and what tables say of them."""

from __future__ import annotations

import argparse

import jax
import numpy as np
import pytest

from sample import judging, lantern_plots, sweeps
from sample.judging import Judge
from specjax.eval import classifier
from specjax.eval.classifier import TrainedClassifier
from specjax.models.classifier import Classifier, ClassifierConfig


class Colours:
  """Features that are mean colours."""

  name, dim, fid_name = 'colours', 3, 'FD-colours'

  def __call__(self, images):
    return (images.mean((1, 2)) / 255).astype(np.float32)


class ByRed:
  """Says class 1 of red images."""

  def logits(self, images):
    red = images[..., 0].mean((1, 2)) / 255
    return np.stack([0.5 - red, red - 0.5], 1)


def noise(seed, top=255, num=64):
  return np.random.default_rng(seed).integers(
      0, top, (num, 8, 8, 3), np.uint8)


def test_the_judge_prefers_what_looks_alike():
  judge = Judge(Colours(), noise(0))
  same, dark = judge.score(noise(1)), judge.score(noise(2, 99))
  assert judge.name == 'FD-colours'
  assert 0 <= same['distance'] < dark['distance']
  assert 0 < same['half_width'] < dark['distance']
  assert same['precision'] > 0.7 and same['recall'] > 0.7
  assert dark['precision'] == dark['recall'] == 0
  assert 'kernel' not in same and 'class_accuracy' not in same
  around = judge.context(np.zeros_like(noise(0)))
  assert 0 <= around['floor'] < around['tokenizer']
  assert around['real_images'] == 64
  # A table with distances.
  row = dict(
      family='plain', label='', temperature=1.0, guidance=1.0, tau=1.0,
      one_step_tv=0.0, samples=64, **same, speed={'1': dict(
          speedup=1.0, least=0.9, most=1.1)})
  table = lantern_plots.table({
      'points': {'plain': row}, 'setting': {'target': 'x'}, 'device': 'y',
      'reference': around})
  assert f'real images from real images {around["floor"]:.3f}' in table
  assert f'{same["precision"]:.2f}, {same["recall"]:.2f}' in table


def test_a_kernel_distance_where_there_are_samples_for_it():
  judge = Judge(Colours(), noise(0, num=1500))
  same, error = judge.score(noise(1, num=1500))['kernel']
  dark, _ = judge.score(noise(1, 230, num=1500))['kernel']
  assert error > 0 and abs(same) < 0.02 * dark


def test_how_often_samples_are_of_their_class():
  pixels = np.zeros((8, 8, 8, 3), np.uint8)
  pixels[::2, ..., 0] = 255
  judge = Judge(Colours(), noise(0), ByRed())
  row = judge.score(pixels, np.array([1, 0, 1, 0, 1, 1, 1, 0]))
  assert row['class_accuracy'] == 7 / 8
  assert row['class_accuracies'] == [1.0, 0.8]
  assert 'class_accuracy' not in judge.score(pixels)
  assert judging.cells(row)[2] == '87.5%'
  assert judging.cells({}) == [''] * len(judging.HEADS)


def test_a_trained_classifier_is_loaded(tmp_path):
  seen = []

  def again(images):
    seen.append(images)
    return images

  network = Classifier(ClassifierConfig(
      num_classes=3, width=8, num_stages=1, num_blocks=1))
  classifier.save(tmp_path / 'c', TrainedClassifier(
      network, network.init(jax.random.key(0)), classes=('a', 'b', 'c')))
  parser = argparse.ArgumentParser()
  sweeps.add_flags(
      parser, batch_size=2, repeats=1, batches=[1], guidance=[1.0])
  judging.add_flags(parser)
  args = parser.parse_args([
      '--data', 'synthetic', '--features', str(tmp_path / 'c'),
      '--classifier', str(tmp_path / 'c'), '--out', str(tmp_path / 'out')])
  record = sweeps.Record(args, ())
  judge = judging.judge_of(args, record, again)
  real, = seen
  row = judge.score(real[:40], np.arange(40) % 3)
  assert 0 <= row['class_accuracy'] <= 1 and row['distance'] >= 0
  assert record.data['reference']['tokenizer'] == pytest.approx(0, abs=1e-6)
  judging.judge_of(args, record, again)
  assert len(seen) == 1  # what is recorded is not worked out again
  args.data = ''
  with pytest.raises(ValueError, match='--data: give the test images'):
    judging.judge_of(args, record, again)
  args.features = 'none'
  assert judging.judge_of(args, record, again) is None

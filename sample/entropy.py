"""How unsure a target is: image codes beside text.

  python -m sample.entropy --target out/image_ar/model \
      --tokenizer out/vq/tokenizer --data cifar10.npz \
      --text smollm2-135m-instruct --out out/entropy
  python -m sample.entropy --target random --text random --out out/try

The next-token laws of an image decoder along test images (teacher-forced, at
temperature 1, at each scale of guidance) and of a language model along answers
that it draws itself to the questions that come with the library. `entropy.json`
has, for each, mean and quantiles of the entropy, the mean probability of the
likeliest token and of the token that is there, and how many tokens hold half
the mass; `entropy.png` draws the distribution of the entropy. What drafts can
hope for at most is in these numbers: an unsure target is hard to guess (the
"token selection ambiguity" of LANTERN, arXiv:2410.03355).
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np

import specjax
from specjax.data import questions
from specjax.eval import plots
from specjax.host import cli, image_sampling, images, tiny
from specjax.host import laws as laws_lib
from specjax.host import results as results_lib
from specjax.io import output
from train import image_data

_BATCH = 32
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def figures(logits: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
  """Returns figures of laws, f32[...] each.

  Args:
    logits: f32[...,V]. tokens: int32[...], the ones that are there.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  p = jnp.exp(log_p)
  mass = jnp.cumsum(-jnp.sort(-p, axis=-1), axis=-1)
  return {
      'entropy': -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1),
      'top': jnp.max(p, axis=-1),
      'there': jnp.take_along_axis(p, tokens[..., None], axis=-1)[..., 0],
      'half': 1 + jnp.sum(mass < 0.5, axis=-1)}


def of_images(
    model: Any, codes: np.ndarray, labels: np.ndarray, scale: float
) -> dict[str, np.ndarray]:
  """Returns the figures of an image decoder along codes int[N,T], flat."""
  lm, nothing = model.lm, model.lm.config.num_conditions - 1

  @jax.jit
  def run(params, codes, label):
    found = lm.whole(params, codes, label)
    if scale != 1:
      without = lm.whole(params, codes, jnp.full_like(label, nothing))
      found = without + scale * (found - without)
    return figures(found, codes)

  rows = [run(model.params, jnp.asarray(codes[i:i + _BATCH], jnp.int32),
              jnp.asarray(labels[i:i + _BATCH], jnp.int32))
          for i in range(0, len(codes), _BATCH)]
  return {name: np.concatenate([np.asarray(r[name]).ravel() for r in rows])
          for name in rows[0]}


def of_text(model: Any, num: int, new: int, seed: int) -> dict[str, Any]:
  """Returns the figures of a language model along its own answers."""
  prompts = [[{'role': 'user', 'content': q.turns[0]}]
             for q in questions.QUESTIONS[:num] if q.turns]
  found = specjax.generate(
      model, None, prompts,
      specjax.Sampling(temperature=1.0, max_new_tokens=new), seed=seed)
  rows = []
  for result in found:
    start = len(result.request.tokens)
    text = [*result.request.tokens, *result.tokens]
    logits = laws_lib.logits(model, [text])[0]
    rows.append(figures(
        jnp.asarray(logits[start - 1:-1]), jnp.asarray(text[start:])))
  return {name: np.concatenate([np.asarray(r[name]) for r in rows])
          for name in rows[0]}


def summary(found: dict[str, np.ndarray]) -> dict[str, Any]:
  """Returns JSON values of figures."""
  return {
      'positions': len(found['entropy']),
      'entropy': float(np.mean(found['entropy'])),
      'entropy_quantiles': dict(zip(map(str, _SHARES), np.quantile(
          found['entropy'], _SHARES).round(4).tolist(), strict=True)),
      'top_probability': float(np.mean(found['top'])),
      'probability_of_what_is_there': float(np.mean(found['there'])),
      'tokens_with_half_the_mass': float(np.median(found['half']))}


def draw(found: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Draws the distribution of the entropy of each set of laws."""
  figure, axes = plots.new_figure(7.0)
  for (name, values), colour in zip(found.items(), plots.COLOURS):
    order = np.sort(values)
    axes.plot(order, np.arange(1, len(order) + 1) / len(order), color=colour,
              label=name)
  axes.set_xlabel('entropy of the next token, nats')
  axes.set_ylabel('share of positions below')
  axes.set_ylim(0, 1)
  plots.finish(figure, axes, 'How unsure the target is, temperature 1', path)


def parse(arguments=None) -> argparse.Namespace:
  """Returns the options."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True)
  parser.add_argument('--target', required=True, help="or 'random'")
  parser.add_argument('--tokenizer', default='')
  parser.add_argument('--data', default='')
  parser.add_argument('--text', default='smollm2-135m-instruct')
  parser.add_argument('--guidance', type=lambda x: [
      float(y) for y in x.split(',')], default=[1.0, 2.0])
  parser.add_argument('--images', type=int, default=256)
  parser.add_argument('--questions', type=int, default=12)
  parser.add_argument('--new_tokens', type=int, default=128)
  parser.add_argument('--seed', type=int, default=0)
  return parser.parse_args(arguments)


def main(arguments=None) -> int:
  """Runs the program; returns the exit code."""
  args = parse(arguments)
  out = pathlib.Path(output.prepare(args.out))
  cli.start(False)
  if args.target == 'random':
    model, facts, tokenizer = image_sampling.random_models()
    args.data = args.data or 'synthetic'
  else:
    model, facts = images.load_lm(args.target)
    tokenizer = images.load_tokenizer(args.tokenizer)
  data = image_data.read(config_dict.ConfigDict(dict(
      path=args.data, test=None, held_out=0.1)), args.seed, labels=True).test
  # Files may be in order of class.
  order = np.random.default_rng(args.seed).permutation(len(data))
  some = np.sort(order[:args.images])
  side = facts['grid'][0]
  codes = tokenizer.encode(data.images[some])
  codes = codes[:, :side, :side].reshape(len(some), -1)
  assert data.labels is not None
  labels = data.labels[some] % len(facts['data']['classes'])
  found = {
      f'image codes, guidance {scale:g}': of_images(
          model, codes, labels, scale) for scale in args.guidance}
  text = (tiny.model() if args.text == 'random'
          else specjax.load(args.text, quiet=True))
  found[f'text, {text.name}'] = of_text(
      text, args.questions, args.new_tokens, args.seed)
  rows = {name: summary(values) for name, values in found.items()}
  output.write_json(out / 'entropy.json', {
      'setting': vars(args), 'device': results_lib.device_name(),
      'versions': results_lib.versions(), 'laws': rows})
  draw({k: v['entropy'] for k, v in found.items()}, out / 'entropy.png')
  for name, row in rows.items():
    print(f'{name}: {row["entropy"]:.2f} nats, likeliest '
          f'{row["top_probability"]:.3f}, half the mass in '
          f'{row["tokens_with_half_the_mass"]:.0f} tokens', flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(cli.reported(main))

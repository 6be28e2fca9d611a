"""The examples of the docstrings, on the API page's order: what one makes, the next ones use."""

import doctest
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import ROOT
from flax import linen as nn
from flax import nnx
from sklearn.datasets import load_digits

import ban_jax
from ban_jax import losses


def test_the_examples_of_the_api_page_print_what_they_show(tmp_path, capsys):
  images, labels = load_digits(return_X_y=True)
  images = (images.reshape(-1, 8, 8, 1) * 15).astype(np.uint8)
  cfg = ban_jax.get_config("own,mlp_16,smoke")
  cfg.update(generations=1)
  data = ban_jax.from_arrays((images[:200], labels[:200]), (images[900:1000], labels[900:1000]))
  names = {"ban_jax": ban_jax, "jax": jax, "jnp": jnp, "np": np, "nn": nn, "nnx": nnx, "optax": optax}
  names |= {"images": images, "labels": labels, "cfg": cfg, "data": data, "directory": tmp_path}
  page = (ROOT / "docs" / "api.md").read_text("utf-8")
  public = [getattr(ban_jax, name) for name in re.findall(r"^::: ban_jax\.(\w+)$", page, re.M)]
  assert executed(public, names) > 20, capsys.readouterr().out


def test_the_examples_of_losses_print_what_they_show(capsys):
  """For a student with probabilities 0.5, 0.3, 0.2, a teacher with 0.6, 0.3, 0.1, and label 0."""
  names = {"losses": losses, "key": jax.random.key(0), "positions": jnp.arange(1), "labels": jnp.array([0])}
  names |= {"logits": jnp.log(jnp.array([[0.5, 0.3, 0.2]])), "teacher": jnp.log(jnp.array([[0.6, 0.3, 0.1]]))}
  every = [loss.apply for loss in losses.LOSSES.values()]
  assert executed(every, names) == len(every), capsys.readouterr().out


def executed(functions, names):
  """Returns how many functions have an example that prints what it shows; 0 if one does not."""
  examples, runner = 0, doctest.DocTestRunner()
  for function in functions:
    example = doctest.DocTestParser().get_doctest(function.__doc__, names, function.__name__, None, None)
    examples += len(example.examples) > 0
    runner.run(example, clear_globs=False)
    names |= example.globs  # what it made
  return 0 if runner.failures else examples

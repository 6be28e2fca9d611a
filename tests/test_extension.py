"""Adding a loss, an optimizer, an augmentation, a network, a data set or a table is one module and one entry.

What only a caller's project needs, as a module, a text or a writer, is one function's argument.
"""

import dataclasses
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import IMAGES, config
from flax import linen as nn
from flax import nnx

import ban_jax
from ban_jax import config as config_lib
from ban_jax import data, losses, models, optim, presets
from ban_jax.data import augment, images
from ban_jax.models import common
from experiments.tables import graph

QUIET = {"progress": False}
SHORT = {"train__epochs": 1, "train__evaluate_every": 0}


def test_a_loss_is_a_function_and_an_entry(monkeypatch):
  def focal(logits, labels, teacher_logits, *, key, positions, temperature):
    values = losses.label_cross_entropy(logits, labels) * temperature
    return values, jnp.ones_like(values)

  monkeypatch.setitem(losses.LOSSES, "focal", losses.Loss(focal, needs_teacher=False))
  cfg = config(f"{IMAGES},focal", **SHORT)  # the presets know it, too
  teacher = ban_jax.train_generation(None, cfg, **QUIET)
  student = ban_jax.train_generation(teacher, cfg, **QUIET)
  assert student.index == 1
  assert losses.make_loss({**cfg.loss, "temperature": 2.0}).options == ("temperature",)


def test_an_optimizer_is_a_function_and_an_entry(monkeypatch, tiny):
  def signed(rate, mask, *, momentum):
    return (
      optax.trace(momentum),
      optax.stateless(lambda g, _: jax.tree.map(jnp.sign, g)),
      optax.scale_by_learning_rate(rate),
    )

  monkeypatch.setitem(optim.OPTIMIZERS, "signed", signed)
  cfg = config(
    "digits,own,smoke,signed", train__batch_size=8, optim__learning_rate=0.5, optim__schedule="constant", **SHORT
  )
  teacher = ban_jax.train_generation(None, cfg, **tiny, **QUIET)
  student = ban_jax.train_generation(teacher, cfg, **tiny, **QUIET)
  assert student.history[0]["learning_rate"] == 0.5
  identity = config_lib.identity(config_lib.record(cfg), 1)
  assert identity["optim.momentum"] == 0.9
  assert "optim.weight_decay" not in identity


def test_a_writer_is_a_function(tiny):
  seen = {}
  cfg = config("digits,own,smoke", train__batch_size=8, **SHORT)
  generation = ban_jax.train_generation(None, cfg, **tiny, **QUIET, writers=[seen.__setitem__])
  assert seen == {6: {"generation": 0, **{name: v for name, v in generation.history[0].items() if name != "step"}}}


def test_an_augmentation_is_a_function_and_an_entry(monkeypatch, tiny):
  def brighter(image, key, *, erasing):
    return image + erasing * jax.random.uniform(key)

  monkeypatch.setitem(augment.AUGMENTATIONS, "brighter", augment.Augmentation(brighter))
  cfg = config(data__augment=("mixup", "brighter"), data__erasing=0.9, **SHORT)
  assert ban_jax.train_generation(None, cfg, **QUIET).index == 0
  assert config_lib.identity(config_lib.record(cfg), 0)["data.erasing"] == 0.9
  pairs = [(split["images"], split["labels"]) for split in map(tiny["dataset"].splits.get, ("train", "test"))]
  given = ban_jax.from_arrays(*pairs, augment={"brighter": {"erasing": 0.5}, "cutmix": {}})
  assert given.options["augment"] == (("brighter", (("erasing", 0.5),)), ("cutmix", (("cutmix_alpha", 1.0),)))
  assert given.fetch is not tiny["dataset"].fetch


def test_a_network_is_a_file_and_an_entry(monkeypatch):
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class LinearOptions:
    scale: float  # of the inputs

  class Linear(nn.Module):
    options: LinearOptions
    num_classes: int

    @nn.compact
    def __call__(self, x, *, train, positions):
      x = x.reshape(len(x), -1) * self.options.scale
      return common.classifier(nn.BatchNorm(use_running_average=not train)(x), self.num_classes, jnp.float32)

  def linear(spec, options, *, dtype, axis_name):
    return common.from_module("linear", Linear(options, spec.num_classes), spec)

  monkeypatch.setitem(models.MODELS, "linear", models.ModelKind(LinearOptions, linear))
  cfg = config(**SHORT).copy_and_resolve_references()
  with cfg.unlocked():
    cfg.model = {"name": "linear", "scale": 0.5}
  generations = [ban_jax.train_generation(None, cfg, **QUIET)]
  generations.append(ban_jax.train_generation(generations[0], cfg, **QUIET))
  assert ban_jax.evaluate(generations, cfg)["count"] == 1397
  cfg.model.scale = 0.25
  with cfg.unlocked():
    cfg.model.sale = 1.0
  with pytest.raises(ban_jax.ConfigError, match="model 'linear' takes the options scale; the configuration gives"):
    ban_jax.train_generation(None, cfg, **QUIET)


def test_an_nnx_module_is_its_constructor(tiny):
  class Linear(nnx.Module):
    def __init__(self, rngs):
      self.layer = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
      return self.layer(x.reshape(x.shape[0], -1))

  own = {**tiny, "model": ban_jax.from_nnx(lambda rngs: Linear(rngs), tiny["dataset"]), **QUIET}
  cfg = config("digits,own,smoke", train__batch_size=8, **SHORT)
  student = ban_jax.train_generation(ban_jax.train_generation(None, cfg, **own), cfg, **own)
  assert (student.index, *student.params["params"]["layer"]) == (1, "bias", "kernel")


def test_a_text_is_a_call(tmp_path):
  text = ban_jax.from_text("to be or not to be\n" * 60, tokens="characters", window=8, name="hamlet")
  size = text.spec.num_classes
  own = {"dataset": text, "model": ban_jax.from_flax(nn.Embed(size, size), text), "devices": jax.devices()[:1]}
  cfg = ban_jax.get_config("own,own,smoke")
  cfg.train.update(epochs=3, batch_size=8)
  cfg.optim.learning_rate, cfg.evaluate.batch_size = 20.0, 8
  teacher = ban_jax.train_generation(None, cfg, **own, **QUIET)
  student = ban_jax.train_generation(teacher, cfg, workdir=tmp_path, **own, **QUIET)
  metrics = student.metrics
  assert metrics["test_bits_per_byte"] == metrics["test_bits_per_character"]
  assert metrics["test_bits_per_byte"] == pytest.approx(np.log2(metrics["test_perplexity"]))
  again = ban_jax.load_run(tmp_path, model=own["model"])[0]
  assert again.network.spec == text.spec
  # Each letter's likeliest successor: "o" is followed by a space more often than by "r" or "t".
  assert ban_jax.sample(again, 3, prompt="not t", temperature=0) == ban_jax.sample(again, 3, prompt="t", top_k=1)
  assert ban_jax.sample(again, 2, prompt="n", temperature=0) == "o "
  assert len(ban_jax.log_probabilities(again, ["to be"])[0]) == 5, "no <eos> in characters"


def test_a_data_set_is_a_file_and_an_entry(monkeypatch):
  def load(options: images.Options):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 30).astype(np.int32)
    pixels = (rng.integers(0, 60, (120, 8, 8, 1)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    parts = [images.Examples(pixels[first::2], labels[first::2]) for first in (0, 1)]
    return images.build("stripes", *parts, num_classes=4, options=options)

  monkeypatch.setitem(data.DATASETS, "stripes", data.Source(load, "images", embedded=True))
  changes = {"data__name": "stripes", "data__train_examples": 40, "data__label_noise": 0.2, "evaluate__batch_size": 60}
  cfg = config(**changes, **SHORT)
  generation = ban_jax.train_generation(None, cfg, **QUIET)
  assert generation.metrics["test_count"] == 60
  assert generation.metrics["wrong_seen_count"] == 8
  assert data.describe(cfg.data).sizes["train"] == 40


def test_a_table_is_a_script(tmp_path, monkeypatch):
  (tmp_path / "table9.py").write_text(
    textwrap.dedent('''
      """A table of one's own."""

      from experiments.tables import run
      from experiments.tables.spec import Table, make_rows


      def columns(builder, row):
        teacher = builder.teacher(row.network)
        return {"teacher": [teacher], "CWTM": [builder.student(teacher, row.network, "cwtm")]}


      TABLE = Table(
        number=9,
        title="one of ours",
        dataset="cifar10",
        rows=make_rows(("teacher", "CWTM"), ("WRN", "wrn_10_1", "0.08M", 9.0, 8.0)),
        columns=columns,
        controls=lambda builder, row: {},
        substitutes={"smoke": {"wrn_10_1": "wrn_10_1"}},
      )

      if __name__ == "__main__":
        run.main(TABLE)
    ''')
  )
  monkeypatch.syspath_prepend(tmp_path)
  import table9

  cells = table9.TABLE.cells("smoke", 2, "", controls=False)
  assert [(cell.row, cell.column, cell.paper) for cell in cells] == [("WRN", "teacher", 9.0), ("WRN", "CWTM", 8.0)]
  nodes = graph.topological_order(node for cell in cells for members in cell.members for node in members)
  assert [node.loss for node in nodes] == ["label", "label", "cwtm", "cwtm"]
  assert presets.compose("digits,wrn_10_1,smoke").data.name == "digits"

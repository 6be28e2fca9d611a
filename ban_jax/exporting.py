"""Generations for use elsewhere: a function of images to probabilities as StableHLO, and parameters as safetensors."""

import json
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export as jax_export

from ban_jax import devices as devices_lib
from ban_jax import predicting, storage, trees
from ban_jax.errors import CheckpointError, ConfigError, check_whole, choices
from ban_jax.types import Generation

NAME_BYTES = 255
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# What other formats are known by: a file so named would be taken for one of them.
SUFFIXES = (
  *(".onnx", ".pt", ".pth", ".ts", ".torchscript", ".pb", ".pbtxt", ".tflite", ".lite", ".h5", ".hdf5", ".keras"),
  *(".npy", ".npz", ".pkl", ".pickle", ".joblib", ".msgpack", ".ckpt", ".orbax", ".gguf", ".json", ".mlmodel"),
  *(".mlpackage", ".engine", ".plan", ".xml", ".zip", ".tar", ".gz"),
)


@devices_lib.default_modes()
def export(
  generations: Generation | Sequence[Generation],
  path: epath.PathLike,
  *,
  weights: Sequence[float] | None = None,
  batch_size: int | None = None,
  platforms: Sequence[str] = PLATFORMS,
) -> None:
  """Writes a function of images to probabilities, of one network or an ensemble (Eq. 4), that JAX alone can call.

  The file holds StableHLO with the parameters and the normalisation inside. It takes images [B, H, W, C] of the type
  and size that the networks were trained on, and returns probabilities, float32 [B, n].

  Args:
    generations: one Generation or several, whose networks are known.
    path: the file to write.
    weights: of the ensemble's members, at least 0; None weights them equally.
    batch_size: the number of images that the function takes; None for any number.
    platforms: what the function is compiled for.

  Raises:
    ConfigError: before any work, for language models, for unknown platforms, and for a network of the caller's own that
      needs a fixed number of images; and the errors of `predict`.

  Examples:
    >>> ban_jax.export(student, directory / "student.bin")
    >>> function = jax.export.deserialize(bytearray((directory / "student.bin").read_bytes()))
    >>> function.call(images[:3]).shape
    (3, 10)
  """
  if isinstance(platforms, str) or not isinstance(platforms, Sequence) or not platforms:
    raise ConfigError(f"platforms={platforms!r}: expected a sequence, some of {', '.join(PLATFORMS)}")
  if unknown := [platform for platform in platforms if platform not in PLATFORMS]:
    raise ConfigError(f"platforms: {choices(unknown)}: expected some of {', '.join(PLATFORMS)}")
  if batch_size is not None:
    batch_size = check_whole("batch_size", batch_size, 1, ", or None")
  target = _file(path, "StableHLO", ".stablehlo", (*SUFFIXES, ".safetensors"))
  predictor = predicting.prepare(generations, weights, jax.local_devices()[:1])
  if predictor.spec.kind != "images":
    raise ConfigError("export takes networks of images; these are language models")
  variables, scaling, log_weights = jax.device_get((predictor.variables, predictor.scaling, predictor.log_weights))

  def probabilities(images: jax.Array) -> jax.Array:
    carries = tuple(model.init_carry(1) for model in predictor.models)
    return jnp.exp(predicting.log_mean(predictor.models, variables, scaling, carries, images, log_weights)[1])

  (rows,) = jax_export.symbolic_shape("rows") if batch_size is None else (batch_size,)
  inputs = jax.ShapeDtypeStruct((rows, *predictor.spec.shape), np.dtype(predictor.dtype))
  try:
    exported = jax_export.export(jax.jit(probabilities), platforms=tuple(platforms))(inputs)
  except Exception as error:  # whatever a caller's own module makes of a number of images that is not known
    if batch_size is not None:
      raise
    raise ConfigError(
      f"the network cannot be exported for any number of images ({storage.first_line(error)}); write x.shape[0] in "
      "place of len(x), or give export a batch_size"
    ) from error
  _write(target, bytes(exported.serialize()))


def export_parameters(generation: Generation, path: epath.PathLike) -> None:
  """Writes a generation's parameters and batch statistics as safetensors, named by their path: "params/stem/kernel".

  The metadata hold "generation" and, as JSON, "network": its options, its inputs and their normalisation.

  Args:
    generation: a Generation.
    path: the file to write.

  Raises:
    ConfigError: for a path that cannot be one.
    StorageError: if the file cannot be written.

  Examples:
    >>> ban_jax.export_parameters(student, directory / "student.safetensors")
  """
  from safetensors.numpy import save

  target = _file(path, "safetensors", ".safetensors", (*SUFFIXES, ".stablehlo", ".mlir"))
  if not isinstance(generation, Generation):
    raise CheckpointError(f"export_parameters takes one Generation, not {type(generation).__name__}")
  metadata = {"generation": str(generation.index)}
  if generation.network is not None:
    metadata["network"] = json.dumps(storage.network_record(generation.network))
  arrays = {name: np.array(leaf, order="C") for name, leaf in trees.leaves(trees.to_plain(generation.params)).items()}
  _write(target, save(arrays, metadata))


def _file(path: epath.PathLike, kind: str, suffix: str, others: Sequence[str]) -> epath.Path:
  """Returns a file's full path; raises a ConfigError where none can be written there, or one of another kind is named.

  `suffix` is the kind's own in the message, `others` those of other kinds.
  """
  target = storage.resolve_workdir(path, "path")
  if target.suffix.lower() in others:
    raise ConfigError(f"path={str(path)!r}: what is written is {kind}; expected another suffix, such as {suffix}")
  if len(os.fsencode(target.name)) > NAME_BYTES and "://" not in str(target):
    raise ConfigError(f"path={str(path)!r}: expected a name of at most {NAME_BYTES} bytes, as file systems take it")
  if target.is_dir():
    raise ConfigError(f"path={str(path)!r} is a directory; name a file")
  if target.parent.exists() and not target.parent.is_dir():
    raise ConfigError(f"path={str(path)!r}: {target.parent} is a file, not a directory")
  return target


def _write(target: epath.Path, content: bytes) -> None:
  """Writes a file, and the directories above it; raises a StorageError where the disk cannot be written."""
  with storage.storage_errors(target.parent):
    target.parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(target, content)

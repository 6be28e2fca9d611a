"""What mkdocs does besides: pages that lie elsewhere in the repository, the guides, and the check of the API page."""

import inspect
import pathlib
import posixpath
import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import ban_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Pages of the site whose text is a file of the repository.
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s]+)\)")


def on_config(config):
  """Adds the guides to the navigation, and checks that the API page has every public name."""
  guides = ROOT / "docs" / "guides"
  order = ["README.md", *re.findall(r"^\| \[(\w+\.md)\]", (guides / "README.md").read_text("utf-8"), re.M)]
  if lacking := {path.name for path in guides.glob("*.md")} - set(order):
    raise PluginError(f"docs/guides/README.md lacks {', '.join(sorted(lacking))}")
  config.nav.insert(1, {"Guides": [f"guides/{name}" for name in order]})
  problems = undocumented((ROOT / "docs" / "api.md").read_text("utf-8"))
  if problems:
    raise PluginError("; ".join(problems))
  return config


def undocumented(page: str) -> list[str]:
  """Returns what the API page lacks: public names, or their docstrings."""
  shown = set(re.findall(r"^::: ban_jax\.(\w+)$", page, re.M))
  public = {name for name in ban_jax.__all__ if not name.startswith("__")}
  problems = [f"docs/api.md lacks ban_jax.{name}" for name in sorted(public - shown)]
  problems += [f"docs/api.md has ban_jax.{name}, which is not public" for name in sorted(shown - public)]
  return problems + [f"ban_jax.{name} has no docstring" for name in sorted(public) if not _described(name)]


def _described(name: str) -> bool:
  value = getattr(ban_jax, name)
  text = inspect.getdoc(value) or ""
  return bool(text) and not text.startswith(f"{name}(")  # what a NamedTuple has without a docstring


def on_files(files, config):
  """Adds the pages whose text lies elsewhere."""
  for page, source in PAGES.items():
    files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
  return files


def on_page_markdown(markdown, page, config, files):
  """Makes links from file to file those of the site; a link to a file that is no page becomes plain text."""
  here = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
  sources = {source: target for target, source in PAGES.items()}

  def replace(found):
    image, text, target = found.groups()
    path, hash_, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:") or not path:
      return found.group()
    place = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    if (ROOT / place / "README.md").exists() and place.startswith("docs/"):
      place += "/README.md"
    own = sources.get(place, place.removeprefix("docs/") if place.startswith("docs/") else None)
    if own and files.get_file_from_path(own):
      relative = posixpath.relpath(own, posixpath.dirname(page.file.src_uri) or ".")
      return f"{image}[{text}]({relative}{hash_}{anchor})"
    if (ROOT / place).exists() and not image:
      return text if "`" in text or " " in text else f"`{text}`"
    return found.group()  # broken: mkdocs says so

  return LINK.sub(replace, markdown)

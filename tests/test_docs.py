"""The documentation's sources: every public name is on the API page, and no link inside the repository is broken."""

import re

import pytest
from conftest import ROOT

import ban_jax
from ban_jax import keys, losses, optim, presets
from ban_jax.data.augment import AUGMENTATIONS
from experiments import configuration

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def public_names():
  return {name for name in ban_jax.__all__ if not name.startswith("__")}


def test_the_api_page_has_every_public_name_once():
  page = (ROOT / "docs" / "api.md").read_text("utf-8")
  shown = re.findall(r"^::: ban_jax\.(?:\w+\.)?(\w+)$", page, re.M)
  assert sorted(shown) == sorted(public_names())


@pytest.mark.parametrize("name", sorted(public_names()))
def test_a_public_name_has_a_docstring_of_its_own(name):
  text = getattr(ban_jax, name).__doc__
  assert text
  assert not text.startswith(f"{name}(")  # what a NamedTuple or a dataclass has without one
  assert text.splitlines()[0].endswith((".", ":"))


def test_the_configuration_page_is_what_the_command_line_lists():
  shown = (ROOT / "docs" / "configuration.md").read_text("utf-8")
  assert shown == configuration.page() + "\n", "run: experiments/train.py --list > docs/configuration.md"
  for name in (*keys.KEYS, *presets.MODELS, *presets.SCALES, *losses.LOSSES, *optim.OPTIMIZERS, *AUGMENTATIONS):
    assert f"`{name}`" in shown


def anchors(page):
  titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
  return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_pictures_lead_somewhere(page):
  text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if "://" in target:
      continue
    path, _, anchor = target.partition("#")
    place = (page.parent / path) if path else page
    assert place.exists(), f"{page}: {target}"
    if anchor and place.suffix == ".md":
      assert anchor in anchors(place), f"{page}: {target}"

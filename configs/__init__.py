"""Configurations: base.py documents every key, presets.py holds the variants, the other files combine them."""

"""Configurations: base.py documents every key, presets.py holds what varies, the rest compose them."""

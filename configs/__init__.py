"""Configuration files for --config, which combine the presets of ban_jax/presets."""

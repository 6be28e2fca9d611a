"""The package's version; setup.py and every manifest read it here."""

__version__ = "0.2.0.dev0"

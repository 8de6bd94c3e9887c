"""The package's version. Hatch reads it from this file, and modules import it from here."""

__version__ = "0.1.0"

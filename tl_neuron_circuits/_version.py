"""The version: this line alone says it; hatchling reads it when it builds."""

__version__ = "0.1.0"

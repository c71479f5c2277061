"""The version of this package, and of what its results depend on."""

__version__ = "0.1.0"  # this line alone says it; hatchling reads it when it builds


def versions() -> dict[str, str]:
    """Versions that a result depends on, without importing what they are of."""
    from importlib import metadata  # 20 modules that starting does not need

    installed = {"tl-neuron-circuits": __version__}
    for name in ("transformer-lens", "torch"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed

"""Of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION: str | None = version("manta-serve")
except PackageNotFoundError:
    VERSION = None  # it runs from a source folder

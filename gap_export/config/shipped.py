"""What travels with the package: model files, the embedded model."""

from __future__ import annotations

from pathlib import Path


def package_data(name: str) -> Path:
    """A data folder: inside the package when installed, beside it in a checkout."""
    home = Path(__file__).resolve().parents[1]
    inside = home / name
    return inside if inside.is_dir() else home.parent / name


def list_configs() -> list[str]:
    """Names in export_configs/."""
    return sorted(path.stem for path in package_data("export_configs").glob("*.toml"))

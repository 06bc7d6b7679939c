"""What plug-ins must fit, by the package that they lie in."""

import inspect
from typing import Protocol

from gap_export.interfaces.dialect import Dialect
from gap_export.interfaces.family import Family, FamilyOptions
from gap_export.interfaces.features import AdaptivePruner, Pruner
from gap_runtime.backends import Backend, Builder
from gap_runtime.cli.options import Command
from gap_runtime.evaluation.protocol import ScoringProtocol
from gap_runtime.evaluation.source import Reader
from gap_runtime.pictures.preprocess import PictureMode

PROTOCOLS = {
    "gap_export.models": Family,
    "gap_export.pruners": Pruner,
    "gap_export.dialects": Dialect,
    "gap_export.cli.commands": Command,
    "gap_runtime.cli.commands": Command,
    "gap_runtime.backends": Backend,
    "gap_runtime.pictures.modes": PictureMode,
    "gap_runtime.evaluation.readers": Reader,
    "gap_runtime.evaluation.protocols": ScoringProtocol,
}
OPTIONS = {
    "gap_export.models": FamilyOptions,
    "gap_export.pruners": AdaptivePruner,
    "gap_runtime.backends": Builder,
}
"""What they may have besides."""


def members(protocol):
    """Names that a protocol asks for."""
    kinds = [kind for kind in protocol.__mro__ if getattr(kind, "_is_protocol", False)]
    kinds = [kind for kind in kinds if kind is not Protocol]
    names = {name for kind in kinds for name in vars(kind) if not name.startswith("_")}
    return names.union(*(inspect.get_annotations(kind) for kind in kinds))


def all_members(package):
    """Names that a plug-in of a package must and may define."""
    names = members(PROTOCOLS[package])
    return names | members(OPTIONS[package]) if package in OPTIONS else names

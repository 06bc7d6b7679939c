"""The licence of the model that a bundle was made from, and whether it lets the bundle be shared.

A bundle holds the weights of its source, so who shares one shares the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gap_runtime.bundle.hub import CARD_FILE, HubName, explain_failure
from gap_runtime.bundle.hub_library import library_failures, load_library
from gap_runtime.bundle.manifest import Source
from gap_runtime.errors import ConfigError
from gap_runtime.records.files import expand, is_file, is_folder

UNKNOWN: Final = "unknown"
_FREE: Final = frozenset(
    {
        *("apache-2.0", "mit", "isc", "unlicense", "wtfpl", "zlib", "0bsd"),
        *("bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear"),
        *("cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0"),
        *("cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
        *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
        *("gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "creativeml-openrail-m"),
    }
)
"""Licences by the hub's words that let changed copies be shared, with the same licence named."""
_EMBEDDED: Final = frozenset(
    {
        "c13b2a58822b46292ddeba29d8ed3a37a04abe38c89024e10bbd644cf0cacec4",
        "af4c1221abb11f01bdf610f2bc970df70d2740fdc9eafa2dda2a265bbc6c6a7c",
    }
)
"""The models that come with gap-export, by their index: they are under its own licence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class License:
    """A licence by the hub's word for it, and where it is said.

    `is_gated`: the model's authors hand it out to those alone who accept their terms.
    """

    name: str
    said_by: str
    is_gated: bool = False

    def find_obstacle(self) -> str | None:
        """Why the bundle may not be shared without a look at the terms; None where it may."""
        if self.is_gated:
            return f"{self.said_by} is handed out to those alone who accept its terms"
        if self.name in _FREE or self.name == UNKNOWN:
            return None
        if "-nd-" in self.name:
            return f"{self.name} ({self.said_by}) allows no changed copies to be shared"
        return f"{self.name} ({self.said_by}) has terms of its own for those who share"

    def require_shareable(self, *, accepted: bool) -> None:
        """Refuse to share what the licence forbids, or binds to terms that nobody has read.

        Raises:
            ConfigError: It needs `--accept-license`.
        """
        obstacle = self.find_obstacle()
        if obstacle is not None and not accepted:
            raise ConfigError(
                f"not pushed: the licence {obstacle}; read it, and where you may share the "
                "bundle give --accept-license"
            )

    def describe(self) -> str:
        """For people."""
        if self.name == UNKNOWN:
            return (
                "the licence of the source model is unknown; find out whether you may share it, "
                "and say it with --license"
            )
        return f"the licence of the source model is {self.name} ({self.said_by})"


def find_license(source: Source, given: str | None = None) -> License:
    """The licence of a bundle's source: as given, or by the source's own card.

    Args:
        source: Its `checkpoint` is a hub id, a folder, or a name.
        given: By the user, as the hub writes it: `apache-2.0`.

    Raises:
        HubError: The source is on the hub, and the hub cannot be asked.
    """
    if given is not None:
        return License(name=given.lower(), said_by="as you say")
    if source.index_sha256 in _EMBEDDED:
        return License(name="apache-2.0", said_by="gap-export's own model")
    folder = expand(source.checkpoint)
    if is_folder(folder):
        return _read_card(folder / CARD_FILE)
    if source.checkpoint.count("/") == 1:
        return _ask_hub(source)
    return License(name=UNKNOWN, said_by=source.checkpoint)


def _read_card(path: Path) -> License:
    """By the card in a checkpoint's folder."""
    library = load_library()
    found = None
    if is_file(path):
        try:
            found = library.ModelCard.load(path, ignore_metadata_errors=True).data
        except library_failures():
            # A page that is no card says nothing of a licence.
            found = None
    return _name_license(found, str(path))


def _ask_hub(source: Source) -> License:
    """By the card of a repository; unknown where there is no such repository."""
    library = load_library()
    try:
        info = library.HfApi().model_info(source.checkpoint, revision=source.revision)
    except library.errors.RepositoryNotFoundError:
        return License(name=UNKNOWN, said_by=source.checkpoint)
    except library_failures() as error:
        name = HubName(repository=source.checkpoint, revision=source.revision)
        what = "be asked for its licence (say it with --license)"
        raise explain_failure(name, what, error) from error
    return _name_license(info.card_data, source.checkpoint, is_gated=bool(info.gated))


def _name_license(card: Any, said_by: str, *, is_gated: bool = False) -> License:
    """The word of a card; one that is not the hub's stands in a key of its own."""
    data = card.to_dict() if card is not None else {}
    name = data.get("license")
    if name == "other":
        name = data.get("license_name") or name
    if not isinstance(name, str) or not name:
        name = UNKNOWN
    return License(name=name.lower(), said_by=said_by, is_gated=is_gated)

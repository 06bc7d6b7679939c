"""A bundle onto the hub: everything in one commit, or nothing of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gap_runtime.bundle.bundle import Bundle
from gap_runtime.bundle.hashes import Begin, begin_silently
from gap_runtime.bundle.hub import CARD_FILE, PREFIX, HubName, explain_failure
from gap_runtime.bundle.hub_library import library_failures, load_library
from gap_runtime.bundle.license import License
from gap_runtime.bundle.manifest import MANIFEST_FILE
from gap_runtime.errors import BundleError, ConfigError, HubError
from gap_runtime.records.files import is_file
from gap_runtime.records.plain import read_json

_USUAL = (".gitattributes", ".gitignore", CARD_FILE, "LICENSE", "NOTICE")
"""What a new repository may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """Where a bundle is now: `hub:NAME` opens it, `commit` is its revision."""

    name: HubName
    commit: str
    url: str


def require_login(name: HubName) -> None:
    """Find out before any work whether somebody is logged in.

    Raises:
        HubError: There is no token, or the hub does not take it or cannot be reached.
    """
    library = load_library()
    try:
        token = library.get_token()
        if token is not None:
            library.HfApi().whoami()
    except library_failures() as error:
        raise explain_failure(name, "be pushed", error) from error
    if token is None:
        raise HubError(
            f"{PREFIX}{name}: no token for the hub; run `hf auth login`, or set HF_TOKEN, with "
            "one that may write"
        )


def list_links(bundle: Bundle) -> list[str]:
    """Files of a bundle that are hard links, to a checkpoint's files for example."""
    names = bundle.manifest.files
    return [name for name in names if (bundle.folder / name).stat().st_nlink > 1]


def push(
    bundle: Bundle,
    name: HubName,
    license: License,  # noqa: A002 - the field's word
    card: str,
    *,
    accept_license: bool = False,
    private: bool = False,
    begin: Begin = begin_silently,
) -> Pushed:
    """Push a bundle: the files of its manifest, the manifest and a card, in one commit.

    What the hub has already is not sent again, so a push that broke off goes on. Files of the
    bundle that was there before go; others of the repository stay.

    Args:
        bundle: Verified here, whole.
        name: Where to; the repository, and the branch, are made where they do not exist.
        license: Of the source.
        card: Its page there, `report.card` makes it.
        accept_license: The user has read a licence that binds who shares.
        private: Whether a repository that is made is private.
        begin: Shows how far the hashing is.

    Raises:
        ConfigError: The licence, or what the repository holds, is against it.
        HubError: The hub refused it or cannot be reached.
        BundleError: A file of the bundle has changed.
    """
    license.require_shareable(accepted=accept_license)
    require_login(name)
    # A hard link may have been written through since the export.
    bundle.verify(limit=None, begin=begin)
    library = load_library()
    api = library.HfApi(library_name="gap-runtime")
    try:
        api.create_repo(name.repository, private=private, exist_ok=True)
        if name.revision:
            api.create_branch(name.repository, branch=name.revision, exist_ok=True)
        info = api.repo_info(name.repository, revision=name.revision)
        there = {each.rfilename for each in info.siblings or ()}
        old = _list_old(api, name, there, info.sha)
        stale = sorted((old & there) - set(bundle.manifest.files))
        files = [*bundle.manifest.files, MANIFEST_FILE]
        commit = api.create_commit(
            name.repository,
            operations=[
                *(library.CommitOperationDelete(path_in_repo=each) for each in stale),
                *(
                    library.CommitOperationAdd(path_in_repo=each, path_or_fileobj=str(path))
                    for each in files
                    for path in [bundle.folder / each]
                ),
                library.CommitOperationAdd(path_in_repo=CARD_FILE, path_or_fileobj=card.encode()),
            ],
            commit_message=f"{bundle.manifest.name}, exported by gap-export",
            revision=name.revision,
            parent_commit=info.sha,
        )
    except library_failures() as error:
        raise explain_failure(name, "be pushed", error) from error
    return Pushed(name=name, commit=commit.oid, url=f"{api.endpoint}/{name.repository}")


def _list_old(api: Any, name: HubName, there: Iterable[str], commit: str) -> set[str]:
    """Files of the bundle that is in the repository; nothing where it is new.

    Raises:
        ConfigError: The repository holds something else.
    """
    others = sorted(each for each in there if each not in _USUAL)
    if not others:
        return set()
    if MANIFEST_FILE not in others:
        raise ConfigError(
            f"{PREFIX}{name}: holds no bundle but {others[0]}"
            f"{f' and {len(others) - 1} more' if others[1:] else ''}; push to a repository of "
            "its own"
        )
    path = api.hf_hub_download(name.repository, MANIFEST_FILE, revision=commit)
    if not is_file(path):
        return set()
    data = read_json(path, BundleError)
    files = data.get("files") if isinstance(data, dict) else None
    return {each for each in files if isinstance(each, str)} if isinstance(files, dict) else set()

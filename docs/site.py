"""What the site has beside this folder: the repository's other pages, and the reference.

A hook of mkdocs (mkdocs.yml). The README and its like become pages, links between all of them are
kept, and the reference of the commands is made from their own parsers.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from schemas import list_json_types, make_schema, tabulate

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "runtime/README.md": "runtime.md",
    "refshapes/README.md": "refshapes.md",
}
"""Pages outside of this folder, and their names in the site."""
PYTHON = {
    "Export": ["gap_export.pipeline.api.export", "gap_export.pipeline.result.ExportResult"],
    "Ask a bundle": [
        "gap_runtime.bundle.bundle.Bundle",
        "gap_runtime.grounding.grounder.Grounder",
        "gap_runtime.grounding.view.View",
        "gap_runtime.grounding.view.Grounding",
        "gap_runtime.pictures.boxes.Box",
        "gap_runtime.grounding.api.draw",
        "gap_runtime.grounding.video.watch.watch",
        "gap_runtime.grounding.video.watch.WatchedFrame",
        "gap_runtime.grounding.video.watch.WatchReport",
    ],
    "Check and measure": [
        "gap_runtime.grounding.api.check",
        "gap_runtime.grounding.check.CheckReport",
        "gap_runtime.evaluation.api.evaluate",
        "gap_runtime.evaluation.api.Evaluation",
    ],
    "Errors": ["gap_runtime.errors"],
}
"""Public names by the module that they live in."""
JSON = """# What --json prints

Every command that takes `--json` prints one JSON value on stdout and nothing else there;
everything for people goes to stderr. This page is made from the types that the commands print,
and the tests hold every output to these schemas.

- Objects have all keys that stand here and no others, unless a key "may be missing".
- A number that is not finite, the mean of nothing for example, is null.
- Sizes are in bytes, boxes in pixels of the picture: left, top, right, bottom.

A command that fails prints this instead, its line on stderr, and ends with the exit code of its
kind:
"""
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in this folder."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_relink(text, source, name)))
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), picture))
            if not path.startswith("docs/"):
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    pages = _describe_commands() | {"python": _describe_python(), "json": _describe_json()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead the links of this folder's pages to the others."""
    if page.file.generated_by is not None:
        return markdown
    return _relink(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _relink(text: str, source: str, name: str) -> str:
    """A page's links, from its place in the repository to its place in the site."""

    def relink(found: re.Match[str]) -> str:
        target, anchor = found.group(1), found.group(2) or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{source}: the link to {target} leads nowhere")
        there = PAGES.get(path, path.removeprefix("docs/"))
        return f"]({posixpath.relpath(there, posixpath.dirname(name) or '.')}{anchor})"

    text = _LINK.sub(relink, text)
    # Files that are no pages are named without a link.
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)[^)]*(?<!\.md)(?<!\.png)\)", _name_only, text)


def _name_only(found: re.Match[str]) -> str:
    return found.group(0) if ".md#" in found.group(0) else found.group(1)


def _describe_commands() -> dict[str, str]:
    """A page for each program, from the parsers of its commands."""
    os.environ["COLUMNS"] = "100"
    from gap_export.cli import main as exporter  # noqa: PLC0415 - the hook is read without them too
    from gap_runtime.cli import main as runtime  # noqa: PLC0415
    from gap_runtime.registry import list_plugins, load_plugin  # noqa: PLC0415

    pages = {}
    for program in (exporter.PROGRAM, runtime.PROGRAM):
        parts = [f"# {program.name}", f"{program.description.capitalize()}.", _fence(program)]
        for name in list_plugins(program.package):
            command: Any = load_plugin(program.package, name, "command")
            parser = program.make_command_parser(name, command)
            parts += [f"## {program.name} {name}", f"```text\n{parser.format_help()}```"]
        pages[program.name] = "\n\n".join(parts)
    return pages


def _describe_json() -> str:
    """The page on what commands print with `--json`, from the types that they name."""
    from gap_runtime.cli.options import ErrorResult  # noqa: PLC0415

    parts = [JSON, *tabulate(make_schema(ErrorResult))]
    for command, kinds in list_json_types().items():
        parts.append(f"## {command}\n")
        for when, kind in kinds.items():
            schema = make_schema(kind)
            text = json.dumps(schema, indent=2)
            parts += [
                f"### `{command} {when}`\n",
                *tabulate(schema),
                '??? note "JSON Schema"\n',
                textwrap.indent(f"```json\n{text}\n```\n", "    "),
            ]
    return "\n".join(parts)


def _fence(program: Any) -> str:
    return f"```text\n{program.make_parser().format_help()}```"


def _describe_python() -> str:
    parts = ["# Python"]
    for title, names in PYTHON.items():
        parts += [
            f"## {title}",
            *(f"::: {name}\n    options:\n      heading_level: 3" for name in names),
        ]
    return "\n\n".join(parts) + "\n"

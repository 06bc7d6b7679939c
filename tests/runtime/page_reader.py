"""What a report must be whatever it holds, read with the standard library's parser."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page: its elements, ids, links, pictures and tables."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.sources, self.images, self.tables = [], [], [], [], []
        self.references, self.problems, self.scripts, self.graphics = [], [], [], []
        self.text, self._open, self._style = [], [], []
        self.feed(text)
        self.close()
        if self._open:
            self.problems.append(f"never closed: {self._open}")

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self._open.append(tag)
        self._note(tag, values)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, dict(attrs))

    def _note(self, tag, values):
        self.ids += [values["id"]] if "id" in values else []
        self._note_addresses(tag, values)
        for value in values.values():
            if value and "url(#" in value:
                self.references.append(value[value.index("url(#") + 4 :].partition(")")[0])
        if tag == "img":
            self.images.append(values)
        if tag == "svg" and "aria-hidden" not in values:
            self.graphics.append(values)
        if tag == "script" or any(name.startswith("on") for name in values):
            self.scripts.append(tag)
        self._note_table(tag, values)

    def _note_addresses(self, tag, values):
        if tag == "a":
            self.links.append(values["href"])
        elif "href" in values:
            inside = values["href"].startswith("#")
            (self.references if inside else self.sources).append(values["href"])
        self.sources += [values["src"]] if "src" in values else []
        for name in ("aria-labelledby", "aria-describedby", "for"):
            self.references += [f"#{values[name]}"] if name in values else []

    def _note_table(self, tag, values):
        if tag == "table":
            self.tables.append({"caption": False, "columns": 0, "rows": 0, "headed": 0})
        elif self.tables and "table" in self._open:
            table = self.tables[-1]
            table["caption"] |= tag == "caption"
            table["columns"] += tag == "th" and values.get("scope") == "col"
            table["headed"] += tag == "th" and values.get("scope") == "row"
            table["rows"] += tag == "tr" and "tbody" in self._open

    def handle_endtag(self, tag):
        if not self._open or self._open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self._open[-1:]}")
            return
        self._open.pop()

    def handle_data(self, data):
        (self._style if "style" in self._open else self.text).append(data)

    @property
    def style(self):
        """All of the page's style."""
        return "".join(self._style)

    @property
    def words(self):
        """What a person reads."""
        return " ".join(" ".join(self.text).split())


def require_sound(page):
    """Whole, with nothing fetched from elsewhere, and readable without seeing it."""
    assert page.problems == []
    assert page.scripts == []
    assert len(page.ids) == len(set(page.ids))
    inside = {link for link in page.links if link.startswith("#")}
    assert {each[1:] for each in (*page.references, *inside)} <= set(page.ids)
    assert all(each.startswith("data:") for each in page.sources)
    assert not any("://" in link or link.startswith("/") for link in page.links)
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert "prefers-color-scheme: dark" in page.style
    assert "@media print" in page.style
    for image in page.images:
        assert image["src"].startswith("data:image/")
        assert image["alt"].strip()
    for graphic in page.graphics:
        assert graphic["role"] == "img"
        assert graphic["aria-label"].strip()
    for table in page.tables:
        assert table["caption"]
        assert table["columns"] >= 2
        assert table["headed"] == table["rows"] > 0

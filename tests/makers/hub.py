"""A stand-in of the hub's HTTP interface: what huggingface_hub's own client asks, answered.

Files up to `SMALL` bytes go in the commit itself, larger ones by LFS: to one address, or in parts
where `part_bytes` is set. Downloads of LFS files lead to another address that takes ranges.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SMALL = 40_000
TOKEN = "hf_right"


class Repository:
    """Commits in their order, each the files by name; branches by name."""

    def __init__(self):
        self.commits, self.branches = {}, {}
        self.commit("main", {})

    def commit(self, branch, files):
        name = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def find(self, revision):
        name = self.branches.get(revision, revision)
        return (name, self.commits[name]) if name in self.commits else None


class Hub:
    """The state: repositories, large objects, what was asked, and what shall go wrong."""

    def __init__(self, handler=None):
        self.repositories, self.objects, self.parts = {}, {}, {}
        self.asked, self.cards = [], {}
        self.part_bytes = None
        self.cut = None
        answers = type("H", (handler or Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def files(self, name, revision="main"):
        return self.repositories[name].find(revision)[1]

    def count(self, method, part):
        return sum(m == method and part in path for m, path in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *_):
        pass

    def reply(self, status=200, data=None, headers=None):
        body = data if isinstance(data, bytes) else json.dumps(data or {}).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code):
        self.reply(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def handle_any(self):  # noqa: PLR0911 - a return for each address
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith("/lfs/"):
            return self.serve_object(path, body)
        if self.headers.get("Authorization") not in {None, f"Bearer {TOKEN}"}:
            return self.refuse(401, "Unauthorized")
        if self.command in {"POST", "PUT"} and self.headers.get("Authorization") is None:
            return self.refuse(401, "Unauthorized")
        if path == "/api/whoami-v2":
            return self.reply(data={"name": "org", "type": "user", "auth": {}, "orgs": []})
        if path == "/api/validate-yaml":
            return self.reply(data={"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "org", asked["name"])))
            if name in hub.repositories:
                return self.reply(409, {"error": "exists", "url": f"{hub.url}/{name}"})
            hub.repositories[name] = Repository()
            return self.reply(data={"url": f"{hub.url}/{name}", "name": name})
        found = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(\.git/.*|/.*|)", path)
        name, rest = found.groups()
        if name not in hub.repositories:
            return self.refuse(401 if name.endswith("secret") else 404, "RepoNotFound")
        return self.serve_repository(name, hub.repositories[name], rest, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def serve_repository(self, name, repository, rest, body):  # noqa: PLR0911
        hub = self.hub
        if rest.endswith("/info/lfs/objects/batch"):
            return self.reply(
                data={"objects": [self.offer(o) for o in json.loads(body)["objects"]]}
            )
        verb, _, tail = rest.lstrip("/").partition("/")
        if verb == "branch":
            repository.branches.setdefault(tail, repository.branches["main"])
            return self.reply(data={})
        if verb == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["size"] > SMALL else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return self.reply(data={"files": files})
        if verb == "commit":
            return self.take_commit(name, repository, tail, body)
        revision, _, file = tail.partition("/")
        found = repository.find(revision or "main")
        if found is None:
            return self.refuse(404, "RevisionNotFound")
        commit, files = found
        if verb in {"", "revision"}:
            siblings = [{"rfilename": each} for each in files]
            about = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
            return self.reply(data=about | hub.cards.get(name, {}))
        if verb == "tree":
            return self.reply(data=[describe(*each) for each in sorted(files.items())])
        assert verb == "resolve", rest
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        return self.serve_file(commit, files[file])

    def offer(self, asked):
        hub, oid, size = self.hub, asked["oid"], asked["size"]
        if oid in hub.objects:
            return {"oid": oid, "size": size}
        href, header = f"{hub.url}/lfs/{oid}", {}
        if hub.part_bytes:
            count = -(-size // hub.part_bytes)
            header = {f"{k + 1:05d}": f"{href}/part/{k + 1}" for k in range(count)}
            header["chunk_size"] = str(hub.part_bytes)
            href += "/complete"
        verify = {"href": f"{hub.url}/lfs/{oid}/verify"}
        actions = {"upload": {"href": href, "header": header}, "verify": verify}
        return {"oid": oid, "size": size, "actions": actions}

    def serve_object(self, path, body):
        hub = self.hub
        _, _, oid, *more = path.split("/")
        if self.command == "PUT" and more:
            hub.parts.setdefault(oid, {})[int(more[1])] = body
            return self.reply(headers={"ETag": f'"{more[1]}"'})
        if self.command == "PUT":
            hub.objects[oid] = body
            return self.reply()
        if more == ["complete"]:
            numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
            hub.objects[oid] = b"".join(hub.parts[oid][k] for k in numbers)
            return self.reply()
        if more == ["verify"]:
            right = hashlib.sha256(hub.objects[oid]).hexdigest() == oid
            return self.reply(200 if right else 400)
        data, start = hub.objects[oid], 0
        if found := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(found[1])
        if hub.cut is not None and len(data) - start > hub.cut:
            # The line breaks.
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + hub.cut])
            self.close_connection = True
            return None
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        return self.reply(206 if start else 200, data[start:], headers)

    def take_commit(self, name, repository, branch, body):
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in {None, repository.branches[branch]}:
            return self.refuse(412, "PreconditionFailed")
        files = dict(repository.find(branch)[1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = (value["oid"], len(self.hub.objects[value["oid"]]))
            else:
                files.pop(value["path"])
        commit = repository.commit(branch, files)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return self.reply(data={"commitUrl": url, "commitOid": commit})

    def serve_file(self, commit, content):
        headers = {"X-Repo-Commit": commit}
        if isinstance(content, bytes):
            etag = hashlib.sha1(content).hexdigest()
            return self.reply(200, content, headers | {"ETag": f'"{etag}"'})
        oid, size = content
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": size}
        # Another host, as on the hub: the client asks it without its token.
        there = self.hub.url.replace("127.0.0.1", "localhost")
        return self.reply(302, b"", headers | {"Location": f"{there}/lfs/{oid}"})


def describe(path, content):
    if isinstance(content, bytes):
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": oid}
    oid, size = content
    lfs = {"oid": oid, "size": size, "pointerSize": 130}
    return {"type": "file", "path": path, "size": size, "oid": oid[:40], "lfs": lfs}

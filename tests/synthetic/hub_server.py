# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
The parts of the Hub's API that pushing and loading a dataset use, on loopback: `python hub_server.py`.

The server prints its port. `POST /stop` ends it, `GET /log` has what was asked. In the namespace `forbidden` nobody may commit.
"""

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_of_the_test"
USER = "somebody"
lock = Lock()
repos: dict[str, dict] = {}  # by name: "private" and "commits", each with the content of all files
large: dict[str, bytes] = {}  # by SHA-256
log: list[str] = []


class Refused(Exception):
    """Status, code and message of an error."""


def files_of(name: str, revision: str | None = None) -> dict[str, bytes]:
    commits = repo_of(name)["commits"]
    if revision in (None, "main"):
        return commits[-1]
    found = [commit for i, commit in enumerate(commits) if sha_of(name, i) == revision]
    if not found:
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return found[0]


def repo_of(name: str) -> dict:
    if name not in repos:
        raise Refused(404, "RepoNotFound", "Repository not found")
    return repos[name]


def sha_of(name: str, index: int = -1) -> str:
    return hashlib.sha1(f"{name} {index % len(repos[name]['commits'])}".encode()).hexdigest()


def info(name: str) -> dict:
    repo = repo_of(name)
    siblings = [{"rfilename": path} for path in repo["commits"][-1]]
    return {"_id": name, "id": name, "sha": sha_of(name), "private": repo["private"], "siblings": siblings, "tags": []}


def entry(path: str, content: bytes) -> dict:
    found = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 in large:
        found["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 100}
    return found


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    folder = f"{folder}/" if folder else ""
    inside = {path: content for path, content in files.items() if path.startswith(folder)}
    if folder and not inside:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist")
    folders = {f"{folder}{path[len(folder) :].partition('/')[0]}" for path in inside if "/" in path[len(folder) :]}
    found = [{"type": "directory", "path": path, "oid": path, "size": 0} for path in sorted(folders)]
    return found + [
        entry(path, content) for path, content in inside.items() if recursive or "/" not in path[len(folder) :]
    ]


def commit(name: str, lines: list[dict]) -> dict:
    if name.startswith("forbidden/"):
        raise Refused(403, None, "Forbidden: you may not write to this repository")
    files = dict(files_of(name))
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            parent = value.get("parentCommit")
            if parent not in (None, sha_of(name)):
                raise Refused(412, None, "A commit has happened since")
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = large[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
        else:
            raise Refused(400, None, f"Unknown operation {line['key']}")
    repos[name]["commits"].append(files)
    oid = sha_of(name)
    return {"success": True, "commitOid": oid, "commitUrl": f"/datasets/{name}/commit/{oid}", "hookOutput": ""}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        extra: dict[str, str] = {}
        with lock:
            log.append(f"{self.command} {path}")
            try:
                status, content = 200, self.answer(path, query, body, extra)
            except Refused as error:
                status, code, message = error.args
                content = {"error": message}
                extra |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(payload), **extra}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)
        if path == "/stop":
            Thread(target=self.server.shutdown).start()

    do_GET = do_HEAD = do_POST = do_PUT = do

    def answer(self, path: str, query: dict, body: bytes, extra: dict[str, str]) -> dict | list | bytes:
        if path in ("/stop", "/log", "/api/validate-yaml"):
            return {"log": log, "private": {name: repo["private"] for name, repo in repos.items()}}
        if found := re.fullmatch(r"/large/(\w+)", path):  # a signed URL, without the token
            assert hashlib.sha256(body).hexdigest() == found[1]
            large[found[1]] = body
            return b""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, None, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return {"type": "user", "name": USER, "orgs": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            if name in repos:
                raise Refused(409, None, "You already created this dataset repo")
            private = asked.get("private", asked.get("visibility") == "private")
            repos[name] = {"private": private, "commits": [{".gitattributes": b"*.parquet filter=lfs\n"}]}
            return {"url": f"{self.base}/datasets/{name}", "name": name}
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**some, "actions": {"upload": {"href": f"{self.base}/large/{some['oid']}"}}}
                for some in json.loads(body)["objects"]
            ]
            return {"transfer": "basic", "objects": objects}
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = found.groups()
            files = files_of(name, revision)
            if file not in files:
                raise Refused(404, "EntryNotFound", "Entry not found")
            extra |= {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"', "X-Repo-Commit": sha_of(name)}
            return files[file]
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/([^/]+)/([^/]+)(?:/(.*))?)?", path):
            return self.of_dataset(*found.groups(), query, body)
        raise Refused(404, "RepoNotFound", f"There is no {path}")

    def of_dataset(
        self, name: str, what: str | None, revision: str | None, path: str | None, query: dict, body: bytes
    ) -> dict | list:
        if what is None or what == "revision":
            files_of(name, revision)
            return info(name)
        if what == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return {"files": modes, "commitOid": sha_of(name)}
        if what == "commit":
            return commit(name, [json.loads(line) for line in body.splitlines() if line])
        files = files_of(name, revision)
        if what == "tree":
            return tree(files, path or "", query.get("recursive", ["false"])[0].lower() == "true")
        if what == "paths-info":
            asked = (
                json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            )  # JSON or a form
            folders = {path.rpartition("/")[0] for path in files}
            return [entry(some, files[some]) for some in asked if some in files] + [
                {"type": "directory", "path": some, "oid": some, "size": 0} for some in asked if some in folders
            ]
        raise Refused(404, None, f"There is no {what}")

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()

# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
The Hub's API on loopback, with models besides datasets: `python hub.py FOLDER`.

What lies in FOLDER/organization/name is the repository organization/name. The server prints its port.
"""

import json
import re
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "synthetic"))
import hub_server  # noqa: E402 - found by the path above


class Handler(hub_server.Handler):
    disable_nagle_algorithm = True  # or each answer waits for the acknowledgement of its header

    def answer(self, path: str, query: dict, body: bytes, extra: dict[str, str]) -> dict | list | bytes:
        for folder in Path(sys.argv[1]).glob("*/*"):
            name = f"{folder.parent.name}/{folder.name}"
            if name not in hub_server.repos:
                files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
                content = {path: file.read_bytes() for path, file in files.items()}
                hub_server.repos[name] = {"private": False, "commits": [content]}
        # A model's paths are those of a dataset without the word
        is_model = path.startswith("/api/models/") or re.match(r"/(?!api/|datasets/)[^/]+/[^/]+/(resolve|info)/", path)
        if is_model:
            path = path.replace("/api/models/", "/api/datasets/") if path.startswith("/api/") else f"/datasets{path}"
        result = super().answer(path, query, body, extra)
        if path == "/api/repos/create" and json.loads(body).get("type", "model") == "model":
            result["url"] = result["url"].replace("/datasets/", "/")
        if is_model and "/commit/" in path:
            result["commitUrl"] = result["commitUrl"].replace("/datasets/", f"{self.base}/")
        return result


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()

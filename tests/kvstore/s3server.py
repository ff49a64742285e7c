"""An S3 server in memory that can be told to behave badly.

It knows what a remote needs: objects, ranges, listing, uploads in parts, conditional
creation. It checks no signature.
"""

import hashlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 7
"""How many keys a page of a listing has: few, so that tests see several."""
OBJECT = "Wed, 21 Oct 2015 07:28:00 GMT"


class S3Server:
    """The server, on a free port.

    Attributes:
        objects: What it holds, by path: bucket and key.
        log: Method and path of each request.
        fault: Called with each request's handler; returns what goes wrong, or None.
            `lost`: done, and the reply is lost; `cut`: half of the reply arrives;
            `flip`: a bit of the body is another; `stall`: nothing comes for a second;
            a number: that status, and nothing is done.
        creates: What `If-None-Match` does: `right`, `ignored` or a status.
        has_ranges: Whether it sends ranges; else the whole object.
        can_list: Whether it lists.
    """

    def __init__(self):
        self.objects, self.parts, self.log = {}, {}, []
        self.fault = lambda request: None
        self.creates, self.has_ranges, self.can_list = "right", True, True
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"world": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()

    @property
    def endpoint(self):
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def options(self):
        """What `Remote` needs to find it."""
        return {"endpoint": self.endpoint, "region": "us-east-1"}

    def keys(self, part=""):
        """Return the keys that contain this, sorted."""
        return sorted(key for key in self.objects if part in key)

    def sent(self, method, part=""):
        """Return how many such requests there were."""
        return sum(m == method and part in path for m, path in self.log)

    def close(self):
        """Stop it."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def handle(self):
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _run(self):
        parts = urlsplit(self.path)
        self.key, self.query = (
            unquote(parts.path)[1:],
            parse_qs(parts.query, keep_blank_values=True),
        )
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        world = self.world
        with world.lock:
            world.log.append((self.command, self.path))
            self.wrong = world.fault(self)
        if isinstance(self.wrong, int):
            return self._reply(self.wrong, b"")
        if self.wrong == "stall":
            time.sleep(1)
            self.close_connection = True
            return None
        return getattr(self, "_" + self.command.lower())()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _run  # noqa: N815

    def _put(self):
        world = self.world
        if "partNumber" in self.query:
            number = int(self.query["partNumber"][0])
            world.parts[self.query["uploadId"][0], number] = self.body
            return self._reply(200, b"", self.body)
        if self.headers.get("If-None-Match") == "*" and world.creates != "ignored":
            if world.creates != "right":
                return self._reply(world.creates, b"")
            if self.key in world.objects:
                return self._reply(412, b"")
        world.objects[self.key] = self.body
        return self._reply(200, b"", self.body)

    def _post(self):
        world = self.world
        if "uploads" in self.query:
            number = f"upload{len(world.log)}"
            text = f"<UploadId>{number}</UploadId>"
            return self._xml("InitiateMultipartUploadResult", text)
        mine = sorted(k for k in world.parts if k[0] == self.query["uploadId"][0])
        world.objects[self.key] = b"".join(world.parts.pop(k) for k in mine)
        return self._xml("CompleteMultipartUploadResult", "<ETag>x</ETag>")

    def _delete(self):
        if "uploadId" not in self.query:  # which ends an upload that failed
            raise AssertionError("nothing is ever deleted")
        return self._reply(204, b"")

    def _head(self):
        self._get()

    def _get(self):
        if "list-type" in self.query:
            return self._list()
        data = self.world.objects.get(self.key)
        if data is None:
            return self._reply(404, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted is None or not self.world.has_ranges:
            return self._reply(200, data, data)
        begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        if begin >= len(data):
            return self._reply(416, b"")
        span = f"bytes {begin}-{end - 1}/{len(data)}"
        return self._reply(206, data[begin:end], data, {"Content-Range": span})

    def _list(self):
        if not self.world.can_list:
            return self._reply(403, b"")
        bucket = self.key.partition("/")[0]
        prefix = f"{bucket}/" + self.query.get("prefix", [""])[0]
        after = self.query.get("continuation-token", [""])[0]
        found = [
            k for k in sorted(self.world.objects) if k.startswith(prefix) and k > after
        ]
        if "delimiter" in self.query:
            tails = {k.removeprefix(prefix).partition("/")[0] for k in found}
            text = "".join(
                f"<CommonPrefixes><Prefix>{escape((prefix + tail).partition('/')[2])}/"
                f"</Prefix></CommonPrefixes>"
                for tail in sorted(tails)
            )
            text += "<IsTruncated>false</IsTruncated>"
            return self._xml("ListBucketResult", text)
        page, rest = found[:PAGE], found[PAGE:]
        text = "".join(
            f"<Contents><Key>{escape(key.partition('/')[2])}</Key>"
            f"<LastModified>2015-10-21T07:28:00.000Z</LastModified>"
            f'<ETag>"x"</ETag><Size>{len(self.world.objects[key])}</Size></Contents>'
            for key in page
        )
        if rest:
            text += f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
        text += f"<IsTruncated>{str(bool(rest)).lower()}</IsTruncated>"
        return self._xml("ListBucketResult", text)

    def _xml(self, name, text):
        body = f'<?xml version="1.0" encoding="UTF-8"?><{name}>{text}</{name}>'
        return self._reply(200, body.encode())

    def _reply(self, status, body, data=None, headers=()):
        if self.wrong == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        if data is not None:
            self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
            self.send_header("Last-Modified", OBJECT)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.wrong == "flip" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if self.wrong == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

"""A server of your own in the standard library: POST a prompt, get what follows.

MLX's arrays belong to the thread that made them, so one thread generates: here the
server's only one. Usage: python small_server.py MODEL [PORT]
"""

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from kvstore.blas import load_openblas

load_openblas()

from mlx_lm import load, stream_generate
from mlx_lm.models.cache import make_prompt_cache

import kvstore


def make_server(path: str, port: int) -> HTTPServer:
    """Return a server that keeps its prompt caches on disk."""
    model, tokenizer = load(path)
    tier = kvstore.tier(model, model_path=path)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            tokens = tokenizer.encode(self.rfile.read(size).decode())
            prompt_cache, rest = tier.fetch(tokens)
            prompt_cache = prompt_cache or make_prompt_cache(model)
            responses = stream_generate(
                model, tokenizer, rest, max_tokens=20, prompt_cache=prompt_cache
            )
            text = "".join(response.text for response in responses)
            # The rows of the prompt; what was generated is cut off.
            tier.put(tokens, prompt_cache, upto=len(tokens))
            self.send_response(200)
            self.send_header("X-From-Disk", str(len(tokens) - len(rest)))
            self.end_headers()
            self.wfile.write(text.encode())

    class Server(HTTPServer):
        def server_close(self) -> None:
            super().server_close()
            tier.close()  # writes what waits

    return Server(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    with make_server(sys.argv[1], int((*sys.argv, "8080")[2])) as server:
        server.serve_forever()

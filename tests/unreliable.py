"""A way to a server on which connections are lost."""

import contextlib
import random
import socket
import struct
import threading


class UnreliableProxy:
    """Passes TCP connections on to a server on this machine, and resets some: before an answer, or in the midst of it.

    Args:
        port: of the server.
        seed: of which connections are dropped, and after how many bytes of the answers.
        longest: bytes of answers that a connection lives for at most.
        outage: after the second request that names `outage_at`, so many connections one after the other are dropped.
    """

    def __init__(self, port: int, seed: int, longest: int = 30_000, outage: int = 0, outage_at: bytes = b".mds"):
        self._server, self._random, self._longest = port, random.Random(seed), longest
        self._outage, self._outage_at, self._named, self._out = outage, outage_at, 0, 0
        self._lock = threading.Lock()
        self.before, self.within, self.refused = 0, 0, 0
        """Connections that were dropped before an answer, in the midst of one, and during the outage."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with self._lock:
            out, self._out = self._out > 0, max(self._out - 1, 0)
            self.refused += out
            allowed = 0 if self._random.random() < 0.2 else self._random.randint(1, self._longest)
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._server)) as server:
            if not out:
                requests = threading.Thread(target=self._requests, args=(client, server), daemon=True)
                requests.start()
                left = allowed
                while left and (answer := server.recv(min(left, 65536))):
                    client.sendall(answer)
                    left -= len(answer)
                if left:
                    return  # the server, or the client, has closed it
                if not allowed:
                    server.recv(1)  # the request has come
                self.before, self.within = self.before + (allowed == 0), self.within + (allowed > 0)
                client.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it, which would keep it open
                requests.join()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while request := client.recv(65536):
                with self._lock:
                    self._named += self._outage_at in request
                    if self._outage and self._named >= 2:
                        self._out, self._outage = self._outage, 0
                server.sendall(request)
            server.shutdown(socket.SHUT_WR)

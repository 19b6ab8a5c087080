"""A meeting of processes: each says one JSON value and hears all of them, in the order of ranks; a barrier as well."""

import json
import socket
import threading
from typing import Any


class Host:
    """The coordinator: hears `num_ranks` connections, then answers round after round until they are gone."""

    def __init__(self, num_ranks: int, address: tuple[str, int] = ("127.0.0.1", 0)):
        self._listener = socket.create_server(address)
        self.address = self._listener.getsockname()[:2]
        self._num_ranks = num_ranks
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        files = {}
        while len(files) < self._num_ranks:
            connection, _ = self._listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            file = connection.makefile("rw")
            files[int(file.readline())] = file
        while True:
            lines = {rank: file.readline() for rank, file in files.items()}
            if not all(lines.values()):
                for file in files.values():  # one is gone: the others hear it and end
                    file.close()
                return
            answer = "[" + ",".join(lines[rank].strip() for rank in sorted(lines)) + "]\n"
            for file in files.values():
                file.write(answer)
                file.flush()


class Guest:
    """One rank's way to the others.

    Args:
      rank: of this process.
      address: the host's.
      timeout_s: of one round.
    """

    def __init__(self, rank: int, address: tuple[str, int], timeout_s: float = 300.0):
        connection = socket.create_connection(address, timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = connection.makefile("rw")
        self._send(str(rank))

    def gather(self, value: Any = None) -> list[Any]:
        """Everybody's value, by rank.

        Raises:
          ConnectionError: a rank is gone.
        """
        self._send(json.dumps(value))
        line = self._file.readline()
        if not line:
            raise ConnectionError("the meeting is over: a process has ended")
        return json.loads(line)

    def _send(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

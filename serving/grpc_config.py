"""GrpcConfig: where the gRPC server listens and what bounds it. No JAX."""

import dataclasses
import ipaddress
import pathlib

import grpc


@dataclasses.dataclass(frozen=True, slots=True)
class GrpcConfig:
    """Where the gRPC server listens, and its bounds.

    Args:
      host: a name or an address; loopback by default, because there is no authentication.
      port: 0 lets the system choose.
      tls_cert, tls_key: PEM files, both or neither.
      max_message_bytes: of a request or a response.
      max_calls: calls at once, health checks included; one more is refused with RESOURCE_EXHAUSTED.
      max_buffered_outputs: how far a client may lag before its request is aborted.
      write_timeout_s: longest that one chunk may wait for a client to read before its request is aborted.
      max_connection_s: a connection older than this is closed once its calls have ended, or 600 s later anyway.
      max_silence_s: longest that a request may wait for its next output, the queue included.
      tokenize_timeout_s: longest that a prompt may take to become token ids.
      grace_s: how long a drain lets running requests go on.

    Raises:
      ValueError: a value out of range, or one TLS file without the other.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    tls_cert: str | None = None
    tls_key: str | None = None
    max_message_bytes: int = 4 * 1024 * 1024
    max_calls: int = 2048
    max_buffered_outputs: int = 256
    write_timeout_s: float = 30.0
    max_connection_s: float = 3600.0
    max_silence_s: float = 600.0
    tokenize_timeout_s: float = 30.0
    grace_s: float = 30.0

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: expected 0 to 65535, got {self.port}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls: expected both a certificate and a key, got one of them")
        for field in dataclasses.fields(self):
            is_bound = field.name.startswith("max_") or field.name.endswith("_timeout_s")
            if is_bound and not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name}: expected more than 0, got {getattr(self, field.name)}")
        if not self.grace_s >= 0:
            raise ValueError(f"grace_s: expected at least 0, got {self.grace_s}")

    @property
    def address(self) -> str:
        """HOST:PORT as gRPC takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def warning(self) -> str | None:
        """What to tell whoever opens this server to others without TLS."""
        if self.tls_cert is not None or _is_loopback(self.host):
            return None
        return (
            f"warning: {self.host} is not loopback: anyone who reaches it can use the model, and prompts and answers "
            "travel unencrypted. Use --tls-cert and --tls-key, or a proxy that authenticates."
        )

    def credentials(self) -> grpc.ServerCredentials | None:
        """TLS credentials from the files; None without.

        Raises:
          FileNotFoundError: a file is not there.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        key, cert = pathlib.Path(self.tls_key).read_bytes(), pathlib.Path(self.tls_cert).read_bytes()
        return grpc.ssl_server_credentials([(key, cert)])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

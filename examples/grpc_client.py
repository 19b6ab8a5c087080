"""Asks a running server: `jmoe serve MODEL` in one terminal, then this in another. Imports no JAX.

    python examples/grpc_client.py 127.0.0.1:50051 "Why is the sky blue?"
"""

import sys

from jmoe import SamplingParams
from jmoe.serving.errors import QueueFullError
from jmoe.serving.grpc_client import Client


def main() -> None:
    address, question = sys.argv[1], sys.argv[2]
    with Client(address, timeout_s=120) as client:
        info = client.model_info()
        print(f"{info.name}: attention on {info.attention}, experts on {info.expert}")
        params = SamplingParams(max_tokens=32)
        try:
            with client.stream([{"role": "user", "content": question}], params) as outputs:
                for output in outputs:  # leaving this loop early cancels the request and frees its pages
                    print(output.text, end="", flush=True)
            print()
        except QueueFullError as error:
            print(f"the server is full, try again later: {error}")


if __name__ == "__main__":
    main()

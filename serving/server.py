"""serve() and Server: a model on two meshes behind four verbs: generate, stream, abort, close. No JAX on import."""

import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from jmoe.cell_config import CellConfig
from jmoe.serving.completions import Completion, OutputStream
from jmoe.serving.engine import Engine
from jmoe.serving.engine_config import EngineConfig
from jmoe.serving.errors import CellFailedError, QueueFullError
from jmoe.serving.executors.protocol import Executor, ProgramKey
from jmoe.serving.host_devices import default_mesh, detect_platform
from jmoe.serving.metrics import Metrics
from jmoe.serving.model_facts import describe
from jmoe.serving.process_options import ProcessOptions
from jmoe.serving.prompts import Prompt, is_one_prompt, prompt_ids
from jmoe.serving.requests import RequestOutput, SamplingParams
from jmoe.serving.sizes import CellSizes
from jmoe.serving.text.tokenizer import Tokenizer
from jmoe.serving.transport import choose_transport
from jmoe.sharding.mesh_config import MeshConfig

if TYPE_CHECKING:
    from jmoe.models.model import Model

TIMEOUT_S = 600.0
ExecutorKind = Literal["auto", "inline", "processes"]
Programs = Literal["greedy", "all", "none"]


class Server:
    """A running cell. Use it as a context manager, or `close` it.

    Args:
      executor: runs the programs; the server closes it.
      tokenizer: None serves token ids only.
      engine_config: of the engine.
      name: what clients are told the model is called.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        tokenizer: Tokenizer | None = None,
        engine_config: EngineConfig | None = None,
        name: str = "model",
    ):
        self.name = name
        self.tokenizer = tokenizer
        self.metrics = Metrics()
        self._executor = executor
        self._lock = threading.Lock()
        self._on_failure: list[Callable[[CellFailedError], None]] = []
        self._engine = Engine(executor, engine_config or EngineConfig(), tokenizer, on_failure=self._fail)
        self._engine.start()

    @property
    def cell(self) -> CellConfig:
        """The sizes that are served."""
        return self._executor.cell

    @property
    def failure(self) -> CellFailedError | None:
        """Why the cell failed; None while it lives."""
        return self._engine.failure

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]  # a str is a sequence of str; one prompt comes first
        self, prompts: Prompt, params: SamplingParams | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> Completion | list[Completion]:
        """Runs one prompt, or many at once, to the end.

        Args:
          prompts: text, token ids or messages (`[{"role": "user", "content": ...}]`, through the chat template); or a
            sequence of such prompts.
          params: for all prompts, or one for each; None is greedy.
          timeout_s: for all of them together; what still runs then is aborted.

        Returns:
          A Completion for one prompt, a list in the same order for a sequence.

        Raises:
          ValueError: a prompt or parameters that this cell can't serve.
          QueueFullError: the inbox is full of other callers' requests.
          EngineClosedError: the server is draining or closed.
          CellFailedError: the cell failed.
          TimeoutError: not done in time.
        """
        if is_one_prompt(prompts):
            if params is not None and not isinstance(params, SamplingParams):
                raise ValueError(f"params: expected SamplingParams for one prompt, got {type(params).__name__}")
            return self._generate([prompts], [params], timeout_s)[0]
        prompts = list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params: expected one, or one for each of {len(prompts)} prompts, got {len(params)}")
        return self._generate(prompts, params, timeout_s)

    def _generate(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams | None], timeout_s: float
    ) -> list[Completion]:
        """Keeps as many prompts in the queue as it takes, and gathers in order."""
        deadline = time.monotonic() + timeout_s
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        streams: list[OutputStream] = []
        done: list[Completion] = []
        try:
            while len(done) < len(ids):
                while len(streams) < len(ids):
                    try:
                        streams.append(self.stream(ids[len(streams)], params[len(streams)]))
                    except QueueFullError:
                        if len(streams) == len(done):  # none of ours runs: waiting for others has no bound
                            raise
                        break
                done.append(Completion.of(streams[len(done)].outputs_until(deadline)))
        finally:
            for stream in streams:
                stream.close()
        return done

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> OutputStream:
        """Starts a request and returns the iterator of its outputs, which has the `request_id`.

        Args:
          prompt: text, token ids or messages.
          params: None is greedy.
          request_id: unique among live requests; None makes one.
          timeout_s: longest wait for the next output.

        Raises:
          ValueError, QueueFullError, EngineClosedError, CellFailedError: as `generate` does.
        """
        ids = self.prompt_ids(prompt)
        params = params or SamplingParams()
        return OutputStream(
            lambda on_output: self.submit(ids, params, on_output, request_id), self._engine.abort, timeout_s
        )

    def prompt_ids(self, prompt: Prompt) -> Sequence[int]:
        """The token ids of a prompt in any of its forms; ValueError where it has none."""
        return prompt_ids(prompt, self.tokenizer, self.cell.max_len)

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        on_output: Callable[[RequestOutput], None],
        request_id: str | None = None,
    ) -> str:
        """Queues a request without waiting; `on_output` is called in the engine's thread. See `Engine.submit`."""
        try:
            return self._engine.submit(ids, params, self.metrics.watch(on_output), request_id)
        except QueueFullError:
            self.metrics.refused()
            raise

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its pages; one that is not there (any more) is no error."""
        self._engine.abort(request_id)

    def stats(self) -> dict[str, float]:
        """The engine's counters and the latencies of requests."""
        return {**self.metrics.snapshot(), **self._engine.stats()}

    def on_failure(self, callback: Callable[[CellFailedError], None]) -> None:
        """Calls back, once and from any thread, when the cell has failed; at once if it already has."""
        with self._lock:
            self._on_failure.append(callback)
            failure = self.failure
        if failure is not None:
            self._fail(failure)

    def _fail(self, failure: CellFailedError) -> None:
        with self._lock:
            callbacks, self._on_failure = self._on_failure, []
        for callback in callbacks:
            callback(failure)

    def drain(self, timeout_s: float) -> bool:
        """Takes no more requests and lets the running ones finish; False if some still run after `timeout_s`."""
        return self._engine.drain(timeout_s)

    def close(self) -> None:
        """Ends running requests and frees devices and processes. Safe to call twice and after a failure."""
        try:
            self._engine.close()
        finally:
            self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve(
    model: "str | pathlib.Path | Model",
    mesh_cfg: MeshConfig | None = None,
    *,
    executor: ExecutorKind = "auto",
    tokenizer: Tokenizer | str | pathlib.Path | None = None,
    programs: Programs = "greedy",
    max_waiting: int = 256,
    progress: Callable[[str], None] | None = None,
    sizes: CellSizes | None = None,
    processes: ProcessOptions | None = None,
    compile_cache: str = "auto",
    max_prefill_tokens: int | None = None,
    **size_options: Any,
) -> Server:
    """Serves a model with attention on one mesh and experts on another, or both on the same devices.

    Args:
      model: a Hugging Face checkpoint folder, or a live `jmoe.models.model.Model`.
      mesh_cfg: devices of each role and micro-batches, or `MeshConfig.colocate(N)`; None is the latter on a host
        with one GPU, else one attention and one expert device.
      executor: "inline" (both roles in this process), "processes" (a worker for each), or "auto": the latter on GPUs.
      tokenizer: of a live model, or its folder; a checkpoint brings its own.
      programs: which to compile now, rather than at their first use: "greedy", "all" (sampling too) or "none".
      max_waiting, max_prefill_tokens: bounds of the queue, and of prefill between two decode calls (`EngineConfig`).
      progress: gets a line for each step of starting up.
      sizes: shapes of the programs (`CellSizes`), or single ones by name: `rows=8, max_len=4096`.
      processes: where the workers are, and how long each thing may take (see `ProcessOptions`).
      compile_cache: where compiled programs are kept: "auto" ($JMOE_CACHE/compiled), "off" or a folder of this user.

    Returns:
      The running server.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: a model, mesh or sizes that don't fit one another, with the numbers.
      CellFailedError: the workers did not come up.
    """
    from jmoe.serving.executors.create import create_executor  # it may start JAX

    if sizes is not None and size_options:
        raise ValueError(f"sizes: expected either sizes= or single ones, got both ({', '.join(size_options)})")
    if programs not in ("greedy", "all", "none"):
        raise ValueError(f"programs: expected 'greedy', 'all' or 'none', got {programs!r}")
    say = progress or (lambda line: None)
    say("reading the model's configuration")
    config, text = describe(model, tokenizer)
    mesh = mesh_cfg or default_mesh()
    transport = choose_transport(mesh, detect_platform(), executor, processes)
    cell = (sizes or CellSizes(**size_options)).resolve(config, mesh, transport)
    forms = {"greedy": (False,), "all": (False, True), "none": ()}[programs]
    keys = [ProgramKey(kind, form) for form in forms for kind in ("prefill", "decode")]
    running = create_executor(model, cell, executor, say, keys, processes, compile_cache)
    try:
        name = pathlib.Path(model).resolve().name if isinstance(model, str | pathlib.Path) else config.family
        return Server(running, tokenizer=text, engine_config=EngineConfig(max_waiting, max_prefill_tokens), name=name)
    except BaseException:
        running.close()
        raise

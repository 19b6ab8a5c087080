"""Serves a model on two meshes in this process: two prompts at once, then one answer streamed as it comes.

    python examples/serve_and_stream.py                     # the demo model, fetched at the first run (93 MB)
    python examples/serve_and_stream.py ./Mixtral-8x7B      # any checkpoint folder
"""

import sys

import jmoe
from jmoe.checkpoints.demo_model import ensure_demo_model


def progress(fraction: float | None, message: str) -> None:
    done = "" if fraction is None else f" {100 * fraction:.0f}%"
    print(f"\r{message}{done}   ", end="", file=sys.stderr, flush=True)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else ensure_demo_model(progress)
    mesh = jmoe.MeshConfig(attention=1, expert=2, num_micro_batches=2)
    with jmoe.serve(model, mesh, rows=1, num_steps=4, chunk_len=32, max_len=512, progress=print) as server:
        prompts = ["The capital of France is", "The capital of Italy is"]
        completions = server.generate(prompts, jmoe.SamplingParams(max_tokens=4))
        for prompt, completion in zip(prompts, completions, strict=True):
            print(f"{prompt}{completion.text}".strip())

        question = [{"role": "user", "content": "Name three colours."}]  # through the model's chat template
        with server.stream(question, jmoe.SamplingParams(max_tokens=24)) as outputs:
            for output in outputs:
                print(output.text, end="", flush=True)
        print(f"\n{output.num_output_tokens} tokens, ended by {output.finish_reason}")


if __name__ == "__main__":
    main()
